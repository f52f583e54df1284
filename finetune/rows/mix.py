"""Sources mixed by weight: which source each row of the order comes from, and which of its rows it is.

The k-th row of a source of share s has its turn at (k + 1/2) / s, so that after any n rows each source has given its
share of them, to within one row: the order is no draw. In memory an epoch is as long as it takes to go through the
source that lasts longest; a stream goes on for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Mix:
    """Rows of several sources, in memory.

    Attributes:
        shares: Of each source, above 0; they add up to 1.
        rows: int64 [n] of each source, the numbers of its rows in the dataset; none is empty.
    """

    shares: tuple[float, ...]
    rows: tuple[Indices, ...]

    @classmethod
    def of(cls, weights: Sequence[float], sources: Indices) -> Mix:
        """The mix of a dataset's rows.

        Args:
            weights: Of each source, in any unit.
            sources: int64 [n], the source of each row.
        """
        rows = tuple(np.flatnonzero(sources == number) for number in range(len(weights)))
        return cls(tuple(weight / sum(weights) for weight in weights), rows)

    def __len__(self) -> int:
        """Rows of an epoch: those after which each source was gone through at least once."""
        return int(max(np.ceil(len(rows) / share - 1e-9) for rows, share in zip(self.rows, self.shares)))

    @property
    def counts(self) -> Indices:
        """int64 [sources], how many rows of an epoch each source gives."""
        return np.bincount(self.turns(), minlength=len(self.shares))

    def turns(self) -> Indices:
        """int64 [rows of an epoch], the source whose turn it is."""
        size = len(self)
        counts = [int(np.ceil(share * size)) + 1 for share in self.shares]
        times = np.concatenate([(np.arange(count) + 0.5) / share for count, share in zip(counts, self.shares)])
        return np.repeat(np.arange(len(counts)), counts)[np.argsort(times, kind="stable")][:size]

    def order(self, seed: int, epoch: int, shuffle: bool) -> Indices:
        """int64 [rows of an epoch], the rows of the dataset in their order.

        Each source goes on where it stood at the end of the epoch before, pass after pass through its rows; shuffled,
        each pass has an order of its own.
        """
        turns = self.turns()
        order = np.empty(len(turns), np.int64)
        for number, rows in enumerate(self.rows):
            places = np.flatnonzero(turns == number)
            first = epoch * len(places)
            passes, within = np.divmod(np.arange(first, first + len(places)), len(rows))
            for one in np.unique(passes):
                chance = np.random.Generator(np.random.PCG64([seed, number, int(one)]))
                own = chance.permutation(rows) if shuffle else rows
                order[places[passes == one]] = own[within[passes == one]]
        return order


def next_source(shares: Sequence[float], taken: Sequence[int]) -> int:
    """Whose turn it is after so many rows were taken of each source; the rule of `Mix.turns`, one at a time."""
    return min(range(len(shares)), key=lambda number: (taken[number] + 0.5) / shares[number])
