"""From a micro-batch to the log-probability of every scored token.

The vocabulary is large (151,936) beside the hidden size (896 to 8192), so logits are made only where a prediction is
scored, and only a chunk of them is alive at a time: the head is recomputed in the backward pass.
"""

from __future__ import annotations

import numpy as np

from finetune.compute import cpu
from finetune.compute.attention import context_of
from finetune.compute.layers import given, prepare_layers, wants
from finetune.compute.layout import Layout
from finetune.compute.limits import CHUNK_ELEMENTS
from finetune.compute.noise import noisy_embeddings
from finetune.model.build import body_of, causal_lm
from finetune.model.lora_layers import LoraHead
from finetune.model.runtime import paddle as _bring_up

_bring_up()
import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer


def token_logps(model, layout: Layout) -> paddle.Tensor:
    """Log-probability of each scored token.

    Args:
        model: PaddleNLP's Qwen2ForCausalLM, with or without LoRA. Set up for spans from here on.
        layout: The micro-batch.

    Returns:
        float32 [N], nats, in the order of `layout.targets`.
    """
    hidden, (weight, transpose) = _scored_hidden(model, layout), _head(model)
    targets = paddle.to_tensor(layout.targets)
    return HeadLogps.apply(hidden, weight, targets, transpose, _wants(hidden, weight))


def total_nll(model, layout: Layout) -> paddle.Tensor:
    """Negative log-likelihood of all scored tokens: float32 scalar, nats. Equals `-token_logps(model, layout).sum()`.

    Cheaper than that where a gradient is wanted: since each token has the same weight, the gradient of the logits is
    known in the forward pass, and the head is not computed twice.
    """
    hidden, (weight, transpose) = _scored_hidden(model, layout), _head(model)
    targets = paddle.to_tensor(layout.targets)
    return HeadNll.apply(hidden, weight, targets, transpose, _wants(hidden, weight))


def score_tokens(model, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """As `token_logps`, without gradient: float32 [N], and whether each scored token is the likeliest, bool [N]."""
    with paddle.no_grad():
        hidden, (weight, transpose) = _scored_hidden(model, layout), _head(model)
        logps, greedy = [], []
        for start, stop in _chunks(hidden, weight, transpose):
            targets = paddle.to_tensor(layout.targets[start:stop])
            logits = _logits(hidden[start:stop], weight, transpose)
            greedy.append((logits.argmax(axis=-1) == targets).numpy())
            logps.append(_target_logps(logits, targets).numpy())
    return np.concatenate(logps), np.concatenate(greedy)


def _head(model) -> tuple[paddle.Tensor, bool]:
    """What hidden states are multiplied with, and whether it is [vocab, hidden]; the gradient goes through it."""
    head = causal_lm(model).lm_head
    return head.product() if isinstance(head, LoraHead) else head.weight, head.transpose_y


def _wants(hidden, weight) -> bool:
    """Whether a gradient is to come."""
    return paddle.is_grad_enabled() and not (hidden.stop_gradient and weight.stop_gradient)


def _scored_hidden(model, layout: Layout) -> paddle.Tensor:
    """Last hidden states at the scored positions, [N, hidden]."""
    lm = causal_lm(model)
    prepare_layers(lm)
    embeddings = noisy_embeddings(lm, layout)
    hidden = body_of(lm)(
        input_ids=paddle.to_tensor(layout.input_ids) if embeddings is None else None,
        inputs_embeds=embeddings,
        position_ids=paddle.to_tensor(layout.position_ids),
        attn_mask_startend_row_indices=context_of(lm, layout),
        use_cache=False,
        return_dict=True,
    )[0]
    return paddle.gather(hidden.squeeze(0), paddle.to_tensor(layout.predict_index), axis=0)


def sum_by_owner(values: paddle.Tensor, layout: Layout) -> paddle.Tensor:
    """Sum float32 [N] over each scored sequence: float32 [num_owners]."""
    out = paddle.zeros([layout.num_owners], dtype=values.dtype)
    return paddle.scatter_nd_add(out, paddle.to_tensor(layout.owners[:, None]), values)


def owner_counts(layout: Layout) -> np.ndarray:
    """Scored tokens of each sequence, int64 [num_owners]."""
    return np.bincount(layout.owners, minlength=layout.num_owners).astype(np.int64)


class HeadLogps(PyLayer):
    """log softmax(hidden @ head)[target], in chunks of rows.

    d logp / d logits = onehot(target) - softmax(logits). With a frozen head the gradient of a row of `hidden` is that
    times the head, times a number that comes with the backward pass; all but the number is made on the way. A trained
    head needs the numbers first, so its logits are computed again in the backward pass.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, transpose, with_gradient):
        """hidden [N, H], weight [V, H] (transpose) or [H, V], targets int64 [N] -> float32 [N]."""
        ctx.transpose, ctx.trained = transpose, with_gradient and not weight.stop_gradient
        ctx.wants = wants(hidden, weight)
        ahead = with_gradient and not ctx.trained
        gradients = _HeadGradients(hidden, weight, transpose, trained=False)
        out = []
        for start, stop in _chunks(hidden, weight, transpose):
            rows, index = hidden[start:stop], targets[start:stop]
            logits = _logits(rows, weight, transpose)
            if not ahead:
                out.append(_target_logps(logits, index))
                continue
            nll, d_logits = _nll_to_gradient(logits, index)
            out.append(-nll)
            gradients.add(rows, d_logits)
            del logits, d_logits  # before the next chunk's are made beside them
        ctx.save_for_backward(*(gradients.of_hidden(),) if ahead else (hidden, weight, targets))
        return paddle.concat(out) if out else paddle.zeros([0], dtype="float32")

    @staticmethod
    def backward(ctx, grad):
        """grad float32 [N] -> gradients of hidden and, where it is trained, of weight."""
        if not ctx.trained:
            (of_nll,) = ctx.saved_tensor()
            return of_nll * (-grad).unsqueeze(-1).astype(of_nll.dtype), None
        hidden, weight, targets = ctx.saved_tensor()
        gradients = _HeadGradients(hidden, weight, ctx.transpose, trained=True)
        for start, stop in _chunks(hidden, weight, ctx.transpose):
            logits = _logits(hidden[start:stop], weight, ctx.transpose)
            gradients.add(hidden[start:stop], _logps_to_gradient(logits, targets[start:stop], grad[start:stop]))
        return given(ctx.wants, gradients.of_hidden(), gradients.of_weight)


class HeadNll(PyLayer):
    """-sum of log softmax(hidden @ head)[target], in chunks of rows, with its gradient made on the way.

    d nll / d logits = softmax(logits) - onehot(target); the backward pass only scales by the gradient it is given.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, transpose, with_gradient):
        """hidden [N, H], weight [V, H] (transpose) or [H, V], targets int64 [N] -> float32 scalar."""
        trained = with_gradient and not weight.stop_gradient
        gradients = _HeadGradients(hidden, weight, transpose, trained=trained)
        total = paddle.zeros([], dtype="float32")
        for start, stop in _chunks(hidden, weight, transpose):
            rows, index = hidden[start:stop], targets[start:stop]
            logits = _logits(rows, weight, transpose)
            if not with_gradient:
                total -= _target_logps(logits, index).sum()
                continue
            nll, d_logits = _nll_to_gradient(logits, index)
            total += nll.sum()
            gradients.add(rows, d_logits)
            del logits, d_logits  # before the next chunk's are made beside them
        ctx.trained, ctx.wants = trained, wants(hidden, weight)
        if with_gradient:
            ctx.save_for_backward(gradients.of_hidden(), gradients.of_weight)
        return total

    @staticmethod
    def backward(ctx, grad):
        """grad float32 scalar -> gradients of hidden and, where it is trained, of weight."""
        grad_hidden, grad_weight = ctx.saved_tensor()
        scaled = grad_hidden * grad.astype(grad_hidden.dtype)
        return given(ctx.wants, scaled, grad_weight.scale_(float(grad)) if ctx.trained else None)


class _HeadGradients:
    """Gradients of hidden states and head, from the logits' gradients of one chunk after the other."""

    def __init__(self, hidden, weight, transpose: bool, *, trained: bool):
        self._hidden, self._weight, self._transpose = hidden, weight, transpose
        self._parts: list = []
        self.of_weight = paddle.zeros_like(weight) if trained else None

    def add(self, rows, d_logits) -> None:
        """rows [n, H]; d_logits [n, V], float32."""
        d_logits = d_logits.astype(self._weight.dtype)
        self._parts.append(paddle.matmul(d_logits, self._weight, transpose_y=not self._transpose))
        if self.of_weight is not None:
            left, right = (d_logits, rows) if self._transpose else (rows, d_logits)
            self.of_weight.addmm_(left.t(), right)

    def of_hidden(self):
        """[N, H]."""
        return paddle.concat(self._parts) if self._parts else paddle.zeros_like(self._hidden)


def _target_logps(logits, targets):
    """log softmax(logits)[target], float32 [n]; logits are destroyed."""
    if cpu.fits(logits):
        return paddle.to_tensor(cpu.target_logps(cpu.array_of(logits), targets.numpy()))
    return -F.cross_entropy(logits, targets, reduction="none")


def _nll_to_gradient(logits, targets):
    """(-log softmax(logits)[target] of each row, float32 [n]; its gradient [n, V]); logits are destroyed."""
    if cpu.fits(logits):
        return paddle.to_tensor(cpu.nll_to_gradient(cpu.array_of(logits), targets.numpy())), logits
    nll = F.cross_entropy(logits, targets, reduction="none")
    return nll, F.softmax(logits, axis=-1) - F.one_hot(targets, logits.shape[-1])


def _logps_to_gradient(logits, targets, upstream):
    """upstream * (onehot(target) - softmax(logits)), [n, V]; logits are destroyed."""
    if cpu.fits(logits):
        cpu.logps_to_gradient(cpu.array_of(logits), targets.numpy(), upstream.numpy())
        return logits
    return (F.one_hot(targets, logits.shape[-1]) - F.softmax(logits, axis=-1)) * upstream.unsqueeze(-1)


def _logits(rows, weight, transpose):
    return paddle.matmul(rows, weight, transpose_y=transpose).astype("float32")


def _chunks(hidden, weight, transpose):
    vocab = weight.shape[0 if transpose else 1]
    size = max(1, CHUNK_ELEMENTS // vocab)
    n = hidden.shape[0]
    return [(start, min(start + size, n)) for start in range(0, n, size)]
