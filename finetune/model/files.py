"""Files of strangers read with care, and folders written so that they are complete or invisible. No paddle here."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import CheckpointError

MAX_JSON_BYTES = 64 * 2**20  # the index of a 1000-shard model has 10 MB


def read_json(path: Path, *, root: Path | None = None) -> dict:
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
        raise CheckpointError(f"is not UTF-8 text (byte {error.start})", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"is not valid JSON: {reason}", where=str(path)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"holds a JSON {type(value).__name__}, not an object", where=str(path))
    return value


def no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    """`object_pairs_hook` of json.loads that refuses a key given twice."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError(f"key {_first_repeated(pairs)!r} is given twice")
    return value


def _first_repeated(pairs: list[tuple[str, object]]) -> str:
    seen: set[str] = set()
    return next(name for name, _ in pairs if name in seen or seen.add(name))


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


def nearest(name: str, candidates) -> str:
    """A hint `Did you mean 'x'?`, or the empty string."""
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f"Did you mean {found[0]!r}?" if found else ""


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
    """
    folder = Path(folder)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    check_new(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"cannot be written: {error.strerror}", where=str(folder)) from error
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        os.replace(partial, folder)
        sync(folder.parent)
    except OSError as error:
        raise CheckpointError(f"cannot be written: {error.strerror}", where=str(folder)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: dict) -> None:
    """Write a JSON object, keys sorted, readable."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")
