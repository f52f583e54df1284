"""Any MODEL of the command line, opened for answering: weights, tokenizer and generation settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.chat.tokenizer import Tokenizer
from finetune.model.config import read_generation_config as config_of
from finetune.model.quantize import Quantization
from finetune.model.resolve import ModelSource, resolve_model

if TYPE_CHECKING:
    from finetune.infer.engine import Engine


@dataclass(frozen=True)
class Held:
    """How weights are held in memory.

    Attributes:
        dtype: auto (bfloat16 on GPU, float32 on CPU), float32, bfloat16 or float16.
        quantization: none; nf4 or int8 for the linear layers of the decoder, with their scales quantized too in nf4.
    """

    dtype: str = "auto"
    quantization: str = "none"


AS_STORED = Held()


@dataclass(frozen=True)
class Opened:
    """A model that can be talked to.

    Attributes:
        engine: Holds the model.
        tokenizer: The model's own; an adapter's folder comes before its base.
        generation_config: As `read_generation_config` returns it.
        source: Where it came from.
    """

    engine: Engine
    tokenizer: Tokenizer
    generation_config: dict[str, Any]
    source: ModelSource


def open_model(model: str | ModelSource, held: Held = AS_STORED, *, pack: bool = False) -> Opened:
    """Load a hub id, a model folder of any layout, an adapter, a checkpoint or a run's folder.

    An adapter is merged in float32, which saves a third of the operations per token. In half precision it is kept
    apart, as it was trained: the sum would be rounded to 8 bits. On quantized weights too, which it was trained beside.

    Args:
        held: Of the base; an adapter beside quantized weights stays as it is.
        pack: For callers that only want answers: lay the weights out for decoding, where that helps (float32 on CPU).
            `engine.model` is then good for nothing else.

    Raises:
        CheckpointError: the model or its tokenizer cannot be read.
    """
    source = model if isinstance(model, ModelSource) else resolve_model(model)
    tokenizer = open_tokenizer(source)
    config = read_generation_config(source)
    from finetune.infer.engine import Engine
    from finetune.model.load import load_model
    from finetune.model.lora import merge_lora

    quantization = Quantization.named(held.quantization)
    loaded = load_model(source, dtype=held.dtype, quantization=quantization)
    causal = loaded.model
    if loaded.lora is not None and loaded.dtype == "float32" and quantization is None:
        causal = merge_lora(causal)
    if pack:
        from finetune.compute.packed import pack as pack_weights

        pack_weights(causal)
    engine = Engine(causal, tokenizer, stop_token_ids=[*tokenizer.stop_token_ids, *config["eos_token_id"]])
    return Opened(engine, tokenizer, config, source)


def open_tokenizer(source: ModelSource) -> Tokenizer:
    """The tokenizer of the model's folder, or of its base where an adapter has none.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    return Tokenizer.from_folder(source.tokenizer_folder)


def read_generation_config(source: ModelSource) -> dict[str, Any]:
    """generation_config.json of the model, or of its base where an adapter has none.

    Returns:
        Its keys as they are, but `eos_token_id` is always a list. End and padding token fall back to config.json's.

    Raises:
        CheckpointError: the file is not a JSON object, or has a value that makes no sense.
    """
    config: dict[str, Any] = config_of(source.generation_file) if source.generation_file else {}
    if config.get("pad_token_id") is None:
        config["pad_token_id"] = source.config.pad_token_id
    ends = config.get("eos_token_id")
    ends = source.config.eos_token_ids if ends is None else ends
    config["eos_token_id"] = [ends] if isinstance(ends, int) else list(ends)
    return config
