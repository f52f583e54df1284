"""Which rows make up each optimizer step. Pure functions: a step number is enough to resume."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from finetune.rows.mix import Mix

Integers = npt.NDArray[np.signedinteger[Any]]


class Packs:
    """Row indices of each sequence that the model sees, in two flat arrays.

    Attributes:
        rows: int64 [n], the indices, pack after pack.
        starts: int64 [packs + 1], where each pack begins in `rows`, and n.
    """

    def __init__(self, rows: Integers, starts: Integers):
        self.rows, self.starts = rows, starts

    @classmethod
    def single(cls, n: int) -> Packs:
        """Each of n rows by itself."""
        return cls(np.arange(n), np.arange(n + 1))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> list[int]:
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        return self.rows[self.starts[index] : self.starts[index + 1]].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return (self[index] for index in range(len(self)))

    def tolist(self) -> list[list[int]]:
        """All of them."""
        return list(self)

    def permuted(self, order: Integers) -> Packs:
        """The same packs in another order, int64 [packs]."""
        parts = [self.rows[self.starts[i] : self.starts[i + 1]] for i in order]
        sizes = np.diff(self.starts)[order]
        return Packs(np.concatenate([self.rows[:0], *parts]), np.concatenate([[0], np.cumsum(sizes)]))

    def sums(self, lengths: Integers) -> Integers:
        """The sum of each pack's lengths, int64 [packs]."""
        return np.add.reduceat(lengths[self.rows], self.starts[:-1]) if len(self) else np.zeros(0, np.int64)


def pack(lengths: Sequence[int] | Integers, max_length: int) -> Packs:
    """Group samples so that no group is longer than max_length, by best-fit-decreasing.

    The longest sample is placed first, each into the group with the least room that takes it, the one opened first of
    equals (samples of equal length in order of index), so the result depends on the lengths alone. Groups are ordered
    by their lowest index and ascending inside. At most 11/9 of the least possible number of groups, plus one (Johnson
    et al. 1974, SIAM J. Comput. 3(4), as for first fit). Samples of one length are placed together, so that the time
    is that of sorting, not that of a search for each sample.

    Raises:
        ValueError: a sample is longer than max_length.

    >>> pack([3, 5, 2, 1], 6).tolist()
    [[0, 2], [1, 3]]
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and int(lengths.max()) > max_length:
        raise ValueError(f"a sample of {int(lengths.max())} tokens does not fit into {max_length}")
    order = np.argsort(-lengths, kind="stable")
    starts = np.flatnonzero(np.diff(lengths[order], prepend=-1))
    groups = _Groups(max_length)
    owners = np.empty(len(lengths), np.int64)
    for items in np.split(order, starts[1:]) if len(order) else ():
        owners[items] = groups.place(int(lengths[items[0]]), len(items))
    # Groups get their places by their lowest index.
    lowest = np.full(groups.count, len(lengths), np.int64)
    np.minimum.at(lowest, owners, np.arange(len(lengths)))
    ranks = np.empty(groups.count, np.int64)
    ranks[np.argsort(lowest)] = np.arange(groups.count)
    owners = ranks[owners]
    sizes = np.bincount(owners, minlength=groups.count)
    return Packs(np.argsort(owners, kind="stable"), np.concatenate([[0], np.cumsum(sizes)]))


class _Groups:
    """Groups by the room that they have left."""

    def __init__(self, room: int):
        self._room = room
        self.count = 0
        self._rooms: list[int] = []  # ascending
        self._by_room: dict[int, Integers] = {}

    def place(self, length: int, count: int) -> Integers:
        """The groups of `count` samples of this length, int64 [count]. Lengths come in falling order."""
        owners: list[Integers] = []
        while count:
            at = bisect_left(self._rooms, length)
            room = self._rooms[at] if at < len(self._rooms) else self._room
            each = room // length
            if at < len(self._rooms):
                groups = self._by_room.pop(self._rooms.pop(at))
            else:
                groups = np.arange(self.count, self.count - (-count // each))
                self.count += len(groups)
            # The tightest group stays the tightest until it is full, so whole groups are filled one after the other.
            full = min(len(groups), count // each)
            owners.append(np.repeat(groups[:full], each))
            self._give_back(room % length, groups[:full])
            count -= full * each
            if count and full < len(groups):
                owners.append(np.repeat(groups[full : full + 1], count))
                self._give_back(room - count * length, groups[full : full + 1])
                count, full = 0, full + 1
            self._give_back(room, groups[full:])
        return np.concatenate(owners)

    def _give_back(self, room: int, groups: Integers) -> None:
        if not len(groups) or not room:
            return
        if room in self._by_room:
            self._by_room[room] = np.sort(np.concatenate([self._by_room[room], groups]))
        else:
            insort(self._rooms, room)
            self._by_room[room] = groups


# -- order -----------------------------------------------------------------------------------------------------


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> Integers:
    """The order of rows in an epoch, int64 [n]: by index, or shuffled by (seed, epoch) alone."""
    if not shuffle:
        return np.arange(n, dtype=np.int64)
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n).astype(np.int64)


@dataclass(frozen=True)
class Step:
    """One optimizer step on one rank.

    Attributes:
        number: From 0.
        epoch: From 0; epochs done at the end of the step are `epoch_end`.
        epoch_end: Epochs done after this step, fractional.
        batches: Row indices of each micro-batch of this rank, int64 arrays; may be empty arrays on a rank that has
            no row left in the last step of an epoch.
        failed: The rows of this step cannot be had (streams only, see `stream.StreamPlan`).
    """

    number: int
    epoch: int
    epoch_end: float
    batches: list[Integers]
    failed: bool = False


class Plan(Protocol):
    """The steps of a run.

    Attributes:
        may_fail: Whether a step can come up short of rows, see `Step.failed`.
    """

    may_fail: ClassVar[bool]

    @property
    def total_steps(self) -> int:
        """Length of the run."""
        ...

    def steps(self, start: int = 0) -> Iterator[Step]:
        """All steps from `start` on."""
        ...

    def put_back(self) -> None:
        """Take back the last step: it is not made, although this rank had rows for it."""
        ...


@dataclass(frozen=True)
class EpochPlan:
    """The whole run as a function of the step number.

    Each epoch goes through all rows once. A step takes batch_size * accumulation * world_size rows, which come in
    global micro-batches of batch_size * world_size; rank r has the r-th batch_size rows of each. The last step of an
    epoch takes what is left, like transformers: fewer micro-batches, the last of them perhaps short. No row is repeated
    to fill up, so ranks may have fewer rows there, or none, and a loss must be normalised over all ranks.

    Attributes:
        n: Rows (or packs).
        batch_size: Rows of a micro-batch on one rank.
        accumulation: Micro-batches of a step.
        total_steps: Length of the run.
        mix: Where sources are mixed by weight: what takes the place of all rows once. n is then its length.
    """

    n: int
    batch_size: int
    accumulation: int
    total_steps: int
    seed: int
    shuffle: bool
    world_size: int = 1
    rank: int = 0
    mix: Mix | None = None
    may_fail: ClassVar[bool] = False

    @property
    def rows_per_step(self) -> int:
        """Of all ranks."""
        return self.batch_size * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that go through all rows once."""
        return -(-self.n // self.rows_per_step)

    def of_ranks(self) -> list[EpochPlan]:
        """The same run as each rank has it."""
        return [replace(self, rank=rank) for rank in range(self.world_size)]

    def step(self, number: int) -> Step:
        """The rows of optimizer step `number`, from 0."""
        epoch, within = divmod(number, self.steps_per_epoch)
        return self._step(number, epoch, within, self._order(epoch))

    def steps(self, start: int = 0) -> Iterator[Step]:
        """All steps from `start` on; resuming is `plan.steps(step)`."""
        order, shuffled = np.zeros(0, np.int64), -1
        for number in range(start, self.total_steps):
            epoch, within = divmod(number, self.steps_per_epoch)
            if epoch != shuffled:
                order, shuffled = self._order(epoch), epoch
            yield self._step(number, epoch, within, order)

    def put_back(self) -> None:
        """Nothing is used up."""

    def _order(self, epoch: int) -> Integers:
        if self.mix is not None:
            return self.mix.order(self.seed, epoch, self.shuffle)
        return epoch_order(self.n, self.seed, epoch, self.shuffle)

    def _step(self, number: int, epoch: int, within: int, order: Integers) -> Step:
        rows = order[within * self.rows_per_step : (within + 1) * self.rows_per_step]
        width = self.batch_size * self.world_size
        own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        batches = [rows[at : at + width][own] for at in range(0, len(rows), width)]
        return Step(number, epoch, epoch + (within + 1) / self.steps_per_epoch, batches)


def plan_steps(
    n: int,
    *,
    batch_size: int,
    accumulation: int = 1,
    max_steps: int | None = None,
    epochs: float | None = None,
    seed: int = 42,
    shuffle: bool = True,
    world_size: int = 1,
    rank: int = 0,
    mix: Mix | None = None,
) -> EpochPlan:
    """Plan a run of max_steps optimizer steps, or of so many epochs (rounded up to a whole step).

    Raises:
        ValueError: no rows, or neither or both of max_steps and epochs.
    """
    if n < 1:
        raise ValueError("there are no rows")
    if (max_steps is None) == (epochs is None):
        raise ValueError("give either max_steps or epochs")
    plan = EpochPlan(n, batch_size, accumulation, max_steps or 0, seed, shuffle, world_size, rank, mix)
    if epochs is None:
        return plan
    total = max(1, math.ceil(round(epochs * plan.steps_per_epoch, 6)))
    return replace(plan, total_steps=total)
