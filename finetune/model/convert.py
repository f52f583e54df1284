"""The one converter between Hugging Face's and Paddle's names and layouts, for models and adapters. Pure functions.

Models                  Hugging Face                            Paddle
    body                model.layers.0. ...                     qwen2.layers.0. ...
    Linear weights      [out, in]                               [in, out]
    head, not tied      lm_head.weight [vocab, hidden]          lm_head.weight [hidden, vocab]
    head, tied          not stored                              not stored (PaddleNLP repeats it, [vocab, hidden])
Adapters                PEFT                                    PaddleNLP
    A                   base_model.model.M.lora_A.weight [r, in]    M'.lora_A [in, r]
    B                   base_model.model.M.lora_B.weight [out, r]   M'.lora_B [r, out]
    with M, M' the module's names in the two models.
"""

from __future__ import annotations

import re

import numpy as np

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PEFT = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_[AB])\.weight")
_PADDLE_LORA = re.compile(r"(?:model\.)?(?P<module>(?:qwen2\.|lm_head).*?)\.(?P<part>lora_[AB])")


def to_paddle(name: str) -> str:
    """`model.norm.weight` -> `qwen2.norm.weight`. Tensors and modules alike."""
    return "qwen2." + name[len("model.") :] if name.startswith("model.") else name


def to_hf(name: str) -> str:
    """`qwen2.norm.weight` -> `model.norm.weight`. Tensors and modules alike."""
    return "model." + name[len("qwen2.") :] if name.startswith("qwen2.") else name


def is_transposed(name: str) -> bool:
    """Whether the two layouts store this tensor (either name) transposed to one another.

    A tied head is the embedding matrix and is not meant here.
    """
    return name == HEAD or (name.endswith(".weight") and name.split(".")[-2] in PROJECTIONS)


def turned(array: np.ndarray, name: str) -> np.ndarray:
    """The tensor in the other layout, contiguous. Its own inverse."""
    return np.ascontiguousarray(array.T) if is_transposed(name) else array


def modules(config: dict) -> dict[str, tuple[int, int]]:
    """The Linear modules of the layers by Hugging Face name, each with (inputs, outputs)."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    attention = {"q_proj": (hidden, hidden), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (hidden, hidden)}
    mlp = {"gate_proj": (hidden, ffn), "up_proj": (hidden, ffn), "down_proj": (ffn, hidden)}
    found = {}
    for layer in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{layer}.self_attn.{name}": size for name, size in attention.items()}
        found |= {f"model.layers.{layer}.mlp.{name}": size for name, size in mlp.items()}
    return found


def hf_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model in Hugging Face's layout, the largest ones first."""
    hidden = config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config["vocab_size"], hidden)}
    if not config["tie_word_embeddings"]:
        shapes[HEAD] = (config["vocab_size"], hidden)
    for module, (inputs, outputs) in modules(config).items():
        shapes[f"{module}.weight"] = (outputs, inputs)
        if module.endswith(("q_proj", "k_proj", "v_proj")):
            shapes[f"{module}.bias"] = (outputs,)
    for layer in range(config["num_hidden_layers"]):
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    return shapes


def is_ignorable(name: str) -> bool:
    """Buffers that old transformers versions stored and that follow from the config."""
    return name.endswith("rotary_emb.inv_freq")


def peft_name(module: str, part: str) -> str:
    """(`model.layers.0.mlp.up_proj`, `lora_A`) -> PEFT's tensor name."""
    return f"base_model.model.{module}.{part}.weight"


def parse_adapter_name(name: str, layout: str) -> tuple[str, str] | None:
    """(Hugging Face module name, lora_A or lora_B) of an adapter's tensor, or None.

    Args:
        layout: `peft` or `paddle`.
    """
    match = (_PEFT if layout == "peft" else _PADDLE_LORA).fullmatch(name)
    return (to_hf(match["module"]), match["part"]) if match else None
