"""Tokenized rows on disk, in Arrow files under a key of all they depend on, opened by mapping them into memory.

CACHE/rows/<key>/
  rows.arrow   the parts, one record batch each
  entry.json   size and CRC-32 of rows.arrow, and what became of the rows; a SHA-256 of itself
CACHE/rows/<key>.lock   held while an entry is made, so that several processes do not make it at once

CACHE is $FINETUNE_CACHE, else $XDG_CACHE_HOME/paddle-finetune, else ~/.cache/paddle-finetune. An entry is written in
a folder of its own, synced, and renamed. One that does not check out is made again. When all of them take more than
`MAX_BYTES`, those go that were not used for longest. Nothing is ever unpickled.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from finetune.files import cache_home, sync
from finetune.rows.table import Part, Sequences

MAX_BYTES = 20 * 2**30
_ROOMS, _BELOW = ("chat", "rows"), ("errors.py", "files.py", "methods.py")
ROWS, ENTRY = "rows.arrow", "entry.json"
_CHUNK = 1 << 20


def cache_folder() -> Path:
    """Where entries lie; it need not be there yet."""
    return cache_home() / "rows"


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def code_files() -> list[Path]:
    """The files of the package that decide what the tokens of a row are: two rooms, and what those take from below."""
    package = Path(__file__).parent.parent
    rooms = [path for room in _ROOMS for path in (package / room).rglob("*.py")]
    return sorted([*rooms, *(package / name for name in _BELOW)])


@cache
def code_digest() -> str:
    """SHA-256 of `code_files` with their names: another version of them makes other entries."""
    package, total = Path(__file__).parent.parent, hashlib.sha256()
    for path in code_files():
        content = path.read_bytes()
        total.update(f"{path.relative_to(package)} {len(content)}\n".encode() + content)
    return total.hexdigest()


# -- entries ---------------------------------------------------------------------------------------------------


def open_entry(folder: Path) -> tuple[list[Part], dict[str, Any]] | None:
    """The parts of an entry and what `Store.finish` was given; None where it is not there or damaged."""
    try:
        record = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
        rows = folder / ROWS
        if digest(record["entry"]) != record["sha256"] or rows.stat().st_size != record["entry"]["size"]:
            return None
        if _crc32(rows) != record["entry"]["crc32"]:
            return None
        os.utime(folder)  # used now
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return read_parts(rows), record["entry"]["content"]


def read_parts(path: Path) -> list[Part]:
    """The parts of an Arrow file. Their arrays are views of the mapped file: the kernel reads and drops pages."""
    import pyarrow

    reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
    return [_part_of(reader.get_batch(i)) for i in range(reader.num_record_batches)]


class Store:
    """Parts written as they come; then `finish` makes an entry of them.

    Args:
        root: The folder of all entries, made if missing.
        key: Of the entry.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, root: Path, key: str):
        self.root, self.key = root, key
        root.mkdir(parents=True, exist_ok=True)
        self._partial = root / f".{key}.partial"
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir()
        self._file = open(self._partial / ROWS, "wb")
        self._writer: Any = None

    def add(self, part: Part) -> None:
        """Write a part."""
        import pyarrow

        batch = _batch_of(part)
        if self._writer is None:
            self._writer = pyarrow.ipc.new_file(self._file, batch.schema)
        self._writer.write_batch(batch)

    def finish(self, content: dict[str, Any]) -> list[Part]:
        """Complete the entry; returns its parts, mapped. Without any part there is no entry.

        Args:
            content: JSON values that `open_entry` gives back.
        """
        if self._writer is None:
            self.discard()
            return []
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        rows = self._partial / ROWS
        entry = {"size": rows.stat().st_size, "crc32": _crc32(rows), "content": content}
        with open(self._partial / ENTRY, "w", encoding="utf-8") as file:
            json.dump({"entry": entry, "sha256": digest(entry)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        final = self.root / self.key
        shutil.rmtree(final, ignore_errors=True)  # a damaged one
        os.rename(self._partial, final)
        sync(self.root)
        return read_parts(final / ROWS)

    def discard(self) -> None:
        """Take away what was written of an entry that is not to be."""
        self._file.close()
        shutil.rmtree(self._partial, ignore_errors=True)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A place for rows where the cache cannot be written; gone afterwards, which mapped files outlive."""
    with tempfile.TemporaryDirectory(prefix="finetune-rows-") as folder:
        yield Path(folder)


@contextmanager
def locked(root: Path, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of an entry; where another process has it, call `on_wait` and wait.

    Raises:
        OSError: the folder cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    path, waited = root / f"{key}.lock", False
    while True:
        with open(path, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    on_wait()
                waited = True
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, path):
                yield
                return


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether a path still leads to an open file: whoever had its lock before may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def sweep(root: Path, keep: str, limit: int = MAX_BYTES) -> None:
    """Remove what killed processes left half-made, and entries beyond the limit, those used longest ago first.

    Args:
        keep: The key of an entry that stays.
    """
    entries = []
    try:
        names = os.listdir(root)
    except OSError:
        return  # the folder itself was removed
    for name in names:
        path = root / name
        if name.endswith(".partial"):
            _remove_unless_locked(root, path, name[1:].removesuffix(".partial"))
            continue
        with suppress(OSError):  # another process removed it meanwhile, or it is no folder
            size = sum((path / file).stat().st_size for file in os.listdir(path))
            entries.append((path.stat().st_mtime, path, size))
    total = sum(size for _, _, size in entries)
    for _, path, size in sorted(entries):
        if total <= limit:
            return
        if path.name != keep:
            _remove_unless_locked(root, path, path.name)
            total -= size


def _remove_unless_locked(root: Path, folder: Path, key: str) -> None:
    path = root / f"{key}.lock"
    try:
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                shutil.rmtree(folder, ignore_errors=True)
                os.unlink(path)
    except OSError:
        pass  # in the making, or not ours


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


# -- Arrow -----------------------------------------------------------------------------------------------------

_SIDES: dict[int, Sequence[str]] = {1: ("",), 2: ("chosen_", "rejected_")}


def _batch_of(part: Part) -> Any:
    """A record batch over the arrays of a part: file, number; of each side input_ids, supervised, num_supervised."""
    import pyarrow

    columns = {"file": pyarrow.array(np.full(len(part), part.file, np.int32)), "number": pyarrow.array(part.numbers)}
    columns["cut"] = pyarrow.array(part.cut)
    for prefix, side in zip(_SIDES[len(part.sides)], part.sides):
        offsets = pyarrow.array(side.offsets)
        bits = pyarrow.Array.from_buffers(pyarrow.bool_(), len(side.ids), [None, pyarrow.py_buffer(side.supervised)])
        columns[f"{prefix}input_ids"] = pyarrow.ListArray.from_arrays(offsets, pyarrow.array(side.ids))
        columns[f"{prefix}supervised"] = pyarrow.ListArray.from_arrays(offsets, bits)
        columns[f"{prefix}num_supervised"] = pyarrow.array(side.num_supervised)
    if len(part.sides) == 2:
        columns |= {"prompt_length": pyarrow.array(part.prompts), "header_length": pyarrow.array(part.headers)}
    return pyarrow.record_batch(columns)


def _part_of(batch: Any) -> Part:
    """The arrays of a record batch that was read whole, without a copy."""
    pairs = "prompt_length" in batch.schema.names

    def array(name: str) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = batch.column(name).to_numpy()
        return values

    sides = []
    for prefix in _SIDES[2 if pairs else 1]:
        ids, bits = batch.column(f"{prefix}input_ids"), batch.column(f"{prefix}supervised")
        packed = np.frombuffer(bits.values.buffers()[1], np.uint8)
        sides.append(Sequences(ids.values.to_numpy(), packed, ids.offsets.to_numpy(), array(f"{prefix}num_supervised")))
    empty = np.zeros(0, np.int32)
    prompts, headers = (array("prompt_length"), array("header_length")) if pairs else (empty, empty)
    return Part(int(batch.column("file")[0].as_py()), array("number"), tuple(sides), prompts, headers, array("cut"))
