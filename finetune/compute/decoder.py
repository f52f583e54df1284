"""A Qwen2 forward pass for decoding, over the modules of a PaddleNLP model.

PaddleNLP's own pass grows the cache by concatenation at every token, repeats the key and value heads, and rebuilds its
masks. This one keeps keys and values in place and computes the same numbers (tests/infer/test_engine.py). Plain
projections are read off their weights, others (LoRA) are called as modules. What a token costs beside its matrix
products is mostly the number of operations and, on CPU, broadcasts over anything but the last axes: there are few of
either (docs/log.md). After `finetune.compute.packed.pack`, steps are that module's.

Each row's keys and values start at slot 0 of its own stretch of the cache, whatever its length: prompts are padded on
the right while they are read, padding is overwritten or masked, and nothing depends on the other rows. A row may
therefore join or leave between any two tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from finetune.model.runtime import paddle as _bring_up

_bring_up()

import paddle
import paddle.nn.functional as F
from paddlenlp.peft.lora.lora_layers import LoRALinear

from finetune.compute.frozen import frozen_linear
from finetune.compute.layers import lora_linear
from finetune.compute.memory import array_of
from finetune.compute.packed import PackedLinear, Steps
from finetune.model.build import body_of, causal_lm, config_of
from finetune.model.frozen import frozen_of

# The cache grows by this many positions: one copy of the cache per 128 tokens, and no memory for tokens never made.
_BLOCK = 128
# Prompts are read in pieces of at most this many tokens, and fewer or fewer rows at a time where the attention scores
# would be more numbers than this: 512 MB in float32.
_PIECE = 512
_SCORES = 2**27
# Below this width, padding a row costs less than going through the weights for it once more.
_NARROW = 64
# Rotary tables begin with this many positions and double when a longer row comes.
_FIRST_POSITIONS = 2048


class KVCache:
    """Keys and values of B rows.

    Attributes:
        keys, values: Per layer, [B * kv_heads * capacity, head_dim]: row-major, so that one scatter writes any
            positions and one reshape (no copy) gives [B, kv_heads, capacity, head_dim].
        lengths: How many positions of each row are filled, int64 [B].
    """

    def __init__(self, layers: int, rows: int, kv_heads: int, head_dim: int, capacity: int, dtype):
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

    def _replace(self, change) -> None:
        for stored in (self.keys, self.values):
            for layer in range(len(stored)):
                stored[layer] = change(stored[layer]).reshape([-1, self.head_dim])


class Decoder:
    """Reads prompts into a cache, then one token per row and call.

    Args:
        model: PaddleNLP's `Qwen2ForCausalLM`, or a `LoRAModel` around one; not changed.
    """

    def __init__(self, model):
        causal, config = causal_lm(model), config_of(model)
        self.body, self.lm_head = body_of(model), causal.lm_head
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.context, self.vocab_size = config.max_position_embeddings, config.vocab_size
        self.dtype = self.body.embed_tokens.weight.dtype
        # PaddleNLP shrinks float16 scores before the product and restores them in float32, against overflow.
        self.shrink = 32.0 if self.dtype == paddle.float16 else 1.0
        self._layers = [_Layer(layer) for layer in self.body.layers]
        self._last_norm = _rms_norm(self.body.norm)
        self._cos, self._sin = self._rotary_tables(_FIRST_POSITIONS)
        self._steps = Steps(causal) if isinstance(self.lm_head, PackedLinear) else None

    def _rotary_tables(self, length: int) -> tuple[paddle.Tensor, paddle.Tensor]:
        """cos and sin of the model's own rotary embedding, each float32 [length, 1, head_dim].

        The first half of sin is negated, so that x * cos + roll(x) * sin is the rotation.
        """
        turns = self.body.layers[0].self_attn.rotary_emb.inv_freq.astype("float32")  # [head_dim / 2]
        angles = (paddle.arange(length, dtype="float32")[:, None] * turns)[:, None]
        cos, sin = angles.cos(), angles.sin()
        return paddle.concat([cos, cos], axis=-1), paddle.concat([-sin, sin], axis=-1)

    def read(self, prompts: list[np.ndarray]) -> tuple[KVCache, paddle.Tensor]:
        """Read prompts, each int64 [L_i], in one pass over the weights per 512 tokens of rows of like length.

        Returns:
            A cache of len(prompts) rows; the logits after each prompt's last token, float32 [B, V].
        """
        with paddle.no_grad():
            # Longest first, so that the rows which still have something to read are always the first ones.
            order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
            lengths = np.array([len(prompts[i]) for i in order], dtype=np.int64)
            longest = int(lengths[0])
            ids = np.zeros([len(prompts), longest], dtype=np.int64)
            for row, i in enumerate(order):
                ids[row, : lengths[row]] = prompts[i]
            layers = len(self.body.layers)
            cache = KVCache(layers, len(prompts), self.kv_heads, self.head_dim, longest + 1, self.dtype)
            last: list[paddle.Tensor | None] = [None] * len(prompts)
            for first, end, start, stop in _pieces(lengths, self.heads):
                hidden = self._forward(ids[first:end, start:stop], np.full(end - first, start), cache, first)
                for row in range(first, end):
                    if start < lengths[row] <= stop:
                        last[order[row]] = hidden[row - first, int(lengths[row]) - 1 - start]
            cache.lengths = lengths
            if order != sorted(order):
                cache.select(np.argsort(order).tolist())
            return cache, self._logits(paddle.stack(last))

    def step(self, tokens: list[int], cache: KVCache) -> paddle.Tensor:
        """Add one token to every row of the cache; returns the logits after it, float32 [B, V]."""
        with paddle.no_grad():
            ids = np.asarray(tokens, dtype=np.int64)
            if self._steps is None:
                logits = self._logits(self._forward(ids[:, None], cache.lengths, cache)[:, 0])
            else:
                self._make_room(cache, int(cache.lengths.max()) + 1)
                cos, sin = (array_of(table)[cache.lengths] for table in (self._cos, self._sin))
                logits = self._steps(ids, cache, (cos, sin))
            cache.lengths = cache.lengths + 1
            return logits

    def _make_room(self, cache: KVCache, length: int) -> None:
        """Room for `length` positions in the cache and in the rotary tables."""
        cache.reserve(length)
        if cache.capacity > len(self._cos):
            self._cos, self._sin = self._rotary_tables(max(cache.capacity, 2 * len(self._cos)))

    def _logits(self, hidden: paddle.Tensor) -> paddle.Tensor:
        logits = self.lm_head(self._last_norm(hidden))
        return logits if logits.dtype == paddle.float32 else logits.astype("float32")

    def _forward(self, ids: np.ndarray, starts: np.ndarray, cache: KVCache, first: int = 0) -> paddle.Tensor:
        """Run the layers on ids [B, T]; hidden states [B, T, H].

        Args:
            starts: Row b is at positions starts[b] .. starts[b] + T - 1.
            first: The cache's row that ids[0] belongs to; the others follow.
        """
        rows, width = ids.shape
        positions = starts[:, None] + np.arange(width)  # [B, T]
        self._make_room(cache, int(positions.max()) + 1)
        # Slot of (row, position, kv head) in the stored [B * kv_heads * capacity, head_dim]; order as k_proj gives it.
        stretch = (first + np.arange(rows))[:, None, None] * self.kv_heads + np.arange(self.kv_heads)
        slots = paddle.to_tensor((stretch * cache.capacity + positions[:, :, None]).reshape(-1))
        seen = cache.capacity if width == 1 else capacity_for(int(positions.max()) + 1)
        mask, where = self._mask(positions, seen), paddle.to_tensor(positions)
        hidden = F.embedding(paddle.to_tensor(ids), self.body.embed_tokens.weight)
        groups = self.heads // self.kv_heads
        q_shape = [rows, self.kv_heads, groups, self.head_dim]
        q_shape = q_shape if width == 1 else [rows, width, *q_shape[1:]]
        turn_q = self._turns(where, self.heads, 1.0 / (math.sqrt(self.head_dim) * self.shrink), q_shape)
        turn_k = self._turns(where, self.kv_heads, 1.0, [-1, self.head_dim])
        for layer, keys, values in zip(self._layers, cache.keys, cache.values):
            x = layer.input_norm(hidden)
            q = self._rotate(layer.q(x).reshape(q_shape), *turn_q)
            paddle.scatter_(keys, slots, self._rotate(layer.k(x).reshape([-1, self.head_dim]), *turn_k))
            paddle.scatter_(values, slots, layer.v(x).reshape([-1, self.head_dim]))
            keys, values = (cache.part(stored, first, rows, seen) for stored in (keys, values))
            mixed = self._attend(q, keys, values, mask)
            hidden = hidden + layer.o(mixed)
            x = layer.middle_norm(hidden)
            hidden = hidden + layer.down(F.silu(layer.gate(x)) * layer.up(x))
        return hidden

    def _mask(self, positions: np.ndarray, capacity: int) -> paddle.Tensor:
        """What is added to scores: float32 [B, 1, 1, T, C], or [B, kv_heads, groups, C] for single tokens."""
        visible = np.arange(capacity) <= positions[:, :, None]  # [B, T, C]
        mask = np.where(visible, np.float32(0), np.float32(-np.inf))[:, None, None]
        if positions.shape[1] > 1:
            return paddle.to_tensor(mask)
        shape = [len(positions), self.kv_heads, self.heads // self.kv_heads, capacity]
        return paddle.to_tensor(np.ascontiguousarray(np.broadcast_to(mask[:, :, 0], shape)))

    def _turns(
        self, where: paddle.Tensor, heads: int, scale: float, shape: list[int]
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """cos and sin at positions [B, T], times `scale`, once per head: [B, T, heads, head_dim] as `shape`."""
        whole = [*where.shape, heads, self.head_dim]
        turns = ((table[where] * scale).astype(self.dtype) for table in (self._cos, self._sin))
        cos, sin = (turn.expand(whole).reshape(shape) for turn in turns)
        return cos, sin

    def _rotate(self, x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor) -> paddle.Tensor:
        return x * cos + paddle.roll(x, self.head_dim // 2, axis=-1) * sin

    def _attend(self, q: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, mask: paddle.Tensor):
        """Attention with the query heads of one key head side by side, so that key heads are not repeated.

        Args:
            q: [B, T, kv_heads, groups, head_dim], or without T for single tokens; scaled.
            keys, values: [B, kv_heads, C, head_dim].
            mask: As `_mask` makes it.

        Returns:
            [B, T, heads * head_dim].
        """
        if q.ndim == 4:
            mixed = paddle.matmul(self._weights(paddle.matmul(q, keys, transpose_y=True), mask), values)
            return mixed.reshape([len(q), 1, self.heads * self.head_dim])
        rows, width, _, groups, _ = q.shape
        q = q.transpose([0, 2, 3, 1, 4]).reshape([rows, self.kv_heads, groups * width, self.head_dim])
        scores = paddle.matmul(q, keys, transpose_y=True).reshape([rows, self.kv_heads, groups, width, -1])
        weights = self._weights(scores, mask).reshape([rows, self.kv_heads, groups * width, -1])
        mixed = paddle.matmul(weights, values).reshape([rows, self.kv_heads, groups, width, self.head_dim])
        return mixed.transpose([0, 3, 1, 2, 4]).reshape([rows, width, self.heads * self.head_dim])

    def _weights(self, scores: paddle.Tensor, mask: paddle.Tensor) -> paddle.Tensor:
        """Attention weights of scores, float32 inside."""
        if scores.dtype == paddle.float32:
            return F.softmax(scores + mask, axis=-1)
        return F.softmax(scores.astype("float32") * self.shrink + mask, axis=-1).astype(scores.dtype)


class _Layer:
    """The functions of one decoder layer, found once instead of at every token."""

    def __init__(self, layer):
        attention, mlp = layer.self_attn, layer.mlp
        self.q, self.k, self.v, self.o = (
            _linear(module) for module in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        )
        self.gate, self.up, self.down = (_linear(module) for module in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.input_norm = _rms_norm(layer.input_layernorm)
        self.middle_norm = _rms_norm(layer.post_attention_layernorm)


def _linear(module) -> Callable[[paddle.Tensor], paddle.Tensor]:
    """A plain projection without what calling a module costs; any other as it is."""
    if isinstance(module, paddle.nn.Linear) and frozen_of(module.weight) is not None:
        return partial(lora_linear if isinstance(module, LoRALinear) else frozen_linear, module)
    if type(module) is not paddle.nn.Linear:
        return module
    held = module._parameters  # not the tensors themselves, which a caller may replace
    # paddle.matmul and + go straight to their kernels; F.linear, which PaddleNLP wraps, does not.
    if held.get("bias") is None:
        return lambda x: paddle.matmul(x, held["weight"])
    return lambda x: paddle.matmul(x, held["weight"]) + held["bias"]


def _rms_norm(module) -> Callable[[paddle.Tensor], paddle.Tensor]:
    """PaddleNLP's Qwen2RMSNorm, whose every call switches automatic mixed precision off and on again."""
    held, epsilon = module._parameters, module.variance_epsilon

    def norm(x: paddle.Tensor) -> paddle.Tensor:
        weight = held["weight"]
        wide = x if x.dtype == paddle.float32 else x.astype("float32")
        wide = wide * paddle.rsqrt(paddle.mean(wide * wide, axis=-1, keepdim=True) + epsilon)
        return (wide if wide.dtype == weight.dtype else wide.astype(weight.dtype)) * weight

    return norm


def capacity_for(length: int) -> int:
    """Positions that a cache holds per row when its longest row needs `length`."""
    return -(-length // _BLOCK) * _BLOCK


def _pieces(lengths: np.ndarray, heads: int) -> Iterator[tuple[int, int, int, int]]:
    """How prompts are read: (first row, row after the last, first position, position after the last).

    Every pass takes rows of like length, no more of them than `_SCORES` allows, and none that has ended.

    Args:
        lengths: Of the prompts, int64 [B], longest first.
        heads: Query heads, each with a score for every pair of positions.
    """
    longest = int(lengths[0])
    piece = min(_PIECE, max(1, _SCORES // (heads * capacity_for(longest))))
    for start in range(0, longest, piece):
        left = lengths[lengths > start] - start
        first = 0
        while first < len(left):
            width = min(piece, int(left[first]))
            most = max(1, _SCORES // (heads * width * capacity_for(start + width)))
            like = len(left) if width <= _NARROW else int((left > width // 2).sum())
            end = min(first + most, like)
            yield first, end, start, start + width
            first = end
