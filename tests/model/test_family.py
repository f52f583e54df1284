"""What is said of a family, against published sizes and against models that other programs made."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import pytest

from finetune.model.config import read_config
from finetune.model.family import ADAPTABLE, FAMILIES, Linear, Qwen2
from tests.tiny import Shape, tiny_config, tiny_weights

# config.json of the models on the hub, and the numbers in their safetensors' headers.
PUBLISHED = {
    "Qwen2-0.5B": (Qwen2(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                         num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True), 494_032_768),
    "Qwen2-1.5B": (Qwen2(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                         num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True), 1_543_714_304),
    "Qwen2-7B": (Qwen2(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                       num_attention_heads=28, num_key_value_heads=4), 7_615_616_512),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_models(name):
    config, parameters = PUBLISHED[name]
    assert config.parameters == parameters


@pytest.mark.parametrize("tied", [True, False])
def test_the_shapes_are_those_of_the_folder(tied, tmp_path):
    config = read_config(tiny_config(tied=tied), tmp_path)
    assert dict(config.shapes) == {name: array.shape for name, array in tiny_weights(tied=tied).items()}


def test_names_and_shapes_are_those_of_paddlenlp_s_own_model():
    from finetune.model.build import build_model

    config = read_config(tiny_config(Shape(num_key_value_heads=1), tied=False), "somewhere")
    model = build_model(config, "float32")
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert found == {config.paddle_name(name): config.paddle_shape(name) for name in config.shapes}


def test_names_return():
    config = read_config(tiny_config(tied=False), "somewhere")
    for name in config.shapes:
        assert config.hf_name(config.paddle_name(name)) == name
    assert config.paddle_name("model.layers.1.mlp.up_proj.weight") == "qwen2.layers.1.mlp.up_proj.weight"
    assert config.paddle_name("lm_head.weight") == "lm_head.weight"


def test_modules_sizes_and_biases_of_a_layer():
    layer = PUBLISHED["Qwen2-7B"][0].layer_linears()
    assert layer["self_attn.q_proj"] == Linear(3584, 3584, bias=True)
    assert layer["self_attn.k_proj"] == layer["self_attn.v_proj"] == Linear(3584, 512, bias=True)
    assert layer["mlp.down_proj"] == Linear(18944, 3584)
    assert [name for name, linear in layer.items() if linear.bias] == [f"self_attn.{x}_proj" for x in "qkv"]
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert ADAPTABLE == ("embed_tokens", *projections, "lm_head")


def test_a_description_does_not_change():
    config = Qwen2()
    with pytest.raises(FrozenInstanceError):
        config.vocab_size = 1
    assert hash(config) == hash(Qwen2()) and replace(config, vocab_size=1) != config


def test_a_size_of_head_of_its_own_is_carried_through():
    config = Qwen2(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    assert (config.query_size, config.key_value_size) == (128, 64)
    assert config.shapes["model.layers.0.self_attn.o_proj.weight"] == (64, 128)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_family_reads_from_config_json_all_it_says(family, tmp_path):
    raw = tiny_config() | {"model_type": family.MODEL_TYPE, "architectures": [family.ARCHITECTURE]}
    config = read_config(raw, tmp_path)
    assert type(config) is family
    for item in fields(config):
        if item.name in raw:
            assert getattr(config, item.name) == raw[item.name]
