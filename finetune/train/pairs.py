"""Micro-batches of preference pairs, and the log-probabilities of their responses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from finetune.model.runtime import paddle as _bring_up
from finetune.train.forward import sum_by_owner, token_logps
from finetune.train.layout import IGNORE, Layout, lay_out_pairs, lay_out_samples

_bring_up()
import paddle  # noqa: E402

if TYPE_CHECKING:
    from finetune.chat.dataset import PairDataset
    from finetune.chat.render import PairExample


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch of pairs: its layout, and the dataset index of each pair, int64 [P]."""

    layout: Layout
    pairs: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return self.layout.num_tokens


class PairBatcher:
    """Makes micro-batches of pairs, in whichever of two layouts costs less.

    Shared: prompt, chosen and rejected in one row, the prompt computed once. Separate: a row for each response behind
    its own copy of the prompt, which wins where prompts are short and responses long, since a row's attention grows
    with the square of its length. Both give the same numbers (tests/train/test_dpo.py).

    Args:
        model: Only its config is read.
        dataset: Tokenized pairs.
        packs: Pair indices of each row.
        pad_token_id: Fills rows.
    """

    def __init__(self, model, dataset: PairDataset, packs: list[list[int]], pad_token_id: int):
        self.dataset, self.packs, self.pad_token_id = dataset, packs, pad_token_id
        self._token_cost, self._attention_cost = _costs(model.config)

    def batch(self, units: list[int]) -> PairBatch:
        """The micro-batch of the given packs."""
        packs = [[self.dataset[i] for i in self.packs[unit]] for unit in units]
        shared = [[_parts(pair) for pair in pack] for pack in packs]
        one_each = all(len(pack) == 1 for pack in packs)
        if one_each and self._cost_separate(shared) < self._cost_shared(shared):
            layout = separate_layout([pack[0] for pack in shared], self.pad_token_id)
        else:
            layout = lay_out_pairs(shared, self.pad_token_id)
        return PairBatch(layout, np.array([i for unit in units for i in self.packs[unit]], np.int64))

    def _cost_shared(self, packs: list) -> float:
        longest = max(sum(len(p) + len(c[0]) + len(r[0]) for p, c, r in pack) for pack in packs)
        return len(packs) * self._cost_of_row(longest)

    def _cost_separate(self, packs: list) -> float:
        longest = max(len(p) + max(len(c[0]), len(r[0])) for ((p, c, r),) in packs)
        return 2 * len(packs) * self._cost_of_row(longest)

    def _cost_of_row(self, length: int) -> float:
        return length * (self._token_cost + self._attention_cost * length)


def _costs(config) -> tuple[float, float]:
    """Work of one layer, a token and a pair of tokens: multiplications, and memory traffic counted as eight of them.

    The scores of each head are written or read about six times (product, mask, softmax, and their gradients).
    """
    hidden, ffn, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    kv = hidden // heads * config.num_key_value_heads
    return float(2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn), float(2 * hidden + 8 * 6 * heads)


def _parts(pair: PairExample) -> tuple:
    """(prompt ids, (chosen ids, labels), (rejected ids, labels)), cut after the last scored token of each response."""
    prompt = len(pair.prompt_ids)
    sides = []
    for side in (pair.chosen, pair.rejected):
        end = int(np.flatnonzero(side.labels != IGNORE)[-1]) + 1
        sides.append((side.input_ids[prompt:end], side.labels[prompt:end]))
    return pair.prompt_ids, *sides


def separate_layout(pairs: list[tuple], pad_token_id: int) -> Layout:
    """Each response behind its own copy of the prompt, two rows a pair; owners as in `lay_out_pairs`.

    Args:
        pairs: Each (prompt int [P], chosen, rejected); a response is (input_ids int [R], labels int [R]).
        pad_token_id: Fills the rows on the right.
    """
    rows = []
    for prompt, *responses in pairs:
        for ids, labels in responses:
            unscored = np.full(len(prompt), IGNORE)
            rows.append([(np.concatenate([prompt, ids]), np.concatenate([unscored, labels]))])
    return lay_out_samples(rows, pad_token_id)


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
