"""Elementwise kernels for float32 on CPU, written with NumPy over the memory of Paddle's tensors.

Paddle's products run on all cores (MKL), but its elementwise kernels run on one and make a pass through memory for
each operation; NumPy's exp alone is four times faster than Paddle's. Here rows are cut into blocks that stay in
cache, each block goes through all operations of a kernel at once, and blocks are shared out over the cores.
Nothing is copied between the two libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from finetune.compute.memory import array_of  # noqa: F401 (callers take it from here)
from finetune.model.runtime import threads

_BLOCK_BYTES = 256 * 1024
# Smallest exponent taken in a softmax. exp(-60) is nothing beside 1 in float32, while what lies below exp(-87) is
# stored as denormal numbers, which make the matrix product behind it ten times slower.
_LOWEST = np.float32(-60.0)
_SERIAL_BYTES = 512 * 1024  # below this, handing work to a thread costs more than it saves
_THREADS = threads()
_POOL = ThreadPoolExecutor(_THREADS, thread_name_prefix="finetune-cpu")


def fits(*tensors) -> bool:
    """Whether these kernels apply: float32 in main memory."""
    return all(t.place.is_cpu_place() and str(t.dtype) == "paddle.float32" for t in tensors)


def by_rows(rows: int, row_bytes: int, work: Callable[[slice], None]) -> None:
    """Call `work` on slices that together are [0, rows), on all threads of this process.

    Args:
        row_bytes: Bytes of one row of one operand; sets the size of the slices.
        work: Takes a slice; slices are disjoint and may run at the same time.
    """
    step = max(1, _BLOCK_BYTES // max(1, row_bytes))

    def share(first: int, last: int) -> None:
        # What overflows shows in the loss or the gradient norm, which the loop checks; NumPy need not warn beside it.
        with np.errstate(all="ignore"):
            for start in range(first, last, step):
                work(slice(start, min(start + step, last)))

    if rows * row_bytes <= _SERIAL_BYTES or _THREADS == 1:
        share(0, rows)
        return
    bounds = np.linspace(0, rows, _THREADS + 1).astype(int)
    futures = [_POOL.submit(share, int(a), int(b)) for a, b in zip(bounds, bounds[1:])]
    for future in futures:
        future.result()


# -- softmax over the vocabulary ---------------------------------------------------------------------------------


def target_logps(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """log softmax(logits)[target] of each row: logits [N, V] are destroyed; targets int64 [N] -> float32 [N]."""
    out = np.empty(len(logits), np.float32)

    def work(rows: slice) -> None:
        block, index = logits[rows], targets[rows]
        block -= block.max(axis=1, keepdims=True)
        picked = block[np.arange(len(block)), index]
        np.exp(block, out=block)
        out[rows] = picked - np.log(block.sum(axis=1))

    by_rows(len(logits), logits.shape[1] * 4, work)
    return out


def nll_to_gradient(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Turn logits [N, V] into the gradient of each row's -log softmax(logits)[target]; return that, float32 [N]."""
    losses = np.empty(len(logits), np.float32)

    def work(rows: slice) -> None:
        block, index = logits[rows], targets[rows]
        at = np.arange(len(block)), index
        block -= block.max(axis=1, keepdims=True)
        picked = block[at]
        np.exp(np.maximum(block, _LOWEST, out=block), out=block)
        total = block.sum(axis=1, keepdims=True)
        losses[rows] = np.log(total[:, 0]) - picked
        block *= 1.0 / total
        block[at] -= 1.0

    by_rows(len(logits), logits.shape[1] * 4, work)
    return losses


def logps_to_gradient(logits: np.ndarray, targets: np.ndarray, upstream: np.ndarray) -> None:
    """Turn logits [N, V] into upstream * (onehot(target) - softmax(logits)), in place; upstream float32 [N]."""

    def work(rows: slice) -> None:
        block, index = logits[rows], targets[rows]
        block -= block.max(axis=1, keepdims=True)
        np.exp(np.maximum(block, _LOWEST, out=block), out=block)
        block *= (-upstream[rows] / block.sum(axis=1))[:, None]
        block[np.arange(len(block)), index] += upstream[rows]

    by_rows(len(logits), logits.shape[1] * 4, work)


# Most queries that go through the softmax together, and which keys of their diagonal each of them does not see.
_QUERIES = 64
_HIDDEN = np.triu(np.ones((_QUERIES, _QUERIES), np.bool_), k=1)

# -- softmax of attention scores ---------------------------------------------------------------------------------


def causal_softmax(scores: np.ndarray) -> None:
    """Softmax over the keys each query may see, in place: scores [heads, l, n], query i sees keys j <= i + n - l."""
    heads, length, seen = scores.shape
    first = seen - length
    step = min(_QUERIES, max(1, _BLOCK_BYTES // (seen * 4)))

    def work(rows: slice) -> None:
        for start in range(0, length, step):
            stop = min(start + step, length)
            hidden = _HIDDEN[: stop - start, : stop - start]
            block = scores[rows, start:stop]
            part = block[:, :, : first + stop]
            diagonal = part[:, :, first + start :]
            np.copyto(diagonal, -np.inf, where=hidden)
            part -= part.max(axis=2, keepdims=True)
            np.exp(np.maximum(part, _LOWEST, out=part), out=part)
            np.copyto(diagonal, 0.0, where=hidden)
            part *= 1.0 / part.sum(axis=2, keepdims=True)
            block[:, :, first + stop :] = 0.0

    by_rows(heads, length * seen * 4, work)


def softmax_backward(weights: np.ndarray, upstream: np.ndarray) -> None:
    """Turn d loss / d weights into d loss / d scores, in place in `upstream`; both [..., n], contiguous."""
    p_rows, g_rows = (x.reshape(-1, x.shape[-1]) for x in (weights, upstream))

    def work(rows: slice) -> None:
        p, g = p_rows[rows], g_rows[rows]
        g -= np.einsum("rn,rn->r", p, g)[:, None]
        g *= p

    by_rows(len(p_rows), p_rows.shape[1] * 4, work)


# -- norm and gate -----------------------------------------------------------------------------------------------


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float, out: np.ndarray, inverse: np.ndarray) -> None:
    """out = x * inverse * weight, inverse = 1 / sqrt(mean(x^2) + epsilon); x, out [T, H], inverse [T]."""

    def work(rows: slice) -> None:
        block = x[rows]
        inverse[rows] = 1.0 / np.sqrt(np.einsum("th,th->t", block, block) / block.shape[1] + epsilon)
        np.multiply(block, inverse[rows, None], out=out[rows])
        out[rows] *= weight

    by_rows(len(x), x.shape[1] * 4, work)


def rms_norm_backward(
    x: np.ndarray, weight: np.ndarray, inverse: np.ndarray, upstream: np.ndarray, out: np.ndarray
) -> None:
    """Gradient of x: inverse * (g - n * mean(g * n)), g = upstream * weight, n = x * inverse; all [T, H]."""

    def work(rows: slice) -> None:
        scale = inverse[rows, None]
        normal = x[rows] * scale
        g = np.multiply(upstream[rows], weight, out=out[rows])
        normal *= (np.einsum("th,th->t", g, normal) / g.shape[1])[:, None]
        g -= normal
        g *= scale

    by_rows(len(x), x.shape[1] * 4, work)


def swiglu(gate: np.ndarray, up: np.ndarray, out: np.ndarray) -> None:
    """out = gate * sigmoid(gate) * up; all [T, F]."""

    def work(rows: slice) -> None:
        a = gate[rows]
        s = _sigmoid(a, out[rows])
        s *= a
        s *= up[rows]

    by_rows(len(gate), gate.shape[1] * 4, work)


def swiglu_backward(
    gate: np.ndarray, up: np.ndarray, upstream: np.ndarray, grad_gate: np.ndarray, grad_up: np.ndarray
) -> None:
    """d gate = g * up * s * (1 + gate * (1 - s)), d up = g * gate * s, s = sigmoid(gate); all [T, F]."""

    def work(rows: slice) -> None:
        a, g = gate[rows], upstream[rows]
        s = _sigmoid(a, np.empty_like(a))
        gs = g * s
        np.multiply(gs, a, out=grad_up[rows])
        d = np.subtract(1.0, s, out=grad_gate[rows])
        d *= a
        d += 1.0
        d *= gs
        d *= up[rows]

    by_rows(len(gate), gate.shape[1] * 4, work)


def _sigmoid(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)); exp overflows to inf for x < -88, where the result is 0 as it should be."""
    np.negative(x, out=out)
    np.exp(out, out=out)
    out += 1.0
    return np.reciprocal(out, out=out)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, out: np.ndarray) -> None:
    """Rotary embedding: x, out [T, heads, D]; cos, sin [T, D/2]. The transpose (the gradient) takes -sin."""
    half = x.shape[2] // 2

    def work(rows: slice) -> None:
        c, s = cos[rows, None], sin[rows, None]
        left, right = x[rows, :, :half], x[rows, :, half:]
        np.multiply(left, c, out=out[rows, :, :half])
        out[rows, :, :half] -= right * s
        np.multiply(right, c, out=out[rows, :, half:])
        out[rows, :, half:] += left * s

    by_rows(len(x), x.shape[1] * x.shape[2] * 4, work)


# -- gradients ---------------------------------------------------------------------------------------------------


def squared_norm(x: np.ndarray) -> float:
    """Sum of squares of a flat array, in float64 over the blocks."""
    parts: dict[int, float] = {}

    def work(rows: slice) -> None:
        parts[rows.start] = float(np.dot(x[rows], x[rows]))

    by_rows(len(x), 4, work)
    return sum(parts[start] for start in sorted(parts))
