"""Learning rates against the published formulas, at their corners. Parity with transformers: tests/parity."""

from __future__ import annotations

import math

import pytest

from finetune.train.schedule import learning_rate, warmup_steps_of


def rate(step: int, name: str, **changes) -> float:
    return learning_rate(step, **({"name": name, "base": 2.0, "warmup_steps": 4, "total_steps": 20} | changes))


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt"])
def test_warm_up_rises_linearly_from_zero(name):
    assert [rate(step, name) for step in range(5)] == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0])


@pytest.mark.parametrize(
    ("name", "middle", "end"),
    [
        ("linear", 1.0, 0.0),
        ("cosine", 1.0, 0.0),
        ("constant_with_warmup", 2.0, 2.0),
        ("polynomial", (2.0 + 1e-7) / 2, 1e-7),
        ("inverse_sqrt", 2.0 / math.sqrt(3), 2.0 / math.sqrt(5)),
        ("cosine_with_min_lr", 2.0 * 0.55, 0.2),
    ],
)
def test_middle_and_end(name, middle, end):
    assert rate(12, name) == pytest.approx(middle)
    assert rate(20, name) == pytest.approx(end)


def test_constant_ignores_warm_up():
    assert rate(0, "constant") == 2.0


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="sawtooth"):
        rate(9, "sawtooth")


def test_a_ratio_is_rounded_up_and_yields_to_steps():
    assert warmup_steps_of(0, 0.1, 15) == 2
    assert warmup_steps_of(3, 0.1, 15) == 3
