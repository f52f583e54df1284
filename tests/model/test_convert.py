"""Names and layouts go there and back."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.model import convert
from finetune.model.config import read_config
from tests.tiny import Shape, tiny_config, tiny_weights


@pytest.mark.parametrize("tied", [True, False])
def test_the_shapes_are_those_of_the_folder(tied, tmp_path):
    config = read_config(tiny_config(tied=tied), tmp_path)
    weights = tiny_weights(tied=tied)
    assert convert.hf_shapes(config) == {name: array.shape for name, array in weights.items()}


def test_names_return():
    config = {**tiny_config(Shape()), "tie_word_embeddings": False}
    for name in convert.hf_shapes(config):
        assert convert.to_hf(convert.to_paddle(name)) == name
    assert convert.to_paddle("model.layers.1.mlp.up_proj.weight") == "qwen2.layers.1.mlp.up_proj.weight"
    assert convert.to_paddle("lm_head.weight") == "lm_head.weight"


def test_linear_weights_and_the_head_turn_and_nothing_else():
    turned = {name for name in tiny_weights(tied=False) if convert.is_transposed(name)}
    expected = {name for name in tiny_weights(tied=False) if "proj.weight" in name} | {"lm_head.weight"}
    assert turned == expected
    array = np.arange(6).reshape(2, 3)
    assert convert.turned(array, "x.q_proj.weight").tolist() == array.T.tolist()
    assert convert.turned(array, "model.embed_tokens.weight") is array


def test_adapter_names_of_both_layouts_mean_the_same():
    module = "model.layers.0.self_attn.q_proj"
    assert convert.parse_adapter_name(convert.peft_name(module, "lora_A"), "peft") == (module, "lora_A")
    assert convert.parse_adapter_name("qwen2.layers.0.self_attn.q_proj.lora_B", "paddle") == (module, "lora_B")
    assert convert.parse_adapter_name("model.qwen2.layers.0.self_attn.q_proj.lora_B", "paddle") == (module, "lora_B")
    assert convert.parse_adapter_name("base_model.model.lm_head.weight", "peft") is None
