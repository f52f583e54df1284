from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.rows.plan import epoch_order, pack, plan_steps


def test_pack_as_in_its_docstring():
    assert pack([3, 5, 2, 1], 6).tolist() == [[0, 2], [1, 3]]
    assert pack([], 6).tolist() == []
    with pytest.raises(ValueError, match="7 tokens does not fit into 6"):
        pack([1, 7], 6)


@given(st.lists(st.integers(1, 64), max_size=80), st.integers(64, 128))
@settings(deadline=None)
def test_packing_invariants(lengths, room):
    packs = pack(lengths, room)
    groups = packs.tolist()
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in group) <= room for group in groups)
    assert all(group == sorted(group) for group in groups)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    # Every group was opened because none of the earlier ones had room: at most one is half empty.
    assert sum(2 * sum(lengths[i] for i in group) <= room for group in groups) <= 1
    assert groups == pack(np.array(lengths, dtype=np.int64), room).tolist()
    assert packs.sums(np.array(lengths, np.int64)).tolist() == [sum(lengths[i] for i in group) for group in groups]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(30, 90))
@settings(deadline=None)
def test_best_fit_is_what_placing_one_by_one_finds(lengths, room):
    groups = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        left = [room - sum(lengths[i] for i in group) for group in groups]
        fitting = [n for n in range(len(groups)) if left[n] >= lengths[index]]
        groups[min(fitting, key=lambda n: left[n])].append(index) if fitting else groups.append([index])
    assert pack(lengths, room).tolist() == sorted(sorted(group) for group in groups)


def test_packing_a_million_rows_takes_no_search_for_each():
    lengths = np.random.default_rng(0).gamma(2, 100, 200_000).astype(np.int64).clip(1, 2048)
    started = time.process_time()
    packs = pack(lengths, 2048)
    per_row = (time.process_time() - started) / len(lengths)
    assert per_row < 2e-6  # a search tree in Python takes 10 to 20
    assert lengths.sum() / (len(packs) * 2048) > 0.999


def test_order_depends_on_seed_and_epoch_alone():
    assert epoch_order(4, 1, 0, shuffle=False).tolist() == [0, 1, 2, 3]
    shuffled = epoch_order(100, 1, 0, shuffle=True)
    assert sorted(shuffled.tolist()) == list(range(100))
    assert shuffled.dtype == np.int64
    assert shuffled.tolist() == epoch_order(100, 1, 0, shuffle=True).tolist()
    assert shuffled.tolist() != epoch_order(100, 1, 1, shuffle=True).tolist()
    assert shuffled.tolist() != epoch_order(100, 2, 0, shuffle=True).tolist()


def test_order_does_not_change_between_releases():
    # A run that was begun with an older release resumes on the same rows.
    assert epoch_order(8, 42, 0, shuffle=True).tolist() == [3, 4, 2, 7, 6, 1, 5, 0]


def rows(plan) -> list[list[list[int]]]:
    return [[batch.tolist() for batch in step.batches] for step in plan.steps()]


def test_steps_with_a_short_end_of_epoch():
    plan = plan_steps(10, batch_size=2, accumulation=2, epochs=1, shuffle=False)
    assert rows(plan) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]]]
    assert rows(plan_steps(9, batch_size=2, accumulation=2, epochs=1, shuffle=False))[-1] == [[8]]
    assert [step.epoch_end for step in plan.steps()] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_epochs_and_max_steps():
    assert plan_steps(10, batch_size=2, accumulation=2, epochs=2.5).total_steps == 8
    assert plan_steps(10, batch_size=1, epochs=0.1).total_steps == 1
    assert plan_steps(10, batch_size=1, epochs=0.3).total_steps == 3
    assert plan_steps(10, batch_size=1, epochs=0.001).total_steps == 1
    assert plan_steps(3, batch_size=2, max_steps=7).total_steps == 7
    assert [step.epoch for step in plan_steps(3, batch_size=2, max_steps=5).steps()] == [0, 0, 1, 1, 2]
    with pytest.raises(ValueError, match="no rows"):
        plan_steps(0, batch_size=1, max_steps=1)
    for wrong in ({}, {"max_steps": 1, "epochs": 1}):
        with pytest.raises(ValueError, match="either max_steps or epochs"):
            plan_steps(3, batch_size=1, **wrong)


@given(
    n=st.integers(1, 40),
    batch=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    world=st.integers(1, 3),
    steps=st.integers(1, 30),
    start=st.integers(0, 30),
)
@settings(deadline=None)
def test_plan_invariants(n, batch, accumulation, world, steps, start):
    def plan(rank=0, world=world, batch=batch, accumulation=accumulation):
        return plan_steps(
            n, batch_size=batch, accumulation=accumulation, max_steps=steps, seed=5, world_size=world, rank=rank
        )

    ranks = [list(plan(rank).steps()) for rank in range(world)]
    # Each epoch has every row once, over all ranks.
    per_epoch = plan().steps_per_epoch
    whole = [step for rank in ranks for step in rank if (step.epoch + 1) * per_epoch <= steps and step.epoch == 0]
    if whole:
        assert sorted(int(i) for step in whole for b in step.batches for i in b) == list(range(n))
    # All ranks have equally many micro-batches in a step.
    assert all(len({len(rank[i].batches) for rank in ranks}) == 1 for i in range(steps))
    # Ranks and accumulation share out the rows of a step, but do not change which they are.
    alone = list(plan(world=1, batch=batch * accumulation * world, accumulation=1).steps())
    for i in range(steps):
        assert sorted(int(x) for rank in ranks for b in rank[i].batches for x in b) == sorted(
            alone[i].batches[0].tolist()
        )
    # Resuming is a matter of the step number.
    rest = [[b.tolist() for b in step.batches] for step in plan().steps(start)]
    assert rest == [[b.tolist() for b in step.batches] for step in ranks[0][start:]]
    if start < steps:
        assert [b.tolist() for b in plan().step(start).batches] == rest[0]
