"""LoRA on PaddleNLP's LoRAModel: lora, rslora, lora_plus, pissa and dora; added, merged, and attached from a folder.

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
from paddlenlp.transformers.model_utils import dtype_guard

from finetune.errors import ArgumentError, CheckpointError
from finetune.model import convert
from finetune.model.adapted import adapter_shapes, merge, open_adapter, parts_of
from finetune.model.adapters import LoraSettings, target_names, tensors_to_save, unties
from finetune.model.build import causal_lm, config_of, dtype_of, empty_parameters
from finetune.model.convert import peft_name
from finetune.model.family import EMBEDDING, HEAD, Architecture
from finetune.model.frozen import frozen_of
from finetune.model.lora_layers import ADAPTED, DoraLinear, LoraEmbedding, LoraHead, Update
from finetune.model.resolve import ModelSource
from finetune.model.tensorfile import Array
from finetune.model.tensors import as_numpy, copy_of, set_parameter
from finetune.model.weights import Weight, audit

__all__ = [
    "LoraSettings",
    "adapter_disabled",
    "adapter_state",
    "add_lora",
    "attach_adapter",
    "lora_layers",
    "merge_lora",
    "paddle_state",
    "retune",
    "saved_tensors",
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
    names = target_names(settings.target_modules, config)
    _check_settings(settings, config, names)
    _check_codes(model, settings, names)
    wrapped = _wrap(model, settings, names)
    layers = lora_layers(wrapped)
    if state is not None:
        _check_state(state, layers, settings, config)
    for name, layer in layers.items():
        if settings.variant == "pissa":
            _start_pissa(layer, name, state)
        elif state is None:
            _start(layer, np.random.default_rng([seed % 2**63, zlib.crc32(name.encode())]))
        if state is not None:
            for part in parts_of(settings):
                set_parameter(getattr(layer, part), state[f"{name}.{part}"])
    for name, (owner, kind) in saved_tensors(wrapped).items():
        parameter = getattr(owner, kind)
        parameter.stop_gradient = False
        wrapped.originals[name] = copy_of(parameter)
        if state is not None:
            set_parameter(parameter, state[name])
    return wrapped


def retune(model: LoRAModel, settings: LoraSettings) -> None:
    """Give a loaded adapter the training-time settings that its folder does not hold: dropout and learning rates.

    Raises:
        ArgumentError: dropout for a head.
    """
    _check_settings(settings, config_of(model), list(lora_layers(model)))
    model.settings = settings
    for layer in lora_layers(model).values():
        layer.lora_dropout = paddle.nn.Dropout(settings.dropout) if settings.dropout else (lambda x: x)
        layer.lora_B.optimize_attr["learning_rate"] = settings.lora_plus_ratio


def _check_settings(settings: LoraSettings, config: Architecture, names: list[str]) -> None:
    if max(map(settings.rank_of, names)) > config.hidden_size and settings.variant == "pissa":
        raise ArgumentError(f"pissa cannot have rank {settings.rank}", where="lora.rank", fix="At most hidden_size.")
    if HEAD in names and settings.dropout:
        fix = "Set it to 0, or leave lm_head out of lora.target_modules."
        raise ArgumentError(f"is {settings.dropout:g}, which lm_head does not take", where="lora.dropout", fix=fix)
    if unties(settings, config):
        raise ValueError("head and embedding of this model are one; load it untied")


def _check_codes(model: paddle.nn.Layer, settings: LoraSettings, names: list[str]) -> None:
    """What is kept as codes can be neither trained nor split into PiSSA's start and its rest (PEFT refuses it too)."""
    config, parameters = config_of(model), dict(model.named_parameters())
    read = [f"{name}.weight" for name in names] if settings.variant == "pissa" else []
    for name in [*read, *tensors_to_save(settings, config, names)]:
        if frozen_of(parameters[config.paddle_name(name)]) is not None:
            why = f"{settings.variant} needs whole" if name in read else "the adapter trains"
            fix = "Leave model.quantization (--quantization) out, or merge the adapter first with finetune export."
            raise ArgumentError(f"would quantize {name}, which {why}", where="model.quantization", fix=fix)


def _wrap(model: paddle.nn.Layer, settings: LoraSettings, names: list[str]) -> LoRAModel:
    """PaddleNLP's LoRAModel over these modules, its weights unset but B = 0."""
    options = LoRAConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=["$^"],  # none: they are in place by then
        rslora=settings.variant == "rslora",
        lora_plus_scale=settings.lora_plus_ratio,
        dtype=dtype_of(model),
    )
    config, state = config_of(model), paddle.get_rng_state()
    parents = dict(model.named_sublayers(include_self=True))
    with empty_parameters(), paddle.utils.unique_name.guard(), dtype_guard(dtype_of(model)):
        for name in names:
            parent, _, attribute = config.paddle_name(name).rpartition(".")
            plain = getattr(parents[parent], attribute)
            layer = _adapted_layer(name, plain, settings)
            layer.plain = (plain,)  # in a tuple, or it would count as a part of the layer
            setattr(parents[parent], attribute, layer)
        wrapped = LoRAModel(model, options)
    paddle.set_rng_state(state)
    options.target_modules = ["|".join(re.escape(config.paddle_name(name)) for name in names)]
    wrapped.settings, wrapped.originals = settings, {}
    for layer in lora_layers(wrapped).values():
        for part in parts_of(settings):
            getattr(layer, part).stop_gradient = False
    return wrapped


def _adapted_layer(name: str, plain: paddle.nn.Layer, settings: LoraSettings) -> paddle.nn.Layer:
    """A layer to take a module's place, with the module's own weight and bias."""
    rank, ratio = settings.rank_of(name), settings.lora_plus_ratio or 1.0
    if name in (EMBEDDING, HEAD):
        make = LoraEmbedding if name == EMBEDDING else LoraHead
        return make(plain, Update(rank, settings.scaling_of(name), settings.dora, ratio))
    layer = (DoraLinear if settings.dora else LoRALinear)(
        *plain.weight.shape,
        r=rank,
        lora_alpha=settings.alpha_of(name),
        lora_dropout=settings.dropout,
        rslora=settings.variant == "rslora",
        lora_plus_scale=ratio,
        bias_attr=False if plain.bias is None else None,
    )
    layer.weight, layer.bias = plain.weight, plain.bias
    return layer


def lora_layers(model: LoRAModel) -> dict[str, paddle.nn.Layer]:
    """The layers with adapters by Hugging Face module name, in the order of the model."""
    found, config = causal_lm(model).named_sublayers(), config_of(model)
    return {config.hf_name(name): layer for name, layer in found if isinstance(layer, ADAPTED)}


def saved_tensors(model: LoRAModel) -> dict[str, tuple[paddle.nn.Layer, str]]:
    """The base's tensors that are trained and saved beside the updates: name -> layer, and weight or bias."""
    config, owners = config_of(model), dict(causal_lm(model).named_sublayers())
    names = tensors_to_save(model.settings, config, list(lora_layers(model)))
    split = {name: name.rpartition(".") for name in names}
    return {name: (owners[config.paddle_name(module)], kind) for name, (module, _, kind) in split.items()}


def _start(layer: paddle.nn.Layer, random: np.random.Generator) -> None:
    """A random, B zero; of an embedding the other way round, as in PEFT. DoRA's magnitudes are the columns' lengths."""
    if isinstance(layer, LoraEmbedding):
        set_parameter(layer.lora_A, np.zeros(layer.lora_A.shape, np.float32))
        set_parameter(layer.lora_B, random.standard_normal(layer.lora_B.shape))
    else:
        bound = layer.weight.shape[0] ** -0.5
        set_parameter(layer.lora_A, random.uniform(-bound, bound, layer.lora_A.shape))
    if getattr(layer, "lora_magnitude", None) is not None:
        codes = frozen_of(layer.weight)
        weight = as_numpy(layer.weight).astype(np.float32) if codes is None else codes.dequantize().T
        set_parameter(layer.lora_magnitude, np.linalg.norm(weight, axis=0))


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
    set_parameter(layer.weight, merge(weight.T, A, B, scaling=-layer.scaling).T)


def _check_state(
    state: dict[str, Array], layers: dict[str, paddle.nn.Layer], settings: LoraSettings, config: Architecture
) -> None:
    expected = {
        name: config.paddle_shape(name) if name in config.shapes else shape[::-1]
        for name, shape in adapter_shapes(settings, config, layers).items()
    }
    if settings.variant == "pissa":
        expected |= {f"{name}0": shape for name, shape in expected.items() if name not in config.shapes}
    faults = audit(expected, {name: array.shape for name, array in state.items()}, "the checkpoint's adapter")
    if faults:
        raise CheckpointError.of(faults)


def training_state(model: LoRAModel) -> dict[str, Array]:
    """All that `add_lora(..., state=...)` needs to go on, in Paddle's layout: the updates and what is saved whole, and
    with pissa also A and B at the start (A0, B0)."""
    state: dict[str, Array] = {}
    for name, layer in lora_layers(model).items():
        state |= {f"{name}.{part}": as_numpy(getattr(layer, part)) for part in parts_of(model.settings)}
        if model.settings.variant == "pissa":
            state |= {f"{name}.lora_A0": as_numpy(layer.start.A), f"{name}.lora_B0": as_numpy(layer.start.B)}
    return state | {name: as_numpy(getattr(owner, kind)) for name, (owner, kind) in saved_tensors(model).items()}


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
    saved = {name: (owner, kind, getattr(owner, kind)) for name, (owner, kind) in saved_tensors(model).items()}
    for layer in layers:
        if pissa:
            layer._parameters.update(lora_A=layer.start.A, lora_B=layer.start.B)
        layer.disable_lora = not pissa
    for name, (owner, kind, _) in saved.items():
        owner._parameters[kind] = model.originals[name]
    try:
        yield
    finally:
        for layer, (A, B) in zip(layers, current):
            layer._parameters.update(lora_A=A, lora_B=B)
            layer.disable_lora = False
        for owner, kind, tensor in saved.values():
            owner._parameters[kind] = tensor


def merge_lora(model: LoRAModel) -> paddle.nn.Layer:
    """Fold the adapters into the base weights, in float32, and take them out again.

    Returns:
        The plain Qwen2ForCausalLM, the same object that was adapted; all its weights are trainable.
    """
    plain, config, layers = causal_lm(model), config_of(model), lora_layers(model)
    parents = dict(plain.named_sublayers(include_self=True))
    for name, layer in layers.items():
        weight, *parts = (as_numpy(getattr(layer, part)).T for part in ("weight", *parts_of(model.settings)))
        set_parameter(layer.weight, merge(weight, *parts, scaling=layer.scaling).T)
        (module,) = layer.plain
        module.training = layer.training
        parent, _, attribute = config.paddle_name(name).rpartition(".")
        setattr(parents[parent], attribute, module)
    for parameter in plain.parameters():
        parameter.stop_gradient = False
    return plain


def adapter_state(model: LoRAModel) -> dict[str, Array]:
    """The adapter's tensors under PEFT's names and in its layout, for the settings `model.settings.saved()`.

    A PiSSA adapter becomes a plain LoRA of rank 2r on the original weights: A' = [A; A0], B' = [B, -B0], so that
    B' A' = B A - B0 A0 (what PEFT's `path_initial_model_for_weight_conversion` writes).
    """
    state: dict[str, Array] = {}
    layers, config = lora_layers(model), config_of(model)
    for name, layer in layers.items():
        arrays = {part: as_numpy(getattr(layer, part)).T for part in parts_of(model.settings)}
        if model.settings.variant == "pissa":
            arrays["lora_A"] = np.concatenate([arrays["lora_A"], as_numpy(layer.start.A).T], axis=0)
            arrays["lora_B"] = np.concatenate([arrays["lora_B"], -as_numpy(layer.start.B).T], axis=1)
        state |= {peft_name(f"{name}.{part}", layers): np.ascontiguousarray(array) for part, array in arrays.items()}
    for name, (owner, kind) in saved_tensors(model).items():
        state[peft_name(name, layers)] = convert.turned(config, name, as_numpy(getattr(owner, kind)))
    return state


def attach_adapter(model: paddle.nn.Layer, source: ModelSource) -> LoRAModel:
    """Attach the adapter of a source to its base model.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape than settings and model say.
    """
    adapter, settings = open_adapter(source)
    return add_lora(model, settings, state=paddle_state(adapter, source.config))


def paddle_state(adapter: dict[str, Weight], config: Architecture) -> dict[str, Array]:
    """What `open_adapter` found, read, as `training_state` has it."""
    return {
        name: convert.turned(config, name, weight.read()) if name in config.shapes else weight.read().T
        for name, weight in adapter.items()
    }
