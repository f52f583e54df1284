"""Parameters and memory of a run, from the model's config alone: no weights are loaded, no paddle is imported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from finetune.compute.limits import CHUNK_ELEMENTS, KEPT_ATTENTION_BYTES
from finetune.model.adapted import adapter_shapes
from finetune.model.adapters import LoraSettings, target_names, unties
from finetune.model.family import Architecture
from finetune.model.quantize import Quantization

if TYPE_CHECKING:
    from finetune.recipe.schema import LoraSection, Recipe


def settings_of(section: LoraSection, adapter: LoraSettings | None) -> LoraSettings:
    """What is trained of an adapter: a new one, or one that is trained further as it is but for how it learns."""
    asked = section.settings()
    if adapter is None:
        return asked
    return replace(adapter, dropout=asked.dropout, variant=asked.variant, lora_plus_ratio=asked.lora_plus_ratio)


def quantization_of(recipe: Recipe) -> Quantization | None:
    """How the recipe keeps the frozen weights; None: as they are."""
    return Quantization.named(recipe.model.quantization, recipe.model.double_quantization)


# Of each number of the one matrix that is made whole by Paddle's operations: indices of pairs, levels, scales, product
# (compute/frozen.py). On CPU it is made in its place.
_COMPOSED_BYTES = 14


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


def estimate(
    recipe: Recipe,
    config: Architecture,
    *,
    dtype: str,
    tokens_per_micro_batch: int,
    length: int,
    shards: int = 1,
    continued: LoraSettings | None = None,
) -> Estimate:
    """Estimate the memory of training on one device.

    Activations are counted as the layers keep them for the backward pass (layers.py, attention.py): a token and layer
    keep the residual stream and the norms' results, query, key, value and what attention returns, and the three vectors
    of the gate; attention weights are kept up to a limit on CPU, and about three times over elsewhere. With recompute:
    one hidden vector a layer, plus one whole layer at a time.

    Args:
        recipe: The run.
        config: The model.
        dtype: float32, bfloat16 or float16.
        tokens_per_micro_batch: Tokens of one forward pass.
        length: Tokens of its longest sequence.
        shards: Processes that share one state of the optimizer, whole tensors each.
        continued: The adapter that is trained further, if one is.
    """
    size = 4 if dtype == "float32" else 2
    adapter = 0
    if recipe.lora:
        settings = settings_of(recipe.lora, continued)
        config = replace(config, tie_word_embeddings=config.tie_word_embeddings and not unties(settings, config))
        # An adapter that names its modules by a pattern is opened before they are known.
        targeted = target_names(settings.target_modules or recipe.lora.target_modules, config)
        adapter = sum(map(prod, adapter_shapes(settings, config, targeted).values()))
    base = config.parameters
    trainable = adapter or base
    largest = 0 if adapter else config.vocab_size * config.hidden_size
    hidden, layers = config.hidden_size, config.num_hidden_layers
    per_token = 6 * hidden + 2 * config.query_size + 2 * config.key_value_size + 3 * config.intermediate_size
    weights = tokens_per_micro_batch * config.num_attention_heads * length * size
    attention = min(weights, KEPT_ATTENTION_BYTES) if size == 4 else 3 * weights
    layer = tokens_per_micro_batch * per_token * size + attention
    kept = layers * tokens_per_micro_batch * hidden * size + layer if recipe.training.recompute else layers * layer
    return Estimate(
        parameters=base,
        trainable=trainable,
        weights=_weight_bytes(config, size, quantization_of(recipe)) + adapter * size,
        gradients=trainable * size,
        optimizer=int(max(-(-trainable // shards), largest) * _state_bytes(recipe.training.optim, size)),
        activations=kept + 4 * min(CHUNK_ELEMENTS, tokens_per_micro_batch * config.vocab_size),
    )


def _weight_bytes(config: Architecture, size: int, quantization: Quantization | None) -> int:
    """Bytes of the base model, `size` bytes a number where it is not quantized."""
    linears = config.linears.values()
    if quantization is None:
        return config.parameters * size
    kept = sum(quantization.nbytes(linear.inputs, linear.outputs) for linear in linears)
    whole = max(linear.inputs * linear.outputs for linear in linears) * (4 if size == 4 else _COMPOSED_BYTES)
    return kept + (config.parameters - sum(linear.inputs * linear.outputs for linear in linears)) * size + whole


def _state_bytes(optim: str, size: int) -> float:
    """Bytes that the optimizer keeps of a trained number: two moments, and a float32 master of half precision."""
    moments = 2 * (1 + 4 / 256) if optim == "adamw_8bit" else 8
    return moments if size == 4 else moments + 4
