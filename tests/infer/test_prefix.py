"""What is remembered of prompts: which blocks, for how long; and that answers are the same with and without."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.infer.prefix import BLOCK, PrefixCache
from finetune.infer.sampling import Sampling
from tests.tiny import Shape, tiny_model


def remember(cache: PrefixCache, tokens: np.ndarray) -> list[tuple[int, int]]:
    """Store under their places; what was taken."""
    taken = []

    def take(start: int, stop: int):
        taken.append((start, stop))
        return tokens[start:stop].tolist()

    cache.store(tokens, take)
    return taken


def known(cache: PrefixCache, tokens: np.ndarray) -> list[int]:
    return [token for part in cache.match(tokens) for token in part]


def test_the_longest_known_beginning_is_found_in_whole_blocks():
    cache, text = PrefixCache(1000), np.arange(100)
    assert remember(cache, text) == [(0, 32), (32, 64), (64, 96)]
    assert known(cache, text) == list(range(96))
    assert known(cache, text[:96]) == list(range(64)), "one token at least is left to read"
    assert known(cache, np.concatenate([text[:70], text])) == list(range(64))
    assert known(cache, text[1:]) == []
    longer = np.concatenate([text[:64], np.full(64, 7)])
    assert remember(cache, longer) == [(64, 96), (96, 128)], "what both begin with is kept once"
    assert cache.positions == 5 * BLOCK


def test_blocks_count_only_behind_the_same_beginning():
    cache = PrefixCache(1000)
    first, second = np.full(64, 1), np.concatenate([np.full(32, 2), np.full(32, 1)])
    remember(cache, first)
    assert known(cache, np.append(second, 0)) == []
    remember(cache, second)
    assert known(cache, np.append(second, 0)) == second.tolist()


def test_what_was_not_used_for_longest_goes_first_and_the_bound_holds():
    cache = PrefixCache(4 * BLOCK)
    old, used, new = (np.full(2 * BLOCK + 1, value) for value in (1, 2, 3))
    remember(cache, old)
    remember(cache, used)
    known(cache, old)
    remember(cache, new)
    assert cache.positions == 4 * BLOCK
    assert (
        known(cache, used) == [] and known(cache, old) == old[:-1].tolist() and known(cache, new) == new[:-1].tolist()
    )
    remember(cache, np.arange(3 * BLOCK))
    assert known(cache, old) == []
    assert known(cache, new) == new[:BLOCK].tolist(), "the end of a beginning goes before its beginning"
    remember(cache, np.arange(100, 100 + 9 * BLOCK))
    assert cache.positions == 4 * BLOCK


@pytest.mark.parametrize("packed", [False, True])
def test_answers_are_the_same_with_remembered_beginnings(tmp_path, packed):
    """Shared beginnings, read in pieces between the steps of others, against each prompt read alone and whole."""
    from finetune.compute.packed import pack
    from finetune.infer.engine import Batch, Engine
    from finetune.model.load import load_model

    shape = Shape(hidden_size=48, num_hidden_layers=3, num_attention_heads=6, max_position_embeddings=640)
    model = load_model(tiny_model(tmp_path / "m", shape=shape, seed=3)).model
    if packed:
        pack(model)
    engine = Engine(model, stop_token_ids=[])
    rng = np.random.default_rng(0)
    system = rng.integers(0, 400, 200).tolist()
    prompts = [system + rng.integers(0, 400, n).tolist() for n in (5, 60, 150, 1)] + [system[:64], [3, 4]]
    sampling = Sampling(max_new_tokens=24)
    expected = [engine.generate([prompt], sampling)[0].tokens for prompt in prompts]

    prefixes = PrefixCache(4096)
    batch, done = Batch(engine, prefixes), {}
    for i, prompt in enumerate(prompts):
        batch.begin([engine.request(prompt, sampling, i)])
        for _ in range(10):
            for row in [*batch.read(7 + 13 * i), *batch.step()]:
                done[row.request.index] = row.tokens
            assert batch.tokens_read <= 7 + 13 * i
    while batch.entering or batch.rows:
        for row in [*batch.read(50), *batch.step()]:
            done[row.request.index] = row.tokens
    assert [done[i] for i in range(len(prompts))] == expected
    assert batch.reused > 0

    # A chat's next turn: its history, answer and all, is known but for what is less than a block.
    history = [*prompts[0], *expected[0]]
    reused = batch.reused
    batch.join([engine.request([*history, 5, 6], sampling, 9)])
    assert batch.reused - reused == (len(history) - 1) // BLOCK * BLOCK


def test_a_row_that_leaves_while_it_is_read_takes_its_prompt_along(tmp_path):
    from finetune.infer.engine import Batch, Engine
    from finetune.model.load import load_model

    engine = Engine(load_model(tiny_model(tmp_path / "m")).model, stop_token_ids=[])
    batch = Batch(engine)
    batch.begin([engine.request(list(range(1, 90)), Sampling(n=2), i) for i in range(2)])
    batch.read(10)
    batch.drop([row for row in batch.entering if row.request.index == 0 or row.sample == 0])
    assert [(row.request.index, row.sample) for row in batch.entering] == [(1, 1)]
    while batch.entering:
        batch.read(50)
    assert [(row.request.index, row.sample) for row in batch.rows] == [(1, 1)]
    expected = engine.generate([list(range(1, 90))], Sampling(max_new_tokens=5))[0].tokens
    while len(batch.rows[0].tokens) < 5:
        batch.step()
    assert batch.rows[0].tokens == expected
    batch.begin([engine.request([1, 2, 3], Sampling())])
    batch.drop(batch.entering)
    assert not batch.entering
