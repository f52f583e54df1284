"""From steps to rates, from rounds to ratios, and the arithmetic that a step needs. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from benchmarks.folders import LORA, linear_sizes
from tests.tiny import Shape

WARM_UP = 2
CHECKED_STEPS = 3
TOLERANCE = 1e-4


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def step_rates(answer: dict, work: dict[str, list[float]], warm_up: int = WARM_UP) -> dict[str, float]:
    """Work done per second after the first steps, on the clock and on the processor.

    Args:
        answer: A worker's: `steps` with `wall` and `cpu` seconds since its start at the end of each, and `reference`,
            the seconds that a reference pass over all rows took before the first step.
        work: By unit (tokens, pairs, flops), how much of it each step does.
        warm_up: Steps that are not counted.

    Returns:
        For each unit `<unit>_per_second` and `<unit>_per_cpu_second`, and without the reference pass
        `<unit>_per_second_of_steps`; `seconds`, `cpu_seconds` of the counted steps with their share of the reference.

    Raises:
        ValueError: no step is left to count.
    """
    steps = answer["steps"]
    if len(steps) <= warm_up:
        raise ValueError(f"{len(steps)} steps are too few to leave out the first {warm_up}")
    before, last = steps[warm_up - 1] if warm_up else {"wall": 0.0, "cpu": 0.0}, steps[-1]
    counted = slice(warm_up, len(steps))
    share = (len(steps) - warm_up) / len(steps)
    seconds = {kind: last[kind] - before[kind] for kind in ("wall", "cpu")}
    whole = {kind: seconds[kind] + share * answer.get("reference", {}).get(kind, 0.0) for kind in seconds}
    rates = {"seconds": whole["wall"], "cpu_seconds": whole["cpu"]}
    for unit, amounts in work.items():
        done = sum(amounts[counted])
        rates[f"{unit}_per_second"] = done / whole["wall"]
        rates[f"{unit}_per_cpu_second"] = done / whole["cpu"]
        rates[f"{unit}_per_second_of_steps"] = done / seconds["wall"]
    return rates


def per_step(values: Sequence[float], batch_size: int) -> list[float]:
    """Sum over the rows of each step."""
    return [sum(values[i : i + batch_size]) for i in range(0, len(values), batch_size)]


def largest_difference(ours: Sequence[float], theirs: Sequence[float], count: int = CHECKED_STEPS) -> float:
    """Largest relative difference of the first losses; infinite where one side has none or it is not a number."""
    if min(len(ours), len(theirs)) < count:
        return math.inf
    gaps = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours[:count], theirs[:count])]
    return max(gaps) if all(map(math.isfinite, gaps)) else math.inf


def row_flops(shape: Shape, lengths: Sequence[int], targets: int, *, lora: bool) -> float:
    """Floating point operations that training on one row needs, however a program goes about it.

    Linear layers at each real token; causal attention, half of the square; the head at scored positions only. The
    backward pass costs a forward pass for the gradient of what goes in, and another for that of the weights if they are
    trained. Of a pair the prompt counts once, and the reference's forward pass is part of it.

    Args:
        lengths: [tokens] of a sample, or [prompt, chosen, rejected] of a pair.
        targets: Scored tokens.
    """
    sizes = linear_sizes(shape).values()
    tokens = sum(lengths)
    linear = 2.0 * sum(i * o for i, o in sizes) * tokens * shape.num_hidden_layers
    attention = 2.0 * shape.hidden_size * _visible(lengths) * shape.num_hidden_layers
    head = 2.0 * shape.hidden_size * shape.vocab_size * targets
    adapters = 2.0 * LORA.rank * sum(i + o for i, o in sizes) * tokens * shape.num_hidden_layers
    forward = linear + attention + head
    total = 3 * forward + (3 * adapters - linear - head if lora else 0.0)
    return total + (forward if len(lengths) > 1 else 0.0)


def _visible(lengths: Sequence[int]) -> float:
    """Twice the number of (query, key) pairs under a causal mask: responses see the prompt and themselves."""
    first, *others = lengths
    return first**2 + sum(length**2 + 2 * first * length for length in others)


def exponents(sizes: Sequence[float], costs: Sequence[float]) -> list[float]:
    """Between each two neighbours the power of size with which cost grows: 1 is linear, 2 is quadratic, 0 is flat."""
    pairs = list(zip(sizes, costs))
    return [math.log(c1 / c0) / math.log(s1 / s0) for (s0, c0), (s1, c1) in zip(pairs, pairs[1:])]


def fitted_law(sizes: Sequence[float], costs: Sequence[float]) -> tuple[list[float], float]:
    """The cost as a + b n + c n^2, without terms that are negative or nothing, by least squares of the relative error.

    The square is left out with fewer than five sizes, so that fewer numbers are fitted than were measured.

    Returns:
        [a, b, c], and the largest relative deviation of a cost from the law.
    """
    n, cost = np.asarray(sizes, float), np.asarray(costs, float)
    terms = list(range(3 if len(n) >= 5 else 2))
    while True:
        columns = np.stack([n**power for power in terms], axis=1) / cost[:, None]
        scale = columns.max(axis=0)
        found = np.linalg.lstsq(columns / scale, np.ones_like(cost), rcond=None)[0] / scale
        shares = (columns * found).max(axis=0)
        if shares.min() > 1e-3:
            break
        del terms[int(shares.argmin())]
    law = [0.0, 0.0, 0.0]
    for power, coefficient in zip(terms, found):
        law[power] = float(coefficient)
    return law, float(np.abs(columns @ found - 1).max())
