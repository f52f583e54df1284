"""Any model source made into PaddleNLP's Qwen2ForCausalLM, or its LoRAModel for an adapter.

PaddleNLP builds the model (`AutoModelForCausalLM.from_config`), without random weights and without the rotary table it
keeps per layer (940 MB for the 1.5B model). The weights are streamed from safetensors straight into the parameters,
after names and shapes of the whole folder were compared with the config: missing or unexpected is an error, never a
warning. Its own `from_pretrained` is not used: docs/log.md lists the folders it loads wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune.model.runtime import paddle as _bring_up

_bring_up()

import paddle  # noqa: E402
from paddle.nn.initializer import Initializer, set_global_initializer  # noqa: E402
from paddlenlp.peft.lora import LoRAModel  # noqa: E402
from paddlenlp.transformers import AutoModelForCausalLM, Qwen2Config  # noqa: E402
from paddlenlp.transformers.model_utils import no_init_weights  # noqa: E402
from paddlenlp.transformers.qwen2.modeling import Qwen2RotaryEmbedding  # noqa: E402

from finetune.model import convert  # noqa: E402
from finetune.model.adapters import LoraSettings  # noqa: E402
from finetune.model.config import read_config  # noqa: E402
from finetune.model.resolve import ModelSource, resolve_model  # noqa: E402
from finetune.model.runtime import resolve_dtype  # noqa: E402
from finetune.model.weights import Weight, base_weights, numpy_dtype  # noqa: E402

_FIRST_ROTARY_LENGTH = 2048


@dataclass
class LoadedModel:
    """A model in memory.

    Attributes:
        model: PaddleNLP's Qwen2ForCausalLM, or LoRAModel around one.
        config: The model's facts (`config.read_config`).
        source: Where it came from.
        lora: The adapter's settings; None for a whole model.
        dtype: Of the weights in memory.
    """

    model: paddle.nn.Layer
    config: dict
    source: ModelSource
    lora: LoraSettings | None
    dtype: str


def load_model(source: ModelSource | str | Path, *, dtype: str = "auto", training: bool = False) -> LoadedModel:
    """Load a model, or an adapter attached to (not merged into) its base.

    Parameter names are the same for every model loaded (`unique_name.guard`), so that optimizer state keyed by them
    fits again later, in this process or another.

    Args:
        source: A MODEL, or what `resolve_model` made of it.
        dtype: Of the weights in memory: auto (bfloat16 on GPU, float32 on CPU), float32, bfloat16, float16.
        training: Leave the model in training mode; dropout is on then.

    Raises:
        CheckpointError: the folder does not hold what its config says.
        ArgumentError: a dtype this device cannot compute in.
    """
    from finetune.model.lora import attach_adapter

    source = source if isinstance(source, ModelSource) else resolve_model(source)
    dtype = resolve_dtype(dtype)
    base = source.base or source
    with paddle.utils.unique_name.guard():
        weights = base_weights(base)
        model = build_model(base.config, dtype)
        fill(model, weights)
        if source.kind == "adapter":
            model = attach_adapter(model, source)
    model.train() if training else model.eval()
    return LoadedModel(model, source.config, source, source.lora, dtype)


def build_model(config: dict, dtype: str) -> paddle.nn.Layer:
    """PaddleNLP's Qwen2ForCausalLM with parameters that hold nothing yet and one rotary table for all layers."""
    known = {key: value for key, value in config.items() if value is not None and key not in ("dtype", "eos_token_id")}
    eos = config["eos_token_id"]
    if eos is not None:
        known["eos_token_id"] = eos[0] if isinstance(eos, list) else eos
    longest = known.pop("max_position_embeddings")
    settings = Qwen2Config(
        **known, dtype=dtype, max_position_embeddings=1, seq_length=longest, use_sliding_window=False
    )
    with no_init_weights(), empty_parameters():
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    settings.max_position_embeddings = longest
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    rotary = SharedRotary(head_dim, min(longest, _FIRST_ROTARY_LENGTH), config["rope_theta"])
    for layer in model.qwen2.layers:
        layer.self_attn.rotary_emb = rotary
        layer.self_attn.max_position_embeddings = longest
    model.facts = config
    return model


def facts_of(model: paddle.nn.Layer) -> dict:
    """The model's facts as `config.read_config` gives them, also for a model PaddleNLP built by itself."""
    plain = model.model if isinstance(model, LoRAModel) else model
    facts = getattr(plain, "facts", None)
    return facts or read_config(plain.config.to_dict() | {"dtype": None}, Path("the model's config"))


class SharedRotary(Qwen2RotaryEmbedding):
    """PaddleNLP's rotary table, one for all layers, doubled when a longer sequence comes."""

    def forward(self, x: paddle.Tensor, seq_len: int | None = None) -> tuple[paddle.Tensor, paddle.Tensor]:
        """cos and sin [1, seq_len, 1, head_dim] in the dtype of `x`."""
        if seq_len > self.max_seq_len_cached:
            self._set_cos_sin_cache(max(seq_len, 2 * self.max_seq_len_cached))
        return super().forward(x, seq_len=seq_len)


class _Nothing(Initializer):
    """Leaves a parameter without memory; `set_value` gives it some."""

    def forward(self, param: paddle.Tensor, block: object = None) -> None:
        return None


@contextlib.contextmanager
def empty_parameters() -> Iterator[None]:
    """Layers made in here do not fill their weights."""
    set_global_initializer(_Nothing(), _Nothing())
    try:
        yield
    finally:
        set_global_initializer(None)


def fill(model: paddle.nn.Layer, weights: dict[str, Weight]) -> None:
    """Stream weights in Hugging Face's layout into the model, one in memory at a time, converted to its dtype."""
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        set_parameter(parameters[convert.to_paddle(name)], convert.turned(weight.read(), name))


def model_weights(model: paddle.nn.Layer) -> dict[str, Weight]:
    """The weights of a model without adapter, as `weights.stored_weights` gives those of a folder."""
    parameters = dict(model.named_parameters())

    def weight(name: str, shape: tuple[int, ...]) -> Weight:
        parameter = parameters[convert.to_paddle(name)]
        return Weight(numpy_dtype(name_of(parameter.dtype)), shape, lambda: convert.turned(as_numpy(parameter), name))

    return {name: weight(name, shape) for name, shape in convert.hf_shapes(facts_of(model)).items()}


def name_of(dtype: paddle.dtype) -> str:
    """`paddle.float32` -> `float32`."""
    return str(dtype).removeprefix("paddle.")


def set_parameter(parameter: paddle.Tensor, array: np.ndarray) -> None:
    """Give a parameter a value of any floating dtype; float32 to bfloat16 rounds to the nearest even."""
    parameter.set_value(as_paddle(array.astype(numpy_dtype(name_of(parameter.dtype)), copy=False)))


def as_paddle(array: np.ndarray) -> np.ndarray:
    """The array as paddle takes it: bfloat16 as its bits in uint16."""
    return array.view(np.uint16) if array.dtype == numpy_dtype("bfloat16") else array


def as_numpy(tensor: paddle.Tensor) -> np.ndarray:
    """The tensor as a numpy array, bfloat16 as ml_dtypes' and not as uint16."""
    array = tensor.numpy()
    return array.view(numpy_dtype("bfloat16")) if tensor.dtype == paddle.bfloat16 else array
