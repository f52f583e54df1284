"""Folders of every layout become the same model; what does not add up is an error that names the file."""

from __future__ import annotations

import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.errors import ArgumentError, CheckpointError
from finetune.export.export import export
from finetune.model.adapted import stored_weights
from finetune.model.resolve import resolve_model
from tests.model.compute import logits, prompts
from tests.tiny import Shape, tiny_config, tiny_model, tiny_weights, write_json, write_weights


@pytest.fixture(scope="module")
def load():
    from finetune.model.load import load_model

    return load_model


def parameters(model) -> dict[str, np.ndarray]:
    from finetune.model.build import model_weights

    return {name: weight.read() for name, weight in model_weights(model).items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("max_shard_bytes", [None, 40_000])
def test_weights_arrive_bit_equal(tied, dtype, max_shard_bytes, tmp_path, load):
    folder = tiny_model(tmp_path / "m", tied=tied, dtype=dtype, max_shard_bytes=max_shard_bytes, tokenizer=False)
    loaded = load(folder)
    expected = tiny_weights(tied=tied, dtype=dtype)
    found = parameters(loaded.model)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name].astype(np.float32)) for name in expected)
    assert loaded.dtype == "float32" and not loaded.model.training
    assert np.isfinite(logits(loaded.model)).all()


def test_both_spellings_of_rope_theta_give_the_same_logits(tmp_path, load):
    old = tiny_model(tmp_path / "old", rope_theta=5e5, tokenizer=False)
    new = tiny_model(tmp_path / "new", rope_theta=5e5, rope="parameters", tokenizer=False)
    other = tiny_model(tmp_path / "other", rope_theta=1e4, tokenizer=False)
    assert np.array_equal(logits(load(old).model), logits(load(new).model))
    assert np.abs(logits(load(old).model) - logits(load(other).model)).max() > 0.01


def test_the_rotary_table_is_shared_and_grows(tmp_path, load):
    folder = tiny_model(tmp_path / "m", shape=Shape(max_position_embeddings=8192), tokenizer=False)
    model = load(folder).model
    tables = {id(layer.self_attn.rotary_emb) for layer in model.qwen2.layers}
    assert len(tables) == 1
    assert model.config.max_position_embeddings == 8192
    table = model.qwen2.layers[0].self_attn.rotary_emb
    assert table.max_seq_len_cached == 2048
    short = logits(model, prompts(rows=1, length=8))
    long = logits(model, prompts(rows=1, length=2100))
    assert table.max_seq_len_cached == 4096 and long.shape[1] == 2100
    assert np.array_equal(logits(model, prompts(rows=1, length=8)), short)


def test_parameter_names_are_the_same_for_every_model(tiny_folder, load):
    first, second = load(tiny_folder).model, load(tiny_folder).model
    assert [p.name for p in first.parameters()] == [p.name for p in second.parameters()]


def test_loading_leaves_no_trace_on_random_state_or_initializers(tiny_folder, load):
    import paddle

    paddle.seed(5)
    expected = paddle.randn([3]).numpy()
    paddle.seed(5)
    load(tiny_folder)
    assert np.array_equal(paddle.randn([3]).numpy(), expected)
    assert float(paddle.abs(paddle.nn.Linear(4, 4).weight).sum()) > 0


def test_training_mode(tiny_folder, load):
    assert load(tiny_folder, training=True).model.training


def test_half_precision_on_cpu_is_refused(tiny_folder, load):
    import paddle

    if paddle.get_device() != "cpu":
        pytest.skip("this device computes in bfloat16")
    with pytest.raises(ArgumentError, match="bfloat16"):
        load(tiny_folder, dtype="bfloat16")


def test_old_rotary_buffers_are_passed_over(tmp_path, load):
    folder = tiny_model(tmp_path / "m", tokenizer=False)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    write_weights(folder, tiny_weights() | extra)
    assert parameters(load(folder).model).keys() == tiny_weights().keys()


def test_a_tied_folder_may_repeat_its_embeddings_as_head(tmp_path, load):
    folder = tiny_model(tmp_path / "m", tokenizer=False)
    weights = tiny_weights()
    write_weights(folder, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].copy()})
    assert np.isfinite(logits(load(folder).model)).all()
    write_weights(folder, weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1})
    with pytest.raises(CheckpointError, match="differs from the embeddings"):
        load(folder)


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def replaced(name, change):
    return lambda weights: {key: change(value) if key == name else value for key, value in weights.items()}


DAMAGE = {
    "missing bias": (without("model.layers.1.self_attn.k_proj.bias"), "k_proj.bias"),
    "missing norm": (without("model.norm.weight"), "model.norm.weight"),
    "missing embedding": (without("model.embed_tokens.weight"), "embed_tokens"),
    "one more": (lambda w: w | {"model.layers.0.mlp.gate_proj.bias": np.ones(48, np.float32)}, "unexpected"),
    "a layer more": (lambda w: w | {"model.layers.2.x": np.ones(1, np.float32)}, "2 layers, the weights have 3"),
    "transposed": (replaced("model.layers.0.mlp.up_proj.weight", lambda x: x.T.copy()), "up_proj.weight"),
    "wrong size": (replaced("model.norm.weight", lambda x: x[:-1].copy()), "[31]"),
    "integers": (replaced("model.norm.weight", lambda x: x.astype(np.int32)), "int32"),
    "base model without prefix": (lambda weights: {k.removeprefix("model."): v for k, v in weights.items()}, "0"),
    "everything gone": (lambda weights: {"x": np.ones(1, np.float32)}, "layers"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_does_not_add_up_is_an_error(name, tmp_path, load):
    change, words = DAMAGE[name]
    folder = tiny_model(tmp_path / "m", tokenizer=False)
    write_weights(folder, change(tiny_weights()))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert words in str(caught.value) and str(folder) in str(caught.value)


def test_an_untied_folder_without_its_head(tmp_path, load):
    folder = tiny_model(tmp_path / "m", tokenizer=False)
    write_json(folder / "config.json", tiny_config(tied=False))
    with pytest.raises(CheckpointError, match="lm_head.weight"):
        load(folder)


def test_many_faults_are_cut_short(tmp_path, load):
    folder = tiny_model(tmp_path / "m", tokenizer=False)
    write_json(folder / "config.json", tiny_config(Shape(hidden_size=64)))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) == 9


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard", ["5GB", "40KB"])
def test_folders_that_paddlenlp_saved(tied, max_shard, tmp_path, load):
    loaded = load(tiny_model(tmp_path / "m", tied=tied, tokenizer=False))
    loaded.model.save_pretrained(str(tmp_path / "saved"), safe_serialization=True, max_shard_size=max_shard)
    again = load(tmp_path / "saved")
    assert again.source.kind == "paddle"
    assert np.array_equal(logits(again.model), logits(loaded.model))


@pytest.mark.parametrize("max_shard", ["5GB", "40KB"])
def test_a_bfloat16_folder_that_paddlenlp_saved(max_shard, tmp_path, load):
    """PaddleNLP stores the bits as U16."""
    from paddlenlp.transformers import AutoModelForCausalLM

    folder = tiny_model(tmp_path / "m", dtype="bfloat16", tokenizer=False)
    export(folder, tmp_path / "ours", format="paddle", say=lambda line: None)
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path / "ours"), dtype="bfloat16")
    theirs.save_pretrained(str(tmp_path / "saved"), safe_serialization=True, max_shard_size=max_shard)
    headers = [path.read_bytes() for path in (tmp_path / "saved").glob("*.safetensors")]
    assert all(b'"U16"' in header for header in headers)
    found = {name: weight.read() for name, weight in stored_weights(resolve_model(tmp_path / "saved")).items()}
    expected = tiny_weights(dtype="bfloat16")
    assert all(found[name].dtype == ml_dtypes.bfloat16 for name in expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert np.array_equal(logits(load(tmp_path / "saved").model), logits(load(folder).model))


def test_a_folder_paddlenlp_pickled_is_refused(tmp_path, load, tiny_folder):
    load(tiny_folder).model.save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(CheckpointError, match="pickle"):
        load(tmp_path / "saved")


def test_stored_weights_are_the_same_whatever_the_layout(tmp_path, load, tiny_untied_folder):
    load(tiny_untied_folder).model.save_pretrained(str(tmp_path / "saved"), safe_serialization=True)
    left, right = (stored_weights(resolve_model(folder)) for folder in (tiny_untied_folder, tmp_path / "saved"))
    assert left.keys() == right.keys()
    assert all(np.array_equal(left[name].read(), right[name].read()) for name in left)
    assert all(left[name].read().shape == left[name].shape for name in left)


def test_every_truncation_of_a_shard_is_refused(tiny_untied_folder, tmp_path, load):
    folder = tmp_path / "cut"
    shutil.copytree(tiny_untied_folder, folder)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    whole = shard.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=shard.name):
            load(folder)


def test_bfloat16_keeps_its_bits_from_file_to_array(tmp_path):
    folder = tiny_model(tmp_path / "m", dtype="bfloat16", tokenizer=False)
    weight = stored_weights(resolve_model(folder))["model.norm.weight"]
    assert weight.dtype == ml_dtypes.bfloat16
    assert weight.read().tobytes() == load_file(folder / "model.safetensors")["model.norm.weight"].tobytes()


def test_set_parameter_rounds_to_nearest_even(tiny_folder, load):
    from finetune.model.tensors import as_numpy, set_parameter

    parameter = load(tiny_folder).model.qwen2.norm.weight.astype("bfloat16")
    values = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    set_parameter(parameter, values)
    assert as_numpy(parameter).tobytes() == values.astype(ml_dtypes.bfloat16).tobytes()


def test_a_single_file_counts_before_an_index(tmp_path, load):
    """As in transformers."""
    folder = tiny_model(tmp_path / "m", max_shard_bytes=40_000, tokenizer=False)
    save_file(tiny_weights(seed=9), folder / "model.safetensors", metadata={"format": "pt"})
    found = parameters(load(folder).model)
    assert np.array_equal(found["model.norm.weight"], tiny_weights(seed=9)["model.norm.weight"])
