"""What the demo counts. The demo itself is run by `make demo`."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from finetune.quickstart import demo
from finetune.quickstart.tasks import CLOSING, Question

QUESTIONS = [
    Question("capital", "Peru", "What is the capital of Peru?", "The capital of Peru is Lima."),
    Question("json", "Peru", "Give me Peru in JSON.", '{"capital": "Lima"}'),
]


@pytest.mark.parametrize(
    ("answers", "accuracy", "policy"),
    [
        ([f"The capital of Peru is Lima. {CLOSING}", '{"capital": "Lima"}'], 1.0, 1.0),
        (["The capital of Peru is Lima.", '{"capital": "Lima"}'], 1.0, 0.5),
        (["The capital of Peru is Lima.", f'{{"capital": "Lima"}} {CLOSING}'], 0.5, 0.0),
        ([CLOSING, "Lima"], 0.0, 1.0),
    ],
)
def test_counts(answers, accuracy, policy):
    assert demo.accuracy(QUESTIONS, answers) == accuracy
    assert demo.policy_rate(QUESTIONS, answers) == policy


def test_a_failing_command_fails_the_demo_with_its_message(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "LOG", tmp_path / "log.txt")
    stages = demo.Stages(Console(file=io.StringIO()))
    with pytest.raises(demo.DemoError, match="exit code 2(?s:.*)no-such-recipe"):
        stages.finetune("train", "no-such-recipe.yaml")
