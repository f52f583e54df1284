"""Tokenized rows in flat arrays: parts, in memory or in a mapped file, and datasets, which are orders over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from finetune.chat.example import IGNORE, Example, PairExample
from finetune.errors import DataError
from finetune.methods import PREFERENCE, RowKind

Integers = npt.NDArray[np.signedinteger[Any]]
Row = TypeVar("Row", Example, PairExample)
AnyDataset = TypeVar("AnyDataset", "Dataset", "PairDataset")


@dataclass(frozen=True)
class Sequences:
    """Token sequences behind one another.

    Attributes:
        ids: int32 [T].
        supervised: uint8 [ceil(T / 8)], one bit for each token, the lowest first.
        offsets: int32 [n + 1], where each sequence begins, and T.
        num_supervised: int32 [n], supervised tokens that have a token before them, which is what a loss sums.
    """

    ids: Integers
    supervised: npt.NDArray[np.uint8]
    offsets: Integers
    num_supervised: Integers

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Sequences:
        """Join examples."""
        supervised = np.concatenate([example.labels for example in examples]) != IGNORE
        offsets = np.cumsum([0, *(len(example.input_ids) for example in examples)]).astype(np.int32)
        # The first token is never predicted, so it never counts (it can be supervised under train_on: all).
        sums = np.concatenate([[0], np.cumsum(supervised)])
        counts = sums[offsets[1:]] - sums[offsets[:-1]] - supervised[offsets[:-1]]
        ids = np.concatenate([example.input_ids for example in examples])
        return cls(ids, np.packbits(supervised, bitorder="little"), offsets, counts.astype(np.int32))

    def example(self, index: int, source: str) -> Example:
        """One of them."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        ids = self.ids[start:end]
        bits = np.unpackbits(self.supervised[start // 8 : -(-end // 8)], bitorder="little")
        supervised = bits[start % 8 : start % 8 + end - start].view(np.bool_)
        return Example(ids, np.where(supervised, ids, np.int32(IGNORE)), source)


CUT, PROMPT_CUT, RESPONSE_CUT = 1, 2, 4


@dataclass(frozen=True)
class Part:
    """Rows of one file that follow each other.

    Attributes:
        file: Which file of the dataset.
        numbers: int64 [n], the rows' numbers in the file.
        sides: One for conversations; chosen and rejected for preferences.
        prompts, headers: int32 [n], tokens of each pair's shared prompt and of the generation header at its end; empty
            for conversations.
        cut: uint8 [n], what was cut off each row: 0, or CUT with PROMPT_CUT and RESPONSE_CUT of a pair.
    """

    file: int
    numbers: Integers
    sides: tuple[Sequences, ...]
    prompts: Integers
    headers: Integers
    cut: npt.NDArray[np.uint8]

    @classmethod
    def of(
        cls, file: int, numbers: Sequence[int], rows: Sequence[Example] | Sequence[PairExample], cut: Sequence[int]
    ) -> Part:
        """Join rows, at least one."""
        places, cuts = np.array(numbers, np.int64), np.array(cut, np.uint8)
        examples = [row for row in rows if isinstance(row, Example)]
        if examples:
            return cls(file, places, (Sequences.of(examples),), np.zeros(0, np.int32), np.zeros(0, np.int32), cuts)
        pairs = [row for row in rows if isinstance(row, PairExample)]
        sides = Sequences.of([pair.chosen for pair in pairs]), Sequences.of([pair.rejected for pair in pairs])
        prompts = np.array([len(pair.prompt_ids) for pair in pairs], np.int32)
        return cls(file, places, sides, prompts, np.array([pair.header_length for pair in pairs], np.int32), cuts)

    def __len__(self) -> int:
        return len(self.numbers)


class Table:
    """All parts, in order, and the names of their files.

    Args:
        sources: The number of the source of each file; where it is not given, all are of one.
    """

    def __init__(self, parts: Sequence[Part], files: Sequence[str], sources: Sequence[int] | None = None):
        self.parts, self.files = list(parts), list(files)
        self._sources = [0] * len(self.files) if sources is None else list(sources)
        self._starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def find(self, place: int) -> tuple[Part, int, str]:
        """(part, index in it, "file:row") of a row."""
        at = int(np.searchsorted(self._starts, place, side="right")) - 1
        part, index = self.parts[at], place - int(self._starts[at])
        return part, index, f"{self.files[part.file]}:{part.numbers[index]}"

    def column(self, of_part: Callable[[Part], Integers | npt.NDArray[np.uint8]]) -> Integers:
        """An array of every part, joined, int64."""
        parts = [of_part(part).astype(np.int64, copy=False) for part in self.parts]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def sources(self) -> Integers:
        """int64 [n], the number of the source of each row."""
        return self.column(lambda part: np.full(len(part), self._sources[part.file], np.int64))

    def lengths(self, side: int) -> Integers:
        """int64 [n], tokens of each row."""
        return self.column(lambda part: np.diff(part.sides[side].offsets))

    def cut(self) -> Integers:
        """int64 [n], see `Part`."""
        return self.column(lambda part: part.cut.astype(np.int64))

    def num_supervised(self, side: int) -> Integers:
        """int64 [n], see `Sequences`."""
        return self.column(lambda part: part.sides[side].num_supervised)


class _Selectable(Generic[Row]):
    """Rows in an order; selecting changes the order and shares the arrays."""

    _table: Table
    _order: Integers

    @property
    def sources(self) -> Integers:
        """int64 [n], the number of the source of each row."""
        return self._table.sources()[self._order]

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._row(int(self._order[index]))

    def _row(self, place: int) -> Row:
        raise NotImplementedError


class Dataset(_Selectable[Example]):
    """Tokenized conversations; indexing gives an `Example`.

    Attributes:
        lengths: int64 [n], tokens of each.
        num_supervised: int64 [n], supervised tokens of each that have a token before them, which is what a loss sums.
        cut: int64 [n], see `Part`.
    """

    def __init__(self, table: Table, order: Integers | None = None):
        self._table = table
        self._order = np.arange(len(table)) if order is None else order
        self.lengths, self.cut = table.lengths(0)[self._order], table.cut()[self._order]
        self.num_supervised = table.num_supervised(0)[self._order]

    def select(self, indices: Sequence[int] | Integers) -> Dataset:
        """A dataset of these rows, in this order."""
        return Dataset(self._table, self._order[np.asarray(indices, dtype=np.int64)])

    def _row(self, place: int) -> Example:
        part, index, source = self._table.find(place)
        return part.sides[0].example(index, source)


class PairDataset(_Selectable[PairExample]):
    """Tokenized preferences; indexing gives a `PairExample`.

    Attributes:
        lengths: int64 [n], tokens of each pair with the shared prompt counted once.
        num_supervised: int64 [n], supervised tokens of both sides.
        prompt_lengths, chosen_lengths, rejected_lengths: int64 [n]; a side's length includes the prompt.
        cut: int64 [n], see `Part`.
    """

    def __init__(self, table: Table, order: Integers | None = None):
        self._table = table
        self._order = np.arange(len(table)) if order is None else order
        self.prompt_lengths = table.column(lambda part: part.prompts)[self._order]
        self.chosen_lengths, self.rejected_lengths = (table.lengths(side)[self._order] for side in (0, 1))
        self.lengths = self.chosen_lengths + self.rejected_lengths - self.prompt_lengths
        self.cut = table.cut()[self._order]
        self.num_supervised = (table.num_supervised(0) + table.num_supervised(1))[self._order]

    def select(self, indices: Sequence[int] | Integers) -> PairDataset:
        """A dataset of these pairs, in this order."""
        return PairDataset(self._table, self._order[np.asarray(indices, dtype=np.int64)])

    def _row(self, place: int) -> PairExample:
        part, index, source = self._table.find(place)
        better, worse = (side.example(index, source) for side in part.sides)
        return PairExample(better.input_ids[: part.prompts[index]], better, worse, int(part.headers[index]), source)


def dataset_of(table: Table, kind: RowKind) -> Dataset | PairDataset:
    """The dataset over all rows of a table, which are of this kind."""
    return PairDataset(table) if kind == PREFERENCE else Dataset(table)


def split_dataset(dataset: AnyDataset, fraction: float, seed: int) -> tuple[AnyDataset, AnyDataset]:
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
