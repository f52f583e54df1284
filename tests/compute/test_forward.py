"""Chunked head log-probabilities and their gradients against paddle's own cross-entropy on whole logits."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.model.runtime import paddle as bring_up


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("train_head", [True, False])
def test_head_logps_and_gradients_equal_whole_logits(monkeypatch, transpose, train_head):
    paddle = bring_up()
    from finetune.compute import forward

    monkeypatch.setattr(forward, "CHUNK_ELEMENTS", 100)  # two rows a chunk
    random = np.random.default_rng(0)
    weights = random.standard_normal((50, 16) if transpose else (16, 50)).astype("float32")
    rows, scale = random.standard_normal((7, 16)).astype("float32"), random.standard_normal(7).astype("float32")
    targets = paddle.to_tensor(random.integers(0, 50, 7))

    def run(logps):
        hidden = paddle.to_tensor(rows, stop_gradient=False)
        weight = paddle.to_tensor(weights, stop_gradient=not train_head)
        out = logps(hidden, weight)
        (out * paddle.to_tensor(scale)).sum().backward()
        return out.numpy(), hidden.grad.numpy(), weight.grad.numpy() if train_head else None

    def whole(hidden, weight):
        logits = paddle.matmul(hidden, weight, transpose_y=transpose)
        return -paddle.nn.functional.cross_entropy(logits, targets, reduction="none")

    ours = run(lambda hidden, weight: forward.HeadLogps.apply(hidden, weight, targets, transpose, True))
    for got, want in zip(ours, run(whole)):
        if want is not None:
            np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("train_head", [True, False])
def test_total_nll_and_gradients_equal_whole_logits(monkeypatch, transpose, train_head):
    paddle = bring_up()
    from finetune.compute import forward

    monkeypatch.setattr(forward, "CHUNK_ELEMENTS", 100)
    random = np.random.default_rng(1)
    weights = random.standard_normal((50, 16) if transpose else (16, 50)).astype("float32")
    rows, targets = random.standard_normal((7, 16)).astype("float32"), paddle.to_tensor(random.integers(0, 50, 7))

    def run(total):
        hidden = paddle.to_tensor(rows, stop_gradient=False)
        weight = paddle.to_tensor(weights, stop_gradient=not train_head)
        out = total(hidden, weight)
        (out / 3).backward()
        return float(out), hidden.grad.numpy(), weight.grad.numpy() if train_head else None

    def whole(hidden, weight):
        logits = paddle.matmul(hidden, weight, transpose_y=transpose)
        return paddle.nn.functional.cross_entropy(logits, targets, reduction="sum")

    ours = run(lambda hidden, weight: forward.HeadNll.apply(hidden, weight, targets, transpose, True))
    for got, want in zip(ours, run(whole)):
        if want is not None:
            np.testing.assert_allclose(got, want, atol=2e-6, rtol=1e-6)
    with paddle.no_grad():
        alone = forward.HeadNll.apply(paddle.to_tensor(rows), paddle.to_tensor(weights), targets, transpose, False)
    assert float(alone) == pytest.approx(ours[0], rel=1e-6)


def test_no_scored_token_gives_an_empty_result_and_zero_gradients():
    paddle = bring_up()
    from finetune.compute import forward

    hidden = paddle.zeros([0, 16])
    hidden.stop_gradient = False
    out = forward.HeadLogps.apply(hidden, paddle.ones([50, 16]), paddle.zeros([0], dtype="int64"), True, True)
    assert out.shape == [0]
