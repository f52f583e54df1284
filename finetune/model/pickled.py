"""Pickled weights turned into safetensors, for `finetune export OLD NEW --allow-pickle` and nothing else.

A pickle is a program: it names functions, and the reader calls them. This reader knows the few names that files of
weights need, each standing for a record of its own that only keeps what it is given; any other name ends the reading.
So nothing of the file is run: not torch's code, not Paddle's, not NumPy's. Neither torch nor paddle is loaded.

Read are what `torch.save` has written since torch 1.6 (a zip archive: .bin, .pth, .pt, .ckpt) and what `paddle.save`
writes (.pdparams). The names: torch/_weights_only_unpickler.py and paddle/framework/io.py.
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from finetune.errors import CheckpointError
from finetune.files import read_json, within, write_json
from finetune.model.resolve import ModelSource, resolve_model
from finetune.model.tensorfile import Array, Dtype, Promise, write_shards

MAX_PICKLE_BYTES = 64 * 2**20  # data.pkl of a torch archive holds names and shapes only
MAX_SHARD_BYTES = 5 * 10**9
# Pickled file or index -> stem of the safetensors it becomes; by config file of the folder.
_KNOWN = {
    "adapter_config.json": {"adapter_model.bin": "adapter_model"},
    "lora_config.json": {"lora_model_state.pdparams": "lora_model_state"},
    "config.json": {
        "pytorch_model.bin": "model",
        "pytorch_model.bin.index.json": "model",
        "model_state.pdparams": "model_state",
        "model_state.pdparams.index.json": "model_state",
    },
}
_TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_TORCH_DTYPES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_PADDLE_DTYPES = {"f2": np.float16, "f4": np.float32, "f8": np.float64, "u2": ml_dtypes.bfloat16, "i8": np.int64}
_PADDLE_DTYPES |= {"i4": np.int32, "i2": np.int16, "i1": np.int8, "u1": np.uint8, "b1": np.bool_}


@contextmanager
def unpickled(name: str | Path, scratch: Path) -> Iterator[ModelSource]:
    """A model or adapter, its weights turned into safetensors for a while where they are pickled.

    Args:
        name: A MODEL.
        scratch: Folder with room for the weights; made if missing.

    Raises:
        CheckpointError: a file is damaged, of a format that is not read, or asks for more than tensors need.
    """
    folder = Path(os.path.expanduser(name))
    found = _pickles(folder) if folder.is_dir() else None
    if found is None:
        yield resolve_model(name)
        return
    file, stem = found
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".unpickled-") as temporary:
        copy = Path(temporary)
        for path in folder.iterdir():
            if path.suffix in (".json", ".txt", ".jinja") and not path.name.endswith(".index.json"):
                shutil.copyfile(within(path.name, folder), copy / path.name)
        _keep_base(folder, copy)
        write_shards(copy, stem, _tensors(folder, file), MAX_SHARD_BYTES, {"format": "pt"})
        yield replace(resolve_model(copy), name=str(name))


def _pickles(folder: Path) -> tuple[str, str] | None:
    """The pickled file or index with the folder's weights, and its new stem; None where there are safetensors."""
    if any(folder.glob("*.safetensors")):
        return None
    for config, names in _KNOWN.items():
        if (folder / config).exists():
            return next(((name, stem) for name, stem in names.items() if (folder / name).exists()), None)
    return None


def _keep_base(folder: Path, copy: Path) -> None:
    """An adapter may name its base relative to its own folder."""
    for config in ("adapter_config.json", "lora_config.json"):
        if (copy / config).exists():
            raw = read_json(copy / config)
            base = raw.get("base_model_name_or_path")
            if isinstance(base, str) and not os.path.exists(base) and os.path.exists(folder / base):
                write_json(copy / config, raw | {"base_model_name_or_path": str((folder / base).resolve())})


def _tensors(folder: Path, file: str) -> dict[str, Promise]:
    if not file.endswith(".index.json"):
        return read_pickle(within(file, folder))
    weight_map = read_json(folder / file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError("has no weight_map from tensor names to file names", where=str(folder / file))
    tensors: dict[str, Promise] = {}
    for shard in dict.fromkeys(weight_map.values()):
        tensors |= read_pickle(within(shard, folder))
    if tensors.keys() != weight_map.keys():
        name = sorted(tensors.keys() ^ weight_map.keys())[0]
        raise CheckpointError(f"tensor {name!r} is not where the index says", where=str(folder / file))
    return tensors


def read_pickle(path: Path) -> dict[str, Promise]:
    """The tensors of one file by name. Those of a torch archive are read when their turn comes.

    Raises:
        CheckpointError: the file is damaged, of a format that is not read, or asks for more than tensors need.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_TORCH_LEGACY))
            if start == _TORCH_LEGACY:
                raise CheckpointError(
                    "is in the format of torch before 1.6, which is not read",
                    where=str(path),
                    fix="Save it again with a newer torch: torch.save(torch.load(file, weights_only=True), file).",
                )
            file.seek(0)
            return _read_torch(path, file) if start.startswith(b"PK") else _read_paddle(path, file)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    except Exception as error:  # pickle raises anything for a damaged file, MemoryError for a length that lies
        what = f"is damaged or holds no weights ({type(error).__name__}: {str(error)[:100]})"
        raise CheckpointError(what, where=str(path), fix="Copy or download it again.") from error


Names = dict[str, Callable[..., Any]]


class _Reader(pickle.Unpickler):
    """An unpickler for which the world has a few names.

    Args:
        storage: What stands for what a torch file keeps outside of the pickle.
    """

    def __init__(self, file: IO[bytes], path: Path, names: Names, storage: Callable[[Any], object] | None = None):
        super().__init__(file)
        self._path, self._names, self._storage = path, names, storage

    def persistent_load(self, identity: Any) -> object:
        """The stand-in for what the file keeps elsewhere."""
        if self._storage is None:
            raise pickle.UnpicklingError("it asks for what is not in the file")
        return self._storage(identity)

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        """The stand-in for a name, or a refusal."""
        full = f"{module}.{name}"
        if full not in self._names:
            raise CheckpointError(
                f"asks for {full[:100]!r}, which weights do not need, and was not read further",
                where=str(self._path),
                fix="Do not trust this file. Ask for safetensors.",
            )
        return self._names[full]


def _named(found: object, promises: Callable[[object], Promise | None], path: Path) -> dict[str, Promise]:
    """Name -> promise of each tensor in what a pickle holds."""
    if not isinstance(found, dict):
        raise CheckpointError(f"holds a {type(found).__name__}, not tensors by name", where=str(path))
    tensors = {}
    for name, value in found.items():
        promise = promises(value) if isinstance(name, str) else None
        if promise is None:
            raise CheckpointError(f"entry {str(name)[:100]!r} is not a tensor", where=str(path))
        tensors[name] = promise
    return tensors


# -- torch -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Storage:
    dtype: Dtype
    key: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    """Arguments of `torch._utils._rebuild_tensor_v2`: a view of a storage, in numbers, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(
    storage: object,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool = False,
    hooks: object = None,
    metadata: object = None,
) -> _Tensor:
    numbers = [offset, *shape, *strides]
    if not isinstance(storage, _Storage) or not all(type(n) is int and 0 <= n < 2**40 for n in numbers):
        raise ValueError("a tensor that is none")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if prod(shape) and last >= storage.count:
        raise ValueError("a tensor beyond its storage")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _read_torch(path: Path, file: IO[bytes]) -> dict[str, Promise]:
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        data = next((name for name in members if name.endswith("/data.pkl")), "")
        if not data or members[data].file_size > MAX_PICKLE_BYTES or any(m.compress_type for m in members.values()):
            raise CheckpointError("is a zip archive, but not of torch", where=str(path))
        root = data.removesuffix("data.pkl")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
            raise CheckpointError("holds numbers of another byte order", where=str(path))
        names: Names = {f"torch.{name}": partial(np.dtype, dtype) for name, dtype in _TORCH_DTYPES.items()} | {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
            "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
        }
        with archive.open(data) as stream:
            found = _Reader(stream, path, names, partial(_storage, root, members)).load()

    def promise(value: object) -> Promise | None:
        if not isinstance(value, _Tensor):
            return None
        return Promise(value.storage.dtype, value.shape, lambda: _read_tensor(path, f"{root}data/", value))

    return _named(found, promise, path)


def _storage(root: str, members: dict[str, zipfile.ZipInfo], identity: tuple[Any, ...]) -> _Storage:
    kind, dtype, key, _, count = identity
    storage = _Storage(dtype(), str(key), count)
    if kind != "storage" or members[f"{root}data/{key}"].file_size != count * storage.dtype.itemsize:
        raise ValueError(f"storage {key} is not as long as it should be")
    return storage


def _read_tensor(path: Path, root: str, tensor: _Tensor) -> Array:
    storage = tensor.storage
    try:
        with zipfile.ZipFile(path) as archive:
            flat = np.frombuffer(archive.read(root + storage.key), dtype=storage.dtype)[tensor.offset :]
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError) as error:  # by what zipfile finds wrong first
        raise CheckpointError(
            f"is damaged ({str(error) or 'it ends too early'})", where=str(path), fix="Copy or download it again."
        ) from error
    strides = [stride * storage.dtype.itemsize for stride in tensor.strides]
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, tensor.shape, strides)).reshape(tensor.shape)


# -- paddle ----------------------------------------------------------------------------------------------------


class _Dtype:
    """What the file says of a NumPy dtype."""

    def __init__(self, code: str, align: bool = False, copy: bool = True):
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _Array:
    """What the file says of a NumPy array."""

    def __init__(self, *_: object):
        self.array: Array | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or dtype.order not in ("<", "|") or not isinstance(data, bytes):
            raise ValueError(f"an array of {getattr(dtype, 'code', 'objects')}")
        array = np.frombuffer(data, dtype=_PADDLE_DTYPES[dtype.code])
        self.array = np.ascontiguousarray(array.reshape(shape, order="F" if fortran else "C"))


def _read_paddle(path: Path, file: IO[bytes]) -> dict[str, Promise]:
    names: Names = {
        "numpy.ndarray": _Array,
        "numpy.dtype": _Dtype,
        "collections.OrderedDict": OrderedDict,
        "_codecs.encode": lambda text, encoding: str(text).encode("latin1"),  # how protocol 2 writes bytes
    }
    for core in ("core", "_core"):  # NumPy 1, NumPy 2
        names[f"numpy.{core}.multiarray._reconstruct"] = lambda kind, shape, code: _Array()
    found = _Reader(file, path, names).load()
    if isinstance(found, dict):
        found.pop("StructuredToParameterName@@", None)

    def promise(value: object) -> Promise | None:
        return Promise.of(value.array) if isinstance(value, _Array) and value.array is not None else None

    return _named(found, promise, path)
