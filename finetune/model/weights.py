"""The weights of a model as they lie on disk: checked against the config, in Hugging Face's layout whatever the folder
has. Each is read when asked for, so that memory holds one. No paddle here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import ml_dtypes
import numpy as np

from finetune.errors import CheckpointError, Fault, did_you_mean
from finetune.model import convert
from finetune.model.bitsandbytes import BitsandbytesTensors, open_folder
from finetune.model.config import DTYPES
from finetune.model.family import EMBEDDING, HEAD, Architecture
from finetune.model.gguf.tensors import GgufTensors, open_gguf
from finetune.model.quantize import Int8, Nf4, Quantization
from finetune.model.resolve import ModelSource
from finetune.model.tensorfile import Array, Dtype, TensorFolder

_COMPARE_ROWS = 4096
_MOST_FAULTS = 8  # named before "and N more"


@dataclass(frozen=True)
class Weight:
    """A tensor to come, in Hugging Face's layout.

    Attributes:
        dtype, shape: As `read` gives it.
        codes: The matrix as the folder has it, where it is quantized there.
    """

    dtype: Dtype
    shape: tuple[int, ...]
    read: Callable[[], Array]
    codes: Callable[[], Nf4] | None = None

    def quantized(self, how: Quantization) -> Nf4 | Int8:
        """A matrix in codes: with nf4 those of its folder, where it has them."""
        return self.codes() if self.codes and how.kind == "nf4" else how.quantize(self.read())


Tensors = TensorFolder | GgufTensors | BitsandbytesTensors


def numpy_dtype(name: str) -> Dtype:
    """The numpy dtype of a dtype's name; bfloat16 is ml_dtypes'."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def base_weights(source: ModelSource, config: Architecture | None = None) -> dict[str, Weight]:
    """The weights of a whole model.

    Args:
        config: What to make of it, where that is not what it is: the same with a head of its own.
    """
    tensors, config = open_tensors(source), config or source.config

    def weight(name: str, shape: tuple[int, ...]) -> Weight:
        own = name if name in source.config.shapes else f"{EMBEDDING}.weight"  # of a head that was tied
        stored = config.paddle_name(own) if source.layout == "paddle" else own

        def read() -> Array:
            array = tensors.read(stored)
            return convert.turned(config, own, array) if source.layout == "paddle" else array

        codes = None
        if isinstance(tensors, BitsandbytesTensors) and stored in tensors.quantized:
            codes = partial(tensors.codes, stored)
        return Weight(tensors.entries[stored].dtype, shape, read, codes)

    return {name: weight(name, shape) for name, shape in config.shapes.items()}


def open_tensors(source: ModelSource) -> Tensors:
    """The weights of a whole model, compared with its config by name, shape and dtype.

    Raises:
        CheckpointError: tensors missing, unexpected, of another shape, or not floating point; the first few are named.
    """
    tensors: Tensors
    if source.gguf:
        tensors = open_gguf(source.gguf, source.config)
    else:
        tensors = open_folder(TensorFolder(source.folder, source.stem))
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
    faults += wrong_dtypes(tensors, where)
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


def wrong_dtypes(tensors: Tensors, where: str) -> list[Fault]:
    """Tensors that hold no floating point numbers, the first few."""
    return [
        Fault(f"tensor {name[:200]!r} is {entry.dtype}", where, "Weights are floating point numbers.")
        for name, entry in tensors.entries.items()
        if not convert.is_ignorable(name) and entry.dtype.name not in (*DTYPES, "float64")
    ][:_MOST_FAULTS]


def _layers_in(tensors: Tensors, prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in tensors.entries if name.startswith(prefix)})


def _check_spare_head(tensors: Tensors, source: ModelSource) -> None:
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
