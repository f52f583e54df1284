"""bitsandbytes' nf4 of each matrix: `python ref_quantize.py WEIGHTS.safetensors ANSWER.safetensors`.

Scales are quantized from float64, for which bitsandbytes takes the nearest level; from float32 it does not on CPU.
"""

from __future__ import annotations

import sys

import torch
from bitsandbytes.functional import create_dynamic_map, quantize_4bit
from safetensors.torch import load_file, save_file


def quantized(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Codes, scales, and the scales quantized again with what they then stand for."""
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    offset = state.absmax.mean()
    levels, centred = create_dynamic_map(), state.absmax - offset
    nested, largest = torch.ops.bitsandbytes.quantize_blockwise(centred.double(), levels, 256)
    scales = levels[nested.int()] * largest.repeat_interleave(256)[: len(centred)] + offset
    return {"codes": codes.reshape(-1), "scales": state.absmax, "nested": nested, "doubled": scales}


if __name__ == "__main__":
    weights = load_file(sys.argv[1])
    answer = {f"{name}/{key}": value for name, w in weights.items() for key, value in quantized(w).items()}
    save_file({name: value.contiguous() for name, value in answer.items()}, sys.argv[2])
