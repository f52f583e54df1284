"""Keys and values of rows that are being decoded, in place.

Each row's keys and values start at slot 0 of its own stretch, whatever its length, so that a row may join or leave
between any two tokens, and what one has read can be copied to another that begins alike.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from finetune.model.runtime import paddle as _bring_up

_bring_up()

import paddle

# The cache grows by this many positions: one copy of the cache per 128 tokens, and no memory for tokens never made.
_BLOCK = 128


class KVCache:
    """Keys and values of B rows.

    Attributes:
        keys, values: Per layer, [B * kv_heads * capacity, head_dim]: row-major, so that one scatter writes any
            positions and one reshape (no copy) gives [B, kv_heads, capacity, head_dim].
        lengths: How many positions of each row are filled, int64 [B].
    """

    def __init__(self, layers: int, rows: int, kv_heads: int, head_dim: int, capacity: int, dtype: paddle.dtype):
        self.kv_heads, self.head_dim, self.dtype = kv_heads, head_dim, dtype
        self.capacity = capacity_for(capacity)
        self.lengths = np.zeros(rows, dtype=np.int64)
        shape = [rows * kv_heads * self.capacity, head_dim]
        # Zeros, not uninitialised memory: a masked position has weight 0, and 0 times NaN is NaN.
        self.keys = [paddle.zeros(shape, dtype=dtype) for _ in range(layers)]
        self.values = [paddle.zeros(shape, dtype=dtype) for _ in range(layers)]

    def view(self, stored: paddle.Tensor) -> paddle.Tensor:
        """[B * kv_heads * capacity, head_dim] as [B, kv_heads, capacity, head_dim]."""
        return stored.reshape([len(self.lengths), self.kv_heads, self.capacity, self.head_dim])

    def part(self, stored: paddle.Tensor, first: int, rows: int, length: int) -> paddle.Tensor:
        """The first `length` positions of some rows as [rows, kv_heads, length, head_dim]."""
        whole = self.view(stored)
        return whole if whole.shape[::2] == [rows, length] else whole[first : first + rows, :, :length]

    def reserve(self, length: int) -> None:
        """Make room for `length` positions in every row."""
        if length <= self.capacity:
            return
        capacity = capacity_for(length)
        room = paddle.zeros(
            [len(self.lengths), self.kv_heads, capacity - self.capacity, self.head_dim], dtype=self.dtype
        )
        self._replace(lambda stored: paddle.concat([self.view(stored), room], axis=2))
        self.capacity = capacity

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order; a row may be named more than once. What only longer rows needed is freed."""
        index, lengths = paddle.to_tensor(rows, dtype="int64"), self.lengths[rows]
        capacity = min(self.capacity, capacity_for(int(lengths.max()) + 1))

        def kept(stored: paddle.Tensor) -> paddle.Tensor:
            rows = paddle.index_select(self.view(stored), index, axis=0)
            return rows if capacity == self.capacity else rows[:, :, :capacity].contiguous()

        self._replace(kept)
        self.lengths, self.capacity = lengths, capacity

    def extend(self, other: KVCache) -> None:
        """Append the rows of `other`, which is used up."""
        self.reserve(other.capacity)
        other.reserve(self.capacity)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for layer in range(len(mine)):
                mine[layer] = paddle.concat([mine[layer], theirs[layer]], axis=0)
                theirs[layer] = None
        self.lengths = np.concatenate([self.lengths, other.lengths])

    def take(self, row: int, start: int, stop: int) -> paddle.Tensor:
        """A copy of positions [start, stop) of a row, all layers: [2 * layers, kv_heads, stop - start, head_dim]."""
        return paddle.stack([self.view(stored)[row, :, start:stop] for stored in (*self.keys, *self.values)])

    def put(self, row: int, start: int, taken: paddle.Tensor) -> None:
        """Write what `take` gave, from `start` on. The caller sets the row's length."""
        positions = np.arange(start, start + taken.shape[2])
        heads = row * self.kv_heads + np.arange(self.kv_heads)
        slots = paddle.to_tensor((heads[:, None] * self.capacity + positions).reshape(-1))
        for stored, part in zip((*self.keys, *self.values), taken):
            paddle.scatter_(stored, slots, part.reshape([-1, self.head_dim]))

    def _replace(self, change: Callable[[paddle.Tensor], paddle.Tensor]) -> None:
        for stored in (self.keys, self.values):
            for layer in range(len(stored)):
                stored[layer] = change(stored[layer]).reshape([-1, self.head_dim])


def capacity_for(length: int) -> int:
    """Positions that a cache holds per row when its longest row needs `length`."""
    return -(-length // _BLOCK) * _BLOCK
