"""Layouts go there and back."""

from __future__ import annotations

import numpy as np

from finetune.model import convert
from finetune.model.config import read_config
from tests.tiny import tiny_config, tiny_weights

CONFIG = read_config(tiny_config(tied=False), "somewhere")


def test_linear_weights_and_the_head_turn_and_nothing_else():
    turned = {name for name in tiny_weights(tied=False) if CONFIG.is_transposed(name)}
    assert turned == {name for name in tiny_weights(tied=False) if "proj.weight" in name} | {"lm_head.weight"}
    array = np.arange(6).reshape(2, 3)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert convert.turned(CONFIG, name, array).tolist() == array.T.tolist()
    assert convert.turned(CONFIG, "model.embed_tokens.weight", array) is array


def test_adapter_names_of_both_layouts_mean_the_same():
    module, paddle = "model.layers.0.self_attn.q_proj", "qwen2.layers.0.self_attn.q_proj.lora_B"
    assert convert.parse_adapter_name(CONFIG, convert.peft_name(f"{module}.lora_A", [module]), "peft") == (
        module,
        "lora_A",
    )
    assert convert.parse_adapter_name(CONFIG, paddle, "paddle") == (module, "lora_B")
    assert convert.parse_adapter_name(CONFIG, f"model.{paddle}", "paddle") == (module, "lora_B")
    assert convert.parse_adapter_name(CONFIG, "llama.layers.0.self_attn.q_proj.lora_B", "paddle") is None
    assert convert.parse_adapter_name(CONFIG, "model.lm_head.weight", "peft") is None


def test_peft_s_names_of_every_part_return():
    projection, embedding = "model.layers.0.self_attn.q_proj", "model.embed_tokens"
    names = [f"{projection}.{part}" for part in ("lora_A", "lora_B", "lora_magnitude", "bias")]
    names += [f"{embedding}.lora_A", f"{embedding}.lora_B", "lm_head.weight", "model.norm.weight"]
    written = [convert.peft_name(name, [projection, embedding]) for name in names]
    assert written[3:6] == [
        f"base_model.model.{projection}.base_layer.bias",
        f"base_model.model.{embedding}.lora_embedding_A",
        f"base_model.model.{embedding}.lora_embedding_B",
    ]
    assert [".".join(convert.parse_adapter_name(CONFIG, name, "peft")) for name in written] == names
