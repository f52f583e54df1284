"""The tensors of GGUF files by Hugging Face's names, each made floating point again when it is asked for.

Of a tensor only some rows at a time are there in both forms, so that memory holds the result and little else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

from finetune.errors import CheckpointError
from finetune.model.family import Architecture
from finetune.model.gguf.container import Header, TensorInfo, damaged, parts_of, read_header
from finetune.model.gguf.package import gguf_package
from finetune.model.tensorfile import Array, Dtype

_PLAIN: dict[str, Dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CHUNK_NUMBERS = 1 << 20  # of the result, made at a time


@dataclass(frozen=True)
class Entry:
    """One tensor: where its bytes are and what they become.

    Attributes:
        kind: Name of its type in GGUF.
        dtype, shape: As it is read: its own dtype where it has one, else float32.
        row_bytes: Bytes of one row, which is the last dimension.
    """

    path: Path
    kind: str
    dtype: Dtype
    shape: tuple[int, ...]
    start: int
    row_bytes: int


class GgufTensors:
    """The tensors of one model, as `tensorfile.TensorFolder` gives those of a folder.

    Args:
        files: All parts of the model.
        config: Its description, for the names.

    Attributes:
        entries: By Hugging Face's name; a tensor that the architecture does not have keeps its own.

    Raises:
        ArgumentError: the gguf package is missing.
        CheckpointError: a file is damaged, or a tensor of a type that cannot be read.
    """

    def __init__(self, files: Iterable[Path], config: Architecture):
        names = {stored: name for name, stored in gguf_names(config).items()}
        self.entries: dict[str, Entry] = {}
        for path in files:
            header = read_header(path)
            for name, entry in _entries(header).items():
                if names.get(name, name) in self.entries:
                    raise damaged(path, f"tensor {name[:100]!r} is in another part too")
                self.entries[names.get(name, name)] = entry

    def read(self, name: str, rows: slice = slice(None)) -> Array:
        """The tensor, or some of its slowest dimension, as its entry says."""
        entry = self.entries[name]
        first, last, _ = rows.indices(entry.shape[0])
        shape = (last - first, *entry.shape[1:])
        inner = prod(entry.shape[1:-1]) if len(entry.shape) > 1 else 1
        if len(entry.shape) == 1:  # one row, whole or not at all
            first, last, shape = 0, 1, entry.shape
        result = np.empty((inner * (last - first), entry.shape[-1]), entry.dtype)
        step = max(1, _CHUNK_NUMBERS // entry.shape[-1])
        for start in range(0, len(result), step):
            part = result[start : start + step]
            part[...] = _decoded(entry, _bytes(entry, first * inner + start, len(part)))
        array = result.reshape(shape)
        return array[rows] if len(entry.shape) == 1 else array


def open_gguf(file: Path, config: Architecture) -> GgufTensors:
    """The tensors of a file and of the parts beside it."""
    return GgufTensors(parts_of(file), config)


def gguf_names(config: Architecture) -> Mapping[str, str]:
    """Hugging Face's name of each tensor -> its name in GGUF."""
    gguf = gguf_package("GGUF")
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == config.GGUF)
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    return {name: table.get_name(name, (".weight", ".bias")) for name in config.shapes}


@cache
def _can_be_read(kind: str) -> bool:
    """Whether the package turns this type into numbers: tried on a row of zeros."""
    gguf = gguf_package("GGUF")
    numbers = gguf.GGMLQuantizationType[kind]
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[numbers][1]), np.uint8), numbers)
    except NotImplementedError:
        return False
    return True


def _entries(header: Header) -> dict[str, Entry]:
    """The header's tensors, which must lie one behind the other and end where the file does."""
    found: dict[str, Entry] = {}
    position = header.data_start
    for name, info in header.tensors.items():
        if info.start != position:
            raise damaged(header.path, f"tensor {name[:100]!r} begins at byte {info.start} instead of {position}")
        found[name] = entry = _entry(name, info)
        position += prod(entry.shape[:-1]) * entry.row_bytes
        if position > header.size:
            what = f"it has {header.size} bytes, and tensor {name[:100]!r} would end at {position}: it is cut short"
            raise damaged(header.path, what)
        position = -(-position // header.alignment) * header.alignment
    if header.size > position:
        raise damaged(header.path, f"it has {header.size} bytes where its tensors end at {position}")
    return found


def _entry(name: str, info: TensorInfo) -> Entry:
    gguf = gguf_package(str(info.path))
    known = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    kind = known.get(info.kind)
    if kind is None or (kind not in _PLAIN and not _can_be_read(kind)):
        fix = "Use a file of another quantization, or a newer gguf package, if it has learnt this one."
        raise CheckpointError(
            f"tensor {name[:100]!r} is of type {kind or info.kind}, which cannot be read", where=str(info.path), fix=fix
        )
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if info.shape[-1] % block:
        raise damaged(info.path, f"tensor {name[:100]!r} has rows of {info.shape[-1]} in blocks of {block}")
    dtype = _PLAIN.get(kind, _PLAIN["F32"])
    return Entry(info.path, kind, dtype, info.shape, info.start, info.shape[-1] // block * block_bytes)


def _bytes(entry: Entry, first: int, rows: int) -> Array:
    """Some rows as they lie in the file, uint8 [rows, bytes]."""
    offset, count = entry.start + first * entry.row_bytes, rows * entry.row_bytes
    try:
        flat = np.fromfile(entry.path, np.uint8, count, offset=offset)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(entry.path)) from error
    if flat.size != count:
        raise CheckpointError("the file was cut short while it was read", where=str(entry.path))
    return flat.reshape(rows, entry.row_bytes)


def _decoded(entry: Entry, raw: Array) -> Array:
    """Those rows as numbers."""
    if entry.kind in _PLAIN:
        return raw.view(entry.dtype)
    gguf = gguf_package(str(entry.path))
    return gguf.dequantize(raw, gguf.GGMLQuantizationType[entry.kind])
