"""Parameters and memory of a run, from the model's config alone: no weights are loaded, no paddle is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.compute.limits import CHUNK_ELEMENTS, KEPT_ATTENTION_BYTES

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


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
    recipe: Recipe, config: dict[str, Any], *, dtype: str, tokens_per_micro_batch: int, length: int, shards: int = 1
) -> Estimate:
    """Estimate the memory of training on one device.

    Activations are counted as the layers keep them for the backward pass (layers.py, attention.py): a token and layer
    keep the residual stream and the norms' results, query, key, value and what attention returns, and the three vectors
    of the gate; attention weights are kept up to a limit on CPU, and about three times over elsewhere. With recompute:
    one hidden vector a layer, plus one whole layer at a time.

    Args:
        recipe: The run.
        config: The model's config.json.
        dtype: float32, bfloat16 or float16.
        tokens_per_micro_batch: Tokens of one forward pass.
        length: Tokens of its longest sequence.
        shards: Processes that share one state of the optimizer, whole tensors each.
    """
    size = 4 if dtype == "float32" else 2
    base = count_parameters(config)
    adapter = 0
    if recipe.lora:
        adapter = count_lora_parameters(config, recipe.lora.rank, recipe.lora.target_modules)
    trainable = adapter or base
    largest = 0 if adapter else config["vocab_size"] * config["hidden_size"]
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    shapes = linear_shapes(config)
    per_token = 8 * hidden + 2 * shapes["k_proj"][1] + 3 * config["intermediate_size"]
    weights = tokens_per_micro_batch * config["num_attention_heads"] * length * size
    attention = min(weights, KEPT_ATTENTION_BYTES) if size == 4 else 3 * weights
    layer = tokens_per_micro_batch * per_token * size + attention
    kept = layers * tokens_per_micro_batch * hidden * size + layer if recipe.training.recompute else layers * layer
    return Estimate(
        parameters=base,
        trainable=trainable,
        weights=(base + adapter) * size,
        gradients=trainable * size,
        optimizer=max(-(-trainable // shards), largest) * (8 if size == 4 else 12),
        activations=kept + 4 * min(CHUNK_ELEMENTS, tokens_per_micro_batch * config["vocab_size"]),
    )
