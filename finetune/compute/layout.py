"""Tokens of one micro-batch as the model takes them, and where its predictions are read. NumPy only.

A micro-batch is one row: its sequences lie end to end, without padding, and attend to themselves only. So packing,
batching and shared prompts are the same thing, and the linear layers see nothing but real tokens. A prediction is read
at `predict_index` and scored against `targets`; the shift by one is made here and nowhere else.

- SFT: each sample is a span.
- DPO: a pair is three spans, the prompt, the chosen response and the rejected one. Both responses see the prompt,
  continue its positions, and their first tokens are predicted from the prompt's last token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.chat.example import IGNORE

Scored = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of the row, which see themselves causally and, before themselves, all of `prefix`."""

    start: int
    stop: int
    prefix: tuple[int, int] | None = None


@dataclass(frozen=True)
class Layout:
    """One micro-batch of T tokens.

    Attributes:
        input_ids: int64 [1, T].
        position_ids: int64 [1, T]; restart with each sequence.
        spans: In order, without gaps.
        predict_index: int64 [N]; positions in the row whose prediction is scored.
        targets: int64 [N]; the token that is to be predicted there.
        owners: int64 [N]; which scored sequence of the batch (0..num_owners-1) the prediction belongs to.
        num_owners: Scored sequences in the batch: samples in SFT; 2 per pair in DPO (chosen 2p, rejected 2p+1).
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    spans: list[Span]
    predict_index: np.ndarray
    targets: np.ndarray
    owners: np.ndarray
    num_owners: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the row; a shared prompt counts once."""
        return int(self.input_ids.size)

    @property
    def num_targets(self) -> int:
        """Scored tokens."""
        return int(self.targets.size)

    def sequence_lengths(self) -> np.ndarray:
        """Of each token, how long the longest sequence is that it is part of: int64 [T].

        >>> lay_out_pairs([([1, 2], ([3, 4], [3, 4]), ([5], [5]))]).sequence_lengths().tolist()
        [4, 4, 4, 4, 3]
        """
        lengths = np.zeros(self.num_tokens, np.int64)
        for span in self.spans:
            length = int(self.position_ids[0, span.stop - 1]) + 1
            lengths[span.start : span.stop] = length
            if span.prefix is not None:
                prompt = lengths[slice(*span.prefix)]
                np.maximum(prompt, length, out=prompt)
        return lengths


def visible_until(spans: list[Span]) -> np.ndarray:
    """Of each token, the row from which on no token sees it: int32 [T].

    These are FlashMask's lower-triangle start rows (Wang et al. 2024, arXiv:2410.01359), by which the whole mask is
    told where attention is causal otherwise: token i sees token j if j <= i < visible_until[j]. That is all of it
    because the spans that see a prefix follow it without a gap.

    >>> visible_until([Span(0, 2), Span(2, 4, (0, 2)), Span(4, 5, (0, 2)), Span(5, 6)]).tolist()
    [5, 5, 4, 4, 5, 6]
    """
    rows = np.empty(spans[-1].stop, np.int32)
    for span in spans:
        rows[span.start : span.stop] = span.stop
        if span.prefix is not None:
            rows[slice(*span.prefix)] = span.stop
    return rows


class _Row:
    """A layout in the making."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.spans: list[Span] = []
        self.predict: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.owners: list[np.ndarray] = []
        self.length = 0
        self.num_owners = 0

    def append(self, ids: Sequence[int] | np.ndarray, prefix: tuple[int, int] | None = None) -> int:
        """Add a span of tokens; return its start."""
        start, stop = self.length, self.length + len(ids)
        first = prefix[1] - prefix[0] if prefix else 0
        self.ids.append(np.asarray(ids, np.int64))
        self.positions.append(np.arange(first, first + len(ids), dtype=np.int64))
        self.spans.append(Span(start, stop, prefix))
        self.length = stop
        return start

    def score(self, predict: np.ndarray, targets: Sequence[int] | np.ndarray) -> None:
        """Score a sequence: `targets` read at `predict`."""
        self.predict.append(np.asarray(predict, np.int64))
        self.targets.append(np.asarray(targets, np.int64))
        self.owners.append(np.full(len(targets), self.num_owners, np.int64))
        self.num_owners += 1

    def layout(self) -> Layout:
        return Layout(
            input_ids=np.concatenate(self.ids)[None],
            position_ids=np.concatenate(self.positions)[None],
            spans=self.spans,
            predict_index=np.concatenate(self.predict),
            targets=np.concatenate(self.targets),
            owners=np.concatenate(self.owners),
            num_owners=self.num_owners,
        )


def lay_out_samples(samples: list[Scored]) -> Layout:
    """Lay out SFT samples.

    Args:
        samples: Each (input_ids int [L], labels int [L]), labels -100 where not trained on and not shifted. The first
            token of a sample is never scored: nothing precedes it.

    >>> lay_out_samples([([5, 6, 7], [-100, 6, 7])]).predict_index
    array([0, 1])
    """
    row = _Row()
    for ids, labels in samples:
        start = row.append(ids)
        after = np.asarray(labels)[1:]
        scored = np.flatnonzero(after != IGNORE)
        row.score(start + scored, after[scored])
    return row.layout()


def lay_out_pairs(pairs: list[tuple[np.ndarray, Scored, Scored]]) -> Layout:
    """Lay out preference pairs, each prompt once.

    Args:
        pairs: Each (prompt int [P], chosen, rejected); a response is (input_ids int [R], labels int [R]), labels -100
            where not scored and not shifted.

    >>> layout = lay_out_pairs([([1, 2], ([3, 4], [3, 4]), ([5], [5]))])
    >>> layout.position_ids.tolist(), layout.predict_index.tolist(), layout.owners.tolist()
    ([[0, 1, 2, 3, 2]], [1, 2, 1], [0, 0, 1])
    """
    row = _Row()
    for prompt, *responses in pairs:
        start = row.append(prompt)
        prefix = (start, start + len(prompt))
        for ids, labels in responses:
            at = row.append(ids, prefix)
            predict = np.arange(at - 1, at + len(ids) - 1)
            predict[:1] = prefix[1] - 1
            scored = np.flatnonzero(np.asarray(labels) != IGNORE)
            row.score(predict[scored], np.asarray(labels)[scored])
    return row.layout()


def lay_out_continuations(groups: list[list[tuple[Sequence[int], Sequence[int]]]]) -> Layout:
    """Lay out sequences whose last tokens are scored. What all of a group begin with stands once.

    Args:
        groups: Of pairs (input, continuation): L token ids that the model reads, without the continuation's last token,
            and 0 < C <= L token ids that are predicted at the input's last C positions.

    >>> layout = lay_out_continuations([[([1, 2, 3], [7]), ([1, 2, 3], [8]), ([1, 2], [9])]])
    >>> layout.input_ids.tolist(), layout.predict_index.tolist(), layout.targets.tolist()
    ([[1, 2, 3]], [2, 2, 1], [7, 8, 9])
    """
    row = _Row()
    for group in groups:
        common = _common_length([ids for ids, _ in group])
        start = row.append(group[0][0][:common]) if common else row.length
        prefix = (start, start + common) if common else None
        # Where the rest of an input stands; equal rests stand once.
        starts: dict[tuple[int, ...], int] = {(): start + common}
        for ids, continuation in group:
            rest = tuple(ids[common:])
            if rest not in starts:
                starts[rest] = row.append(rest, prefix)
            places = np.arange(len(ids) - len(continuation), len(ids))
            row.score(np.where(places < common, start + places, starts[rest] + places - common), continuation)
    return row.layout()


def _common_length(rows: Iterable[Sequence[int]]) -> int:
    """Tokens that all rows begin with."""
    lists = [list(row) for row in rows]
    first, last = min(lists), max(lists)  # what these share, all between them do
    return next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
