"""Which rows make up each optimizer step, and rows to padded arrays.

Pure functions: a step number is enough to resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, max_length: int) -> list[list[int]]:
    """Group samples so that no group is longer than max_length, by first-fit-decreasing.

    The longest sample is placed first, each into the first group with room (equal lengths in order of index), so the
    result depends on the lengths alone. Groups are ordered by their lowest index and ascending inside. At most 11/9 of
    the least possible number of groups, plus one.

    Raises:
        ValueError: a sample is longer than max_length.

    >>> pack([3, 5, 2, 1], 6)
    [[0, 2], [1, 3]]
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and int(lengths.max()) > max_length:
        raise ValueError(f"a sample of {int(lengths.max())} tokens does not fit into {max_length}")
    groups: list[list[int]] = []
    room = _FirstWithRoom(len(lengths), max_length)
    for index in np.argsort(-lengths, kind="stable"):
        group = room.take(int(lengths[index]))
        if group == len(groups):
            groups.append([])
        groups[group].append(int(index))
    return sorted((sorted(group) for group in groups), key=lambda group: group[0])


class _FirstWithRoom:
    """Finds the first group with enough room in O(log n): a binary tree of the most room below each node."""

    def __init__(self, count: int, room: int):
        self._leaves = 1 << max(0, (count - 1).bit_length())
        self._most = [room] * (2 * self._leaves)

    def take(self, length: int) -> int:
        node = 1
        while node < self._leaves:
            node *= 2
            if self._most[node] < length:
                node += 1
        group = node - self._leaves
        self._most[node] -= length
        while node > 1:
            node //= 2
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])
        return group


# -- order -----------------------------------------------------------------------------------------------------


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
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
    """

    number: int
    epoch: int
    epoch_end: float
    batches: list[np.ndarray]


@dataclass(frozen=True)
class Plan:
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
    """

    n: int
    batch_size: int
    accumulation: int
    total_steps: int
    seed: int
    shuffle: bool
    world_size: int = 1
    rank: int = 0

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.n // self.rows_per_step)

    def step(self, number: int) -> Step:
        """The rows of optimizer step `number`, from 0."""
        epoch, within = divmod(number, self.steps_per_epoch)
        return self._step(number, epoch, within, epoch_order(self.n, self.seed, epoch, self.shuffle))

    def steps(self, start: int = 0) -> Iterator[Step]:
        """All steps from `start` on; resuming is `plan.steps(step)`."""
        order, shuffled = None, -1
        for number in range(start, self.total_steps):
            epoch, within = divmod(number, self.steps_per_epoch)
            if epoch != shuffled:
                order, shuffled = epoch_order(self.n, self.seed, epoch, self.shuffle), epoch
            yield self._step(number, epoch, within, order)

    def _step(self, number: int, epoch: int, within: int, order: np.ndarray) -> Step:
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
) -> Plan:
    """Plan a run of max_steps optimizer steps, or of so many epochs (rounded up to a whole step).

    Raises:
        ValueError: no rows, or neither or both of max_steps and epochs.
    """
    if n < 1:
        raise ValueError("there are no rows")
    if (max_steps is None) == (epochs is None):
        raise ValueError("give either max_steps or epochs")
    plan = Plan(n, batch_size, accumulation, max_steps or 0, seed, shuffle, world_size, rank)
    if epochs is None:
        return plan
    total = max(1, math.ceil(round(epochs * plan.steps_per_epoch, 6)))
    return Plan(n, batch_size, accumulation, total, seed, shuffle, world_size, rank)
