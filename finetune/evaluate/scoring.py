"""Log-probabilities of continuations. Questions with the same beginning, such as few-shot examples, read it once.

The sequences to score are sorted, neighbours that share a beginning form a group, and groups are laid out as a row of
spans (finetune/compute/layout.py): the shared beginning, then what follows it in each sequence. Answers of one token
after the same question, as in multiple choice, are read off one position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.compute.forward import score_tokens
from finetune.compute.layout import lay_out_continuations

# Tokens of a row: enough to keep matrix products large, few enough to bound memory.
ROW_TOKENS = 4096


@dataclass(frozen=True)
class Score:
    """Of one continuation: the sum of its tokens' log-probabilities, nats, and whether each is the likeliest."""

    logprob: float
    greedy: bool


def score_continuations(
    model,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    on_scored: Callable[[int], None] = lambda count: None,
) -> list[Score]:
    """Score each continuation after its context.

    Args:
        model: PaddleNLP's Qwen2ForCausalLM, with or without LoRA.
        pairs: Token ids (context, continuation), neither empty.
        on_scored: Called with the number of pairs scored since the last call.

    Returns:
        A score for each pair, in their order. float32 inside, summed in float64.
    """
    inputs = [(*context, *continuation[:-1]) for context, continuation in pairs]
    scores: dict[int, Score] = {}
    for row in _rows(inputs):
        layout = lay_out_continuations([[(inputs[i], pairs[i][1]) for i in group] for group in row])
        logps, greedy = score_tokens(model, layout)
        indices = [i for group in row for i in group]
        sums = np.bincount(layout.owners, weights=logps, minlength=len(indices))
        missed = np.bincount(layout.owners, weights=~greedy, minlength=len(indices))
        for index, logprob, wrong in zip(indices, sums, missed):
            scores[index] = Score(float(logprob), wrong == 0)
        on_scored(len(indices))
    return [scores[index] for index in range(len(pairs))]


def _rows(inputs: list[tuple[int, ...]]) -> Iterator[list[list[int]]]:
    """Groups of indices that together fill a row of about ROW_TOKENS."""
    row: list[list[int]] = []
    filled = 0
    for group, tokens in _groups(inputs):
        if row and filled + tokens > ROW_TOKENS:
            yield row
            row, filled = [], 0
        row.append(group)
        filled += tokens
    if row:
        yield row


def _groups(inputs: list[tuple[int, ...]]) -> Iterator[tuple[list[int], int]]:
    """Neighbours in sorted order, as long as sharing their beginning saves tokens; with the tokens they then take."""
    group: list[int] = []
    shared = rest = 0  # tokens of the beginning, and of all that follows it
    for index in sorted(range(len(inputs)), key=inputs.__getitem__):
        length = len(inputs[index])
        if group:
            common = min(shared, _common(inputs[group[-1]], inputs[index]))
            after = rest + len(group) * (shared - common) + length - common
            if common + after <= ROW_TOKENS and common + after < shared + rest + length:
                group.append(index)
                shared, rest = common, after
                continue
            yield group, shared + rest
        group, shared, rest = [index], length, 0
    if group:
        yield group, shared + rest


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the beginning that two sequences share."""
    for place, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return place
    return min(len(a), len(b))
