"""Rows of all sources to one tokenized dataset in flat arrays, with a report of what was read, cut and left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from finetune.chat.formats import detect_format, parse_row
from finetune.chat.messages import Conversation, Preference
from finetune.chat.render import (
    IGNORE,
    Example,
    PairExample,
    encode_pairs,
    encode_rendered,
    render_conversation,
    render_preference,
    shared_prompt_length,
)
from finetune.chat.sources import DataFile, Source, find_files, read_file
from finetune.chat.tokenizer import Tokenizer
from finetune.errors import DataError, Fault

MAX_FAULTS = 10
BATCH = 1024
Progress = Callable[[int], None]
Rows = TypeVar("Rows", "Dataset", "PairDataset")


class DataSettings(Protocol):
    """What is needed of the recipe's data section."""

    max_length: int
    overlong: str
    train_on: str


# -- storage ---------------------------------------------------------------------------------------------------


class _Rows:
    """Examples of different length behind one another: int32 ids, one byte each for supervised or not."""

    def __init__(self, ids: np.ndarray, supervised: np.ndarray, lengths: np.ndarray, sources: list[str]):
        self.ids, self.supervised, self.lengths, self.sources = ids, supervised, lengths, sources
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        # The first token is never predicted, so it never counts (it can be supervised under train_on: all).
        counts = np.concatenate([[0], np.cumsum(supervised)])
        starts, ends = self.starts[:-1], self.starts[1:]
        self.num_supervised = (counts[ends] - counts[starts] - supervised[starts]).astype(np.int64)

    @classmethod
    def of(cls, examples: Sequence[Example]) -> _Rows:
        return cls(
            _joined([example.input_ids for example in examples], np.int32),
            _joined([example.labels != IGNORE for example in examples], np.bool_),
            np.array([len(example.input_ids) for example in examples], dtype=np.int64),
            [example.source for example in examples],
        )

    @classmethod
    def joined(cls, parts: Sequence[_Rows]) -> _Rows:
        return cls(
            _joined([part.ids for part in parts], np.int32),
            _joined([part.supervised for part in parts], np.bool_),
            _joined([part.lengths for part in parts], np.int64),
            [source for part in parts for source in part.sources],
        )

    def __getitem__(self, index: int) -> Example:
        place = slice(self.starts[index], self.starts[index + 1])
        ids = self.ids[place]
        return Example(ids, np.where(self.supervised[place], ids, np.int32(IGNORE)), self.sources[index])


class _Selectable:
    """Rows in an order; selecting changes the order and shares the arrays."""

    _order: np.ndarray

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._row(int(self._order[index]))


class Dataset(_Selectable):
    """Tokenized conversations; indexing gives an `Example`.

    Attributes:
        lengths: int64 [n], tokens of each.
        num_supervised: int64 [n], supervised tokens of each that have a token before them, which is what a loss sums.
    """

    def __init__(self, rows: _Rows, order: np.ndarray | None = None):
        self._rows = rows
        self._order = np.arange(len(rows.lengths)) if order is None else order
        self.lengths = rows.lengths[self._order]
        self.num_supervised = rows.num_supervised[self._order]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Dataset:
        return cls(_Rows.of(examples))

    @classmethod
    def joined(cls, parts: Sequence[Dataset]) -> Dataset:
        """All rows of freshly made datasets, one after the other."""
        return cls(_Rows.joined([part._rows for part in parts]))

    def select(self, indices: Sequence[int] | np.ndarray) -> Dataset:
        """A dataset of these rows, in this order."""
        return Dataset(self._rows, self._order[np.asarray(indices, dtype=np.int64)])

    def _row(self, place: int) -> Example:
        return self._rows[place]


class PairDataset(_Selectable):
    """Tokenized preferences; indexing gives a `PairExample`.

    Attributes:
        lengths: int64 [n], tokens of each pair with the shared prompt counted once.
        num_supervised: int64 [n], supervised tokens of both sides.
        prompt_lengths, chosen_lengths, rejected_lengths: int64 [n]; a side's length includes the prompt.
    """

    def __init__(
        self,
        chosen: _Rows,
        rejected: _Rows,
        prompts: np.ndarray,
        headers: np.ndarray,
        order: np.ndarray | None = None,
    ):
        self._parts = chosen, rejected, prompts, headers
        self._order = np.arange(len(prompts)) if order is None else order
        self.prompt_lengths = prompts[self._order]
        self.chosen_lengths, self.rejected_lengths = chosen.lengths[self._order], rejected.lengths[self._order]
        self.lengths = self.chosen_lengths + self.rejected_lengths - self.prompt_lengths
        self.num_supervised = (chosen.num_supervised + rejected.num_supervised)[self._order]

    @classmethod
    def of(cls, pairs: Sequence[PairExample]) -> PairDataset:
        return cls(
            _Rows.of([pair.chosen for pair in pairs]),
            _Rows.of([pair.rejected for pair in pairs]),
            np.array([len(pair.prompt_ids) for pair in pairs], dtype=np.int64),
            np.array([pair.header_length for pair in pairs], dtype=np.int64),
        )

    @classmethod
    def joined(cls, parts: Sequence[PairDataset]) -> PairDataset:
        """All pairs of freshly made datasets, one after the other."""
        chosen, rejected, prompts, headers = zip(*(part._parts for part in parts), strict=True) if parts else ((),) * 4
        return cls(_Rows.joined(chosen), _Rows.joined(rejected), _joined(prompts, np.int64), _joined(headers, np.int64))

    def select(self, indices: Sequence[int] | np.ndarray) -> PairDataset:
        """A dataset of these pairs, in this order."""
        return PairDataset(*self._parts, order=self._order[np.asarray(indices, dtype=np.int64)])

    def _row(self, place: int) -> PairExample:
        chosen, rejected, prompts, headers = self._parts
        better, worse = chosen[place], rejected[place]
        return PairExample(better.input_ids[: prompts[place]], better, worse, int(headers[place]), better.source)


def _joined(arrays: Sequence[np.ndarray], dtype) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)


def split_dataset(dataset: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Set rows aside for evaluation, the same ones for the same seed and size; both parts keep the order of rows.

    Args:
        fraction: Share of rows, in [0, 1); at least one row is set aside when it is above 0, and one is left to train.

    Returns:
        (training part, evaluation part).

    Raises:
        DataError: fewer than two rows cannot be split.
    """
    if fraction == 0:
        return dataset, dataset.select([])
    if len(dataset) < 2:
        raise DataError(
            f"{len(dataset)} row cannot be split", where="data.eval_fraction", fix="Give data.eval instead."
        )
    count = min(max(1, round(len(dataset) * fraction)), len(dataset) - 1)
    aside = np.zeros(len(dataset), dtype=np.bool_)
    aside[np.random.Generator(np.random.PCG64([seed, len(dataset)])).permutation(len(dataset))[:count]] = True
    return dataset.select(np.flatnonzero(~aside)), dataset.select(np.flatnonzero(aside))


# -- report ----------------------------------------------------------------------------------------------------


@dataclass
class FileReport:
    """A data file as the manifest names it. rows: those read; sha256 is None for the hub."""

    path: str
    rows: int
    sha256: str | None


@dataclass
class DataReport:
    """What became of the rows.

    Attributes:
        read, kept: Rows before and after.
        truncated: Rows that were cut to max_length. For preferences `prompts_cut` and `responses_cut` say what.
        dropped: Rows left out because they are longer than max_length (overlong: drop).
        unsupervised: Rows left out because no token is trained on, from the start or after cutting.
        tokens, supervised_tokens: Of the kept rows. A pair's shared prompt counts once.
        longest: Tokens of the longest row before cutting.
        files: In the order read.
        notes: Sentences for the user: counts with the rows they concern and what to do.
    """

    read: int = 0
    kept: int = 0
    truncated: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    dropped: int = 0
    unsupervised: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    files: list[FileReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


class _Named:
    """Row names collected under a heading, for the notes."""

    def __init__(self) -> None:
        self._rows: dict[str, list[str]] = {}

    def add(self, heading: str, source: str) -> None:
        self._rows.setdefault(heading, []).append(source)

    def notes(self) -> list[str]:
        return [f"{_counted(len(rows))} {heading.format(rows=_some(rows))}" for heading, rows in self._rows.items()]


def _counted(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _some(rows: list[str]) -> str:
    return ", ".join(rows[:5]) + (f" and {len(rows) - 5:,} more" if len(rows) > 5 else "")


# -- building --------------------------------------------------------------------------------------------------


def build_dataset(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    data: DataSettings,
    method: str,
    progress: Progress | None = None,
    base: Path | None = None,
    limit: int | None = None,
) -> tuple[Dataset | PairDataset, DataReport]:
    """Read, check, render, tokenize and cut all rows, source after source in the order given.

    Args:
        data: max_length (tokens), overlong ("truncate", "drop", "error") and train_on.
        method: "sft" (conversations) or "dpo" (preferences).
        progress: Called with the number of rows done since the last call.
        base: The recipe's folder, see `find_files`.
        limit: Stop once this many rows are kept, for a look at the first ones.

    Returns:
        The rows that can be trained on, and what happened to the others.

    Raises:
        DataError: rows are wrong; names up to 10 of them and says how many there are. Or no row is left.
    """
    builder = _Builder(tokenizer, data, method, progress, limit)
    for source in sources:
        try:
            builder.read(source, base)
        except DataError as error:  # a file that is missing or cannot be read; the other sources are still checked
            builder.fail(error.faults)
    return builder.finish()


class _Builder:
    """Takes rows in, batch by batch, and keeps count."""

    def __init__(
        self, tokenizer: Tokenizer, data: DataSettings, method: str, progress: Progress | None, limit: int | None
    ):
        self.tokenizer, self.data, self.method = tokenizer, data, method
        self.limit = limit
        self.batch_size = BATCH if limit is None else min(limit, BATCH)
        self.progress = progress or (lambda rows: None)
        self.report = DataReport()
        self.named = _Named()
        self.faults: list[Fault] = []
        self.fault_count = 0
        self.taken: list[Example | PairExample] = []
        self.parts: list[Dataset | PairDataset] = []

    @property
    def full(self) -> bool:
        return self.limit is not None and sum(map(len, self.parts)) >= self.limit

    def read(self, source: Source, base: Path | None) -> None:
        left = source.samples
        form = source.format
        for file in find_files(source, base):
            if left == 0 or self.full:
                break
            count, form = self._read_file(file, source, form, left)
            left = None if left is None else left - count
            self.report.files.append(FileReport(file.name, count, file.sha256()))

    def _read_file(self, file: DataFile, source: Source, form: str, limit: int | None) -> tuple[int, str]:
        count, batch = 0, []
        for row, name in read_file(file):
            if count == limit or self.full:
                break
            count += 1
            if isinstance(row, Fault):
                self.fail([row])
                continue
            try:
                form = self._form(row, form, source, name)
                batch.append(self._checked(parse_row(row, form, name)))
            except DataError as error:
                self.fail(error.faults)
            if len(batch) == self.batch_size:
                self._encode(batch)
                batch = []
        self._encode(batch)
        self.report.read += count
        return count, form

    def _form(self, row: dict, form: str, source: Source, name: str) -> str:
        """The first row of an `auto` source decides; a row of another form is a fault, not a guess."""
        if source.format != "auto":
            return form
        found = detect_format(row, name)
        if form not in ("auto", found):
            raise DataError(
                f"a row of form {found}, but the rows before it are {form}",
                where=name,
                fix="Give files of different forms as separate sources.",
            )
        return found

    def _checked(self, parsed: Conversation | Preference) -> Conversation | Preference:
        pair = isinstance(parsed, Preference)
        if pair != (self.method == "dpo"):
            found, wanted = ("preference", "conversations") if pair else ("conversation", "preferences")
            raise DataError(
                f"a {found} row, but method {self.method} trains on {wanted}",
                where=parsed.source,
                fix=f"Use method: {'dpo' if pair else 'sft'}, or rows of the right form.",
            )
        return parsed

    def fail(self, faults: list[Fault]) -> None:
        """Note what is wrong with one row or file."""
        self.fault_count += 1
        self.faults += faults[: MAX_FAULTS - len(self.faults)]

    def _encode(self, parsed: list) -> None:
        render = self._render_pair if self.method == "dpo" else self._render
        rendered = []
        for item in parsed:
            try:
                rendered.append(render(item))
            except DataError as error:
                self.fail(error.faults)
        # Past the first fault nothing will be trained; the rest is only checked.
        if not self.fault_count and rendered:
            if self.method == "dpo":
                for pair in encode_pairs(self.tokenizer, rendered):
                    self._take_pair(pair)
            else:
                for example in encode_rendered(self.tokenizer, rendered):
                    self._take(example)
            self.parts.append((PairDataset if self.method == "dpo" else Dataset).of(self.taken))
            self.taken = []
        self.progress(len(parsed))

    def _render(self, conversation: Conversation):
        self._note_tools(conversation)
        return render_conversation(self.tokenizer, conversation, self.data.train_on)

    def _render_pair(self, preference: Preference):
        self._note_tools(preference.prompt)
        if [_said(m) for m in preference.chosen] == [_said(m) for m in preference.rejected]:
            self.named.add("with chosen equal to rejected, which teaches nothing: {rows}.", preference.source)
        for side in ("chosen", "rejected"):
            if not any(_said(message).strip() for message in getattr(preference, side)):
                self.named.add(f"with an empty {side} answer: {{rows}}.", preference.source)
        return render_preference(self.tokenizer, preference)

    def _note_tools(self, conversation: Conversation) -> None:
        if conversation.tools and not self.tokenizer.template_for(conversation.tools).knows_tools:
            self.named.add(
                "with tools that the model's chat template does not show: {rows}. "
                "Use a model whose template knows tools, such as Qwen2.5-Instruct.",
                conversation.source,
            )

    # -- length ------------------------------------------------------------------------------------------------

    def _take(self, example: Example) -> None:
        length = len(example.input_ids)
        self.report.longest = max(self.report.longest, length)
        if not _predicted(example):
            self._leave_out("left out for having no supervised token: {rows}.", example.source)
            return
        if length > self.data.max_length:
            if not self._may_cut(length, example.source):
                return
            cut = slice(0, self.data.max_length)
            example = replace(example, input_ids=example.input_ids[cut], labels=example.labels[cut])
            if not _predicted(example):
                self._leave_out(
                    "left out because nothing of the responses lies within max_length: {rows}.", example.source
                )
                return
            self.report.truncated += 1
        self.taken.append(example)

    def _take_pair(self, pair: PairExample) -> None:
        length = max(len(pair.chosen.input_ids), len(pair.rejected.input_ids))
        self.report.longest = max(self.report.longest, length)
        whole = pair
        if length > self.data.max_length:
            if not self._may_cut(length, pair.source):
                return
            pair = cut_pair(pair, self.data.max_length)
        for side in ("chosen", "rejected"):
            if not _predicted(getattr(pair, side)):
                cut = "within max_length" if _predicted(getattr(whole, side)) else "trained on"
                self._leave_out(f"left out because nothing of the {side} answer is {cut}: {{rows}}.", pair.source)
                return
        if pair is not whole:
            self.report.truncated += 1
            self.report.prompts_cut += len(pair.prompt_ids) < len(whole.prompt_ids)
            self.report.responses_cut += any(
                getattr(pair, side).num_supervised < getattr(whole, side).num_supervised
                for side in ("chosen", "rejected")
            )
        self.taken.append(pair)

    def _may_cut(self, length: int, source: str) -> bool:
        """Apply the over-long policy; False: the row is not to be kept."""
        if self.data.overlong == "error":
            self.fail(
                [
                    Fault(
                        f"{length:,} tokens, but data.max_length is {self.data.max_length:,}",
                        source,
                        "Raise data.max_length, shorten the row, or set data.overlong to truncate or drop.",
                    )
                ]
            )
        elif self.data.overlong == "drop":
            self.report.dropped += 1
        return self.data.overlong == "truncate"

    def _leave_out(self, heading: str, source: str) -> None:
        self.report.unsupervised += 1
        self.named.add(heading, source)

    # -- end ---------------------------------------------------------------------------------------------------

    def finish(self) -> tuple[Dataset | PairDataset, DataReport]:
        if self.faults:
            error = DataError.of(self.faults)
            if self.fault_count > len(self.faults):
                error.args = (f"{error.args[0]}\n{self.fault_count:,} faults in all; these are the first.",)
            raise error
        dataset = (PairDataset if self.method == "dpo" else Dataset).joined(self.parts)
        if self.limit is not None:
            dataset = dataset.select(range(min(self.limit, len(dataset))))
        report = self.report
        report.kept = len(dataset)
        report.tokens = int(dataset.lengths.sum())
        report.supervised_tokens = int(dataset.num_supervised.sum())
        report.notes = self._length_notes() + self.named.notes()
        if not report.kept:
            raise DataError(
                f"of {_counted(report.read)} none can be trained on",
                where=", ".join(file.path for file in report.files[:3]),
                fix=" ".join(report.notes),
            )
        return dataset, report

    def _length_notes(self) -> list[str]:
        report, limit = self.report, f"data.max_length ({self.data.max_length:,} tokens; the longest row has"
        limit = f"{limit} {self.report.longest:,})"
        notes = []
        if report.truncated:
            what = f": {report.prompts_cut:,} in the prompt, {report.responses_cut:,} in a response"
            notes.append(f"{_counted(report.truncated)} cut to {limit}{what if self.method == 'dpo' else ''}.")
        if report.dropped:
            notes.append(f"{_counted(report.dropped)} dropped for being longer than {limit}.")
        return notes


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


def _said(message: dict) -> str:
    return message.get("content") or str(message.get("tool_calls") or "")
