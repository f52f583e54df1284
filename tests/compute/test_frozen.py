"""Quantized linear layers against the same model with the numbers that the codes stand for."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.compute.layout import lay_out_samples
from finetune.model.adapters import LoraSettings
from finetune.model.frozen import Frozen, frozen_of
from finetune.model.load import load_model
from finetune.model.lora import adapter_disabled, add_lora
from finetune.model.quantize import Quantization, quantize_int8, quantize_nf4
from finetune.model.runtime import paddle as bring_up

KINDS = [Quantization("nf4"), Quantization("nf4", double=False), Quantization("int8")]


def matrix(rows: int, columns: int) -> np.ndarray:
    draw = np.random.default_rng(0)
    return (draw.standard_normal([rows, columns]) * draw.uniform(0, 1, [rows, 1])).astype(np.float32)


@pytest.mark.parametrize("shape", [(48, 64), (7, 33), (1024, 896)])
@pytest.mark.parametrize("quantize", [quantize_nf4, lambda w: quantize_nf4(w, double=False), quantize_int8])
def test_both_ways_of_making_a_matrix_whole_give_the_codecs_numbers(shape, quantize):
    from finetune.compute.frozen import composed, dequantized

    paddle = bring_up()
    codes = quantize(matrix(*shape))
    frozen = Frozen.of(codes)
    expected = codes.dequantize()
    assert np.array_equal(dequantized(frozen, paddle.zeros([1])).numpy(), expected)
    np.testing.assert_allclose(composed(frozen).numpy(), expected, rtol=1e-6)


def layout():
    draw = np.random.default_rng(0)
    samples = [draw.integers(0, 400, length) for length in (9, 40, 3)]
    return lay_out_samples([(ids, ids) for ids in samples])


def adapted(model, settings: LoraSettings):
    """An adapter whose B is not zero."""
    model = add_lora(model, settings, seed=1)
    draw = np.random.default_rng(2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.set_value(draw.normal(0, 0.1, parameter.shape).astype("float32"))
    return model


def pair(folder, quantization: Quantization, settings: LoraSettings):
    """The quantized model, and a plain one with the same numbers in full."""
    ours = load_model(folder, training=True, quantization=quantization).model
    plain = load_model(folder, training=True).model
    codes = {name: frozen_of(parameter) for name, parameter in ours.named_parameters()}
    assert sum(value is not None for value in codes.values()) == 7 * len(plain.qwen2.layers)
    for name, parameter in plain.named_parameters():
        if codes[name] is not None:
            whole = quantization.quantize(parameter.numpy().T).dequantize()
            parameter.set_value(np.ascontiguousarray(whole.T))
    return adapted(ours, settings), adapted(plain, settings)


def results(model):
    from finetune.compute.forward import total_nll

    bring_up().seed(5)  # of dropout
    loss = total_nll(model, layout())
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    model.clear_gradients()
    return float(loss), gradients


@pytest.mark.parametrize("quantization", KINDS, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        LoraSettings(rank=4, alpha=8.0),
        LoraSettings(rank=4, alpha=8.0, target_modules=("q_proj", "down_proj")),
        LoraSettings(rank=4, alpha=8.0, dropout=0.3),
        LoraSettings(rank=4, alpha=8.0, variant="dora"),
        LoraSettings(rank=4, alpha=8.0, variant="dora", dropout=0.3, target_modules=("q_proj", "down_proj")),
    ],
    ids=["all", "some", "dropout", "dora", "dora, dropout"],
)
def test_loss_and_gradients_are_those_of_the_numbers_that_the_codes_stand_for(tiny_folder, quantization, settings):
    ours, plain = pair(tiny_folder, quantization, settings)
    (loss, gradients), (expected, expected_gradients) = results(ours), results(plain)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        expected = expected_gradients[name]
        assert gradient == pytest.approx(expected, rel=1e-4, abs=1e-5 * float(np.abs(expected).max())), name


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_the_base_alone_is_the_reference_of_dpo(tiny_folder, variant):
    ours, plain = pair(tiny_folder, KINDS[0], LoraSettings(rank=4, alpha=8.0, variant=variant))
    from finetune.compute.forward import total_nll

    with bring_up().no_grad(), adapter_disabled(ours), adapter_disabled(plain):
        assert float(total_nll(ours, layout())) == pytest.approx(float(total_nll(plain, layout())), rel=1e-6)


@pytest.mark.parametrize(
    ("quantization", "variant"), [*((kind, "lora") for kind in KINDS), (KINDS[0], "dora")], ids=str
)
def test_decoding_gives_the_same_logits(tiny_folder, quantization, variant):
    from finetune.compute.decoder import Decoder

    settings = LoraSettings(rank=4, alpha=8.0, target_modules=("q_proj", "up_proj"), variant=variant)
    models = pair(tiny_folder, quantization, settings)
    found = []
    for model in models:
        model.eval()
        decoder = Decoder(model)
        cache, logits = decoder.read([np.arange(5), np.arange(3) + 40])
        found.append([logits.numpy(), decoder.step([7, 8], cache).numpy()])
    for ours, plain in zip(*found):
        assert ours == pytest.approx(plain, rel=1e-4, abs=1e-5)
