"""Sources mixed by weight: shares, fairness among a source's rows, and the same order whatever step it begins at."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from finetune.errors import DataError
from finetune.rows.dataset import build_dataset, mixed
from finetune.rows.mix import Mix, next_source
from finetune.rows.plan import plan_steps
from tests.chat.conftest import From, Settings

WEIGHTS = (0.7, 0.2, 0.1)
SIZES = (5000, 900, 13)


def mix(weights=WEIGHTS, sizes=SIZES) -> Mix:
    return Mix.of(weights, np.repeat(np.arange(len(sizes)), sizes))


@pytest.mark.parametrize("shuffle", [True, False])
def test_shares_over_a_hundred_thousand_rows(shuffle):
    made = mix()
    plan = plan_steps(len(made), batch_size=10, max_steps=10_000, seed=3, shuffle=shuffle, mix=made)
    rows = np.concatenate([batch for step in plan.steps() for batch in step.batches])[:100_000]
    sources = np.searchsorted(np.cumsum(SIZES), rows, side="right")
    for number, weight in enumerate(WEIGHTS):
        # Not only at the end, and to within a row an epoch, which is far below half a percent.
        counts = np.cumsum(sources == number)
        off = np.abs(counts - weight * np.arange(1, len(rows) + 1))
        assert off.max() <= 1 + len(rows) / len(made)
        assert abs(counts[-1] / len(rows) - weight) < 0.0005
    # Within a source no row is had more often than another, but for the last pass.
    times = Counter(rows.tolist())
    for number in range(3):
        own = [times[row] for row in made.rows[number].tolist()]
        assert max(own) - min(own) <= 1


def test_an_epoch_ends_when_each_source_was_gone_through():
    made = mix((3, 1), (30, 5))
    assert len(made) == 40 and made.counts.tolist() == [30, 10]
    order = made.order(seed=1, epoch=0, shuffle=True)
    assert sorted(order.tolist()) == sorted([*range(30), *range(30, 35), *range(30, 35)])
    assert mix((1, 3), (30, 5)).counts.tolist() == [30, 90]
    # The order in words: the first of the heavier source, then its share.
    assert mix((3, 1), (6, 2)).order(0, 0, shuffle=False).tolist() == [0, 1, 6, 2, 3, 4, 7, 5]


def test_the_stream_takes_turns_by_the_same_rule():
    made, taken = mix(), [0, 0, 0]
    for turn in made.turns()[:2000].tolist():
        assert next_source(made.shares, taken) == turn
        taken[turn] += 1


@pytest.mark.parametrize("start", [1, 7, 40, 133])
def test_resuming_needs_the_step_number_alone(start):
    made = mix((2, 1), (40, 11))
    plan = plan_steps(len(made), batch_size=2, accumulation=2, max_steps=140, seed=5, mix=made)
    whole = [[batch.tolist() for batch in step.batches] for step in plan.steps()]
    assert [[batch.tolist() for batch in step.batches] for step in plan.steps(start)] == whole[start:]
    assert [batch.tolist() for batch in plan.step(start).batches] == whole[start]


def test_epochs_and_seeds_shuffle_anew():
    made = mix((2, 1), (40, 11))
    orders = [made.order(seed, epoch, True).tolist() for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert made.order(1, 0, False).tolist() != made.order(1, 1, False).tolist()  # 20 of 11 rows: it goes on


def test_ranks_share_a_step():
    made = mix((2, 1), (40, 11))
    whole = plan_steps(len(made), batch_size=4, max_steps=30, seed=5, mix=made)
    ranks = [plan_steps(len(made), batch_size=2, max_steps=30, seed=5, world_size=2, rank=r, mix=made) for r in (0, 1)]
    for step, *own in zip(whole.steps(), *(rank.steps() for rank in ranks)):
        assert sorted(step.batches[0]) == sorted(np.concatenate([part.batches[0] for part in own]))


def test_sources_of_a_dataset(tokenizer, write):
    row = '{"prompt": [{"role": "user", "content": "q"}], "completion": "a"}\n'
    sources = [
        From(write("a.jsonl", row * 30), weight=3),
        From(write("b/1.jsonl", row * 4).rpartition("/")[0], weight=1),
    ]
    write("b/2.jsonl", row * 6)
    rows, report = build_dataset(sources, tokenizer, data=Settings(), method="sft")
    made = mixed(rows, sources, report)
    assert made is not None and [len(own) for own in made.rows] == [30, 10] and len(made) == 40
    assert "An epoch is 40 rows: 75.0 % from" in report.notes[-1] and "(10 rows, 1.00 times)" in report.notes[-1]
    assert mixed(rows, [From("a"), From("b")], report) is None
    # A source whose rows were all set aside
    with pytest.raises(DataError, match="a weight, but no row"):
        mixed(rows.select(range(30)), sources, report)
