"""The layouts that `finetune export` writes, and the numbers that each can hold: light, for the command line."""

from __future__ import annotations

NUMBERS = ("float32", "bfloat16", "float16")

FORMATS: dict[str, tuple[str, ...]] = {
    "hf": NUMBERS,
    "paddle": NUMBERS,
    "peft": NUMBERS,
    "gguf": (*NUMBERS, "q8_0"),
}

DTYPES = ("auto", *dict.fromkeys(dtype for dtypes in FORMATS.values() for dtype in dtypes))
