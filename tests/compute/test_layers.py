"""Layers replaced for training against PaddleNLP's own: values, gradients, and which inputs get one."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.compute.layout import lay_out_samples
from finetune.model.adapters import LoraSettings
from finetune.model.load import load_model
from finetune.model.lora import add_lora
from finetune.model.runtime import paddle as bring_up

TARGETS = ["all-linear", ("q_proj",), ("v_proj",), ("k_proj", "gate_proj"), ("up_proj",), ("down_proj",)]


def batch(vocabulary: int = 400):
    draw = np.random.default_rng(0)
    samples = [draw.integers(0, vocabulary, length) for length in (9, 130, 3)]
    return samples, lay_out_samples([(ids, ids) for ids in samples])


def gradients(model) -> dict[str, np.ndarray]:
    return {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}


def plain_nll(model, samples):
    """By PaddleNLP's forward, one sample a call."""
    paddle = bring_up()
    total = 0.0
    for ids in samples:
        logits = model(input_ids=paddle.to_tensor(ids[None]))[0][0, :-1]
        total = total + paddle.nn.functional.cross_entropy(logits, paddle.to_tensor(ids[1:]), reduction="sum")
    return total


def build(folder, targets):
    model = load_model(folder, training=True).model
    if targets is None:
        return model
    model = add_lora(model, LoraSettings(rank=4, alpha=8.0, target_modules=targets), seed=1)
    draw = np.random.default_rng(2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.set_value(draw.normal(0, 0.1, parameter.shape).astype("float32"))
    return model


@pytest.mark.parametrize("targets", [None, *TARGETS], ids=str)
def test_loss_and_gradients_equal_paddlenlps(tiny_folder, targets):
    from finetune.compute.forward import total_nll

    samples, layout = batch()
    theirs, ours = build(tiny_folder, targets), build(tiny_folder, targets)
    want, got = plain_nll(theirs, samples), total_nll(ours, layout)
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    want.backward()
    got.backward()
    expected = gradients(theirs)
    assert gradients(ours).keys() == expected.keys()
    for name, value in gradients(ours).items():
        np.testing.assert_allclose(value, expected[name], atol=2e-4 * np.abs(expected[name]).max(), err_msg=name)


def test_the_layers_of_other_devices_give_the_same(tiny_folder, monkeypatch):
    """Where the CPU kernels do not apply, composed operations are used; they run here too."""
    from finetune.compute import cpu
    from finetune.compute.forward import token_logps, total_nll

    results = []
    for applies in (True, False):
        if not applies:
            monkeypatch.setattr(cpu, "fits", lambda *tensors: False)
        _, layout = batch()
        model = build(tiny_folder, None)
        nll = total_nll(model, layout)
        logps = token_logps(model, layout)
        (nll + (logps * paddle_weights(logps)).sum()).backward()
        results.append((float(nll), logps.numpy(), gradients(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    np.testing.assert_allclose(results[0][1], results[1][1], atol=2e-5)
    for name, value in results[0][2].items():
        other = results[1][2][name]
        np.testing.assert_allclose(value, other, atol=2e-4 * np.abs(other).max(), err_msg=name)


def paddle_weights(logps):
    return bring_up().to_tensor(np.random.default_rng(5).standard_normal(logps.shape).astype("float32"))
