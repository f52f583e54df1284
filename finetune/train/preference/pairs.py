"""Micro-batches of preference pairs, and the log-probabilities of their responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from finetune.chat.example import IGNORE, PairExample
from finetune.compute.forward import sum_by_owner, token_logps
from finetune.compute.layout import Layout, lay_out_pairs
from finetune.model.runtime import paddle as _bring_up
from finetune.train.task import Packs

_bring_up()
import paddle


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch of pairs: its layout, and the dataset index of each pair, int64 [P]."""

    layout: Layout
    pairs: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens that the model computes."""
        return self.layout.num_tokens


class Pairs(Protocol):
    """Tokenized preferences by number: all of them, or those that a stream has at hand."""

    def __getitem__(self, row: int, /) -> PairExample: ...


class PairBatcher:
    """Makes micro-batches of pairs, each prompt computed once.

    Args:
        dataset: Tokenized pairs.
        packs: Pair indices of each unit of the data order.
    """

    def __init__(self, dataset: Pairs, packs: Packs):
        self.dataset, self.packs = dataset, packs

    def batch(self, units: Sequence[int]) -> PairBatch:
        """The micro-batch of the given packs."""
        pairs = [i for unit in units for i in self.packs[unit]]
        return PairBatch(lay_out_pairs([_parts(self.dataset[i]) for i in pairs]), np.array(pairs, np.int64))


def _parts(pair: PairExample) -> tuple:
    """(prompt ids, (chosen ids, labels), (rejected ids, labels)), cut after the last scored token of each response."""
    prompt = len(pair.prompt_ids)
    sides = []
    for side in (pair.chosen, pair.rejected):
        end = int(np.flatnonzero(side.labels != IGNORE)[-1]) + 1
        sides.append((side.input_ids[prompt:end], side.labels[prompt:end]))
    return pair.prompt_ids, *sides


def response_logps(model, layout: Layout) -> paddle.Tensor:
    """Log-probability of each response: float64 [2P], chosen of pair p at 2p and rejected at 2p+1.

    The per-token values are float32; their sums are taken in float64, since losses and rewards are small differences
    of sums of hundreds of tokens.
    """
    return sum_by_owner(token_logps(model, layout).astype("float64"), layout)


@contextmanager
def evaluating(model) -> Iterator[None]:
    """No gradient and no dropout inside; the model's mode is as it was afterwards."""
    training = model.training
    model.eval()
    try:
        with paddle.no_grad():
            yield
    finally:
        if training:
            model.train()
