"""The arithmetic of choosing a token, against straightforward formulas. No paddle."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.errors import ArgumentError
from finetune.infer.sampling import Sampling, choose, penalize, support, token_logprob


def scores(seed: int = 0, size: int = 500, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def plain_support(values: np.ndarray, s: Sampling) -> dict[int, float]:
    """The definitions written out: a loop over tokens sorted by probability."""
    weights = np.exp((values.astype(np.float64) / s.temperature) - (values.max() / s.temperature))
    kept = sorted(range(len(values)), key=lambda i: -weights[i])
    if s.top_k:
        kept = [i for i in kept if weights[i] >= weights[kept[min(s.top_k, len(kept)) - 1]]]
    if s.top_p < 1:
        total, sum_above, nucleus = sum(weights[i] for i in kept), 0.0, []
        for i in kept:  # a token stays while the tokens above it have not reached top_p
            if not nucleus or sum_above < s.top_p * total:
                nucleus.append(i)
            sum_above += weights[i]
        kept = nucleus
    if s.min_p:
        kept = [i for i in kept if weights[i] >= s.min_p * weights[kept[0]]]
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.0, "top_k": 1},
        {"top_k": 20},
        {"top_k": 5000},
        {"top_p": 0.8},
        {"top_p": 0.0},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_support_follows_the_definitions(settings):
    sampling = Sampling(**{"temperature": 1.0, **settings})
    for seed in range(20):
        values = scores(seed)
        ids, probabilities = support(values, sampling)
        expected = plain_support(values, sampling)
        assert ids.tolist() == sorted(expected)
        np.testing.assert_allclose(probabilities, [expected[i] for i in ids], atol=1e-6)


def test_ties_with_the_kth_token_stay():
    ids, _ = support(np.array([1, 3, 3, 3, 0], np.float32), Sampling(temperature=1.0, top_k=2))
    assert ids.tolist() == [1, 2, 3]


def test_top_p_of_equal_tokens_compares_as_transformers_does():
    # Ascending sums .1, .2, ... 1 against 1 - 0.9 in float32: the first is not above it and goes.
    ids, _ = support(np.zeros(10, np.float32), Sampling(temperature=1.0, top_p=0.9))
    assert len(ids) == 9


def test_greedy_takes_the_largest_and_needs_no_generator():
    assert choose(scores(1), Sampling(), None) == scores(1).argmax()


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 3}])
def test_a_temperature_too_small_to_divide_by_is_greedy(settings):
    sampling = Sampling(temperature=1e-40, **settings)
    assert sampling.temperature == 0.0
    assert choose(scores(1), sampling, np.random.default_rng(0)) == scores(1).argmax()
    least = Sampling(temperature=1e-5, **settings)
    assert choose(scores(1), least, np.random.default_rng(0)) == scores(1).argmax()


def test_draws_follow_the_probabilities():
    sampling = Sampling(temperature=1.0, top_k=4)
    values = scores(2, size=12, spread=1.0)
    ids, probabilities = support(values, sampling)
    rng = np.random.default_rng(0)
    drawn = np.array([choose(values, sampling, rng) for _ in range(20_000)])
    shares = [(drawn == i).mean() for i in ids]
    np.testing.assert_allclose(shares, probabilities, atol=0.015)


def test_repetition_penalty_divides_positive_and_multiplies_negative_scores():
    values = np.array([2.0, -2.0, 1.0, -1.0, 3.0], np.float32)
    result = penalize(values, Sampling(repetition_penalty=2.0), np.array([0, 1]), {3: 5})
    assert result.tolist() == [1.0, -4.0, 1.0, -2.0, 3.0]
    assert values.tolist() == [2.0, -2.0, 1.0, -1.0, 3.0]


def test_presence_and_frequency_penalty_look_at_the_answer_only():
    values = np.zeros(4, np.float32)
    result = penalize(values, Sampling(presence_penalty=0.5, frequency_penalty=0.25), np.array([0]), {1: 1, 2: 3})
    assert result.tolist() == [0.0, -0.75, -1.25, 0.0]


def test_logprobs_come_from_the_models_own_distribution():
    values = scores(3, size=30)
    entry = token_logprob(values, 7, 3)
    expected = values - np.log(np.exp(values.astype(np.float64)).sum())
    assert entry.logprob == pytest.approx(expected[7], abs=1e-6)
    assert [token for token, _ in entry.top] == np.argsort(-values)[:3].tolist()
    assert token_logprob(values, 7, 0).top == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", 2),
        ("temperature", 1e300),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-30),
        ("repetition_penalty", 1e30),
        ("max_new_tokens", 0),
        ("n", 0),
        ("seed", -1),
        ("stop", ("",)),
        ("logprobs", 21),
    ],
)
def test_a_wrong_setting_is_named(name, value):
    with pytest.raises(ArgumentError, match=name):
        Sampling(**{name: value})


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(ArgumentError) as caught:
        Sampling(top_p=2.0, top_k=-1)
    assert {fault.where for fault in caught.value.faults} == {"top_p", "top_k"}


def test_generation_config_is_read_as_transformers_reads_it():
    qwen = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    sampling = Sampling.from_generation_config(qwen)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.8, 20)
    greedy = Sampling.from_generation_config({**qwen, "do_sample": False})
    assert (greedy.temperature, greedy.repetition_penalty) == (0.0, 1.05)
    assert Sampling.from_generation_config({"do_sample": True}).top_k == 50


def test_a_draw_with_a_seed_hardly_ever_changes_with_the_last_bits_of_the_scores():
    """20,000 nearly equal tokens, moved by 1e-4, a hundred times what the size of a batch moves: one draw in some
    thousands may change, where the two earliest of exponential times are closer than that."""
    noise, changed = np.random.default_rng(0), 0
    sampling = Sampling(temperature=1.0)
    for seed in range(400):
        values = scores(seed, size=20_000, spread=0.3)
        moved = values + (noise.standard_normal(len(values)) * 1e-4).astype(np.float32)
        changed += choose(values, sampling, np.random.default_rng(seed)) != choose(
            moved, sampling, np.random.default_rng(seed)
        )
    assert changed <= 1
