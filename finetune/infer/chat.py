"""The `chat` command: a conversation in the terminal.

Answers are drawn as the model's generation_config.json says, at temperature 0.7 where it does not draw, so that another
answer can be had; they are printed as they come.
Everything but the answers goes to stderr, so that a piped conversation leaves nothing else on stdout. With `--compare`
two models hold the same conversation, each with its own answers: side by side where the terminal is wide, else one
after the other under their names.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from finetune.chat.messages import Conversation
from finetune.chat.render import prompt_ids
from finetune.console import console, say
from finetune.errors import ArgumentError, DataError, UserError, did_you_mean
from finetune.infer.open import AS_STORED, Held, Opened, open_model
from finetune.infer.sampling import DEFAULT_MAX_NEW_TOKENS, Sampling

if TYPE_CHECKING:
    from finetune.infer.engine import Delta

WIDE = 120  # columns from which two answers stand side by side
TEMPERATURE = 0.7  # of a model whose generation config is greedy, or says nothing


@dataclass
class Talk:
    """The state of a conversation.

    Attributes:
        name: What the model is called.
        messages: All messages so far, the system message first if there is one.
        answers: How many were asked for, those taken back included: with a seed, each answer has draws of its own.
    """

    opened: Opened
    sampling: Sampling
    name: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    answers: int = 0

    def prompt(self) -> tuple[list[int], int]:
        """Ids of the conversation with the header of the answer, and how many old turns were left out to make room.

        Oldest turns go first, whole; the system message stays. A quarter of the context is kept for the answer.

        Raises:
            DataError: even the last message alone does not fit.
        """
        room = self.opened.engine.context - min(self.sampling.max_new_tokens, self.opened.engine.context // 4)
        system = [message for message in self.messages[:1] if message["role"] == "system"]
        turns = self.messages[len(system) :]
        questions = [i for i, message in enumerate(turns) if message["role"] == "user"]
        for dropped, start in enumerate(questions):
            ids = prompt_ids(self.opened.tokenizer, Conversation(system + turns[start:], None, "chat"))
            if len(ids) <= room:
                return ids, dropped
        raise DataError(
            f"the message is too long: {len(ids)} tokens, and there is room for {room}", fix="Shorten it, or /reset."
        )

    def answer(self) -> Generator[Delta, None, None]:
        """Stream the answer to the last message."""
        ids, dropped = self.prompt()
        if dropped:
            say(f"The {dropped} oldest turns no longer fit the model's context and are left out.", style="yellow")
        sampling = self.sampling
        if sampling.seed is not None:
            seed = np.random.SeedSequence([sampling.seed, self.answers]).generate_state(1)[0]
            sampling = replace(sampling, seed=int(seed))
        self.answers += 1
        return self.opened.engine.stream(ids, sampling)

    def ask(self, text: str) -> Generator[Delta, None, None]:
        """Stream the answer to a new message. Where reading stops, what was said so far is the answer.

        A message that cannot be answered, or whose answer was stopped before it began, is taken back.
        """
        self.messages.append({"role": "user", "content": text})
        said, end = "", None
        try:
            for delta in self.answer():
                said += delta.text
                end = delta.output
                yield delta
        finally:
            if said or end is not None:
                self.messages.append({"role": "assistant", "content": said})
            else:
                self.messages.pop()

    def undo(self) -> bool:
        """Take back the last question and what followed it."""
        questions = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not questions:
            return False
        del self.messages[questions[-1] :]
        return True

    def reset(self, system: str | None = None) -> None:
        """Start over, with another system message if one is given ("" for none)."""
        kept = [message for message in self.messages[:1] if message["role"] == "system"]
        if system is not None:
            kept = [{"role": "system", "content": system}] if system else []
        self.messages = kept

    def save(self, path: Path) -> None:
        """Append the conversation, up to its last answer, as a row of messages form."""
        row = list(self.messages)
        while row and row[-1]["role"] != "assistant":
            row.pop()
        if not row:
            raise DataError("there is no answer to save yet")
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": row}, ensure_ascii=False) + "\n")


def chat(
    model: str,
    *,
    system: str | None = None,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    compare: str | None = None,
    held: Held = AS_STORED,
) -> None:
    """Talk with a model until /exit or the end of the input.

    Args:
        compare: A second model, whose answers are shown first.
        temperature, top_p, top_k: Instead of the model's own settings; temperature 0 is greedy.
        held: How the weights of both are held in memory.

    Raises:
        UserError: the model cannot be opened or has no chat template.
    """
    asked = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    opened = open_model(model, held, pack=True)
    opened.tokenizer.template_for(None)
    sides = [(model, opened)]
    if compare is not None:
        sides.insert(0, (compare, _with_template(open_model(compare, held, pack=True), opened)))
    talks = []
    for name, side in sides:
        sampling = _sampling(side.generation_config, asked, max_new_tokens=max_new_tokens, seed=seed)
        talks.append(Talk(side, sampling, name))
        talks[-1].reset(system or "")
    if sys.stdin.isatty():
        say(f"Talking with {' and '.join(talk.name for talk in talks)}.", style="dim")
        say(f"{_manner(talks)} /help shows what can be done.", style="dim")
    for line in _lines():
        try:
            if not _handle(talks, line):
                return
        except (UserError, OSError) as error:
            say(str(error), style="red")


def _sampling(config: dict[str, Any], asked: dict[str, Any], **others: Any) -> Sampling:
    """The model's own settings under those asked for. A model that would always give the same answer is drawn from."""
    if not config.get("do_sample") and asked["temperature"] is None:
        asked = {**asked, "temperature": TEMPERATURE}
    return Sampling.under_model(config, asked, **others)


def _manner(talks: list[Talk]) -> str:
    """How answers come about, in one sentence."""
    manners = list(dict.fromkeys(_settings(talk.sampling) for talk in talks))
    return f"Answers are drawn at {', and at '.join(manners)}."


def _settings(sampling: Sampling) -> str:
    if sampling.temperature == 0.0:
        return "temperature 0 (always the likeliest token)"
    parts = [
        f"temperature {sampling.temperature:g}",
        f"top-p {sampling.top_p:g}" if sampling.top_p < 1 else "",
        f"top-k {sampling.top_k}" if sampling.top_k else "",
        f"seed {sampling.seed}" if sampling.seed is not None else "",
    ]
    return ", ".join(filter(None, parts))


def _lines() -> Iterator[str]:
    """What the user writes, stripped, without empty lines. A Ctrl-C at the prompt only clears it."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  editing and history for input()
    while True:
        try:
            line = input("\001\033[1m\002> \001\033[0m\002") if terminal else sys.stdin.readline()
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            continue
        except EOFError:
            return
        if not terminal and not line:
            return
        if line.strip():
            yield line.strip()


def _with_template(base: Opened, tuned: Opened) -> Opened:
    """A base model may know no chats; it then reads them as the tuned one does."""
    if base.tokenizer.chat_template is not None:
        return base
    say("The second model has no chat template: it gets the first one's.", style="dim")
    return replace(base, tokenizer=tuned.tokenizer)


def _handle(talks: list[Talk], line: str) -> bool:
    """Do what one line asks for, in every talk; False ends the conversation."""
    name, _, rest = line.partition(" ")
    if not line.startswith("/"):
        _ask(talks, line)
    elif name == "/exit":
        return False
    elif name in COMMANDS:
        COMMANDS[name].do(talks, rest.strip())
    else:
        say(f"There is no {name}. {did_you_mean(name, COMMANDS, '/help shows what there is.')}", style="red")
    return True


def _ask(talks: list[Talk], text: str) -> None:
    """Show every talk's answer to a message. If one of them cannot take it, none keeps it."""
    before = [len(talk.messages) for talk in talks]
    try:
        if len(talks) > 1 and sys.stdout.isatty() and console.width >= WIDE:
            _side_by_side(talks, text)
            return
        for talk in talks:
            if len(talks) > 1:
                sys.stdout.write(f"[{talk.name}]\n")
            _stream(talk, text)
    except DataError:
        for talk, length in zip(talks, before):
            del talk.messages[length:]
        raise


def _stream(talk: Talk, text: str) -> None:
    end = None
    try:
        with closing(talk.ask(text)) as deltas:
            for delta in deltas:
                end = delta.output
                sys.stdout.write(delta.text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        say("(stopped)", style="dim")
    sys.stdout.write("\n")
    sys.stdout.flush()
    if end is not None and end.finish_reason == "length":
        say("(cut at the greatest length)", style="dim")


def _side_by_side(talks: list[Talk], text: str) -> None:
    """A column for each talk, all growing at once: a token here, a token there."""
    answers = [Text() for _ in talks]
    table = Table(expand=True)
    for talk in talks:
        table.add_column(Text(talk.name), ratio=1, overflow="fold")
    table.add_row(*answers)
    streams = [talk.ask(text) for talk in talks]
    try:
        with Live(table, console=Console(file=sys.stdout), refresh_per_second=8, vertical_overflow="visible"):
            for deltas in zip_longest(*streams):
                for answer, delta in zip(answers, deltas):
                    if delta is not None:
                        answer.append(delta.text)
                        if delta.output is not None and delta.output.finish_reason == "length":
                            answer.append(" (cut at the greatest length)", style="dim")
    except KeyboardInterrupt:
        say("(stopped)", style="dim")
    finally:
        for stream in streams:
            stream.close()


def _system(talks: list[Talk], text: str) -> None:
    for talk in talks:
        talk.reset(text)
    say("Started over with this system message." if text else "Started over without one.", style="dim")


def _temperature(talks: list[Talk], text: str) -> None:
    if text:
        try:
            temperature = float(text)
        except ValueError as error:
            raise ArgumentError(
                f"{text!r} is not a number", where="/temperature", fix="Try 0.7; 0 is greedy."
            ) from error
        _set(talks, temperature=temperature)
    say(_manner(talks), style="dim")


def _seed(talks: list[Talk], text: str) -> None:
    if text and not (text.isascii() and text.isdigit()):
        raise ArgumentError(
            f"{text!r} is not a whole number", where="/seed", fix="Try 1; without a number draws are free again."
        )
    _set(talks, seed=int(text) if text else None)
    for talk in talks:
        talk.answers = 0
    say(_manner(talks), style="dim")


def _set(talks: list[Talk], **settings: Any) -> None:
    samplings = [replace(talk.sampling, **settings) for talk in talks]  # all are valid before one is taken
    for talk, sampling in zip(talks, samplings):
        talk.sampling = sampling


def _undo(talks: list[Talk], _: str) -> None:
    undone = [talk.undo() for talk in talks]
    say("Took back the last question." if any(undone) else "There is nothing to take back.", style="dim")


def _retry(talks: list[Talk], _: str) -> None:
    question = next((m["content"] for m in reversed(talks[-1].messages) if m["role"] == "user"), None)
    if question is None:
        say("There is nothing to answer again.", style="dim")
        return
    if all(talk.sampling.temperature == 0.0 for talk in talks):
        say("At temperature 0 the answer is the same again; /temperature 0.7 draws another.", style="dim")
    for talk in talks:
        talk.undo()
    _ask(talks, question)


def _reset(talks: list[Talk], _: str) -> None:
    for talk in talks:
        talk.reset()
    say("Started over.", style="dim")


def _save(talks: list[Talk], name: str) -> None:
    if not name:
        raise ArgumentError("no file is named", where="/save", fix="Name a file: /save FILE")
    path = Path(os.path.expanduser(name))
    talks[-1].save(path)
    say(f"Appended to {path}.", style="dim")


def _help(talks: list[Talk], _: str) -> None:
    for name, command in COMMANDS.items():
        say(f"{f'{name} {command.takes}':<16}{command.help}")
    say(f"{'/exit':<16}leave (Ctrl-D too); Ctrl-C stops an answer")


@dataclass(frozen=True)
class Command:
    """A line of the chat that starts with a slash.

    Attributes:
        takes: What may stand behind its name, in capitals; "" for nothing.
        help: What it does.
        do: Does it, given the talks and what stood behind the name.
    """

    takes: str
    help: str
    do: Callable[[list[Talk], str], None]


COMMANDS = {
    "/system": Command("TEXT", "start over with this system message (without TEXT: with none)", _system),
    "/temperature": Command("T", "draw at temperature T from now on; 0 takes the likeliest token", _temperature),
    "/seed": Command("N", "make draws repeatable from here on (without N: no longer)", _seed),
    "/undo": Command("", "take back the last question and its answer", _undo),
    "/retry": Command("", "answer the last question again", _retry),
    "/reset": Command("", "start over, keeping the system message", _reset),
    "/save": Command("FILE", "add the conversation to FILE as a row to train on (MODEL's)", _save),
    "/help": Command("", "show this", _help),
}
