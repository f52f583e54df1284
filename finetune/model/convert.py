"""Between Hugging Face's and Paddle's layouts, for models and adapters. Pure functions; names are in `family`.

Adapters                PEFT                                    PaddleNLP
    A                   base_model.model.M.lora_A.weight [r, in]    M'.lora_A [in, r]
    B                   base_model.model.M.lora_B.weight [out, r]   M'.lora_B [r, out]
    with M, M' the module's names in the two models.
"""

from __future__ import annotations

import re

import numpy as np

from finetune.model.family import HEAD, Architecture
from finetune.model.tensorfile import Array

_PEFT = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_[AB])\.weight")
_PADDLE_LORA = re.compile(r"(?:model\.)?(?P<module>.+?)\.(?P<part>lora_[AB])")


def turned(config: Architecture, name: str, array: Array) -> Array:
    """The tensor of this Hugging Face name in the other layout, contiguous. Its own inverse."""
    return np.ascontiguousarray(array.T) if config.is_transposed(name) else array


def is_ignorable(name: str) -> bool:
    """Buffers that old transformers versions stored and that follow from the config."""
    return name.endswith("rotary_emb.inv_freq")


def peft_name(module: str, part: str) -> str:
    """(`model.layers.0.mlp.up_proj`, `lora_A`) -> PEFT's tensor name."""
    return f"base_model.model.{module}.{part}.weight"


def parse_adapter_name(config: Architecture, name: str, layout: str) -> tuple[str, str] | None:
    """(Hugging Face module name, lora_A or lora_B) of an adapter's tensor, or None.

    Args:
        layout: `peft` or `paddle`.
    """
    if layout == "peft":
        match = _PEFT.fullmatch(name)
        return (match["module"], match["part"]) if match else None
    match = _PADDLE_LORA.fullmatch(name)
    if match is None or not match["module"].startswith((f"{config.PADDLE_BODY}.", HEAD)):
        return None
    return config.hf_name(match["module"]), match["part"]
