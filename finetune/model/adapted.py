"""An adapter's tensors as they lie on disk, and the weights of its base with them merged in.

Each is read when asked for, so that memory holds one. No paddle here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

import numpy as np

from finetune.errors import ArgumentError, CheckpointError, Fault
from finetune.model import convert
from finetune.model.adapters import LoraSettings, target_names, tensors_to_save
from finetune.model.family import EMBEDDING, HEAD, Architecture
from finetune.model.quantize import Quantization
from finetune.model.resolve import ModelSource
from finetune.model.tensorfile import Array, TensorFolder
from finetune.model.weights import Weight, audit, base_weights, wrong_dtypes

_MOST_FAULTS = 8
_COMPARE_ROWS = 4096
_ROUNDING = 2.0**-7  # relative; bfloat16's is 2**-9


def stored_weights(source: ModelSource, quantization: Quantization | None = None) -> dict[str, Weight]:
    """All weights by Hugging Face name, largest first; an adapter's are merged in float32.

    Args:
        quantization: Take for the base's linear layers what such codes of them stand for.

    Raises:
        CheckpointError: the folder does not hold what its config says.
    """
    if source.base is None:
        return base_weights(source)
    config, (adapter, settings) = source.config, open_adapter(source)
    weights = base_weights(source.base, config)
    if quantization is not None:
        weights |= {f"{name}.weight": _rounded(weights[f"{name}.weight"], quantization) for name in config.linears}
    saved = {name: weight for name, weight in adapter.items() if name in weights}
    merged = {f"{module}.weight": _merged(module, config, weights, adapter, settings) for module in adapted(adapter)}
    return weights | saved | merged


def _rounded(weight: Weight, quantization: Quantization) -> Weight:
    return Weight(np.dtype(np.float32), weight.shape, lambda: weight.quantized(quantization).dequantize())


def adapted(names: Iterable[str]) -> list[str]:
    """The modules with an update, of the names of an adapter's tensors."""
    return [name.removesuffix(".lora_A") for name in names if name.endswith(".lora_A")]


def _merged(
    module: str, config: Architecture, weights: dict[str, Weight], adapter: dict[str, Weight], settings: LoraSettings
) -> Weight:
    weight, scaling = weights[f"{module}.weight"], settings.scaling_of(module)
    parts = [adapter[f"{module}.{part}"] for part in parts_of(settings)]
    turn = not config.is_transposed(f"{module}.weight")  # an embedding is stored as [inputs, outputs]

    def read() -> Array:
        array = weight.read()
        result = merge(array.T if turn else array, *(part.read() for part in parts), scaling=scaling)
        return np.ascontiguousarray(result.T) if turn else result

    return Weight(np.dtype(np.float32), weight.shape, read)


def merge(weight: Array, A: Array, B: Array, magnitude: Array | None = None, *, scaling: float) -> Array:
    """weight + scaling * B A in float32, whatever the dtypes; with DoRA each row of it has the given length.

    Args:
        weight: [out, in].
        A, B: [rank, in] and [out, rank].
        magnitude: DoRA's, [out].
    """
    weight, A, B = (array.astype(np.float32) for array in (weight, A, B))
    result: Array = weight + np.float32(scaling) * (B @ A)
    if magnitude is not None:
        result *= (magnitude.astype(np.float32) / np.linalg.norm(result, axis=1))[:, None]
    return result


def parts_of(settings: LoraSettings) -> tuple[str, ...]:
    """What each adapted module has, in the order in which `merge` takes it."""
    return ("lora_A", "lora_B", "lora_magnitude") if settings.dora else ("lora_A", "lora_B")


def adapter_shapes(settings: LoraSettings, config: Architecture, modules: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an adapter's tensors, in PEFT's layout: of the updates, then those saved whole."""
    shapes: dict[str, tuple[int, ...]] = {}
    modules = list(modules)
    for module in modules:
        rank, linear = settings.rank_of(module), config.adaptable[module]
        found = {"lora_A": (rank, linear.inputs), "lora_B": (linear.outputs, rank), "lora_magnitude": (linear.outputs,)}
        shapes |= {f"{module}.{part}": found[part] for part in parts_of(settings)}
    return shapes | {name: config.shapes[name] for name in tensors_to_save(settings, config, modules)}


def open_adapter(source: ModelSource) -> tuple[dict[str, Weight], LoraSettings]:
    """An adapter's tensors, and its settings with the target modules filled in.

    The names are `<Hugging Face module>.lora_A` [rank, in], `.lora_B` [out, rank], with DoRA `.lora_magnitude` [out],
    and those of the base's tensors that the adapter has whole.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape than settings and model say.
    """
    config, settings = source.config, source.lora
    if settings is None or source.base is None:
        raise ValueError(f"{source.name} is a whole model")
    tensors, where = TensorFolder(source.folder, source.stem), str(source.folder)
    stored = _names(tensors, source)
    found = {f"{module}.{part}": name for (module, part), name in stored.items() if part != "base"}
    settings = _completed(settings, found)
    modules = _targeted(settings, config, adapted(found), where)
    turn = source.layout == "paddle"

    def weight(name: str) -> Weight:
        entry = tensors.entries[name]
        shape = entry.shape[::-1] if turn else entry.shape
        return Weight(entry.dtype, shape, lambda: tensors.read(name).T if turn else tensors.read(name))

    weights = {ours: weight(name) for ours, name in found.items()}
    expected = adapter_shapes(settings, config, modules)
    faults = audit(expected, {name: weight.shape for name, weight in weights.items()}, where)
    faults += wrong_dtypes(tensors, where)
    if faults:
        raise CheckpointError.of(faults)
    for (module, part), name in stored.items():
        if part == "base":
            _check_repeated(f"{module}.weight", source.base, config, weight(name), where)
    return weights, replace(settings, target_modules=tuple(short_names(modules, config.adaptable)))


def _names(tensors: TensorFolder, source: ModelSource) -> dict[tuple[str, str], str]:
    """(module, part) -> name in the file; see `convert.PARTS`."""
    where, config = str(source.folder), source.config
    found: dict[tuple[str, str], str] = {}
    faults: list[Fault] = []
    for name in tensors.entries:
        parsed = convert.parse_adapter_name(config, name, source.layout)
        if parsed is None or not _has_place(config, *parsed):
            faults.append(Fault(f"tensor {name[:200]!r} is of no projection of this model", where))
        elif parsed in found:
            faults.append(Fault(f"tensor {name[:200]!r} is there under two names", where))
        else:
            found[parsed] = name
    if faults:
        raise CheckpointError.of(faults[:_MOST_FAULTS])
    if not found:
        raise CheckpointError("the adapter has no tensors", where=where)
    return found


def _has_place(config: Architecture, module: str, part: str) -> bool:
    return f"{module}.{part}" in config.shapes if part in ("weight", "bias") else module in config.adaptable


def _completed(settings: LoraSettings, found: Collection[str]) -> LoraSettings:
    """Of a tied pair PEFT's `ensure_weight_tying` writes both parts, where the config names one."""
    names, pair = settings.modules_to_save, {EMBEDDING.rpartition(".")[2], HEAD}
    if pair & set(names) and {f"{EMBEDDING}.weight", f"{HEAD}.weight"} <= set(found):
        return replace(settings, modules_to_save=tuple(dict.fromkeys((*names, *sorted(pair)))))
    return settings


def _targeted(settings: LoraSettings, config: Architecture, present: Collection[str], where: str) -> list[str]:
    """The modules an adapter must have: those its config names; where it has a pattern, those its tensors name."""
    if not settings.target_modules:
        return [name for name in config.adaptable if name in present]
    try:
        return target_names(settings.target_modules, config)
    except ArgumentError as error:
        raise CheckpointError.of([Fault(fault.what, where, fault.fix) for fault in error.faults]) from error


def _check_repeated(name: str, base: ModelSource, config: Architecture, found: Weight, where: str) -> None:
    """PEFT repeats the weight of an adapted embedding or head. It must be the base's, but for rounding."""
    expected = base_weights(base, config)[name]
    same = found.shape == expected.shape
    if same:
        left, right = found.read(), expected.read()
        for start in range(0, len(left), _COMPARE_ROWS):
            a, b = (array[start : start + _COMPARE_ROWS].astype(np.float32) for array in (left, right))
            same &= bool(np.all(np.abs(a - b) <= _ROUNDING * np.abs(b) + 1e-6))
    if not same:
        raise CheckpointError(
            f"holds another {name} than its base model (perhaps tokens were added)",
            where=where,
            fix="Merge it in PEFT (model.merge_and_unload()), save the whole model there, and name that one.",
        )


def short_names(names: list[str], every: Iterable[str]) -> list[str]:
    """The modules' last names where those mean the same modules, else their full names."""
    short = sorted({name.rpartition(".")[2] for name in names})
    meant = {name for name in every if name.rpartition(".")[2] in short}
    return short if meant == set(names) else sorted(names)
