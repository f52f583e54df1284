"""Attention over many sequences laid end to end in one row, each seeing itself (and its prompt) only.

A micro-batch is one row without padding, so the linear layers do no work for padding, and attention is computed
sequence by sequence, so nothing is computed for pairs of tokens that may not see each other and no mask of [T, T] is
built. PaddleNLP repeats the key and value heads to the number of query heads; here they are grouped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from finetune.compute import cpu, gpu
from finetune.compute.layout import Layout, Span, visible_until
from finetune.compute.limits import KEPT_ATTENTION_BYTES
from finetune.model.build import body_of
from finetune.model.runtime import paddle as _bring_up

_bring_up()
import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer
from paddle.incubate.nn.functional import fused_rotary_position_embedding

# Queries of a span that are taken together on CPU. Of the keys they do not see, only those among them are computed.
QUERIES = 128


@dataclass(frozen=True)
class Block:
    """Tokens [start, stop) of a span as queries: they see the span's prefix, and its own tokens from `first` on."""

    start: int
    stop: int
    first: int
    prefix: tuple[int, int] | None

    @property
    def seen(self) -> int:
        """Tokens that the last of them sees."""
        return self.stop - self.first + (self.prefix[1] - self.prefix[0] if self.prefix else 0)


@dataclass(frozen=True)
class Context:
    """What the attention layers need to know of a micro-batch.

    It travels through PaddleNLP's model as `attn_mask_startend_row_indices`, which is handed on as it is and keeps the
    model from building masks.

    Attributes:
        spans: The sequences of the row.
        cos, sin: float32 [T, head_dim / 2], of each token's rotary angles.
    """

    spans: list[Span]
    cos: np.ndarray
    sin: np.ndarray

    @cached_property
    def blocks(self) -> list[Block]:
        """The spans in blocks of at most `QUERIES` queries."""
        starts = [(span, start) for span in self.spans for start in range(span.start, span.stop, QUERIES)]
        return [Block(start, min(start + QUERIES, span.stop), span.start, span.prefix) for span, start in starts]

    @cached_property
    def angles(self) -> tuple[paddle.Tensor, paddle.Tensor]:
        """cos and sin on the device, float32 [T, 1, head_dim / 2]."""
        return paddle.to_tensor(self.cos[:, None]), paddle.to_tensor(self.sin[:, None])

    @cached_property
    def start_rows(self) -> paddle.Tensor:
        """The mask as FlashMask takes it, int32 [1, 1, T, 1]."""
        return paddle.to_tensor(visible_until(self.spans)[None, None, :, None])


def context_of(lm, layout: Layout) -> Context:
    """The context of a micro-batch, with angles from the model's own rotary table."""
    rotary = body_of(lm).layers[0].self_attn.rotary_emb
    positions = layout.position_ids[0]
    tables = rotary(paddle.zeros([1], dtype="float32"), seq_len=int(positions.max()) + 1)
    half = tables[0].shape[-1] // 2
    cos, sin = (table[0, :, 0, :half].numpy()[positions] for table in tables)
    return Context(layout.spans, cos, sin)


def attention_forward(self, hidden_states, position_ids, past_key_value, attention_mask, output_attentions, use_cache,
                      attn_mask_startend_row_indices=None):  # fmt: skip
    """Replaces the forward of PaddleNLP's Qwen2Attention: [1, T, hidden] -> [1, T, hidden]."""
    context = attn_mask_startend_row_indices
    if not isinstance(context, Context):
        raise ValueError("the model was set up for training; load it again to call it with a mask or a cache")
    tokens = hidden_states.shape[1]
    query = self.q_proj(hidden_states).reshape([tokens, self.num_heads, self.head_dim])
    key = self.k_proj(hidden_states).reshape([tokens, self.num_key_value_heads, self.head_dim])
    value = self.v_proj(hidden_states).reshape([tokens, self.num_key_value_heads, self.head_dim])
    dropout = self.attention_dropout if self.training else 0.0
    return self.o_proj(attend(query, key, value, context, dropout).reshape([1, tokens, -1]))


def attend(query, key, value, context: Context, dropout: float = 0.0):
    """Rotary embedding, then causal attention within spans.

    Args:
        query: [T, heads, head_dim], before the rotary embedding.
        key, value: [T, kv_heads, head_dim]; key before the rotary embedding.

    Returns:
        [T, heads, head_dim].
    """
    if not dropout and cpu.fits(query, key, value):
        return _SpanAttention.apply(query, key, value, context)
    shapes = tuple((_TRIAL_SPANS[-1].stop, *x.shape[1:]) for x in (query, key, value))
    fused = gpu.chosen("rotary", query.dtype, shapes[:2], _try_rotary_fused, _try_rotary)
    query, key = (_rotary_fused if fused else _rotary)(query, key, context)
    fused = not dropout and gpu.chosen("flashmask", query.dtype, shapes, _try_flashmask, _try_by_span)
    return _flashmask(query, key, value, context) if fused else _by_span(query, key, value, context, dropout)


# -- fused, on GPU -------------------------------------------------------------------------------------------------

# What kernels are tried on: two samples and a pair.
_PROMPT = (100, 140)
_TRIAL_SPANS = [Span(0, 40), Span(40, 100), Span(*_PROMPT), Span(140, 200, _PROMPT), Span(200, 230, _PROMPT)]


@cache
def _trial(head_dim: int) -> Context:
    shape = _TRIAL_SPANS[-1].stop, head_dim // 2
    angles = np.linspace(0, 6, shape[0] * shape[1], dtype=np.float32).reshape(shape)
    return Context(_TRIAL_SPANS, np.cos(angles), np.sin(angles))


def _try_rotary_fused(query, key):
    return _rotary_fused(query, key, _trial(query.shape[-1]))


def _try_rotary(query, key):
    return _rotary(query, key, _trial(query.shape[-1]))


def _try_flashmask(query, key, value):
    return [_flashmask(query, key, value, _trial(query.shape[-1]))]


def _try_by_span(query, key, value):
    return [_by_span(query, key, value, _trial(query.shape[-1]))]


def _rotary_fused(query, key, context: Context):
    """Rotary embedding of queries and keys [T, heads, head_dim] in one kernel."""
    # It wants the angles of both halves, [1, T, 1, head_dim], and the dtype of the queries.
    cos, sin = (paddle.concat([x, x], axis=-1)[None].astype(query.dtype) for x in context.angles)
    query, key, _ = fused_rotary_position_embedding(
        query[None], key[None], None, sin=sin, cos=cos, use_neox_rotary_style=False
    )
    return query[0], key[0]


def _flashmask(query, key, value, context: Context):
    """Attention of the whole row in one kernel, [T, heads, head_dim]; tokens of a prefix are not copied."""
    inputs = (x[None] for x in (query, key, value))
    return F.flashmask_attention(*inputs, startend_row_indices=context.start_rows, causal=True)[0]


# -- composed, on any device and in any dtype ------------------------------------------------------------------------


def _rotary(query, key, context: Context):
    return _rotated(query, context), _rotated(key, context)


def _rotated(x, context: Context):
    cos, sin = (t.astype(x.dtype) for t in context.angles)
    left, right = x.chunk(2, axis=-1)
    return paddle.concat([left * cos - right * sin, right * cos + left * sin], axis=-1)


def _by_span(query, key, value, context: Context, dropout: float = 0.0):
    parts = [_attend_span(query, key, value, span, dropout) for span in context.spans]
    return parts[0] if len(parts) == 1 else paddle.concat(parts)


def _attend_span(query, key, value, span: Span, dropout: float):
    queries = query[span.start : span.stop]
    keys, values = (_visible(x, span) for x in (key, value))
    length, heads, head_dim = queries.shape
    seen, kv_heads = keys.shape[0], keys.shape[1]
    group = heads // kv_heads
    # [kv_heads, group * l, head_dim] @ [kv_heads, head_dim, n]: each key head serves its group of query heads.
    queries = queries.reshape([length, kv_heads, group, head_dim]).transpose([1, 2, 0, 3])
    queries = queries.reshape([kv_heads, group * length, head_dim]) * head_dim**-0.5
    scores = paddle.matmul(queries, keys.transpose([1, 2, 0])).reshape([kv_heads, group, length, seen])
    scores = scores.astype("float32")
    scores = scores + paddle.triu(paddle.full([length, seen], -1e30, "float32"), diagonal=1 + seen - length)
    weights = F.softmax(scores, axis=-1).astype(values.dtype)
    if dropout:
        weights = F.dropout(weights, p=dropout)
    out = paddle.matmul(weights.reshape([kv_heads, group * length, seen]), values.transpose([1, 0, 2]))
    return out.reshape([kv_heads, group, length, head_dim]).transpose([2, 0, 1, 3]).reshape([length, heads, head_dim])


def _visible(x, span: Span):
    """Keys or values that a span sees: its prefix and itself, [n, kv_heads, head_dim]."""
    own = x[span.start : span.stop]
    if span.prefix is None:
        return own
    return paddle.concat([x[span.prefix[0] : span.prefix[1]], own])


# -- float32 on CPU ------------------------------------------------------------------------------------------------


class _SpanAttention(PyLayer):
    """The same in one node: products by MKL, the rest by cpu.py, gradients written in place."""

    @staticmethod
    def forward(ctx, query, key, value, context):
        heads, head_dim = query.shape[1:]
        kv_heads = key.shape[1]
        scale = np.float32(head_dim**-0.5)
        parts = (
            _by_head(query, context.cos * scale, context.sin * scale),
            _by_head(key, context.cos, context.sin),
            _by_head(value),
        )
        q, k, v = map(cpu.array_of, parts)
        out = paddle.empty(query.shape, dtype="float32")
        bytes_kept = sum(heads * (b.stop - b.start) * b.seen * 4 for b in context.blocks)
        kept: list[paddle.Tensor] = []
        for block in context.blocks:
            weights = _weights(q, k, block, heads // kv_heads)
            result = paddle.matmul(weights, _tensor(_keys(v, block)))
            _scatter(cpu.array_of(result), cpu.array_of(out)[block.start : block.stop])
            if bytes_kept <= KEPT_ATTENTION_BYTES:
                kept.append(weights)
        # As tensors: `recompute` drops what is saved so, but not what an attribute of ctx holds.
        ctx.save_for_backward(*parts, *kept)
        ctx.context, ctx.scale = context, scale
        ctx.frozen = [x.stop_gradient for x in (query, key, value)]
        return out

    @staticmethod
    def backward(ctx, grad):
        context, scale, saved = ctx.context, ctx.scale, ctx.saved_tensor()
        (q, k, v), kept = map(cpu.array_of, saved[:3]), saved[3:]
        group = q.shape[0] // k.shape[0]
        upstream = cpu.array_of(_by_head(grad))
        dq, dk, dv = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
        for index, block in enumerate(context.blocks):
            weights = kept[index] if kept else _weights(q, k, block, group)
            g = _tensor(_queries(upstream, block, group))
            scores = paddle.matmul(g, _tensor(_keys(v, block)), transpose_y=True)
            _add_keys(dv, block, paddle.matmul(weights, g, transpose_x=True))
            cpu.softmax_backward(cpu.array_of(weights), cpu.array_of(scores))
            into = cpu.array_of(paddle.matmul(scores, _tensor(_keys(k, block))))
            dq[:, block.start : block.stop] = into.reshape(q.shape[0], -1, q.shape[2])
            _add_keys(dk, block, paddle.matmul(scores, _tensor(_queries(q, block, group)), transpose_x=True))
        cos, sin = context.cos, context.sin
        gradients = _by_token(dq, cos * scale, -sin * scale), _by_token(dk, cos, -sin), _by_token(dv)
        return tuple(None if frozen else g for frozen, g in zip(ctx.frozen, gradients))


def _by_head(x, cos: np.ndarray | None = None, sin: np.ndarray | None = None):
    """[T, heads, D] -> [heads, T, D], rotated if angles are given."""
    source = cpu.array_of(x.contiguous())
    out = paddle.empty([source.shape[1], source.shape[0], source.shape[2]], dtype="float32")
    if cos is None or sin is None:
        cpu.array_of(out)[...] = source.transpose(1, 0, 2)
    else:
        cpu.rotate(source, cos, sin, cpu.array_of(out).transpose(1, 0, 2))
    return out


def _by_token(x: np.ndarray, cos: np.ndarray | None = None, sin: np.ndarray | None = None):
    """[heads, T, D] array -> [T, heads, D] tensor, rotated if angles are given."""
    out = paddle.empty([x.shape[1], x.shape[0], x.shape[2]], dtype="float32")
    if cos is None or sin is None:
        cpu.array_of(out)[...] = x.transpose(1, 0, 2)
    else:
        cpu.rotate(x.transpose(1, 0, 2), cos, sin, cpu.array_of(out))
    return out


def _weights(q: np.ndarray, k: np.ndarray, block: Block, group: int):
    """Attention weights of a block, tensor [kv_heads, group * l, n]."""
    scores = paddle.matmul(_tensor(_queries(q, block, group)), _tensor(_keys(k, block)), transpose_y=True)
    cpu.causal_softmax(cpu.array_of(scores).reshape(q.shape[0], block.stop - block.start, block.seen))
    return scores


def _queries(x: np.ndarray, block: Block, group: int) -> np.ndarray:
    """Rows of a block, [kv_heads, group * l, D]: the query heads of a key head are behind one another."""
    own = x[:, block.start : block.stop]
    return own.reshape(x.shape[0] // group, -1, x.shape[2])


def _keys(x: np.ndarray, block: Block) -> np.ndarray:
    """Rows that a block sees, [kv_heads, n, D]."""
    own = x[:, block.first : block.stop]
    return own if block.prefix is None else np.concatenate([x[:, block.prefix[0] : block.prefix[1]], own], axis=1)


def _add_keys(total: np.ndarray, block: Block, part) -> None:
    """Add gradients [kv_heads, n, D] to the rows that a block sees."""
    part = cpu.array_of(part)
    before = block.seen - (block.stop - block.first)
    total[:, block.first : block.stop] += part[:, before:]
    if block.prefix is not None:
        total[:, block.prefix[0] : block.prefix[1]] += part[:, :before]


def _scatter(result: np.ndarray, out: np.ndarray) -> None:
    """[kv_heads, group * l, D] -> out [l, heads, D]."""
    length, heads, head_dim = out.shape
    out[...] = result.reshape(heads, length, head_dim).transpose(1, 0, 2)


def _tensor(array: np.ndarray):
    out = paddle.empty(list(array.shape), dtype="float32")
    cpu.array_of(out)[...] = array
    return out
