"""The `gguf` package, which is an extra."""

from __future__ import annotations

from types import ModuleType

from finetune.errors import ArgumentError


def gguf_package(where: str) -> ModuleType:
    """The gguf package.

    Args:
        where: What needs it, for the message.

    Raises:
        ArgumentError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        fix = "Install it: pip install 'paddle-finetune[gguf]'."
        raise ArgumentError("the gguf package is not installed", where=where, fix=fix) from error
    return gguf
