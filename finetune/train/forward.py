"""From a micro-batch to the log-probability of every scored token.

The vocabulary is large (151,936) beside the hidden size (896 to 8192), so logits are made only where a prediction is
scored, and only a chunk of them is alive at a time: the head is recomputed in the backward pass.
"""

from __future__ import annotations

import numpy as np

from finetune.model.runtime import paddle as _bring_up
from finetune.train.layout import Layout, attention_mask

_bring_up()
import paddle  # noqa: E402
import paddle.nn.functional as F  # noqa: E402
from paddle.autograd import PyLayer  # noqa: E402

# Logits alive at once, in elements: 256 rows of Qwen2's vocabulary, 156 MB in float32.
_CHUNK_ELEMENTS = 256 * 151_936


def causal_lm(model):
    """The Qwen2ForCausalLM inside a LoRA wrapper, or the model itself."""
    return model.model if hasattr(model, "lora_config") else model


def token_logps(model, layout: Layout) -> paddle.Tensor:
    """Log-probability of each scored token.

    Args:
        model: PaddleNLP's Qwen2ForCausalLM, with or without LoRA.
        layout: The micro-batch.

    Returns:
        float32 [N], nats, in the order of `layout.targets`.
    """
    lm = causal_lm(model)
    mask = attention_mask(layout)
    hidden = lm.qwen2(
        input_ids=paddle.to_tensor(layout.input_ids),
        position_ids=paddle.to_tensor(layout.position_ids),
        attention_mask=None if mask is None else paddle.to_tensor(mask),
        use_cache=False,
        return_dict=True,
    )[0]
    hidden = hidden.reshape([-1, hidden.shape[-1]])
    hidden = paddle.gather(hidden, paddle.to_tensor(layout.predict_index), axis=0)
    head = lm.lm_head
    return HeadLogps.apply(hidden, head.weight, paddle.to_tensor(layout.targets), head.transpose_y)


def sum_by_owner(values: paddle.Tensor, layout: Layout) -> paddle.Tensor:
    """Sum float32 [N] over each scored sequence: float32 [num_owners]."""
    out = paddle.zeros([layout.num_owners], dtype=values.dtype)
    return paddle.scatter_nd_add(out, paddle.to_tensor(layout.owners[:, None]), values)


def owner_counts(layout: Layout) -> np.ndarray:
    """Scored tokens of each sequence, int64 [num_owners]."""
    return np.bincount(layout.owners, minlength=layout.num_owners).astype(np.int64)


class HeadLogps(PyLayer):
    """log softmax(hidden @ head)[target], in chunks of rows; logits are recomputed in the backward pass.

    d logp_t / d logits = onehot(target) - softmax(logits).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, transpose):
        """hidden [N, H], weight [V, H] (transpose) or [H, V], targets int64 [N] -> float32 [N]."""
        ctx.transpose = transpose
        ctx.save_for_backward(hidden, weight, targets)
        out = []
        for start, stop in _chunks(hidden, weight, transpose):
            logits = _logits(hidden[start:stop], weight, transpose)
            out.append(-F.cross_entropy(logits, targets[start:stop], reduction="none"))
        return paddle.concat(out) if out else paddle.zeros([0], dtype="float32")

    @staticmethod
    def backward(ctx, grad):
        """grad float32 [N] -> gradients of hidden and, where it is trained, of weight."""
        hidden, weight, targets = ctx.saved_tensor()
        transpose = ctx.transpose
        trained = not weight.stop_gradient
        grad_hidden, grad_weight = [], None
        for start, stop in _chunks(hidden, weight, transpose):
            rows = hidden[start:stop]
            index = targets[start:stop].unsqueeze(-1)
            softmax = F.softmax(_logits(rows, weight, transpose), axis=-1)
            g = grad[start:stop].unsqueeze(-1)
            d_logits = paddle.put_along_axis(softmax * -g, index, g, axis=1, reduce="add").astype(weight.dtype)
            grad_hidden.append(paddle.matmul(d_logits, weight, transpose_y=not transpose))
            if trained:
                left, right = (d_logits, rows) if transpose else (rows, d_logits)
                part = paddle.matmul(left, right, transpose_x=True)
                grad_weight = part if grad_weight is None else grad_weight.add_(part)
        grad_hidden = paddle.concat(grad_hidden) if grad_hidden else paddle.zeros_like(hidden)
        if not trained:
            return grad_hidden, None
        return grad_hidden, grad_weight if grad_weight is not None else paddle.zeros_like(weight)


def _logits(rows, weight, transpose):
    return paddle.matmul(rows, weight, transpose_y=transpose).astype("float32")


def _chunks(hidden, weight, transpose):
    vocab = weight.shape[0 if transpose else 1]
    size = max(1, _CHUNK_ELEMENTS // vocab)
    n = hidden.shape[0]
    return [(start, min(start + size, n)) for start in range(0, n, size)]
