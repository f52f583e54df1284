"""GNU's OpenMP for a machine that has none: paddle needs libgomp.so.1, and its wheel does not hold it.

It comes with gcc, and with little else: neither a minimal Debian nor Python's slim images have it. The wheels of
scikit-learn and sentencepiece, which paddlenlp brings, hold it under names of their own, such as
libgomp-e985bcbb.so.1.0.0, by which the loader does not know it. So one is read, given its usual name in memory, and
loaded before paddle asks.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from finetune.errors import FinetuneError

_NAME = "libgomp.so.1"
_HOLDERS = ("sklearn", "sentencepiece")


def bring_openmp(name: str = _NAME, holders: Sequence[str] = _HOLDERS) -> None:
    """Load OpenMP under its usual name. Nothing, where the machine has it.

    Args:
        name: The library as paddle asks for it.
        holders: Packages whose wheels hold it.

    Raises:
        FinetuneError: the machine does not have it, and no wheel holds it.
    """
    try:
        ctypes.CDLL(name)
    except OSError:
        found = _of_a_wheel(holders)
        if found is None:
            fix = "Install it (Debian, Ubuntu: apt-get install libgomp1)."
            raise FinetuneError(f"paddle needs {name}, which is not on this machine", fix=fix) from None
        _load_as(name, found)


def _of_a_wheel(holders: Sequence[str]) -> Path | None:
    """The library as a wheel holds it: beside its package, in NAME.libs."""
    for holder in holders:
        spec = importlib.util.find_spec(holder)
        for folder in (spec and spec.submodule_search_locations) or ():
            for path in sorted(Path(folder).parent.glob("*.libs/libgomp-*.so.1*")):
                return path
    return None


def _load_as(name: str, path: Path) -> None:
    """Load a library whose own name (its SONAME, which is that of its file) is replaced by a shorter one."""
    own, wanted = path.name.encode(), name.encode()
    memory = os.memfd_create(name)
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(path.read_bytes().replace(own, wanted.ljust(len(own), b"\0")))
        ctypes.CDLL(f"/proc/self/fd/{memory}", mode=ctypes.RTLD_GLOBAL)
    finally:
        os.close(memory)
