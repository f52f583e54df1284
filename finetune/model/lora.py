"""LoRA on PaddleNLP's LoRAModel: lora, rslora, lora_plus and pissa; added, merged, and attached from a folder.

What differs from PaddleNLP: the random start comes from a seed of its own (the global state is not touched); PiSSA is
computed here, since PaddleNLP's is computed in the first forward pass and its adapters reload wrong; merging works in
float32 and leaves no adapter behind; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from finetune.model.runtime import paddle as _bring_up

_bring_up()

import paddle
from paddlenlp.peft.lora import LoRAConfig, LoRAModel
from paddlenlp.peft.lora.lora_layers import LoRALinear

from finetune.errors import ArgumentError, CheckpointError
from finetune.model import convert
from finetune.model.adapters import LoraSettings, target_names
from finetune.model.build import causal_lm, config_of, dtype_of, empty_parameters
from finetune.model.resolve import ModelSource
from finetune.model.tensorfile import Array
from finetune.model.tensors import as_numpy, set_parameter
from finetune.model.weights import audit, merge, open_adapter

__all__ = [
    "LoraSettings",
    "adapter_disabled",
    "adapter_state",
    "add_lora",
    "attach_adapter",
    "lora_layers",
    "merge_lora",
    "training_state",
]


@dataclass(frozen=True)
class _Start:
    """PiSSA's starting factors, in Paddle's layout; the base weight in memory is W - scaling * A B."""

    A: paddle.Tensor
    B: paddle.Tensor


def add_lora(
    model: paddle.nn.Layer, settings: LoraSettings, *, seed: int = 0, state: dict[str, Array] | None = None
) -> LoRAModel:
    """Put adapters into a model; only they are trainable afterwards.

    A starts uniform in +-1/sqrt(inputs), as in PEFT (Kaiming with a = sqrt 5), B at zero. With pissa both start from
    the largest singular vectors of the weight, which keeps the rest (Meng et al. 2024, arXiv:2404.02948, eq. 2 to 4;
    PEFT's scaling: A and B each carry 1/sqrt(scaling)).

    Args:
        model: Qwen2ForCausalLM with the base weights. Changed in place.
        settings: What to add.
        seed: Of the random start; each module has a stream of its own, whatever the others are.
        state: From `training_state`: go on from there instead.

    Returns:
        PaddleNLP's LoRAModel around `model`; its `settings` attribute holds the settings.

    Raises:
        ArgumentError: the settings name modules that the model does not have.
        CheckpointError: `state` does not fit the settings.
    """
    config = config_of(model)
    names = target_names(settings.target_modules, config.linears)
    if settings.rank > config.hidden_size and settings.variant == "pissa":
        raise ArgumentError(f"pissa cannot have rank {settings.rank}", where="lora.rank", fix="At most hidden_size.")
    wrapped = _wrap(model, settings, names)
    layers = lora_layers(wrapped)
    if state is not None:
        _check_state(state, layers, settings)
    for name, layer in layers.items():
        if settings.variant == "pissa":
            _start_pissa(layer, name, state)
        elif state is None:
            bound = layer.weight.shape[0] ** -0.5
            random = np.random.default_rng([seed % 2**63, zlib.crc32(name.encode())])
            set_parameter(layer.lora_A, random.uniform(-bound, bound, layer.lora_A.shape))
        if state is not None:
            set_parameter(layer.lora_A, state[f"{name}.lora_A"])
            set_parameter(layer.lora_B, state[f"{name}.lora_B"])
    return wrapped


def _wrap(model: paddle.nn.Layer, settings: LoraSettings, names: list[str]) -> LoRAModel:
    """PaddleNLP's LoRAModel over these modules, its weights unset but B = 0."""
    paddle_names = [re.escape(config_of(model).paddle_name(name)) for name in names]
    config = LoRAConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=["|".join(paddle_names)],
        rslora=settings.variant == "rslora",
        lora_plus_scale=settings.lora_plus_ratio,
        dtype=dtype_of(model),
    )
    state = paddle.get_rng_state()
    with empty_parameters(), paddle.utils.unique_name.guard():
        wrapped = LoRAModel(model, config)
    paddle.set_rng_state(state)
    wrapped.settings = settings
    return wrapped


def lora_layers(model: LoRAModel) -> dict[str, LoRALinear]:
    """The layers with adapters by Hugging Face module name, in the order of the model."""
    found, config = causal_lm(model).named_sublayers(), config_of(model)
    return {config.hf_name(name): layer for name, layer in found if isinstance(layer, LoRALinear)}


def _start_pissa(layer: LoRALinear, name: str, state: dict[str, Array] | None) -> None:
    """Split the weight into the adapter's start and a residual."""
    weight = as_numpy(layer.weight).astype(np.float32)
    if state is None:
        left, values, right = np.linalg.svd(weight, full_matrices=False)
        root = np.sqrt(values[: layer.r] / layer.scaling)
        set_parameter(layer.lora_A, left[:, : layer.r] * root)
        set_parameter(layer.lora_B, right[: layer.r] * root[:, None])
    else:
        set_parameter(layer.lora_A, state[f"{name}.lora_A0"])
        set_parameter(layer.lora_B, state[f"{name}.lora_B0"])
    layer.start = _Start(layer.lora_A.detach().clone(), layer.lora_B.detach().clone())
    A, B = as_numpy(layer.start.A).T, as_numpy(layer.start.B).T
    set_parameter(layer.weight, merge(weight.T, A, B, -layer.scaling).T)


def _check_state(state: dict[str, Array], layers: dict[str, LoRALinear], settings: LoraSettings) -> None:
    parts = ("lora_A", "lora_B", "lora_A0", "lora_B0") if settings.variant == "pissa" else ("lora_A", "lora_B")
    expected = {
        f"{name}.{part}": tuple((layer.lora_A if "_A" in part else layer.lora_B).shape)
        for name, layer in layers.items()
        for part in parts
    }
    faults = audit(expected, {name: array.shape for name, array in state.items()}, "the checkpoint's adapter")
    if faults:
        raise CheckpointError.of(faults)


def training_state(model: LoRAModel) -> dict[str, Array]:
    """All that `add_lora(..., state=...)` needs to go on: A and B now, and with pissa also at the start (A0, B0)."""
    state: dict[str, Array] = {}
    for name, layer in lora_layers(model).items():
        state |= {f"{name}.lora_A": as_numpy(layer.lora_A), f"{name}.lora_B": as_numpy(layer.lora_B)}
        if model.settings.variant == "pissa":
            state |= {f"{name}.lora_A0": as_numpy(layer.start.A), f"{name}.lora_B0": as_numpy(layer.start.B)}
    return state


@contextlib.contextmanager
def adapter_disabled(model: LoRAModel) -> Iterator[None]:
    """The base model as it was before training, for a while: the reference of DPO.

    With pissa the base is the residual plus the starting factors. Values are not written, only exchanged, so that a
    gradient still to be computed from an earlier forward pass stays right.
    """
    layers = list(lora_layers(model).values())
    pissa = model.settings.variant == "pissa"
    if any(layer.merged for layer in layers):
        raise ValueError("the adapter is merged and cannot be disabled")
    current = [(layer.lora_A, layer.lora_B) for layer in layers]
    for layer in layers:
        if pissa:
            layer._parameters.update(lora_A=layer.start.A, lora_B=layer.start.B)
        layer.disable_lora = not pissa
    try:
        yield
    finally:
        for layer, (A, B) in zip(layers, current):
            layer._parameters.update(lora_A=A, lora_B=B)
            layer.disable_lora = False


def merge_lora(model: LoRAModel) -> paddle.nn.Layer:
    """Fold the adapters into the base weights, in float32, and take them out again.

    Returns:
        The plain Qwen2ForCausalLM, the same object that was adapted; all its weights are trainable.
    """
    plain = causal_lm(model)
    parents = dict(plain.named_sublayers())
    for name, layer in parents.items():
        if not isinstance(layer, LoRALinear):
            continue
        weight, A, B = (as_numpy(tensor).T for tensor in (layer.weight, layer.lora_A, layer.lora_B))
        set_parameter(layer.weight, merge(weight, A, B, layer.scaling).T)
        inputs, outputs = layer.weight.shape
        with empty_parameters(), paddle.utils.unique_name.guard():
            linear = paddle.nn.Linear(inputs, outputs, bias_attr=False if layer.bias is None else None)
        linear.weight = layer.weight
        if layer.bias is not None:
            linear.bias = layer.bias
        linear.training = layer.training
        parent, _, attribute = name.rpartition(".")
        setattr(parents[parent], attribute, linear)
    for parameter in plain.parameters():
        parameter.stop_gradient = False
    return plain


def adapter_state(model: LoRAModel) -> dict[str, Array]:
    """The adapter's tensors under PEFT's names and in its layout, for the settings `model.settings.saved()`.

    A PiSSA adapter becomes a plain LoRA of rank 2r on the original weights: A' = [A; A0], B' = [B, -B0], so that
    B' A' = B A - B0 A0 (what PEFT's `path_initial_model_for_weight_conversion` writes).
    """
    state = {}
    for name, layer in lora_layers(model).items():
        A, B = as_numpy(layer.lora_A).T, as_numpy(layer.lora_B).T
        if model.settings.variant == "pissa":
            A = np.concatenate([A, as_numpy(layer.start.A).T], axis=0)
            B = np.concatenate([B, -as_numpy(layer.start.B).T], axis=1)
        state[convert.peft_name(name, "lora_A")] = np.ascontiguousarray(A)
        state[convert.peft_name(name, "lora_B")] = np.ascontiguousarray(B)
    return state


def attach_adapter(model: paddle.nn.Layer, source: ModelSource) -> LoRAModel:
    """Attach the adapter of a source to its base model.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape than settings and model say.
    """
    adapter, settings = open_adapter(source)
    return add_lora(model, settings, state={name: weight.read().T for name, weight in adapter.items()})
