"""PaddleNLP's model of an architecture, made without weights and filled with them.

PaddleNLP builds the model (`AutoModelForCausalLM.from_config`), without random weights and without the rotary table it
keeps per layer (940 MB for the 1.5B model). The weights are streamed straight into the parameters. Its own
`from_pretrained` is not used: docs/log.md lists the folders it loads wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.model.runtime import paddle as _bring_up

_bring_up()

import paddle
from paddle.nn.initializer import Initializer, set_global_initializer
from paddlenlp.peft.lora import LoRAModel
from paddlenlp.transformers import AutoModelForCausalLM, Qwen2Config
from paddlenlp.transformers.model_utils import no_init_weights
from paddlenlp.transformers.qwen2.modeling import Qwen2RotaryEmbedding

from finetune.model import convert
from finetune.model.config import paddle_config, read_config
from finetune.model.family import Architecture
from finetune.model.frozen import freeze
from finetune.model.quantize import Quantization
from finetune.model.tensors import as_numpy, name_of, set_parameter
from finetune.model.weights import Weight, numpy_dtype

_FIRST_ROTARY_LENGTH = 2048


def build_model(config: Architecture, dtype: str) -> paddle.nn.Layer:
    """PaddleNLP's Qwen2ForCausalLM with parameters that hold nothing yet and one rotary table for all layers."""
    longest = config.max_position_embeddings
    known: dict[str, Any] = paddle_config(config, dtype) | {"max_position_embeddings": 1, "seq_length": longest}
    settings = Qwen2Config(**known)
    with no_init_weights(), empty_parameters():
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    settings.max_position_embeddings = longest
    rotary = SharedRotary(config.head_dim, min(longest, _FIRST_ROTARY_LENGTH), config.rope_theta)
    for layer in body_of(model).layers:
        layer.self_attn.rotary_emb = rotary
        layer.self_attn.max_position_embeddings = longest
    model.architecture = config
    return model


def causal_lm(model: paddle.nn.Layer) -> paddle.nn.Layer:
    """The Qwen2ForCausalLM inside a LoRAModel, or the model itself."""
    return model.model if isinstance(model, LoRAModel) else model


def body_of(model: paddle.nn.Layer) -> paddle.nn.Layer:
    """Embeddings, layers and last norm of a model, with or without adapter: PaddleNLP's Qwen2Model."""
    return causal_lm(model).base_model


def config_of(model: paddle.nn.Layer) -> Architecture:
    """The model's description, with or without adapter, also for a model that PaddleNLP built by itself."""
    plain = causal_lm(model)
    if not hasattr(plain, "architecture"):
        plain.architecture = read_config(plain.config.to_dict() | {"dtype": None}, Path("the model's config"))
    config: Architecture = plain.architecture
    return config


def dtype_of(model: paddle.nn.Layer) -> str:
    """The dtype of a model's weights in memory, by name."""
    return name_of(body_of(model).embed_tokens.weight.dtype)


class SharedRotary(Qwen2RotaryEmbedding):
    """PaddleNLP's rotary table, one for all layers, doubled when a longer sequence comes."""

    def forward(self, x: paddle.Tensor, seq_len: int) -> tuple[paddle.Tensor, paddle.Tensor]:
        """cos and sin [1, seq_len, 1, head_dim] in the dtype of `x`."""
        if seq_len > self.max_seq_len_cached:
            self._set_cos_sin_cache(max(seq_len, 2 * self.max_seq_len_cached))
        tables: tuple[paddle.Tensor, paddle.Tensor] = super().forward(x, seq_len=seq_len)
        return tables


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


def fill(model: paddle.nn.Layer, weights: dict[str, Weight], quantization: Quantization | None = None) -> None:
    """Stream weights in Hugging Face's layout into the model, one in memory at a time, converted to its dtype.

    The one place where a stored weight becomes a parameter.

    Args:
        quantization: Keep the linear layers of the decoder so; embedding, head, norms and biases stay as they are.
            For nf4, a matrix that its folder has in nf4 keeps the codes it has there.
    """
    config, parameters = config_of(model), dict(model.named_parameters())
    for name, weight in weights.items():
        parameter = parameters[config.paddle_name(name)]
        if quantization is not None and name.removesuffix(".weight") in config.linears:
            freeze(parameter, weight.quantized(quantization))
        else:
            set_parameter(parameter, convert.turned(config, name, weight.read()))


def model_weights(model: paddle.nn.Layer) -> dict[str, Weight]:
    """The weights of a model without adapter, as `weights.stored_weights` gives those of a folder."""
    config, parameters = config_of(model), dict(model.named_parameters())

    def weight(name: str, shape: tuple[int, ...]) -> Weight:
        parameter = parameters[config.paddle_name(name)]
        dtype = numpy_dtype(name_of(parameter.dtype))
        return Weight(dtype, shape, lambda: convert.turned(config, name, as_numpy(parameter)))

    return {name: weight(name, shape) for name, shape in config.shapes.items()}
