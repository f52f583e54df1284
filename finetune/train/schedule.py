"""Learning rate as a function of the step number: names and formulas of transformers/optimization.py."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, name: str, base: float, warmup_steps: int, total_steps: int, min_lr_ratio: float = 0.1
) -> float:
    """The learning rate used by optimizer step `step`, counted from 0.

    Args:
        step: Optimizer step, 0-based. With warm-up the first step has rate 0, as in transformers.
        name: linear | cosine | constant | constant_with_warmup | polynomial | inverse_sqrt | cosine_with_min_lr.
        base: The peak rate.
        warmup_steps: Steps of linear warm-up. `constant` has none.
        total_steps: Steps of the whole run.
        min_lr_ratio: Lowest rate over `base`, for cosine_with_min_lr.

    Raises:
        ValueError: unknown name.
    """
    if name == "constant":
        return base
    if step < warmup_steps:
        return base * step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if name == "constant_with_warmup":
        return base
    if name == "linear":
        return base * max(0.0, 1.0 - progress)
    if name == "cosine":
        return base * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    if name == "cosine_with_min_lr":
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
        return base * max(0.0, factor * (1.0 - min_lr_ratio) + min_lr_ratio)
    if name == "polynomial":
        end = 1e-7  # transformers' default: power 1 down to 1e-7
        return end if progress >= 1.0 else (base - end) * (1.0 - progress) + end
    if name == "inverse_sqrt":
        timescale = warmup_steps or 10_000
        return base / math.sqrt((step + timescale - warmup_steps) / timescale)
    raise ValueError(f"unknown lr_scheduler_type {name!r}")


def warmup_steps_of(warmup_steps: int, warmup_ratio: float, total_steps: int) -> int:
    """Warm-up in steps: `warmup_steps`, or `warmup_ratio` of the run, rounded up as transformers does."""
    return warmup_steps if warmup_steps > 0 else math.ceil(total_steps * warmup_ratio)
