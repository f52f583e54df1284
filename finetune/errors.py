"""Errors that tell people what was found, where, and what to do.

Every error a user can cause is a `UserError`; the command line prints it as one plain message and exits with its
`exit_code`. Anything else is a fault of the program.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

_NEAR = 0.66  # of difflib's ratio: two letters that changed places in a word of three
_LONGEST = 100  # characters of a word that are looked at: the search takes time by the square of its length


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


AnyUserError = TypeVar("AnyUserError", bound="UserError")


class UserError(FinetuneError):
    """The user's input is wrong. The exit code of the command is 2."""

    exit_code = 2
    advice: str | None = None

    @classmethod
    def of(cls: type[AnyUserError], faults: list[Fault], advice: str | None = None) -> AnyUserError:
        """Make one error of several faults, one line each.

        Args:
            advice: A last line on all of them together, which counts as no fault.
        """
        error = cls(faults[0].what, where=faults[0].where, fix=faults[0].fix)
        error.faults, error.advice = list(faults), advice
        error.args = ("\n".join([*map(str, faults), *([advice] if advice else [])]),)
        return error


class RecipeError(UserError):
    """A recipe, or a KEY=VALUE override, is wrong."""


class DataError(UserError):
    """A data file or a row of it is wrong."""


class CheckpointError(UserError):
    """A model folder, adapter or checkpoint is missing, damaged or of a form that cannot be read."""


class ArgumentError(UserError):
    """A command-line argument is wrong, or asks for what this machine cannot do."""


class HubError(FinetuneError):
    """A hub did not answer, or what it sent is damaged."""


class TrainingError(FinetuneError):
    """A run cannot go on: loss not finite, out of memory."""


class Interrupted(FinetuneError):
    """A run was asked to stop, and did. What it says is no error, and is shown without that word."""


class StorageError(FinetuneError):
    """The disk is full, or has become read-only."""


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that a mistyped word was probably meant to be, whatever its case.

    Returns:
        The nearest choice; None when nothing is near, or the word is itself one of them.

    >>> nearest("Sigmiod", ("sigmoid", "hinge"))
    'sigmoid'
    """
    by_word = {choice.strip().lower(): choice for choice in choices}
    found = difflib.get_close_matches(word.strip().lower()[:_LONGEST], by_word, n=1, cutoff=_NEAR)
    near = by_word[found[0]] if found else None
    return None if near == word else near


def did_you_mean(word: str, choices: Iterable[str], more: str = "") -> str:
    """A hint `Did you mean x?` with the nearest choice if there is one, and what else there is to say."""
    near = nearest(word, choices)
    return f"Did you mean {near}? {more}".rstrip() if near else more
