"""Rows of an input file to prompts: what stands before the answer, whatever form the row has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.chat.messages import OWN_KEYS, Conversation, PlainText, Preference
from finetune.chat.render import prompt_ids
from finetune.chat.tokenizer import Tokenizer
from finetune.console import format_count, warn
from finetune.errors import ArgumentError, DataError, Fault
from finetune.rows.formats import parse_row
from finetune.rows.unread import check_media

MAX_FAULTS = 20  # faults of an input file that are named before the rest is only counted


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the engine.

    Attributes:
        shown: What goes under "prompt" in the output: the row's own text, or its messages.
        ids: Token ids.
        source: "file:line".
    """

    shown: str | list[dict[str, Any]]
    ids: list[int]
    source: str


@dataclass(frozen=True)
class PromptReader:
    """Turns rows into prompts.

    Attributes:
        raw: Take a text as it is, without the chat template.
        system: System message of rows that have none.
        context: Most tokens of prompt and answer together.
    """

    tokenizer: Tokenizer
    context: int
    raw: bool = False
    system: str | None = None

    def read(self, row: Any, source: str) -> Prompt:
        """Make a prompt of one row.

        Args:
            row: {"prompt": text or messages, "tools"?}, or a row of any training format, whose last answer is left out.

        Raises:
            DataError: the row has no such form, or does not fit the context.
        """
        if not isinstance(row, dict):
            raise DataError("the line is not an object", where=source, fix='Write {"prompt": "..."}.')
        check_characters(row, source)
        shown, ids = self._raw(row, source) if self.raw else self._rendered(row, source)
        if not ids:
            raise DataError("the prompt is empty", where=source, fix="Give it a text.")
        if len(ids) >= self.context:
            raise DataError(
                f"the prompt has {len(ids)} tokens, and the model's context holds {self.context} with the answer",
                where=source,
                fix="Shorten the prompt.",
            )
        return Prompt(shown, ids, source)

    def _raw(self, row: dict[str, Any], source: str) -> tuple[str, list[int]]:
        if not isinstance(row.get("prompt"), str):
            raise DataError("--raw needs a text", where=f"{source}, key prompt", fix='Write {"prompt": "..."}.')
        return row["prompt"], self.tokenizer.encode(row["prompt"])

    def _rendered(self, row: dict[str, Any], source: str) -> tuple[str | list[dict[str, Any]], list[int]]:
        conversation = self._with_system(to_conversation(row, source))
        shown = row["prompt"] if isinstance(row.get("prompt"), str) else _plain(conversation)
        return shown, prompt_ids(self.tokenizer, conversation)

    def file(self, path: Path, skip_bad: bool = False) -> Iterator[Prompt]:
        """The prompts of a JSONL file, one line at a time; empty lines are passed over.

        Args:
            skip_bad: Pass over bad lines too.

        Raises:
            DataError: at the first bad line, naming it.
        """
        for source, line in _lines(path):
            try:
                yield self.read(_parse(line, source), source)
            except DataError:
                if not skip_bad:
                    raise

    def check(self, path: Path, skip_bad: bool = False) -> int:
        """Read a whole file without keeping it; returns its number of prompts.

        Args:
            skip_bad: Only say which lines are bad.

        Raises:
            DataError: naming every bad line, up to MAX_FAULTS of them; with `skip_bad`, only if no line is good.
        """
        count, bad = 0, 0
        faults: list[Fault] = []
        for source, line in _lines(path):
            try:
                self.read(_parse(line, source), source)
                count += 1
            except DataError as error:
                bad += 1
                faults += error.faults[: MAX_FAULTS - len(faults)]
        if bad > len(faults):
            faults.append(Fault(f"and {bad - len(faults)} more bad lines", where=str(path)))
        if faults and (count == 0 or not skip_bad):
            raise DataError.of(faults)
        if faults:
            warn("\n  ".join([f"{format_count(bad, 'bad row')} skipped, {count:,} are left", *map(str, faults)]))
        if not count:
            raise DataError("the file holds no rows", where=str(path), fix='Write one {"prompt": "..."} per line.')
        return count

    def _with_system(self, conversation: Conversation) -> Conversation:
        messages = conversation.messages
        if self.system is None or messages[0]["role"] == "system":
            return conversation
        return Conversation(
            [{"role": "system", "content": self.system}, *messages], conversation.tools, conversation.source
        )


# Keys of a question that may come without its answer, and where the answer would stand.
_ANSWERS = {"instruction": "output", "query": "response"}


def _asks(row: dict[str, Any], key: str) -> bool:
    return key in row and not {"chosen", "rejected", "rejected_response", "messages", "conversations"} & row.keys()


def to_conversation(row: dict[str, Any], source: str) -> Conversation:
    """What stands before the answer in a row of any form.

    Raises:
        DataError: the row has no known form, is about pictures or sounds, or nothing is left to answer.
    """
    check_media(row, source)
    if "prompt" in row:
        row = _prompt_as_messages(row, source)
    else:
        row = {**row, **{answer: row.get(answer) or "" for key, answer in _ANSWERS.items() if _asks(row, key)}}
    parsed = parse_row(row, "auto", source)
    if isinstance(parsed, PlainText):
        fix = 'Write {"prompt": "..."}, with --raw to have it gone on from as it is.'
        raise DataError("a text that nobody asks for an answer to", where=source, fix=fix)
    conversation = parsed.prompt if isinstance(parsed, Preference) else parsed
    messages = list(conversation.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] != "system" for message in messages):
        raise DataError("there is no message to answer", where=source, fix="End with a user or tool message.")
    return Conversation(messages, conversation.tools, source)


def _prompt_as_messages(row: dict[str, Any], source: str) -> dict[str, Any]:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise DataError("it is neither a text nor messages", where=f"{source}, key prompt", fix="Write a text.")
    if isinstance(row.get("system"), str) and row["system"]:
        prompt = [{"role": "system", "content": row["system"]}, *prompt]
    return {"messages": prompt, "tools": row.get("tools")}


def check_characters(row: dict[str, Any], source: str) -> None:
    """JSON can write half of a character pair, which is no text and can neither be tokenized nor written back."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds half of a character pair (\\u{ord(error.object[error.start]):04x} alone)",
            where=source,
            fix="Write the character itself, or both halves of its \\u escape.",
        ) from error


def _plain(conversation: Conversation) -> list[dict[str, Any]]:
    return [{k: v for k, v in message.items() if k not in OWN_KEYS} for message in conversation.messages]


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise ArgumentError(
            f"the file cannot be read: {error.strerror}", where=str(path), fix="Give a JSONL file."
        ) from error


def _parse(line: bytes, source: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the line is not JSON: {error}", where=source, fix='Write {"prompt": "..."}.') from error
