"""One run per output folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from finetune.errors import ArgumentError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder/.lock` while a run writes there.

    The kernel drops the lock with the process, so that a killed run never leaves a stale one; the file's content only
    tells who the owner is.

    Raises:
        ArgumentError: another run holds it; names its process and host. Or the folder cannot be written.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise ArgumentError(
            f"cannot be written ({error.strerror})", where=str(folder), fix="Choose another training.output_dir."
        ) from error
    with file:
        _hold(file, folder)
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        try:
            yield
        finally:  # emptied and not deleted: another run may have opened it already, and would lock a file without name
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), 0)


def check_unlocked(folder: Path) -> None:
    """What `locked` would say of another run, without making the folder or keeping the lock.

    Raises:
        ArgumentError: another run holds it.
    """
    with contextlib.suppress(FileNotFoundError, PermissionError), open(folder / ".lock", encoding="utf-8") as file:
        _hold(file, folder)


def _hold(file: TextIO, folder: Path) -> None:
    """Take the lock of an open file, until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ArgumentError(
            f"another run is writing there ({_owner(file.read())})",
            where=str(folder),
            fix="Wait for it, stop it, or choose another training.output_dir.",
        ) from None
    except OSError as error:
        raise ArgumentError(
            f"cannot be locked ({error.strerror}), so two runs could spoil each other's files",
            where=str(folder),
            fix="Choose another training.output_dir, on a file system that has locks.",
        ) from error


def _owner(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):
        return "owner unknown"
