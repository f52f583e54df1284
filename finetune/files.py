"""Files of strangers read with care, and folders written so that they are complete or invisible. No paddle here."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from finetune.errors import CheckpointError, FinetuneError, StorageError

MAX_JSON_BYTES = 64 * 2**20  # the index of a 1000-shard model has 10 MB
_COPY_AGAIN = "Copy the file again from where the folder came from."


def read_json(path: Path, *, root: Path | None = None) -> dict[str, Any]:
    """Read a JSON object from a model folder.

    Args:
        path: The file.
        root: Folder the file must really lie in, links followed; its own folder by default.

    Raises:
        CheckpointError: missing, outside of the folder, too large, not UTF-8, not JSON, nested too deep, a key given
            twice, or not an object.
    """
    path = within(path.name if root is None else str(path.relative_to(root)), root or path.parent)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"the file has more than {MAX_JSON_BYTES // 2**20} MB", where=str(path))
        value = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=no_duplicates)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"is not UTF-8 text (byte {error.start})", where=str(path), fix=_COPY_AGAIN) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"is not valid JSON: {reason}", where=str(path), fix=_COPY_AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"holds a JSON {type(value).__name__}, not an object", where=str(path), fix=_COPY_AGAIN)
    return value


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` of json.loads that refuses a key given twice."""
    value = dict(pairs)
    if len(value) != len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {name!r} is given twice")
    return value


def within(name: str, folder: Path) -> Path:
    """The path of `name` in `folder`, refused where it leads out of it.

    A hub snapshot links into the `blobs` folder beside it; that much is allowed.

    Raises:
        CheckpointError: an absolute name, `..`, a link to somewhere else, or a NUL character.
    """
    parts = Path(name).parts
    if not name or "\0" in name or "\\" in name or Path(name).is_absolute() or ".." in parts:
        raise CheckpointError(f"names a file outside of the folder: {name!r}", where=str(folder))
    path = folder / name
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if home not in real.parents and blobs not in real.parents:
        raise CheckpointError(
            f"is a link to {real}, outside of the folder", where=str(path), fix="Put the file itself there."
        )
    return path


def check_new(folder: Path) -> None:
    """A folder to be written must not exist, or be empty.

    Raises:
        CheckpointError: there is something.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError("exists and is not empty", where=str(folder), fix="Choose another folder.")
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(folder)) from error


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a hidden folder to write in; on success sync it and rename it to `folder`, on failure remove it.

    Raises:
        CheckpointError: `folder` exists and is not an empty folder, or it cannot be written.
        StorageError: the disk is full.
    """
    folder = Path(folder)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    check_new(folder)
    try:
        _sweep(folder)
        partial.mkdir(parents=True)
        yield partial
        sync_tree(partial)
        os.replace(partial, folder)
        sync(folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)  # before the free space is told
        raise write_fault(error, folder) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Remove what processes that are no more left half-written of a file or folder."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        owner = left.name.rpartition("-")[2]
        if owner == str(os.getpid()) or not Path("/proc", owner).exists():
            shutil.rmtree(left, ignore_errors=True)
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Give a hidden file to write to; on success sync it and rename it to `path`, on failure remove it.

    Whoever opens `path`, now or after a crash at any moment, finds the old file or the new one whole.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    _sweep(path)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file whole, as `replacing` does; text in UTF-8, where half of a surrogate pair becomes its escape.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    with replacing(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))


def write_fault(error: OSError, where: Path, *, needed: int | None = None, fix: str | None = None) -> FinetuneError:
    """What to raise for a write that failed.

    Args:
        where: What was to be written.
        needed: Bytes it takes, where that is known.
        fix: What to do once there is room; a sentence on making room when not given.

    Returns:
        StorageError where the disk is full or read-only, with the free space; else CheckpointError.
    """
    reason = error.strerror or str(error)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return CheckpointError(f"cannot be written: {reason}", where=str(where))
    takes = f"it takes about {format_size(needed)}, and " if needed else ""
    free = format_size(shutil.disk_usage(next(p for p in where.absolute().parents if p.exists())).free)
    fix = fix or "Make room, or choose another disk."
    return StorageError(f"cannot be written: {reason} ({takes}{free} are free there)", where=str(where), fix=fix)


def format_size(count: float) -> str:
    """Write a number of bytes: `512 bytes`, `1.5 MiB`, `2.9 GiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def cache_home() -> Path:
    """Where what can be made or fetched again is kept: $FINETUNE_CACHE, or ~/.cache/paddle-finetune."""
    if named := os.environ.get("FINETUNE_CACHE"):
        return Path(os.path.expanduser(named))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "paddle-finetune"


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_tree(folder: Path) -> None:
    """Force a folder and all in it to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: object, *, indent: int | None = 2, sort_keys: bool = True) -> None:
    """Write a JSON file as `json_text` has it."""
    path.write_text(json_text(value, indent=indent, sort_keys=sort_keys), encoding="utf-8", newline="")


def json_text(value: object, *, indent: int | None = 2, sort_keys: bool = True, allow_nan: bool = True) -> str:
    """JSON in characters that UTF-8 has bytes for, with a newline at its end.

    A file of a stranger may hold half of a surrogate pair, which UTF-8 has no bytes for; it stays the escape it was.

    Raises:
        ValueError: a number is not finite, and `allow_nan` is false.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=allow_nan, indent=indent, sort_keys=sort_keys)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"
