"""Parameters and memory of a run, from the model's config alone: no weights are loaded, no paddle is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
_CHUNK_LOGITS_BYTES = 2 * 256 * 151_936 * 4  # logits and their gradient, one chunk (forward.py)


@dataclass(frozen=True)
class Estimate:
    """Bytes by kind, and counts of parameters."""

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes of all kinds together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def linear_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) features of the linear modules of one decoder layer."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config.get("num_key_value_heads", config["num_attention_heads"])
    return {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (hidden, hidden),
        "gate_proj": (hidden, ffn),
        "up_proj": (hidden, ffn),
        "down_proj": (ffn, hidden),
    }


def count_parameters(config: dict[str, Any]) -> int:
    """Parameters of the model; a tied head counts once."""
    shapes = linear_shapes(config)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    layer = sum(i * o for i, o in shapes.values()) + sum(shapes[n][1] for n in ("q_proj", "k_proj", "v_proj"))
    layer += 2 * hidden
    heads = 1 if config.get("tie_word_embeddings") else 2
    return config["num_hidden_layers"] * layer + heads * vocab * hidden + hidden


def count_lora_parameters(config: dict[str, Any], rank: int, target_modules: str | list[str]) -> int:
    """Parameters of the adapter: rank * (in + out) for every targeted module of every layer."""
    shapes = linear_shapes(config)
    names = shapes if target_modules == "all-linear" else [n for n in target_modules if n in shapes]
    return config["num_hidden_layers"] * sum(rank * sum(shapes[name]) for name in names)


def estimate(
    recipe: Recipe, config: dict[str, Any], *, dtype: str, tokens_per_micro_batch: int, length: int
) -> Estimate:
    """Estimate the memory of training on one device.

    Activations follow Korthikanti et al. 2022 (arXiv:2205.05198), section 4, counted for this model: about 16 hidden,
    6 intermediate and 3 x heads x length values a token and layer; with recompute one hidden vector a layer, plus one
    whole layer at a time.

    Args:
        recipe: The run.
        config: The model's config.json.
        dtype: float32, bfloat16 or float16.
        tokens_per_micro_batch: Tokens of one forward pass.
        length: Tokens of its longest row.
    """
    size = 4 if dtype == "float32" else 2
    base = count_parameters(config)
    adapter = 0
    if recipe.lora:
        adapter = count_lora_parameters(config, recipe.lora.rank, recipe.lora.target_modules)
    trainable = adapter or base
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    per_layer = 16 * hidden + 6 * config["intermediate_size"] + 3 * config["num_attention_heads"] * length
    kept = layers * hidden + per_layer if recipe.training.recompute else layers * per_layer
    return Estimate(
        parameters=base,
        trainable=trainable,
        weights=(base + adapter) * size,
        gradients=trainable * size,
        optimizer=trainable * (8 if size == 4 else 12),
        activations=tokens_per_micro_batch * kept * size + _CHUNK_LOGITS_BYTES,
    )
