"""Safetensors read one tensor at a time with every claim of the header checked, and written one tensor at a time.

The `safetensors` package writes from a dict that holds a whole shard; here a shard is a list of promises, each made
good when its turn comes, so that memory holds one tensor. No paddle here.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from finetune.errors import CheckpointError
from finetune.files import no_duplicates, read_json, within

Array = NDArray[Any]
Dtype = np.dtype[Any]

DTYPES: dict[str, Dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the format
_COPY_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: where its bytes are and what they mean."""

    path: Path
    dtype: Dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class TensorFolder:
    """The tensors of one safetensors file, or of the shards an index names.

    NumPy has no bfloat16: PaddleNLP saves its bits as U16, in files whose format is `np` or not said, and reads them as
    bfloat16 again. So does this; what is written here says BF16.

    Args:
        folder: The model or adapter folder. Nothing outside of it is read.
        stem: Name before `.safetensors` or `.safetensors.index.json`.

    Raises:
        CheckpointError: a file is missing, damaged or outside of the folder, or index and shards disagree.
    """

    def __init__(self, folder: Path, stem: str):
        self.folder = folder
        self.metadata: dict[str, Any] = {}
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        self.label = single if single.exists() else index
        self.entries = self._read_file(single.name) if single.exists() else self._read_index(index)

    @staticmethod
    def present(folder: Path, stem: str) -> bool:
        """Whether there is something to read under this stem."""
        return any((folder / f"{stem}.safetensors{end}").exists() for end in ("", ".index.json"))

    def read(self, name: str, rows: slice = slice(None)) -> Array:
        """The tensor, or some rows of it, in the dtype of the file."""
        entry = self.entries[name]
        shape, start, nbytes = entry.shape, entry.start, entry.nbytes
        if rows != slice(None):
            first, last, _ = rows.indices(shape[0])
            row_bytes = nbytes // max(shape[0], 1)
            shape, start, nbytes = (last - first, *shape[1:]), start + first * row_bytes, (last - first) * row_bytes
        try:
            flat = np.fromfile(entry.path, dtype=np.uint8, count=nbytes, offset=start)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=str(entry.path)) from error
        if flat.size != nbytes:
            raise CheckpointError("the file was cut short while it was read", where=str(entry.path))
        return flat.view(entry.dtype).reshape(shape)

    def _read_index(self, index: Path) -> dict[str, Entry]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError("has no weight_map from tensor names to file names", where=str(index))
        entries: dict[str, Entry] = {}
        for file in dict.fromkeys(weight_map.values()):
            if not os.path.isfile(within(file, self.folder)):
                raise CheckpointError(
                    f"shard {file!r} is named in {index.name} but is not there",
                    where=str(self.folder),
                    fix="Copy or download the folder again.",
                )
            shard = self._read_file(file)
            promised = {name for name, where in weight_map.items() if where == file}
            if promised != shard.keys():
                name = sorted(promised ^ shard.keys())[0]
                state = "is not in it" if name in promised else f"is in it, but {index.name} does not say so"
                raise CheckpointError(f"tensor {name!r} {state}", where=str(self.folder / file))
            entries |= shard
        return entries

    def _read_file(self, name: str) -> dict[str, Entry]:
        path = within(name, self.folder)
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                prefix = file.read(8)
                length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
                if length > min(MAX_HEADER_BYTES, size - 8):
                    raise _damaged(path, "its header does not fit into the file")
                raw = file.read(length)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"its header is not valid JSON ({str(error)[:100]})") from error
        if not isinstance(header, dict):
            raise _damaged(path, "its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        self.metadata = metadata if isinstance(metadata, dict) else {}
        dtypes = DTYPES | {"U16": DTYPES["BF16"]} if self.metadata.get("format", "np") == "np" else DTYPES
        entries = {name: _entry(path, name, value, 8 + length, dtypes) for name, value in header.items()}
        _check_extents(path, entries.values(), 8 + length, size)
        return entries


def _entry(path: Path, name: str, value: Any, data_start: int, dtypes: dict[str, Dtype]) -> Entry:
    """Check one line of the header against itself."""
    try:
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, start, end]
        if dtype not in dtypes:
            raise CheckpointError(
                f"tensor {name!r} is stored as {str(dtype)[:20]}, which is not supported",
                where=str(path),
                fix="Supported for weights: F32, F16, BF16.",
            )
        good = all(type(number) is int and 0 <= number < 2**62 for number in numbers) and len(shape) <= 8
        nbytes = prod(shape) * dtypes[dtype].itemsize if good else -1
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(path, f"the header entry of {name[:100]!r} is not one") from error
    if not good or end - start != nbytes:
        raise _damaged(path, f"tensor {name[:100]!r} has a size that its shape and dtype do not give")
    return Entry(path, dtypes[dtype], tuple(shape), data_start + start, nbytes)


def _check_extents(path: Path, entries: Iterable[Entry], data_start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    position = data_start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.nbytes)):
        if entry.start != position:
            raise _damaged(path, "its tensors overlap or leave gaps")
        position += entry.nbytes
    if position != size:
        state = "cut short" if position > size else "longer than its header says"
        raise _damaged(path, f"it has {size} bytes where its header promises {position}: it is {state}")


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"the file is damaged: {what}", where=str(path), fix="Copy or download it again.")


@dataclass(frozen=True)
class Promise:
    """A tensor to be written: its shape now, its content when its turn comes.

    Attributes:
        make: Gives the array, of exactly this dtype and shape.
    """

    dtype: Dtype
    shape: tuple[int, ...]
    make: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, array: Array) -> Promise:
        """A promise already kept."""
        return cls(array.dtype, array.shape, lambda: array)


def write_tensors(path: Path, tensors: dict[str, Promise], metadata: dict[str, str]) -> None:
    """Write one safetensors file, holding one tensor in memory at a time.

    Larger items first, as the package orders them, so that every tensor stays aligned to its item size.

    Raises:
        ValueError: a promise was not kept (another shape or dtype).
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for name in order:
        tensor = tensors[name]
        offsets = [position, position + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name in order:
            array = tensors[name].make()
            if array.shape != tensors[name].shape or array.dtype != tensors[name].dtype:
                raise ValueError(f"{name}: {array.dtype}{array.shape}, promised {tensors[name]}")
            _write_bytes(file, np.ascontiguousarray(array))


def _write_bytes(file: BinaryIO, array: Array) -> None:
    flat = array.reshape(-1).view(np.uint8)
    for start in range(0, flat.size, _COPY_BYTES):  # one huge write would be copied whole
        file.write(flat[start : start + _COPY_BYTES].data)


def write_shards(
    folder: Path, stem: str, tensors: dict[str, Promise], max_bytes: int, metadata: dict[str, str]
) -> None:
    """Write one file, or numbered shards with an index where the tensors exceed `max_bytes`."""
    shards: list[dict[str, Promise]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        write_tensors(folder / f"{stem}.safetensors", tensors, metadata)
        return
    files = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards):
        write_tensors(folder / file, shard, metadata)
    weight_map = {name: file for file, shard in zip(files, shards) for name in sorted(shard)}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
