"""Errors that tell people what was found, where, and what to do.

Every error a user can cause is a `UserError`; the command line prints it as one plain message and exits with its
`exit_code`. Anything else is a fault of the program.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with the user's input.

    Attributes:
        what: What was found, with the offending value.
        where: File and line, row, key or argument; None when there is no place to name.
        fix: What would be right.
    """

    what: str
    where: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text.rstrip('.')}. {self.fix}" if self.fix else text


class FinetuneError(Exception):
    """Base of all errors raised on purpose. The exit code of the command is 1."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        self.faults = [Fault(what, where, fix)]
        super().__init__(str(self.faults[0]))


class UserError(FinetuneError):
    """The user's input is wrong. The exit code of the command is 2."""

    exit_code = 2

    @classmethod
    def of(cls, faults: list[Fault]) -> UserError:
        """Make one error of several faults, one line each."""
        error = cls(faults[0].what, where=faults[0].where, fix=faults[0].fix)
        error.faults = list(faults)
        error.args = ("\n".join(str(fault) for fault in faults),)
        return error


class RecipeError(UserError):
    """A recipe, or a KEY=VALUE override, is wrong."""


class DataError(UserError):
    """A data file or a row of it is wrong."""


class CheckpointError(UserError):
    """A model folder, adapter or checkpoint is missing, damaged or of a form that cannot be read."""


class ArgumentError(UserError):
    """A command-line argument is wrong, or asks for what this machine cannot do."""


class TrainingError(FinetuneError):
    """A run cannot go on: loss not finite, out of memory."""


class StorageError(FinetuneError):
    """The disk is full, or has become read-only."""
