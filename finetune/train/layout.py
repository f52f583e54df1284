"""Tokens of one micro-batch as the model takes them, and where its predictions are read. NumPy only.

Every trainer uses this one layout. A prediction is read at `predict_index` and scored against `targets`, so the shift
by one is made here and nowhere else, and a row may hold any mix of samples:

- SFT: one sample, or several packed samples, in a row; each is a segment, all tokens on branch 0.
- DPO: the prompt (branch 0), then the chosen response (branch 1), then the rejected one (branch 2) of a pair; each
  branch continues the prompt's positions, and its first token is predicted from the prompt's last token.

A token attends to the tokens before it in its row that are of its segment and on branch 0 or on its own branch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORE = -100
Scored = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Layout:
    """One micro-batch.

    Attributes:
        input_ids: int64 [B, L]; padding holds the pad id.
        position_ids: int64 [B, L]; restart with each segment.
        segment_ids: int32 [B, L]; 0 is padding, 1.. are samples of the row.
        branch_ids: int32 [B, L]; 0 shared, 1 and 2 the responses of a pair.
        predict_index: int64 [N]; index into the flattened [B*L] hidden states whose prediction is scored.
        targets: int64 [N]; the token that is to be predicted there.
        owners: int64 [N]; which scored sequence of the batch (0..num_owners-1) the prediction belongs to.
        num_owners: Scored sequences in the batch: samples in SFT; 2 per pair in DPO (chosen 2p, rejected 2p+1).
        plain: Every row is a single sample padded on the right, so the causal mask alone is right.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    branch_ids: np.ndarray
    predict_index: np.ndarray
    targets: np.ndarray
    owners: np.ndarray
    num_owners: int
    plain: bool

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.segment_ids > 0).sum())

    @property
    def num_targets(self) -> int:
        """Scored tokens."""
        return int(self.targets.size)


@dataclass
class _Row:
    ids: list[np.ndarray]
    positions: list[np.ndarray]
    segments: list[np.ndarray]
    branches: list[np.ndarray]
    predict: list[np.ndarray]
    targets: list[np.ndarray]
    owners: list[np.ndarray]
    length: int = 0

    @classmethod
    def empty(cls) -> "_Row":
        return cls([], [], [], [], [], [], [])

    def append(self, ids: np.ndarray, start: int, segment: int, branch: int) -> int:
        """Add tokens whose positions begin at `start`; return the row index of the first."""
        n = len(ids)
        at = self.length
        self.ids.append(np.asarray(ids, np.int64))
        self.positions.append(np.arange(start, start + n, dtype=np.int64))
        self.segments.append(np.full(n, segment, np.int32))
        self.branches.append(np.full(n, branch, np.int32))
        self.length += n
        return at

    def score(self, predict: np.ndarray, targets: np.ndarray, owner: int) -> None:
        self.predict.append(np.asarray(predict, np.int64))
        self.targets.append(np.asarray(targets, np.int64))
        self.owners.append(np.full(len(targets), owner, np.int64))


def lay_out_samples(packs: list[list[Scored]], pad_token_id: int) -> Layout:
    """Lay out SFT samples, one pack a row.

    Args:
        packs: For each row its samples, each (input_ids int [L], labels int [L]), labels -100 where not trained on and
            not shifted. Label 0 of a sample is never scored: nothing precedes it.
        pad_token_id: Fills the rows on the right.

    >>> lay_out_samples([[([5, 6, 7], [-100, 6, 7])]], 0).predict_index
    array([0, 1])
    """
    rows, owner = [], 0
    for pack in packs:
        row = _Row.empty()
        for segment, (ids, labels) in enumerate(pack, start=1):
            labels = np.asarray(labels)
            at = row.append(ids, 0, segment, 0)
            scored = np.flatnonzero(labels[1:] != IGNORE)
            row.score(at + scored, labels[1:][scored], owner)
            owner += 1
        rows.append(row)
    return _stack(rows, owner, pad_token_id, plain=all(len(pack) == 1 for pack in packs))


def lay_out_pairs(packs: list[list[tuple[np.ndarray, Scored, Scored]]], pad_token_id: int) -> Layout:
    """Lay out preference pairs, prompt, chosen and rejected in one row, one pack of pairs a row.

    Args:
        packs: For each row its pairs, each (prompt int [P], chosen, rejected); a response is (input_ids int [R],
            labels int [R]), labels -100 where not scored and not shifted.
        pad_token_id: Fills the rows on the right.

    >>> layout = lay_out_pairs([[([1, 2], ([3, 4], [3, 4]), ([5], [5]))]], 0)
    >>> layout.position_ids.tolist(), layout.predict_index.tolist(), layout.owners.tolist()
    ([[0, 1, 2, 3, 2]], [1, 2, 1], [0, 0, 1])
    """
    rows, owner = [], 0
    for pack in packs:
        row = _Row.empty()
        for segment, (prompt, *responses) in enumerate(pack, start=1):
            last = row.append(prompt, 0, segment, 0) + len(prompt) - 1
            for branch, (ids, labels) in enumerate(responses, start=1):
                at = row.append(ids, len(prompt), segment, branch)
                predict = np.arange(at - 1, at + len(ids) - 1)
                predict[:1] = last
                scored = np.flatnonzero(np.asarray(labels) != IGNORE)
                row.score(predict[scored], np.asarray(labels)[scored], owner)
                owner += 1
        rows.append(row)
    return _stack(rows, owner, pad_token_id, plain=False)


def _stack(rows: list[_Row], num_owners: int, pad_token_id: int, *, plain: bool) -> Layout:
    length = max(row.length for row in rows)

    def grid(name: str, fill: int, dtype: type) -> np.ndarray:
        out = np.full((len(rows), length), fill, dtype)
        for i, row in enumerate(rows):
            out[i, : row.length] = np.concatenate(getattr(row, name))
        return out

    predict = [np.concatenate(row.predict) + i * length for i, row in enumerate(rows)]
    return Layout(
        input_ids=grid("ids", pad_token_id, np.int64),
        position_ids=grid("positions", 0, np.int64),
        segment_ids=grid("segments", 0, np.int32),
        branch_ids=grid("branches", 0, np.int32),
        predict_index=np.concatenate(predict),
        targets=np.concatenate([t for row in rows for t in row.targets]),
        owners=np.concatenate([o for row in rows for o in row.owners]),
        num_owners=num_owners,
        plain=plain,
    )


def attention_mask(layout: Layout) -> np.ndarray | None:
    """bool [B, 1, L, L], True where row position q may attend to k; None where the causal mask alone is right.

    Padding attends to itself, so that no softmax row is empty.
    """
    if layout.plain:
        return None
    segments, branches = layout.segment_ids, layout.branch_ids
    length = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    visible = (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    causal = np.tril(np.ones((length, length), bool))
    mask = same & visible & causal
    return mask[:, None]
