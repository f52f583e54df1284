"""What a row is once it is tokens. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IGNORE = -100
"""The label of a token that is not trained on."""


@dataclass(frozen=True)
class Example:
    """One tokenized conversation.

    Attributes:
        input_ids: int32 [L].
        labels: int32 [L], equal to input_ids where supervised, -100 elsewhere. Not shifted.
        source: "file:row".
    """

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    source: str

    @property
    def wanted(self) -> Example:
        """The conversation as the model should continue it: this one."""
        return self

    @property
    def num_supervised(self) -> int:
        return int(np.count_nonzero(self.labels != IGNORE))


@dataclass(frozen=True)
class PairExample:
    """One tokenized preference. Both sides start with `prompt_ids`; all their labels lie behind it.

    Attributes:
        prompt_ids: int32 [P], what the two sides share, at most up to the first supervised token.
        chosen: Prompt and better answer.
        rejected: Prompt and worse answer.
        header_length: How many tokens at the end of the prompt are the generation header (`<|im_start|>assistant`
            and a newline), which is never cut.
        source: "file:row".
    """

    prompt_ids: npt.NDArray[np.int32]
    chosen: Example
    rejected: Example
    header_length: int
    source: str

    @property
    def wanted(self) -> Example:
        """The conversation as the model should continue it."""
        return self.chosen


def shared_prompt_length(chosen: Example, rejected: Example) -> int:
    """How many first tokens both sides share, none of them supervised on either side."""
    limit = min(_first_supervised(chosen), _first_supervised(rejected))
    differing = np.flatnonzero(chosen.input_ids[:limit] != rejected.input_ids[:limit])
    return int(differing[0]) if len(differing) else limit


def _first_supervised(example: Example) -> int:
    supervised = np.flatnonzero(example.labels != IGNORE)
    return int(supervised[0]) if len(supervised) else len(example.labels)
