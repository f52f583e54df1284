"""A Qwen2 forward pass for decoding, over the modules of a PaddleNLP model.

PaddleNLP's own pass grows the cache by concatenation at every token, repeats the key and value heads, and rebuilds its
masks. This one keeps keys and values in place and computes the same numbers (tests/infer/test_engine.py). Plain
projections are read off their weights, others (LoRA) are called as modules. What a token costs beside its matrix
products is mostly the number of operations and, on CPU, broadcasts over anything but the last axes: there are few of
either (docs/log.md). After `finetune.compute.packed.pack`, steps and pieces are that module's.

Prompts are read a piece at a time, so that other rows' tokens can be made between two pieces. They are padded on the
right meanwhile (but for a packed model); padding is overwritten or masked, and nothing depends on the other rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from finetune.model.runtime import paddle as _bring_up

_bring_up()

import paddle
import paddle.nn.functional as F

from finetune.compute.cache import KVCache, capacity_for
from finetune.compute.layers import frozen_product
from finetune.compute.memory import array_of
from finetune.compute.packed import PackedLinear, Steps
from finetune.model.build import body_of, causal_lm, config_of
from finetune.model.frozen import frozen_of

# Prompts are read in pieces of at most this many tokens, and fewer or fewer rows at a time where the attention scores
# would be more numbers than this: 512 MB in float32.
_PIECE = 512
_SCORES = 2**27
# Logits behind the tokens of a prompt are computed for so many at a time.
_TOLD = 32
# Below this width, padding a row costs less than going through the weights for it once more.
_NARROW = 64
# Rotary tables begin with this many positions and double when a longer row comes.
_FIRST_POSITIONS = 2048


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

    def reading(
        self,
        prompts: list[np.ndarray],
        known: list[list[paddle.Tensor]] | None = None,
        hear: Sequence[Callable[[np.ndarray], None] | None] | None = None,
    ) -> Reading:
        """Begin to read prompts, each int64 [L_i]; nothing is computed before `Reading.advance`.

        Args:
            known: Of each prompt, what `KVCache.take` gave of its beginning, in parts; less than the whole prompt.
            hear: Of each prompt, what is called with the logits behind its tokens, float32 [N, V], in their order: all
                that are read but the prompt's last. None of those that nobody wants to know.
        """
        return Reading(self, prompts, known or [[] for _ in prompts], hear or [None] * len(prompts))

    def read(self, prompts: list[np.ndarray]) -> tuple[KVCache, paddle.Tensor]:
        """Read prompts, each int64 [L_i], in one pass over the weights per 512 tokens of rows of like length.

        Returns:
            A cache of len(prompts) rows; the logits after each prompt's last token, float32 [B, V].
        """
        reading = self.reading(prompts)
        while reading.left:
            reading.advance()
        return reading.finish()

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

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache."""
        return KVCache(len(self.body.layers), rows, self.kv_heads, self.head_dim, capacity, self.dtype)

    def piece(self, ids: np.ndarray, cache: KVCache, first: int, starts: np.ndarray, stops: np.ndarray) -> Any:
        """Run the layers on a piece of some rows, ids[first + b, starts[b] : stops[b]] for row b.

        Returns:
            Hidden states by row and position, `hidden[b][t]` of position starts[b] + t.
        """
        rows = range(first, first + len(starts))
        if self._steps is not None:
            self._make_room(cache, int(stops.max()))
            parts = list(zip(rows, starts.tolist(), stops.tolist()))
            return self._steps.read(ids, parts, cache, array_of(self._cos)[:, 0], array_of(self._sin)[:, 0])
        width = int((stops - starts).max())
        padded = np.zeros([len(starts), width], dtype=np.int64)
        for b, row in enumerate(rows):
            padded[b, : stops[b] - starts[b]] = ids[row, starts[b] : stops[b]]
        return self._forward(padded, starts, cache, first)

    def logits(self, hidden: list[Any]) -> paddle.Tensor:
        """Logits, float32 [N, V], of hidden states that `piece` gave, each [H]."""
        if self._steps is not None:
            return self._steps.logits(np.stack(hidden))
        return self._logits(paddle.stack(hidden))

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
        hidden = self.body.embed_tokens(paddle.to_tensor(ids))
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


class Reading:
    """Prompts on their way into a cache of their own.

    Attributes:
        left: Tokens that are not read yet.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: list[np.ndarray],
        known: list[list[paddle.Tensor]],
        hear: Sequence[Callable[[np.ndarray], None] | None],
    ):
        self._decoder = decoder
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        read = np.array([sum(part.shape[2] for part in parts) for parts in known], dtype=np.int64)
        # Those with most to read first, so that rows of like length stand together.
        self._order = np.argsort(read - lengths, kind="stable")
        self._lengths, self._read = lengths[self._order], read[self._order]
        self._ids = np.zeros([len(prompts), int(lengths.max())], dtype=np.int64)
        self._cache = decoder.new_cache(len(prompts), int(lengths.max()) + 1)
        self._last: list[Any] = [None] * len(prompts)
        self._hear = [hear[i] for i in self._order]
        for row, i in enumerate(self._order):
            self._ids[row, : lengths[i]] = prompts[i]
            start = 0
            for part in known[i]:
                self._cache.put(row, start, part)
                start += part.shape[2]

    @property
    def left(self) -> int:
        return int((self._lengths - self._read).sum())

    def advance(self, tokens: int | None = None) -> int:
        """One pass over the weights: the next tokens of a prompt, and of those of like length behind it.

        Args:
            tokens: No more of them than this.

        Returns:
            How many tokens were read.
        """
        first, end, width = self._next(tokens)
        before = self._read[first:end].copy()
        after = np.minimum(before + width, self._lengths[first:end])
        with paddle.no_grad():
            hidden = self._decoder.piece(self._ids, self._cache, first, before, after)
            self._tell(hidden, first, before, after)
        self._read[first:end] = after
        for row in np.flatnonzero(after == self._lengths[first:end]).tolist():
            self._last[first + row] = hidden[row][int(after[row] - before[row]) - 1]
        return int((after - before).sum())

    def _tell(self, hidden: Any, first: int, before: np.ndarray, after: np.ndarray) -> None:
        """Logits of what was read, a few positions at a time: they are as wide as the vocabulary."""
        for row, start, stop in zip(range(first, first + len(before)), before.tolist(), after.tolist()):
            hear, count = self._hear[row], min(stop, int(self._lengths[row]) - 1) - start
            for t in range(0, count if hear is not None else 0, _TOLD):
                states = [hidden[row - first][s] for s in range(t, min(t + _TOLD, count))]
                hear(self._decoder.logits(states).numpy())

    def _next(self, tokens: int | None) -> tuple[int, int, int]:
        """The rows [first, end) of the next pass, and how many positions they go on by.

        They have like much left, and no more attention scores than `_SCORES` allows.
        """
        left = self._lengths - self._read
        first = int(np.flatnonzero(left)[0])
        heads, seen = self._decoder.heads, capacity_for(int(self._lengths[first:].max()))
        width = min(_PIECE, tokens or _PIECE, int(left[first]), max(1, _SCORES // (heads * seen)))
        most = max(1, min(_SCORES // (heads * width * seen), (tokens or 2**62) // width))
        least = 0 if width <= _NARROW else width // 2
        end = first + 1
        while end < min(len(left), first + most) and left[end] > least:
            end += 1
        return first, end, width

    def finish(self) -> tuple[KVCache, paddle.Tensor]:
        """The cache, its rows in the order of the prompts, and the logits after each prompt's last token, [B, V]."""
        back = np.argsort(self._order)
        self._cache.lengths = self._lengths
        if self._order.tolist() != sorted(self._order.tolist()):
            self._cache.select(back.tolist())
        with paddle.no_grad():
            return self._cache, self._decoder.logits([self._last[row] for row in back])


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
        return frozen_product(module)
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
