"""The layouts that `finetune export` writes, and the numbers that each can hold: light, for the command line."""

from __future__ import annotations

NUMBERS = ("float32", "bfloat16", "float16")

# The types of 32 numbers with a scale that the gguf package can make. It reads K-quants and IQ, and makes none.
QUANTIZED = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")

FORMATS: dict[str, tuple[str, ...]] = {
    "hf": NUMBERS,
    "paddle": NUMBERS,
    "peft": NUMBERS,
    "gguf": (*NUMBERS, *QUANTIZED),
}

DTYPES = ("auto", *dict.fromkeys(dtype for dtypes in FORMATS.values() for dtype in dtypes))
