"""What the page says first: in sentences and figures that the numbers bear out, evaluation before training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.report.charts import Series, series

# A change is said where it is larger than so many standard errors of the two means.
_CLEAR = 3.0
_SAME = 0.005  # relative
_ACCURACY, _MARGIN = "rewards/accuracies", "rewards/margins"
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Trend:
    """How a series of noisy values went.

    Attributes:
        count: Finite values.
        mean: Of all of them.
        first, last: Means of the first and the last tenth, so that one lucky batch makes no headline.
        clear: Whether they differ by more than the noise: three standard errors of the two means, the noise of one
            value taken from the differences of neighbours (von Neumann et al. 1941), which a trend hardly changes.
    """

    count: int
    mean: float
    first: float
    last: float
    clear: bool

    @property
    def level(self) -> float:
        """Where it stands: the last tenth where it went somewhere, else all there is."""
        return self.last if self.clear else self.mean


def trend(line: Series) -> Trend | None:
    """The trend of a series; None where it has no finite value."""
    values = line.values[np.isfinite(line.values)]
    if not len(values):
        return None
    tenth = max(1, len(values) // 10)
    first, last = float(values[:tenth].mean()), float(values[-tenth:].mean())
    noise = math.sqrt(float(np.square(np.diff(values)).mean()) / 2) if len(values) > 1 else math.inf
    clear = abs(last - first) > _CLEAR * noise * math.sqrt(2 / tenth) and not math.isclose(first, last, rel_tol=_SAME)
    return Trend(len(values), float(values.mean()), first, last, clear)


def sentences(rows: Rows) -> str:
    """How a run went: evaluation first; of the training loss only what stands out of its noise."""
    parts = [*_evaluation(rows), *_ranking(rows)]
    loss = trend(series(rows, "loss", ""))
    if loss is not None and loss.clear:
        parts.append(
            f"Training loss {'fell' if loss.last < loss.first else 'rose'} from {loss.first:.3g} to {loss.last:.3g}."
        )
    elif loss is not None and loss.count > 1:
        same = math.isclose(loss.first, loss.last, rel_tol=_SAME)
        parts.append(
            f"Training loss {'stayed at' if same else 'changed by no more than its noise, around'} {loss.mean:.3g}."
        )
    return " ".join(parts)


def _evaluation(rows: Rows) -> Iterator[str]:
    line = series(rows, "eval_loss", "")
    finite = np.isfinite(line.values)
    values, steps = line.values[finite], line.steps[finite]
    if not len(values):
        return
    best = int(np.argmin(values))
    first, last = f"{values[0]:.3g}", f"{values[-1]:.3g}"
    if len(values) == 1:
        yield f"Evaluation loss was {last} at step {steps[0]:,}."
    elif math.isclose(values.min(), values.max(), rel_tol=_SAME):
        yield f"Evaluation loss stayed at {last}."
    elif values[-1] <= values[best] * (1 + _SAME):
        yield f"Evaluation loss fell from {first} to {last}."
    elif best == 0:
        yield f"Evaluation loss was lowest at its first evaluation, step {steps[0]:,} ({first}), and rose to {last}."
    else:
        lowest = f"{values[best]:.3g} at step {steps[best]:,}"
        yield f"Evaluation loss fell from {first} to {lowest} and ended higher, at {last}."


def _ranking(rows: Rows) -> Iterator[str]:
    held_out, training = _last(rows, f"eval_{_ACCURACY}"), trend(series(rows, _ACCURACY, ""))
    if held_out is not None:
        yield f"At the end the chosen answer is preferred in {held_out:.0%} of the evaluation pairs."
    elif training is not None and training.clear:
        yield (
            f"The chosen answer was preferred in {training.first:.0%} of the training pairs at the start, "
            f"in {training.last:.0%} at the end."
        )
    elif training is not None:
        yield f"The chosen answer was preferred in {training.mean:.0%} of the training pairs."


def _last(rows: Rows, key: str) -> float | None:
    values = series(rows, key, "").values
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else None


def figures(rows: Rows) -> Iterator[tuple[str, str, str]]:
    """The losses and rewards as (name, value, remark)."""
    line = series(rows, "eval_loss", "")
    finite = np.isfinite(line.values)
    values, steps = line.values[finite], line.steps[finite]
    if len(values):
        best = int(np.argmin(values))
        lowest = "" if best == len(values) - 1 else f", lowest {values[best]:.3g} at step {steps[best]:,}"
        remark = f"from {values[0]:.3g}{lowest}" if len(values) > 1 else f"at step {steps[0]:,}"
        yield "Evaluation loss", f"{values[-1]:.3g}", remark
    for key, name, form in ((_ACCURACY, "Pairs ranked right", ".0%"), (_MARGIN, "Reward margin", ".3g")):
        held_out, training = _last(rows, f"eval_{key}"), trend(series(rows, key, ""))
        if held_out is not None:
            yield name, f"{held_out:{form}}", "evaluation"
        elif training is not None:
            yield name, f"{training.level:{form}}", _remark(training, form)
    loss = trend(series(rows, "loss", ""))
    if loss is not None:
        yield "Training loss", f"{loss.level:.3g}", _remark(loss, ".3g")


def speaks_of_tenths(rows: Rows) -> bool:
    """Whether a figure of training is the mean over a tenth of several steps, which the page has to say."""
    trends = (trend(series(rows, key, "")) for key in ("loss", _ACCURACY, _MARGIN))
    return any(of is not None and of.clear and of.count >= 20 for of in trends)


def _remark(of: Trend, form: str) -> str:
    if of.clear:
        return f"from {of.first:{form}}"
    return "mean of all steps" if of.count > 1 else "the only one logged"
