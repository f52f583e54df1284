"""Curves as SVG paths with ticks and hover values; the page's template draws them.

A chart's SVG has a fixed box of 1000 x 1000 that the page stretches to any size; lines keep their width
(`vector-effect`), and labels are HTML beside it, so that text stays readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

BOX = 1000.0
MAX_POINTS = 600
"""A longer series is drawn by the lowest and highest value of each of MAX_POINTS / 2 stretches."""

SMOOTH_FROM = 20
"""Points from which on a noisy series gets a smooth line over its raw points."""

_LOG_RANGE = 20.0


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: For the legend and the hover box.
        color: CSS class: a, b or c.
        steps: int64 [N], rising.
        values: float64 [N]; those that are not finite leave gaps.
        smooth: Draw a smooth line over the points, if there are enough.
        dots: Mark each point, for sparse series.
    """

    name: str
    color: str
    steps: np.ndarray
    values: np.ndarray
    smooth: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Tick:
    """A label on an axis, `at` percent of its length from the left or the top."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """A drawn path; `kind` is raw, main or dots."""

    path: str
    color: str
    kind: str


@dataclass(frozen=True)
class Chart:
    """All that the template needs to draw one chart.

    Attributes:
        title: What is drawn.
        legend: (name, color) of each series; one series needs none.
        note: Remark below the title: log scale, values that are not finite.
        hover: Points and scales for the page's script.
        summary: The chart in words, for screen readers.
        size: Share of the page's width: full, half or third.
    """

    title: str
    legend: list[tuple[str, str]]
    note: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    hover: dict[str, Any]
    summary: str
    size: str


def series(
    rows: Sequence[Mapping[str, Any]],
    key: str,
    name: str,
    color: str = "a",
    *,
    smooth: bool = False,
    dots: bool = False,
) -> Series:
    """Pick one key out of rows of metrics, in the order of their steps; rows without a number there are passed over."""
    pairs = sorted(
        (row["step"], float(row[key]))
        for row in rows
        if isinstance(row.get("step"), int) and isinstance(row.get(key), (int, float))
    )
    steps = np.array([step for step, _ in pairs], dtype=np.int64)
    return Series(name, color, steps, np.array([value for _, value in pairs], dtype=np.float64), smooth, dots)


def draw(
    title: str,
    lines: Sequence[Series],
    *,
    from_zero: bool = False,
    bounds: tuple[float, float] | None = None,
    log_if_wide: bool = False,
    size: str = "third",
) -> Chart | None:
    """Lay out a chart.

    Args:
        title: What is drawn.
        lines: Series that share the axes; empty ones are left out.
        from_zero: Let the value axis begin at 0.
        bounds: Fixed ends of the value axis.
        log_if_wide: Draw on a log scale if the highest value is more than 20 times the median and all are positive.
        size: Share of the page's width that it gets: full, half or third.

    Returns:
        The chart; None when there is no finite value to draw.
    """
    lines = [line for line in lines if np.isfinite(line.values).any()]
    if not lines:
        return None
    finite = np.concatenate([line.values[np.isfinite(line.values)] for line in lines])
    steps = np.concatenate([line.steps for line in lines])
    log = bool(log_if_wide and finite.min() > 0 and finite.max() > _LOG_RANGE * np.median(finite))
    low, high = bounds or _value_range(finite, from_zero, log)
    left, right = float(steps.min()), float(steps.max())
    if 0 < left <= 0.05 * right:
        left = 0.0
    if left == right:
        left, right = left - 0.5, right + 0.5
    scale = _Scale(left, right, low, high, log)
    drawn, hover = [], []
    for line in lines:
        paths, points = _draw_line(line, scale)
        drawn += paths
        hover += points
    missing = sum(int((~np.isfinite(line.values)).sum()) for line in lines)
    notes = ["log scale"] if log else []
    notes += [f"{missing:,} {'value is' if missing == 1 else 'values are'} not finite and not drawn"] if missing else []
    return Chart(
        title=title,
        legend=[(line.name, line.color) for line in lines] if len(lines) > 1 else [],
        note="; ".join(notes),
        lines=drawn,
        x_ticks=[Tick(scale.x(step) / BOX * 100, f"{step:,}") for step in _step_ticks(left, right)],
        y_ticks=[Tick(scale.y(value) / BOX * 100, label) for value, label in _value_ticks(low, high, log)],
        hover={"x": [left, right], "y": [low, high], "log": log, "series": hover},
        summary=_summary(title, lines),
        size=size,
    )


def smooth_line(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Smooth a noisy series by local straight lines, which follow a steep start and do not lag.

    Args:
        values: float64 [N], all finite.
        at: int64 [M], the indices to give the smooth value for.

    Returns:
        float64 [M].

    Source:
        Cleveland 1979, locally weighted regression with tricube weights, without its robust passes; the neighbourhood
        is the nearest fifth of the points, at least 13.
    """
    size = min(len(values), max(13, len(values) // 5))
    result = np.empty(len(at))
    for place, index in enumerate(at):
        begin = min(max(0, index - size // 2), len(values) - size)
        x = np.arange(begin, begin + size) - float(index)
        y = values[begin : begin + size]
        weight = (1 - (np.abs(x) / (np.abs(x).max() + 1)) ** 3) ** 3
        mean_x, mean_y = np.average(x, weights=weight), np.average(y, weights=weight)
        slope = (weight * (x - mean_x) * (y - mean_y)).sum() / (weight * (x - mean_x) ** 2).sum()
        result[place] = mean_y - slope * mean_x
    return result


def thin(values: np.ndarray, most: int = MAX_POINTS) -> np.ndarray:
    """Choose indices that keep the shape of a long series: the lowest and highest value of each stretch, and both ends.

    Args:
        values: float64 [N], all finite.
        most: About how many to keep.

    Returns:
        int64 [M], rising, M at most `most` + 2.
    """
    if len(values) <= most:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), most // 2 + 1).astype(np.int64)
    kept = {0, len(values) - 1}
    for begin, end in pairwise(edges.tolist()):
        kept.update((begin + int(values[begin:end].argmin()), begin + int(values[begin:end].argmax())))
    return np.array(sorted(kept), dtype=np.int64)


@dataclass(frozen=True)
class _Scale:
    left: float
    right: float
    low: float
    high: float
    log: bool

    def x(self, step: float) -> float:
        return (step - self.left) / (self.right - self.left) * BOX

    def y(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return BOX - (value - low) / (high - low) * BOX


def _draw_line(line: Series, scale: _Scale) -> tuple[list[Line], list[dict[str, Any]]]:
    """Make the paths of a series and its hover points."""
    finite = np.isfinite(line.values)
    steps, values = line.steps[finite], line.values[finite]
    breaks = np.cumsum(~finite)[finite]
    kept = thin(values)
    smoothed = line.smooth and len(values) >= SMOOTH_FROM
    raw = _path(steps[kept], values[kept], breaks[kept], scale)
    paths = [Line(raw, line.color, "raw" if smoothed else "main")]
    hover = [_hover(line.name, line.color, steps[kept], values[kept])]
    if smoothed:
        at = np.unique(np.linspace(0, len(values) - 1, min(len(values), 200)).astype(np.int64))
        level = 10 ** smooth_line(np.log10(values), at) if scale.log else smooth_line(values, at)
        inside = np.clip(level, values.min(), values.max())
        paths.append(Line(_path(steps[at], inside, np.zeros(len(at)), scale), line.color, "main"))
        hover.append(_hover(f"{line.name}, smoothed", line.color, steps[at], inside))
    if line.dots or len(values) == 1:
        dots = " ".join(f"M{scale.x(x):.1f} {scale.y(y):.1f}h0" for x, y in zip(steps[kept], values[kept]))
        paths.append(Line(dots, line.color, "dots"))
    return paths, hover


def _path(steps: np.ndarray, values: np.ndarray, breaks: np.ndarray, scale: _Scale) -> str:
    """Write an SVG path that starts anew where `breaks` changes."""
    parts = []
    for index, (step, value) in enumerate(zip(steps, values)):
        move = index == 0 or breaks[index] != breaks[index - 1]
        parts.append(f"{'M' if move else 'L'}{scale.x(step):.1f} {scale.y(value):.1f}")
    return "".join(parts)


def _hover(name: str, color: str, steps: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    return {
        "name": name,
        "color": color,
        "steps": [int(step) for step in steps],
        "values": [float(f"{value:.5g}") for value in values],
    }


def _value_range(finite: np.ndarray, from_zero: bool, log: bool) -> tuple[float, float]:
    low, high = float(finite.min()), float(finite.max())
    if log:
        return low / 1.2, high * 1.2
    if from_zero or 0 <= low < 0.35 * high:
        low = min(0.0, low)
    if low == high:
        room = abs(low) * 0.1 or 1.0
        return low - room, high + room
    room = 0.06 * (high - low)
    return (low if low == 0 else low - room), (high if high == 0 else high + room)


def _value_ticks(low: float, high: float, log: bool) -> list[tuple[float, str]]:
    if log:
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        every = max(1, len(powers) // 5)
        values = [10.0**power for power in powers][::every]
        return [(value, f"{value:g}") for value in values]
    step = _nice(high - low, 4)
    values = [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [(value, _tick_label(value, step)) for value in values]


def _step_ticks(left: float, right: float) -> list[int]:
    step = max(1, round(_nice(right - left, 5)))
    return [index * step for index in range(math.ceil(left / step), math.floor(right / step) + 1)]


def _nice(span: float, parts: int) -> float:
    """Find the 1, 2, 2.5 or 5 times a power of ten that cuts `span` into about `parts`."""
    rough = span / parts
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)


def _tick_label(value: float, step: float) -> str:
    if value == 0 or abs(value) < step / 2:
        return "0"
    if abs(value) >= 1000:
        power, letter = (1e6, "M") if step >= 1e5 else (1e3, "k")
        return f"{value / power:.10g}{letter}"
    if step < 1e-3:
        power = math.floor(math.log10(abs(value)) + 1e-9)
        return f"{value / 10.0**power:.3g}e{power}"
    places = next(places for places in range(6) if math.isclose(round(step, places), step))
    return f"{value:.{places}f}"


def _summary(title: str, lines: Sequence[Series]) -> str:
    parts = []
    for line in lines:
        values = line.values[np.isfinite(line.values)]
        parts.append(f"{line.name} from {values[0]:.4g} to {values[-1]:.4g}, lowest {values.min():.4g}")
    return f"{title}: {'; '.join(parts)}"
