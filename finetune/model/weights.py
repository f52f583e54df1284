"""The weights of a model source as they lie on disk: checked against the config, in Hugging Face's layout whatever the
folder has, an adapter merged on the way. Each is read when asked for, so that memory holds one. No paddle here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from finetune.errors import ArgumentError, CheckpointError, Fault, did_you_mean
from finetune.model import convert
from finetune.model.adapters import LoraSettings, target_names
from finetune.model.config import DTYPES
from finetune.model.family import EMBEDDING, HEAD, Architecture
from finetune.model.gguf.tensors import GgufTensors, open_gguf
from finetune.model.resolve import ModelSource
from finetune.model.tensorfile import Array, Dtype, TensorFolder

_COMPARE_ROWS = 4096
_MOST_FAULTS = 8  # named before "and N more"


@dataclass(frozen=True)
class Weight:
    """A tensor to come, in Hugging Face's layout.

    Attributes:
        dtype, shape: As `read` gives it.
    """

    dtype: Dtype
    shape: tuple[int, ...]
    read: Callable[[], Array]


def numpy_dtype(name: str) -> Dtype:
    """The numpy dtype of a dtype's name; bfloat16 is ml_dtypes'."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def stored_weights(source: ModelSource) -> dict[str, Weight]:
    """All weights by Hugging Face name, largest first; an adapter's are merged in float32.

    Raises:
        CheckpointError: the folder does not hold what its config says.
    """
    if source.base is None:
        return base_weights(source)
    weights, adapter, settings = base_weights(source.base), *open_adapter(source)
    modules = {name.rpartition(".")[0] for name in adapter}

    def merged(module: str) -> Weight:
        weight = weights[f"{module}.weight"]

        def read() -> Array:
            A, B = (adapter[f"{module}.{part}"].read() for part in ("lora_A", "lora_B"))
            return merge(weight.read(), A, B, settings.scaling)

        return Weight(np.dtype(np.float32), weight.shape, read)

    return weights | {f"{module}.weight": merged(module) for module in modules}


def merge(weight: Array, A: Array, B: Array, scaling: float) -> Array:
    """weight + scaling * B A in float32, whatever the dtypes.

    Args:
        weight: [out, in].
        A, B: [rank, in] and [out, rank].
    """
    weight, A, B = (array.astype(np.float32) for array in (weight, A, B))
    return weight + np.float32(scaling) * (B @ A)


def base_weights(source: ModelSource) -> dict[str, Weight]:
    """The weights of a whole model."""
    tensors, config = open_tensors(source), source.config

    def weight(name: str, shape: tuple[int, ...]) -> Weight:
        stored = config.paddle_name(name) if source.layout == "paddle" else name

        def read() -> Array:
            array = tensors.read(stored)
            return convert.turned(config, name, array) if source.layout == "paddle" else array

        return Weight(tensors.entries[stored].dtype, shape, read)

    return {name: weight(name, shape) for name, shape in config.shapes.items()}


def open_tensors(source: ModelSource) -> TensorFolder | GgufTensors:
    """The weights of a whole model, compared with its config by name, shape and dtype.

    Raises:
        CheckpointError: tensors missing, unexpected, of another shape, or not floating point; the first few are named.
    """
    tensors = open_gguf(source.gguf, source.config) if source.gguf else TensorFolder(source.folder, source.stem)
    config, where = source.config, str(source.place)
    layers = _layers_in(tensors, config.layer_prefix(source.layout))
    if layers != config.num_hidden_layers:
        what = f"config.json says {config.num_hidden_layers} layers, the weights have {layers}"
        raise CheckpointError(what, where=where, fix="Files of two models are mixed, or some are missing.")
    expected = expected_shapes(config, source.layout)
    found = {name: entry.shape for name, entry in tensors.entries.items() if not convert.is_ignorable(name)}
    head = f"{HEAD}.weight"
    spare_head = config.tie_word_embeddings and head in found
    if spare_head:
        expected[head] = (config.vocab_size, config.hidden_size)
    faults = audit(expected, found, where)
    faults += _wrong_dtypes(tensors, where)
    if faults:
        raise CheckpointError.of(faults)
    if spare_head:
        _check_spare_head(tensors, source)
    return tensors


def expected_shapes(config: Architecture, layout: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes a model folder in this layout must have."""
    if layout != "paddle":
        return dict(config.shapes)
    return {config.paddle_name(name): config.paddle_shape(name) for name in config.shapes}


def audit(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str) -> list[Fault]:
    """Differences between two sets of names and shapes, at most a few of them spelled out."""
    faults = [Fault(f"tensor {name!r} is missing", where) for name in expected if name not in found]
    for name, shape in found.items():
        if name not in expected:
            faults.append(Fault(f"tensor {name[:200]!r} is unexpected", where, did_you_mean(name, expected)))
        elif shape != expected[name]:
            want = list(expected[name])
            faults.append(Fault(f"tensor {name!r} has shape {list(shape)}, config.json asks for {want}", where))
        if len(faults) > 10 * _MOST_FAULTS:
            break
    if len(faults) > _MOST_FAULTS:
        rest = len(faults) - _MOST_FAULTS
        faults = [*faults[:_MOST_FAULTS], Fault(f"and {rest} or more faults of this kind", where)]
    return faults


def _wrong_dtypes(tensors: TensorFolder | GgufTensors, where: str) -> list[Fault]:
    return [
        Fault(f"tensor {name[:200]!r} is {entry.dtype}", where, "Weights are floating point numbers.")
        for name, entry in tensors.entries.items()
        if not convert.is_ignorable(name) and entry.dtype.name not in (*DTYPES, "float64")
    ][:_MOST_FAULTS]


def _layers_in(tensors: TensorFolder | GgufTensors, prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in tensors.entries if name.startswith(prefix)})


def _check_spare_head(tensors: TensorFolder | GgufTensors, source: ModelSource) -> None:
    """A tied folder may repeat the embeddings as head; a different head means that it is not tied."""
    embedding, config = f"{EMBEDDING}.weight", source.config
    embedding = config.paddle_name(embedding) if source.layout == "paddle" else embedding
    for start in range(0, config.vocab_size, _COMPARE_ROWS):
        rows = slice(start, start + _COMPARE_ROWS)
        if not np.array_equal(tensors.read(embedding, rows), tensors.read(f"{HEAD}.weight", rows)):
            raise CheckpointError(
                "lm_head.weight differs from the embeddings although config.json ties them",
                where=str(source.folder),
                fix="Set tie_word_embeddings to false if the head is meant to be its own.",
            )


def open_adapter(source: ModelSource) -> tuple[dict[str, Weight], LoraSettings]:
    """An adapter's tensors, and its settings with the target modules filled in.

    The names are `<Hugging Face module>.lora_A` [rank, in] and `.lora_B` [out, rank].

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape than settings and model say.
    """
    tensors = TensorFolder(source.folder, source.stem)
    where, modules, settings = str(source.folder), source.config.linears, source.lora
    if settings is None:
        raise ValueError(f"{source.name} is a whole model")
    found = _adapter_names(tensors, source)
    names = _adapted(settings, modules, {module for module, _ in found}, where)
    expected: dict[str, tuple[int, ...]] = {}
    for module in names:
        A, B = (settings.rank, modules[module].inputs), (modules[module].outputs, settings.rank)
        expected |= {f"{module}.lora_A": A, f"{module}.lora_B": B}
    turn = source.layout == "paddle"

    def weight(stored: str) -> Weight:
        entry = tensors.entries[stored]
        shape = entry.shape[::-1] if turn else entry.shape
        return Weight(entry.dtype, shape, lambda: tensors.read(stored).T if turn else tensors.read(stored))

    weights = {f"{module}.{part}": weight(stored) for (module, part), stored in found.items()}
    faults = audit(expected, {name: weight.shape for name, weight in weights.items()}, where)
    faults += _wrong_dtypes(tensors, where)
    if faults:
        raise CheckpointError.of(faults)
    return weights, replace(settings, target_modules=tuple(short_names(names, modules)))


def _adapter_names(tensors: TensorFolder, source: ModelSource) -> dict[tuple[str, str], str]:
    """(module, lora_A or lora_B) -> name in the file."""
    where = str(source.folder)
    found: dict[tuple[str, str], str] = {}
    faults: list[Fault] = []
    for name in tensors.entries:
        parsed = convert.parse_adapter_name(source.config, name, source.layout)
        if parsed is None or parsed[0] not in source.config.linears:
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


def _adapted(settings: LoraSettings, modules: Iterable[str], present: set[str], where: str) -> list[str]:
    """The modules an adapter must have: those its config names; where it has a pattern, those its tensors name."""
    if not settings.target_modules:
        return [name for name in modules if name in present]
    try:
        return target_names(settings.target_modules, modules)
    except ArgumentError as error:
        raise CheckpointError.of([Fault(fault.what, where, fault.fix) for fault in error.faults]) from error


def short_names(names: list[str], every: Iterable[str]) -> list[str]:
    """The modules' last names where those mean the same modules, else their full names."""
    short = sorted({name.rpartition(".")[2] for name in names})
    meant = {name for name in every if name.rpartition(".")[2] in short}
    return short if meant == set(names) else sorted(names)
