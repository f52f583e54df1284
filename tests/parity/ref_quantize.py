"""bitsandbytes' nf4 of each matrix: `python ref_quantize.py WEIGHTS.safetensors ANSWER.safetensors`."""

from __future__ import annotations

import sys

import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_4bit
from safetensors.torch import load_file, save_file


def quantized(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Codes, scales, and the scales quantized themselves, with what they then stand for."""
    codes, plain = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    again, double = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(codes, again)
    scales = dequantize_blockwise(double.absmax, double.state2) + double.offset
    return {"codes": codes.reshape(-1), "scales": plain.absmax, "nested": double.absmax, "doubled": scales}


if __name__ == "__main__":
    weights = load_file(sys.argv[1])
    answer = {f"{name}/{key}": value for name, w in weights.items() for key, value in quantized(w).items()}
    save_file({name: value.contiguous() for name, value in answer.items()}, sys.argv[2])
