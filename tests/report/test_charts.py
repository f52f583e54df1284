"""Curves: thinning, smoothing, ticks and paths."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from finetune.report.charts import MAX_POINTS, _tick_label, draw, series, smooth_line, thin


def rows(values, key="loss"):
    return [{"step": step, key: value} for step, value in enumerate(values, start=1)]


def points(path):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path)]


def test_a_series_takes_what_has_a_step_and_a_number():
    line = series(
        [{"step": 2, "loss": 0.5}, {"step": 1, "loss": 1}, {"step": 3}, {"loss": 9.0}, {"step": 4, "loss": "x"}],
        "loss",
        "l",
    )
    assert line.steps.tolist() == [1, 2] and line.values.tolist() == [1.0, 0.5]


def test_thinning_keeps_the_spike_and_both_ends():
    values = np.zeros(100_000)
    values[54_321] = 9.0
    kept = thin(values)
    assert len(kept) <= MAX_POINTS + 2
    assert {0, 54_321, 99_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert thin(values[:10]).tolist() == list(range(10))


@pytest.mark.parametrize("n", [20, 57, 1000])
def test_smoothing_leaves_a_straight_line_as_it_is(n):
    values = 3.0 - 0.01 * np.arange(n)
    at = np.array([0, 1, n // 2, n - 1])
    np.testing.assert_allclose(smooth_line(values, at), values[at], atol=1e-9)


def test_smoothing_takes_noise_away():
    noise = np.random.default_rng(0).normal(size=500)
    level = smooth_line(noise, np.arange(500))
    assert level.std() < 0.4 and abs(level.mean()) < 0.1


def test_the_path_runs_through_the_values():
    chart = draw("Loss", [series(rows([2.0, 1.0, 0.0]), "loss", "loss")], bounds=(0.0, 2.0))
    assert points(chart.lines[0].path) == [(0.0, 0.0), (500.0, 500.0), (1000.0, 1000.0)]
    assert chart.hover["series"][0]["steps"] == [1, 2, 3]
    assert "from 2 to 0" in chart.summary


def test_values_that_are_not_finite_leave_a_gap_and_a_note():
    chart = draw("Loss", [series(rows([3.0, math.nan, 2.0, math.inf, 1.0]), "loss", "loss")])
    assert chart.lines[0].path.count("M") == 3
    assert chart.note == "2 values are not finite and not drawn"
    assert all(math.isfinite(value) for value in chart.hover["series"][0]["values"])


def test_nothing_to_draw_is_no_chart():
    assert draw("Loss", [series([], "loss", "loss")]) is None
    assert draw("Loss", [series(rows([math.nan]), "loss", "loss")]) is None


def test_one_point_is_drawn_as_a_dot():
    chart = draw("Loss", [series(rows([1.5]), "loss", "loss")])
    assert [line.kind for line in chart.lines] == ["main", "dots"]
    assert chart.lines[1].path == "M500.0 500.0h0"


def test_a_noisy_series_is_drawn_raw_and_smooth_inside_its_range():
    values = np.abs(np.random.default_rng(1).normal(size=200)) + 0.1
    chart = draw("Loss", [series(rows(values.tolist()), "loss", "loss", smooth=True)], from_zero=True)
    assert [line.kind for line in chart.lines] == ["raw", "main"]
    assert [one["name"] for one in chart.hover["series"]] == ["loss", "loss, smoothed"]
    assert all(0 <= y <= 1000 for line in chart.lines for _, y in points(line.path))


def test_a_spike_turns_the_scale_to_logarithmic():
    values = [1.0] * 50 + [900.0] + [1.1] * 50
    chart = draw("Gradient norm", [series(rows(values), "loss", "norm", smooth=True)], log_if_wide=True)
    assert chart.note == "log scale"
    assert [tick.label for tick in chart.y_ticks] == ["1", "10", "100", "1000"]
    assert draw("x", [series(rows([0.0, *values]), "loss", "norm")], log_if_wide=True).note == ""


@pytest.mark.parametrize(
    "values",
    [[0.0, 0.0], [1e-5, 3e-5], [5.0, 5.0], [-3.0, -1.0], [0.99, 1.01], [1e6, 5e6], [1e-12, 2e-12], [-1e9, 1e9]],
)
def test_ticks_lie_on_the_axis_and_are_distinct(values):
    chart = draw("x", [series(rows(values), "loss", "loss")])
    labels = [tick.label for tick in chart.y_ticks]
    assert 2 <= len(labels) <= 8 and len(set(labels)) == len(labels)
    assert all(-0.01 <= tick.at <= 100.01 for tick in chart.y_ticks + chart.x_ticks)


@pytest.mark.parametrize(
    ("value", "step", "label"),
    [
        (0, 0.5, "0"),
        (0.25, 0.25, "0.25"),
        (1.5, 0.5, "1.5"),
        (5e-5, 5e-5, "5e-5"),
        (2500, 500, "2.5k"),
        (2e6, 1e6, "2M"),
        (-80, 5, "-80"),
    ],
)
def test_tick_labels(value, step, label):
    assert _tick_label(value, step) == label
