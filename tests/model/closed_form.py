"""Qwen2 in thirty lines of NumPy, float64: what models are compared with where transformers is not there."""

from __future__ import annotations

import numpy as np

Weights = dict[str, np.ndarray]


def qwen2(weights: Weights, ids: np.ndarray, *, heads: int = 4, kv_heads: int = 2, theta: float = 1e6) -> np.ndarray:
    """Logits float64 [length, vocabulary] of ids int64 [length]; weights by Hugging Face name, a head among them."""

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"]

    def rotated(x: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        angles = np.arange(len(ids))[:, None, None] / theta ** (np.arange(half) / half)
        left, right = x[..., :half], x[..., half:]
        return np.concatenate([left * np.cos(angles) - right * np.sin(angles),
                               right * np.cos(angles) + left * np.sin(angles)], axis=-1)  # fmt: skip

    w = {name: array.astype(np.float64) for name, array in weights.items()}
    hidden, length = w["model.embed_tokens.weight"][ids], len(ids)
    future = np.triu(np.full((length, length), -np.inf), 1)
    for layer in range(sum(name.endswith("input_layernorm.weight") for name in w)):
        prefix = f"model.layers.{layer}"
        x = norm(hidden, f"{prefix}.input_layernorm")
        q, k, v = (linear(x, f"{prefix}.self_attn.{name}_proj").reshape(length, -1, hidden.shape[1] // heads)
                   for name in "qkv")  # fmt: skip
        q, k, v = rotated(q), *(np.repeat(part, heads // kv_heads, axis=1) for part in (rotated(k), v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1]) + future
        share = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", share / share.sum(-1, keepdims=True), v).reshape(length, -1)
        hidden = hidden + linear(mixed, f"{prefix}.self_attn.o_proj")
        x = norm(hidden, f"{prefix}.post_attention_layernorm")
        gate = linear(x, f"{prefix}.mlp.gate_proj")
        hidden = hidden + linear(
            gate / (1 + np.exp(-gate)) * linear(x, f"{prefix}.mlp.up_proj"), f"{prefix}.mlp.down_proj"
        )
    return norm(hidden, "model.norm") @ w["lm_head.weight"].T


def nll(logits: np.ndarray, targets: np.ndarray) -> float:
    """Sum of -log softmax(logits)[target], nats."""
    shifted = logits - logits.max(-1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(targets)), targets]).sum())
