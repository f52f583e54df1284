"""A block of rows to tokens: read, check, render, tokenize, cut. What every process does that prepares data.

The result depends on the block, the settings and the form of the source's rows alone, so that it is the same in
whichever process and order blocks are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from finetune.chat.example import IGNORE, Example, PairExample, shared_prompt_length
from finetune.chat.messages import KNOWN_KEYS, REASONING_KEYS, Conversation, PlainText, Preference
from finetune.chat.render import (
    Rendered,
    RenderedPair,
    encode_pairs,
    encode_rendered,
    render_conversation,
    render_plain,
    render_preference,
)
from finetune.chat.tokenizer import Tokenizer
from finetune.errors import DataError, Fault, did_you_mean
from finetune.methods import CONVERSATION, METHODS, PREFERENCE, RowKind, methods_on
from finetune.rows.block import Block
from finetune.rows.formats import FORMS, Parsed, detect_format, parse_row
from finetune.rows.sources import rows_of
from finetune.rows.table import CUT, PROMPT_CUT, RESPONSE_CUT, Part
from finetune.rows.turns import keys_of
from finetune.rows.unread import unread_keys

MAX_FAULTS = 10
MAX_ALIKE = 3
MAX_NAMED = 5
_BATCH = 1024
_MAX_KEY_SETS = 4  # of a block that are told of with their keys


class DataSettings(Protocol):
    """What is needed of the recipe's data section."""

    @property
    def max_length(self) -> int: ...

    @property
    def overlong(self) -> str: ...

    @property
    def train_on(self) -> str: ...


@dataclass(frozen=True)
class Settings:
    """What becomes of a row, beside the tokenizer: `DataSettings`, the method, one of METHODS, and how many tokens the
    model has embeddings for; None where that is not known."""

    method: str
    max_length: int
    overlong: str
    train_on: str
    vocab_size: int | None = None

    @classmethod
    def of(cls, data: DataSettings, method: str, vocab_size: int | None = None) -> Settings:
        """Take what is needed of the recipe."""
        return cls(method, data.max_length, data.overlong, data.train_on, vocab_size)

    @property
    def kind(self) -> RowKind:
        """What rows must be."""
        return METHODS[self.method].rows


@dataclass(frozen=True)
class Task:
    """A block to be done.

    Attributes:
        block: The rows.
        source, file: Numbers of the source and of the file in the order in which they are read.
        name: The file's name.
        format: As the source says: `auto` or a form.
        columns: The form's keys that the source's columns stand for, key: column.
        form: The form of the rows before, `auto` where it is not known.
        limit: Take so many rows of the block, the first ones; None takes all.
        keep: Stop once so many rows are kept.
        share: (r, n): take every n-th row of the block, from the r-th on.
        check_only: Find faults, make no tokens.
    """

    block: Block
    source: int
    file: int
    name: str
    format: str
    columns: dict[str, str] = field(default_factory=dict)
    form: str = "auto"
    limit: int | None = None
    keep: int | None = None
    share: tuple[int, int] = (0, 1)
    check_only: bool = False


@dataclass
class Faults:
    """Faults of rows in order: all are counted, the first `MAX_FAULTS` kept, of those that say the same `MAX_ALIKE`.

    Attributes:
        count: All of them.
        first: Those that are kept.
        more: How many others say the same as some that are kept, by what they say.
    """

    count: int = 0
    first: list[Fault] = field(default_factory=list)
    more: dict[tuple[str, str | None], int] = field(default_factory=dict)

    def add(self, faults: Sequence[Fault]) -> None:
        """Note what is wrong with a row or a file."""
        for fault in faults:
            self.count += 1
            kind, alike = (fault.what, fault.fix), self._alike(fault.what, fault.fix)
            if alike < MAX_ALIKE and len(self.first) < MAX_FAULTS:
                self.first.append(fault)
            elif alike:
                self.more[kind] = self.more.get(kind, 0) + 1

    def join(self, others: Faults) -> None:
        """Note the faults of rows behind these."""
        self.add(others.first)
        self.count += others.count - len(others.first)
        for (what, fix), count in others.more.items():
            if self._alike(what, fix):
                self.more[what, fix] = self.more.get((what, fix), 0) + count

    def _alike(self, what: str, fix: str | None) -> int:
        return sum((fault.what, fault.fix) == (what, fix) for fault in self.first)

    def error(self) -> DataError:
        """All of them: a line each, and one for a mistake that many rows share."""
        shown: dict[tuple[str, str | None, str | None], Fault] = {}
        for fault in self.first:
            others = self.more.get((fault.what, fault.fix), 0)
            if not others:
                shown[fault.what, fault.fix, fault.where] = fault
                continue
            count = others + self._alike(fault.what, fault.fix) - 1
            whole = Fault(fault.what, f"{fault.where} and {count:,} more", fault.fix)
            shown.setdefault((fault.what, fault.fix, None), whole)
        told = len(self.first) + sum(self.more.values())
        rest = f"{self.count:,} faults in all; these are the first." if self.count > told else None
        return DataError.of(list(shown.values()), rest)


@dataclass
class Named:
    """Rows under a heading, counted; the first `MAX_NAMED` as (file, row number)."""

    count: int = 0
    first: list[tuple[int, int]] = field(default_factory=list)

    def add(self, rows: Sequence[tuple[int, int]], count: int = 1) -> None:
        """Note `count` rows."""
        self.count += count
        self.first += rows[: MAX_NAMED - len(self.first)]


COUNTS = ("dropped", "unsupervised")


@dataclass
class Result:
    """What became of a block.

    Attributes:
        read: Rows read.
        form: The form of its last row; `auto` where no row has a known one.
        part: The rows that are kept; None where there are none, or for `check_only`.
        faults: Of rows that cannot be used.
        too_long: Of rows that are longer than max_length, with overlong: error.
        named: Rows to be told of, by heading.
        counts: Rows that were left out, by why; see `DataReport`.
        longest: Tokens of the longest row before cutting.
    """

    read: int = 0
    form: str = "auto"
    part: Part | None = None
    faults: Faults = field(default_factory=Faults)
    too_long: Faults = field(default_factory=Faults)
    named: dict[str, Named] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    longest: int = 0


class Encoder:
    """Does blocks, with one tokenizer and one set of settings."""

    def __init__(self, tokenizer: Tokenizer, settings: Settings):
        self.tokenizer, self.settings = tokenizer, settings

    def encode(self, task: Task) -> Result:
        """Do one block.

        Raises:
            CheckpointError: the tokenizer's chat template cannot be used.
        """
        return _Run(self.tokenizer, self.settings, task).result


class _Run:
    """One block in the making."""

    def __init__(self, tokenizer: Tokenizer, settings: Settings, task: Task):
        self.tokenizer, self.settings, self.task = tokenizer, settings, task
        self.result = Result(form=task.form)
        self.pair = settings.kind == PREFERENCE
        self.numbers: list[int] = []
        self.cut: dict[int, int] = {}  # by number, of rows that were cut
        self.key_sets: set[str] = set()  # that no form reads, and that were told of
        self.rows: list[Any] = []
        batch: list[tuple[int, Any]] = []
        size = _BATCH if task.keep is None else min(task.keep, _BATCH)
        first, step = task.share
        for index, (number, row) in enumerate(rows_of(task.block, task.name, task.columns)):
            if index == task.limit or (task.keep is not None and len(self.rows) >= task.keep):
                break
            if index % step != first:
                continue
            self.result.read += 1
            try:
                batch.append((number, self._rendered(row, number)))
            except DataError as error:
                self.result.faults.add(error.faults)
            if len(batch) == size:
                self._encode(batch)
                batch = []
        self._encode(batch)
        if self.rows:
            cut = [self.cut.get(number, 0) for number in self.numbers]
            self.result.part = Part.of(task.file, self.numbers, self.rows, cut)

    def _name(self, number: int) -> str:
        return f"{self.task.name}:{number}"

    def _note(self, heading: str, number: int) -> None:
        self.result.named.setdefault(heading, Named()).add([(self.task.file, number)])

    # -- checks ------------------------------------------------------------------------------------------------

    def _rendered(self, row: dict[str, Any] | Fault, number: int) -> Rendered | RenderedPair:
        if isinstance(row, Fault):
            raise DataError.of([row])
        name = self._name(number)
        try:
            self.result.form = form = self._form(row, name)
            parsed = parse_row(row, form, name)
        except DataError as error:
            raise self._lacking_column(row, name) or error from None
        self._check_kind(parsed)
        self._note_keys(unread_keys(row, FORMS[form], name), number)
        if not isinstance(parsed, Preference) and _has_empty_answer(parsed):
            self._note("with an empty answer, of which the end alone is trained on: {rows}.", number)
        if isinstance(parsed, PlainText):
            return render_plain(self.tokenizer, parsed, self.settings.train_on)
        return self._render_pair(parsed, number) if isinstance(parsed, Preference) else self._render(parsed, number)

    def _form(self, row: dict[str, Any], name: str) -> str:
        """The first row of an `auto` source decides; a row of another form is a fault, not a guess."""
        if self.task.format != "auto":
            return self.task.format
        found, form = detect_format(row, name, self.task.columns), self.result.form
        if form not in ("auto", found):
            raise DataError(
                f"a row of form {found}, but the rows before it are {form}",
                where=name,
                fix="Give files of different forms as separate sources.",
            )
        return found

    def _lacking_column(self, row: dict[str, Any], name: str) -> DataError | None:
        """What is wrong with a row where a column is missing that the source's `columns` names, and is needed."""
        for key, column in self.task.columns.items():
            if key not in row:
                what = f"there is no column {column}, which `columns` takes for {key}; the row has {keys_of(row)}"
                names = [str(other) for other in row]
                return DataError(what, where=name, fix=did_you_mean(column, names, "Correct columns in the recipe."))
        return None

    def _check_kind(self, parsed: Parsed) -> None:
        kind = PREFERENCE if isinstance(parsed, Preference) else CONVERSATION
        if kind != self.settings.kind:
            raise DataError(
                f"a {kind.name} row, but method {self.settings.method} trains on {self.settings.kind.plural}",
                where=parsed.source,
                fix=f"Use method: {' or '.join(methods_on(kind))}, or rows of the right form.",
            )

    def _render(self, conversation: Conversation, number: int) -> Rendered:
        self._note_unread(conversation, number)
        rendered = render_conversation(self.tokenizer, conversation, self.settings.train_on)
        self._note_surplus(rendered.surplus, number)
        return rendered

    def _note_keys(self, keys: str, number: int) -> None:
        """Tell of keys that the row's form does not read."""
        if not keys:
            return
        known = keys in self.key_sets or len(self.key_sets) < _MAX_KEY_SETS
        if known:
            self.key_sets.add(keys)
        which = f"keys that nothing reads ({_literal(keys)})" if known else "other keys that nothing reads"
        self._note(f"with {which}: {{rows}}.", number)

    def _render_pair(self, preference: Preference, number: int) -> RenderedPair:
        prompt, answers = preference.prompt, preference.chosen + preference.rejected
        self._note_unread(replace(prompt, messages=prompt.messages + answers), number)
        if [_said(m) for m in preference.chosen] == [_said(m) for m in preference.rejected]:
            self._note("with chosen equal to rejected, which teaches nothing: {rows}.", number)
        for side in ("chosen", "rejected"):
            if not any(_said(message).strip() for message in getattr(preference, side)):
                self._note(f"with an empty {side} answer: {{rows}}.", number)
        rendered = render_preference(self.tokenizer, preference)
        self._note_surplus(rendered.chosen.surplus or rendered.rejected.surplus, number)
        return rendered

    def _note_unread(self, conversation: Conversation, number: int) -> None:
        """Tell of what the template has no place for, and what is not text of the conversation."""
        template = self.tokenizer.template_for(conversation.tools)
        if conversation.tools and not template.knows_tools:
            self._note(
                "with tools that the model's chat template does not show: {rows}. "
                "Use a model whose template knows tools, such as Qwen2.5-Instruct.",
                number,
            )
        messages = conversation.messages
        unknown = {
            key for m in messages for key, held in m.items() if key not in KNOWN_KEYS and held not in ("", [], {})
        }
        for key in sorted(unknown):
            if not template.mentions(key):
                self._note(f"with a key {_literal(key)!r} in turns, which nothing reads: {{rows}}.", number)

    def _note_surplus(self, surplus: str, number: int) -> None:
        if surplus:
            self._note(
                f"without the {_literal(repr(surplus))} in which the chat template ends a generation prompt: {{rows}}. "
                "They are trained on as they are, from where the two part; generation goes on from the whole prompt.",
                number,
            )

    # -- tokens ------------------------------------------------------------------------------------------------

    def _encode(self, rendered: list[tuple[int, Any]]) -> None:
        # With a fault nothing will be trained; the rest is only checked.
        if self.task.check_only or self.result.faults.count or not rendered:
            return
        numbers, items = [number for number, _ in rendered], [item for _, item in rendered]
        kept: list[Example | None] | list[PairExample | None]
        if self.pair:
            pairs = encode_pairs(self.tokenizer, items)
            kept = [
                self._take_pair(pair, number) if self._is_known(pair, number) else None
                for pair, number in zip(pairs, numbers, strict=True)
            ]
        else:
            examples = encode_rendered(self.tokenizer, items)
            kept = [
                self._take(example, number) if self._is_known(example, number) else None
                for example, number in zip(examples, numbers, strict=True)
            ]
        self.rows += [row for row in kept if row is not None]
        self.numbers += [number for row, number in zip(kept, numbers) if row is not None]

    def _is_known(self, row: Example | PairExample, number: int) -> bool:
        """Note a token of the row that the model has no embedding for."""
        fault = self._without_embedding(row, number)
        if fault is not None:
            self.result.faults.add([fault])
        return fault is None

    def _without_embedding(self, row: Example | PairExample, number: int) -> Fault | None:
        """A token that was added to the tokenizer, and the model's embeddings were not resized."""
        sides = (row.chosen, row.rejected) if isinstance(row, PairExample) else (row,)
        largest = max(int(side.input_ids.max(initial=0)) for side in sides)
        if self.settings.vocab_size is None or largest < self.settings.vocab_size:
            return None
        what, fix = self.tokenizer.beyond(largest, self.settings.vocab_size)
        return Fault(what, self._name(number), fix)

    def _take(self, example: Example, number: int) -> Example | None:
        limit, length = self.settings.max_length, len(example.input_ids)
        self.result.longest = max(self.result.longest, length)
        if not _predicted(example):
            self._leave_out("left out for having no supervised token: {rows}.", number)
            return None
        if length <= limit:
            return example
        if not self._may_cut(length, number):
            return None
        example = replace(example, input_ids=example.input_ids[:limit], labels=example.labels[:limit])
        if not _predicted(example):
            self._leave_out("left out because nothing of the responses lies within max_length: {rows}.", number)
            return None
        self.cut[number] = CUT
        return example

    def _take_pair(self, pair: PairExample, number: int) -> PairExample | None:
        length = max(len(pair.chosen.input_ids), len(pair.rejected.input_ids))
        self.result.longest = max(self.result.longest, length)
        whole = pair
        if length > self.settings.max_length:
            if not self._may_cut(length, number):
                return None
            pair = cut_pair(pair, self.settings.max_length)
        for side in ("chosen", "rejected"):
            if not _predicted(getattr(pair, side)):
                cut = "within max_length" if _predicted(getattr(whole, side)) else "trained on"
                self._leave_out(f"left out because nothing of the {side} answer is {cut}: {{rows}}.", number)
                return None
        if pair is not whole:
            less = any(
                getattr(pair, side).num_supervised < getattr(whole, side).num_supervised
                for side in ("chosen", "rejected")
            )
            prompt = PROMPT_CUT if len(pair.prompt_ids) < len(whole.prompt_ids) else 0
            self.cut[number] = CUT | prompt | (RESPONSE_CUT if less else 0)
        return pair

    def _may_cut(self, length: int, number: int) -> bool:
        """Apply the over-long policy; False: the row is not to be kept."""
        if self.settings.overlong == "error":
            self.result.too_long.add(
                [
                    Fault(
                        f"{length:,} tokens, but data.max_length is {self.settings.max_length:,}",
                        self._name(number),
                        "Raise data.max_length, shorten the row, or set data.overlong to truncate or drop.",
                    )
                ]
            )
        elif self.settings.overlong == "drop":
            self.result.counts["dropped"] += 1
        return self.settings.overlong == "truncate"

    def _leave_out(self, heading: str, number: int) -> None:
        """Count and name a row that is not kept."""
        self.result.counts["unsupervised"] += 1
        self._note(heading, number)


def cut_pair(pair: PairExample, max_length: int) -> PairExample:
    """Cut a pair so that neither side is longer than max_length tokens.

    The oldest tokens of the prompt go first, the same on both sides; the generation header stays. If a response with
    the header alone is too long, it loses its end.
    """
    excess = max(len(pair.chosen.input_ids), len(pair.rejected.input_ids)) - max_length
    start = max(0, min(excess, len(pair.prompt_ids) - pair.header_length))
    place = slice(start, start + max_length)
    chosen, rejected = (
        replace(side, input_ids=side.input_ids[place], labels=side.labels[place])
        for side in (pair.chosen, pair.rejected)
    )
    shared = shared_prompt_length(chosen, rejected)
    return replace(pair, prompt_ids=chosen.input_ids[:shared], chosen=chosen, rejected=rejected)


def _predicted(example: Example) -> bool:
    """Whether any token is trained on; the first has nothing before it to be predicted from."""
    return bool((example.labels[1:] != IGNORE).any())


def _has_empty_answer(parsed: Conversation | PlainText) -> bool:
    if isinstance(parsed, PlainText):
        return parsed.prompt is not None and not parsed.completion.strip()
    return any(
        message["role"] == "assistant"
        and message.get("train") is not False
        and not any(message.get(key) for key in ("tool_calls", *REASONING_KEYS))
        and not message["content"].strip()
        for message in parsed.messages[parsed.given :]
    )


def _literal(text: str) -> str:
    """A text as it must stand in a heading, in which braces are places."""
    return text.replace("{", "{{").replace("}", "}}")


def _said(message: dict[str, Any]) -> str:
    return message.get("content") or str(message.get("tool_calls") or "")
