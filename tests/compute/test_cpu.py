"""The NumPy kernels against plain formulas in float64, on shapes that need one block and many."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.compute import cpu
from finetune.model.runtime import paddle as bring_up

draw = np.random.default_rng(0)


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (draw.standard_normal(shape) * scale).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("scale", [1.0, 40.0])
@pytest.mark.parametrize("shape", [(1, 2), (5, 300), (300, 5000)])
def test_vocabulary_softmax(shape, scale):
    logits, targets, upstream = normal(*shape, scale=scale), draw.integers(0, shape[1], shape[0]), normal(shape[0])
    exact = logits.astype(np.float64)
    p = softmax(exact)
    at = np.arange(shape[0]), targets
    shifted = exact - exact.max(axis=1, keepdims=True)
    logps = shifted[at] - np.log(np.exp(shifted).sum(axis=1))
    onehot = np.zeros(shape)
    onehot[at] = 1.0
    np.testing.assert_allclose(cpu.target_logps(logits.copy(), targets), logps, rtol=2e-6, atol=2e-6)
    work = logits.copy()
    np.testing.assert_allclose(cpu.nll_to_gradient(work, targets), -logps, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(work, p - onehot, atol=1e-6)
    work = logits.copy()
    cpu.logps_to_gradient(work, targets, upstream)
    np.testing.assert_allclose(work, upstream[:, None] * (onehot - p), atol=3e-6)


def test_no_denormal_numbers_are_left_behind():
    logits = np.linspace(-100, 0, 2000, dtype=np.float32)[None].repeat(3, axis=0)
    cpu.nll_to_gradient(logits, np.zeros(3, np.int64))
    assert (np.abs(logits) >= np.finfo(np.float32).tiny).all()


@pytest.mark.parametrize(
    ("heads", "length", "seen"), [(1, 1, 1), (2, 3, 3), (3, 70, 70), (4, 130, 190), (2, 1, 65), (1, 70, 2000)]
)
def test_causal_softmax_and_its_gradient(heads, length, seen):
    scores, upstream = normal(heads, length, seen, scale=5.0), normal(heads, length, seen)
    visible = np.arange(seen)[None] <= np.arange(length)[:, None] + seen - length
    p = softmax(np.where(visible, scores.astype(np.float64), -np.inf))
    weights = scores.copy()
    cpu.causal_softmax(weights)
    np.testing.assert_allclose(weights, p, atol=1e-6)
    assert (weights[:, ~visible] == 0.0).all()
    got = upstream.copy()
    cpu.softmax_backward(weights, got)
    np.testing.assert_allclose(got, p * (upstream - (p * upstream).sum(axis=-1, keepdims=True)), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 700])
def test_norm_gate_and_rotation(rows):
    x, weight, g = normal(rows, 512), normal(512), normal(rows, 512)
    out, inverse, grad = np.empty_like(x), np.empty(rows, np.float32), np.empty_like(x)
    cpu.rms_norm(x, weight, 1e-6, out, inverse)
    exact, up = x.astype(np.float64), g.astype(np.float64) * weight
    r = 1 / np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out, exact * r * weight, atol=1e-5)
    cpu.rms_norm_backward(x, weight, inverse, g, grad)
    np.testing.assert_allclose(grad, r * (up - exact * r * (up * exact * r).mean(axis=1, keepdims=True)), atol=2e-5)

    gate, other = normal(rows, 512, scale=30.0), normal(rows, 512)
    s = 1 / (1 + np.exp(-gate.astype(np.float64)))
    cpu.swiglu(gate, other, out)
    np.testing.assert_allclose(out, gate * s * other, rtol=1e-5, atol=1e-6)
    grad_gate, grad_up = np.empty_like(x), np.empty_like(x)
    cpu.swiglu_backward(gate, other, g, grad_gate, grad_up)
    np.testing.assert_allclose(grad_gate, g * other * s * (1 + gate * (1 - s)), rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(grad_up, g * gate * s, rtol=1e-5, atol=1e-5)

    tokens, angle = x.reshape(rows, 4, 128), normal(rows, 64)
    turned = np.empty_like(tokens)
    cpu.rotate(tokens, np.cos(angle), np.sin(angle), turned)
    left, right, c, s = tokens[..., :64], tokens[..., 64:], np.cos(angle)[:, None], np.sin(angle)[:, None]
    np.testing.assert_allclose(turned, np.concatenate([left * c - right * s, right * c + left * s], axis=2), atol=1e-6)


def test_an_array_is_the_tensors_own_memory_and_keeps_it_alive():
    paddle = bring_up()
    tensor = paddle.zeros([2, 3])
    array = cpu.array_of(tensor)
    array[1, 2] = 7.0
    assert float(tensor[1, 2]) == 7.0
    del tensor
    paddle.ones([1000, 1000])
    assert array[1, 2] == 7.0
    with pytest.raises(ValueError, match="contiguous"):
        cpu.array_of(paddle.zeros([4, 4]).t()[1:, :2])
