"""Attention over many sequences laid end to end in one row, each seeing itself only.

A micro-batch is one row without padding, so the linear layers do no work for padding, and attention is computed
sequence by sequence, so nothing is computed for pairs of tokens that may not see each other and no mask of [L, L] is
built for the batch. PaddleNLP repeats the key and value heads to the number of query heads; here they are grouped.
"""

from __future__ import annotations

from functools import lru_cache

from finetune.model.runtime import paddle as _bring_up
from finetune.train.layout import Span

_bring_up()
import paddle  # noqa: E402
import paddle.nn.functional as F  # noqa: E402


def use_span_attention(lm) -> None:
    """Make the attention layers of a Qwen2ForCausalLM take spans, and only spans, instead of a mask.

    The spans travel as `attn_mask_startend_row_indices`, which PaddleNLP hands from the model to `attn_func` as it is,
    and which keeps it from building masks. `use_flash_attention` keeps it from repeating key and value heads; its other
    reader, the attention function, is the one replaced here.
    """
    if lm.qwen2.layers[0].self_attn.attn_func is span_attention:
        return
    lm.config.use_flash_attention = True
    for layer in lm.qwen2.layers:
        layer.self_attn.attn_func = span_attention


def span_attention(
    query,
    config,
    key,
    value,
    attention_mask,
    output_attentions,
    attn_mask_startend_row_indices=None,
    training=True,
    sequence_parallel=False,
    skip_recompute=False,
):
    """Causal attention within spans. The signature is that of PaddleNLP's `attn_func`.

    Args:
        query: [1, T, heads, head_dim].
        key, value: [1, T, kv_heads, head_dim].
        attn_mask_startend_row_indices: The layout's spans, in order and without gaps: list of `Span`.

    Returns:
        [1, T, heads * head_dim].
    """
    spans = attn_mask_startend_row_indices
    if spans is None:
        raise ValueError("the model was set up for training by spans; load it again to call it with a mask")
    dropout = config.attention_dropout if training else 0.0
    query, key, value = (x.squeeze(0) for x in (query, key, value))
    tokens, heads, head_dim = query.shape
    parts = [_attend(query, key, value, span, dropout) for span in spans]
    out = parts[0] if len(parts) == 1 else paddle.concat(parts)
    return out.reshape([1, tokens, heads * head_dim])


def _attend(query, key, value, span: Span, dropout: float):
    """One span: [l, heads, head_dim]."""
    queries = query[span.start : span.stop]
    keys, values = (_visible(x, span) for x in (key, value))
    length, heads, head_dim = queries.shape
    seen, kv_heads = keys.shape[0], keys.shape[1]
    group = heads // kv_heads
    # [kv_heads, group * l, head_dim] @ [kv_heads, head_dim, n]: each key head serves its group of query heads.
    queries = queries.reshape([length, kv_heads, group, head_dim]).transpose([1, 2, 0, 3])
    queries = queries.reshape([kv_heads, group * length, head_dim]) * head_dim**-0.5
    scores = paddle.matmul(queries, keys.transpose([1, 2, 0])).reshape([kv_heads, group, length, seen])
    if length > 1:
        scores = scores + _causal_bias(seen, scores.dtype)[seen - length :]
    weights = F.softmax(scores.astype("float32"), axis=-1).astype(values.dtype)
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


def _causal_bias(size: int, dtype):
    """[size, size]: 0 where query i sees key j <= i, else the lowest number of the dtype."""
    rounded = 1 << max(6, (size - 1).bit_length())
    return _rounded_causal_bias(rounded, str(dtype).removeprefix("paddle."))[:size, :size]


@lru_cache(maxsize=4)
def _rounded_causal_bias(size: int, dtype: str):
    lowest = paddle.finfo(getattr(paddle, dtype)).min
    return paddle.triu(paddle.full([size, size], lowest, dtype=dtype), diagonal=1)
