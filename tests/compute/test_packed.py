"""Packed weights and the step in NumPy against NumPy's products and PaddleNLP's own forward pass."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.infer.sampling import Sampling
from tests.tiny import Shape, tiny_model

LENGTHS = (3, 17, 129, 1, 260)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    """Three query heads to a key head; the prompts below cross a block of the cache."""
    shape = Shape(hidden_size=48, num_hidden_layers=3, num_attention_heads=6, max_position_embeddings=640)
    return tiny_model(tmp_path_factory.mktemp("cpu") / "base", shape=shape, tied=request.param, seed=3)


@pytest.fixture(scope="module")
def model(folder):
    from finetune.model.load import load_model

    return load_model(folder).model


@pytest.fixture(scope="module")
def packed(folder):
    from finetune.compute.packed import PackedLinear, pack
    from finetune.model.load import load_model

    model = load_model(folder).model
    pack(model)
    assert isinstance(model.lm_head, PackedLinear)
    return model


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 400, length).tolist() for length in LENGTHS]


def own_logits(model, ids: list[int]) -> np.ndarray:
    """PaddleNLP's forward over the whole sequence: logits of the last position."""
    import paddle

    with paddle.no_grad():
        return model(paddle.to_tensor([ids]), return_dict=True).logits[0, -1].numpy()


@pytest.mark.parametrize("size", [(48, 96), (96, 48), (33, 7), (5, 1000), (1, 1), (896, 128)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_product_takes_any_number_of_rows(size, bias):
    import paddle

    from finetune.compute.packed import PackedLinear

    rng = np.random.default_rng(1)
    linear = paddle.nn.Linear(*size, bias_attr=None if bias else False)
    linear.weight.set_value(rng.standard_normal(size, dtype=np.float32))
    if bias:
        linear.bias.set_value(rng.standard_normal(size[1], dtype=np.float32))
    expected = linear.weight.numpy().astype(np.float64)
    offset = linear.bias.numpy() if bias else 0.0
    packed = PackedLinear(linear)
    assert packed.agrees_with(linear)
    del linear
    for rows in (1, 2, 3, 7, 8, 9, 16, 31, 300):
        x = rng.standard_normal((rows, size[0]), dtype=np.float32)
        np.testing.assert_allclose(packed(paddle.to_tensor(x)).numpy(), x @ expected + offset, atol=3e-4)
    x = rng.standard_normal((2, 3, size[0]), dtype=np.float32)
    np.testing.assert_allclose(packed(paddle.to_tensor(x)).numpy(), x @ expected + offset, atol=3e-4)


def test_a_product_that_is_wrong_is_not_used(folder, monkeypatch):
    from finetune.compute.packed import PackedLinear, pack
    from finetune.model.load import load_model

    multiply = PackedLinear.multiply

    def wrong(self, x, out):
        out[...] = multiply(self, x, out) * (1.001 if len(x) == 1 else 1.0)
        return out

    monkeypatch.setattr(PackedLinear, "multiply", wrong)
    model = load_model(folder).model
    pack(model)
    assert not any(isinstance(layer, PackedLinear) for layer in model.sublayers())


def test_the_packed_model_computes_the_same(model, packed, prompts):
    for prompt in prompts:
        np.testing.assert_allclose(own_logits(packed, prompt), own_logits(model, prompt), atol=2e-5)


def test_steps_equal_the_models_own_forward(model, packed, prompts):
    """Rows of all lengths together; four steps, past the end of a block of the cache; then fewer rows, reordered."""
    from finetune.infer.engine import Engine

    decoder = Engine(packed, stop_token_ids=[]).decoder
    cache, logits = decoder.read([np.array(prompt) for prompt in prompts])
    rows = [list(prompt) for prompt in prompts]
    np.testing.assert_allclose(logits.numpy(), [own_logits(model, row) for row in rows], atol=2e-5)
    for step in range(4):
        tokens = [(7 * step + 11 * place) % 400 for place in range(len(rows))]
        rows = [[*row, token] for row, token in zip(rows, tokens)]
        logits = decoder.step(tokens, cache).numpy()
        np.testing.assert_allclose(logits, [own_logits(model, row) for row in rows], atol=2e-5)
    cache.select([4, 0])
    logits = decoder.step([5, 6], cache).numpy()
    np.testing.assert_allclose(logits, [own_logits(model, row) for row in ([*rows[4], 5], [*rows[0], 6])], atol=2e-5)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_greedy_answers_equal_those_of_the_plain_engine(model, packed, prompts, batch_size):
    from finetune.infer.engine import Engine

    sampling = Sampling(max_new_tokens=30)
    expected, found = (
        [output.tokens for output in Engine(m, stop_token_ids=[]).generate(prompts, sampling, batch_size=batch_size)]
        for m in (model, packed)
    )
    assert found == expected


def test_rows_beyond_the_first_rotary_table(packed, model, monkeypatch):
    monkeypatch.setattr("finetune.compute.decoder._FIRST_POSITIONS", 4)
    from finetune.infer.engine import Engine

    decoder = Engine(packed, stop_token_ids=[]).decoder
    cache, _ = decoder.read([np.arange(127)])
    ids = list(range(127))
    for token in (3, 4, 5):
        ids.append(token)
        logits = decoder.step([token], cache).numpy()
    np.testing.assert_allclose(logits[0], own_logits(model, ids), atol=2e-5)


def test_adapters_are_left_as_they_are(folder):
    from finetune.compute.packed import PackedLinear, pack
    from finetune.model.adapters import LoraSettings
    from finetune.model.load import load_model
    from finetune.model.lora import add_lora

    model = add_lora(load_model(folder).model, LoraSettings(rank=2), seed=1)
    pack(model)
    assert not any(isinstance(layer, PackedLinear) for layer in model.sublayers())


def test_packing_gives_paddles_weights_back(folder):
    import weakref

    from finetune.compute.packed import pack
    from finetune.model.load import load_model

    model = load_model(folder).model
    held = [weakref.ref(layer.mlp.up_proj.weight) for layer in model.qwen2.layers]
    pack(model)
    assert [reference() for reference in held] == [None] * len(held)
    assert sum(np.prod(parameter.shape) for parameter in model.parameters()) < 416 * 48 + 20 * 48
