"""Between Hugging Face's and Paddle's layouts, for models and adapters. Pure functions; names are in `family`.

Adapters                PEFT                                            PaddleNLP
    A                   base_model.model.M.lora_A.weight [r, in]            M'.lora_A [in, r]
    B                   base_model.model.M.lora_B.weight [out, r]           M'.lora_B [r, out]
    A, B of embeddings  base_model.model.M.lora_embedding_A, _B, the same
    DoRA's magnitude    base_model.model.M.lora_magnitude_vector [out]
    in the base's place base_model.model.M.weight, M.bias; of a module that has A and B M.base_layer.bias
    with M, M' the module's names in the two models. Here a tensor is called `<M>.<part>`, see `PARTS`.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np

from finetune.model.family import EMBEDDING, HEAD, Architecture
from finetune.model.tensorfile import Array

# `base` is the adapted module's own weight, which PEFT repeats for embeddings and head.
PARTS = ("lora_A", "lora_B", "lora_magnitude", "weight", "bias", "base")
_PEFT_PARTS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "lora_magnitude",
    "weight": "weight",
    "bias": "bias",
    "base_layer.weight": "base",
    "base_layer.bias": "bias",
}
_PEFT = re.compile(rf"base_model\.model\.(?P<module>.+?)\.(?P<part>{'|'.join(map(re.escape, _PEFT_PARTS))})")
_PADDLE_LORA = re.compile(r"(?:model\.)?(?P<module>.+?)\.(?P<part>lora_[AB])")


def turned(config: Architecture, name: str, array: Array) -> Array:
    """The tensor of this Hugging Face name in the other layout, contiguous. Its own inverse."""
    return np.ascontiguousarray(array.T) if config.is_transposed(name) else array


def is_ignorable(name: str) -> bool:
    """Buffers that old transformers versions stored and that follow from the config."""
    return name.endswith("rotary_emb.inv_freq")


def peft_name(name: str, adapted: Collection[str]) -> str:
    """`model.layers.0.mlp.up_proj.lora_A` -> PEFT's tensor name; `adapted`: the modules with A and B."""
    module, _, part = name.rpartition(".")
    if part == "bias":
        part = "base_layer.bias" if module in adapted else part
    elif part == "lora_magnitude":
        part = "lora_magnitude_vector"
    elif part != "weight":
        part = part.replace("lora", "lora_embedding") if module == EMBEDDING else f"{part}.weight"
    return f"base_model.model.{module}.{part}"


def parse_adapter_name(config: Architecture, name: str, layout: str) -> tuple[str, str] | None:
    """(Hugging Face module name, one of `PARTS`) of an adapter's tensor, or None.

    Args:
        layout: `peft` or `paddle`.
    """
    if layout == "peft":
        match = _PEFT.fullmatch(name)
        return (match["module"], _PEFT_PARTS[match["part"]]) if match else None
    match = _PADDLE_LORA.fullmatch(name)
    if match is None or not match["module"].startswith((f"{config.PADDLE_BODY}.", HEAD)):
        return None
    return config.hf_name(match["module"]), match["part"]
