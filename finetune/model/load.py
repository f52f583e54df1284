"""Any model source made into PaddleNLP's Qwen2ForCausalLM, or its LoRAModel for an adapter.

Names and shapes of the whole folder are compared with the config before anything is built: missing or unexpected is an
error, never a warning.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from finetune.model.runtime import paddle as _bring_up

_bring_up()

import paddle

from finetune.model.adapters import LoraSettings
from finetune.model.build import build_model, fill
from finetune.model.family import Architecture
from finetune.model.lora import attach_adapter
from finetune.model.quantize import Quantization
from finetune.model.resolve import ModelSource, resolve_model
from finetune.model.runtime import resolve_dtype
from finetune.model.weights import base_weights


@dataclass
class LoadedModel:
    """A model in memory.

    Attributes:
        model: PaddleNLP's Qwen2ForCausalLM, or LoRAModel around one.
        config: The model's description.
        source: Where it came from.
        lora: The adapter's settings; None for a whole model.
        dtype: Of the weights in memory.
    """

    model: paddle.nn.Layer
    config: Architecture
    source: ModelSource
    lora: LoraSettings | None
    dtype: str


def load_model(
    source: ModelSource | str | Path,
    *,
    dtype: str = "auto",
    training: bool = False,
    quantization: Quantization | None = None,
    untied: bool = False,
) -> LoadedModel:
    """Load a model, or an adapter attached to (not merged into) its base.

    Parameter names are the same for every model loaded (`unique_name.guard`), so that optimizer state keyed by them
    fits again later, in this process or another.

    Args:
        source: A MODEL, or what `resolve_model` made of it.
        dtype: Of the weights in memory: auto (bfloat16 on GPU, float32 on CPU), float32, bfloat16, float16.
        training: Leave the model in training mode; dropout is on then.
        quantization: Keep the linear layers of the decoder so; an adapter beside them stays as it is.
        untied: Give a model whose head is its embedding a head of its own, equal to it.

    Raises:
        CheckpointError: the folder does not hold what its config says.
        ArgumentError: a dtype this device cannot compute in.
    """
    source = source if isinstance(source, ModelSource) else resolve_model(source)
    dtype = resolve_dtype(dtype)
    base = source.base or source
    with paddle.utils.unique_name.guard():
        config = replace(source.config, tie_word_embeddings=False) if untied else source.config
        weights = base_weights(base, config)
        model = build_model(config, dtype)
        fill(model, weights, quantization)
        if source.kind == "adapter":
            model = attach_adapter(model, source)
    model.train() if training else model.eval()
    return LoadedModel(model, config, source, source.lora, dtype)
