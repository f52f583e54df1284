"""How much of a step the kernels hold at once. They stop there, and the memory estimate counts it. No paddle here."""

from __future__ import annotations

# Attention weights of one layer kept for the backward pass; larger ones are computed again.
KEPT_ATTENTION_BYTES = 32 * 2**20
# Logits alive at once, in elements: 256 rows of Qwen2's vocabulary, 156 MB in float32.
CHUNK_ELEMENTS = 256 * 151_936
