"""A GGUF file's header, with every claim of it checked against the file (version 2 and 3, little-endian).

    magic "GGUF", version u32, number of tensors u64, number of keys u64
    each key:     name, type u32, value         a text is its length u64 and UTF-8 bytes
    each tensor:  name, dimensions u32, each u64 (fastest first), type u32, offset u64 from the start of the data
    padding to `general.alignment`, then the data, each tensor padded alike

Source: ggml/docs/gguf.md of llama.cpp. The `gguf` package's reader maps the file and trusts it, and takes seconds for a
vocabulary of 151,936; it is used for what tensors' types mean, in finetune/model/gguf/tensors.py.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from finetune.errors import CheckpointError

MAGIC = b"GGUF"
_COPY_AGAIN = "Copy or download it again."
_VERSIONS = (2, 3)
_MOST_KEYS, _MOST_TENSORS, _MOST_DIMENSIONS = 1 << 16, 1 << 20, 4
_MOST_ALIGNMENT = 1 << 20
_TEXT, _LIST = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor, as the header has it.

    Attributes:
        path: The file it is in.
        shape: As arrays have it, slowest dimension first.
        kind: Number of its type.
        start: Of its bytes, from the beginning of the file.
    """

    path: Path
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class Header:
    """What one file says before its data.

    Attributes:
        metadata: Numbers, texts, and lists of them, by key.
        tensors: By name, in the order of the file.
        alignment: Bytes that the start of each tensor is a multiple of, from the start of the data on.
        data_start, size: Of the file, in bytes.
        digest: SHA-256 of all bytes before the data, hex.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    alignment: int
    data_start: int
    size: int
    digest: str


def damaged(path: Path, what: str) -> CheckpointError:
    """What to raise for a file that contradicts itself."""
    return CheckpointError(f"the file is damaged: {what}", where=str(path), fix=_COPY_AGAIN)


def parts_of(path: Path) -> list[Path]:
    """All files of a model that was split into `NAME-00001-of-00003.gguf`, of which `path` is any; else just it.

    Raises:
        CheckpointError: one is missing.
    """
    split = _PART.fullmatch(path.name)
    if split is None:
        return [path]
    count = int(split[3])
    parts = [path.with_name(f"{split[1]}-{number:05d}-of-{split[3]}.gguf") for number in range(1, count + 1)]
    missing = next((part for part in parts if not part.is_file()), None)
    if not parts or missing:
        fix = "All parts must lie in one folder."
        raise CheckpointError(f"the model has {count} parts, and one is missing", where=str(missing or path), fix=fix)
    return parts


def read_header(path: Path) -> Header:
    """Read what stands before the data.

    Raises:
        CheckpointError: no GGUF file, of a version that is not read, cut short, or damaged.
    """
    try:
        with path.open("rb") as file:
            return _Reader(path, file).header()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error


class _Reader:
    """Goes through a header once. What it counts up to is never more than the file could hold."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path = path
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.position = 0
        self.total = hashlib.sha256()

    def header(self) -> Header:
        if self.take(4) != MAGIC:
            what = "is no GGUF file: it does not begin with 'GGUF'"
            raise CheckpointError(what, where=str(self.path), fix=_COPY_AGAIN)
        version = self.number("I")
        if version not in _VERSIONS:
            fix = "Versions 2 and 3 in little-endian order are read; convert it with llama.cpp's tools."
            raise CheckpointError(f"is GGUF of version {version}", where=str(self.path), fix=fix)
        tensors, keys = self.count("Q", _MOST_TENSORS), self.count("Q", _MOST_KEYS)
        metadata = self.unique(keys, "key", lambda: self.value(self.number("I")))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
            raise damaged(self.path, f"general.alignment is {str(alignment)[:50]}")
        infos = self.unique(tensors, "tensor", self.info)
        start = -(-self.position // alignment) * alignment
        places = {
            name: TensorInfo(self.path, shape, kind, start + offset) for name, (shape, kind, offset) in infos.items()
        }
        return Header(self.path, metadata, places, alignment, start, self.size, self.total.hexdigest())

    def unique(self, count: int, what: str, read: Callable[[], Any]) -> dict[str, Any]:
        """`count` names, each with what follows it."""
        found: dict[str, Any] = {}
        for _ in range(count):
            name = self.text()
            if name in found:
                raise damaged(self.path, f"{what} {name[:100]!r} is there twice")
            found[name] = read()
        return found

    def info(self) -> tuple[tuple[int, ...], int, int]:
        """Shape, type and offset of a tensor."""
        shape = tuple(self.number("Q") for _ in range(self.count("I", _MOST_DIMENSIONS)))[::-1]
        if not shape or any(not 1 <= size < 1 << 40 for size in shape):
            raise damaged(self.path, f"a tensor has the shape {list(shape)}")
        return shape, self.number("I"), self.number("Q")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A number, a text, or a list of them."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _LIST or depth > 1:
            raise damaged(self.path, f"a value has the type {kind}")
        inner = self.number("I")
        if inner in _NUMBERS:
            code = _NUMBERS[inner]
            count = self.count("Q", (self.size - self.position) // struct.calcsize(code))
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))
        return [self.value(inner, depth + 1) for _ in range(self.count("Q", (self.size - self.position) // 8))]

    def text(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise damaged(self.path, f"a text is not UTF-8: {raw[:50]!r}") from error

    def count(self, code: str, most: int) -> int:
        value = self.number(code)
        if value > most:
            raise damaged(self.path, f"it claims {value} things where there is room for {most}: it may be cut short")
        return value

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise damaged(self.path, f"it is cut short: {self.size} bytes end within its header")
        raw = self.file.read(count)
        if len(raw) != count:
            raise damaged(self.path, "it was cut short while it was read")
        self.position += count
        self.total.update(raw)
        return raw
