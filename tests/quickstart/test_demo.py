"""What the demo counts. The demo itself is run by `make demo`."""

from __future__ import annotations

import io
import shlex

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


def test_commands_are_shown_in_lines_that_break_between_words_and_can_be_copied(tmp_path):
    command = (
        "finetune generate outputs/quickstart/sft_lora --input data/heldout.jsonl --output out/a.jsonl "
        '--prompt "Which city governs Iran?" --seed 1'
    )
    for width in range(60, 200):
        shown = demo.shown_command(command, width)
        assert all(len(line) <= width for line in shown.splitlines())
        assert shlex.split(shown[4:].replace("\\\n", "")) == shlex.split(command)


def test_samples_fit_a_terminal_of_80_columns():
    answers = {"before": "no " * 60, "SFT_LoRA": "In America.\nYes.", "SFT_full": "", "DPO": "[b]"}
    file = io.StringIO()
    demo.show_samples(Console(file=file, width=80), [{"prompt": "Where is Peru?", **answers}])
    title, prompt, before, lora, full, dpo = file.getvalue().splitlines()[1:]
    assert (title, prompt.strip()) == ("Held-out questions", "Where is Peru?")
    assert len(before) == 80 and before.endswith("…")
    assert lora.split() == ["SFT", "LoRA", "In", "America.", "Yes."]
    assert (full.strip(), dpo.split()) == ("SFT full", ["DPO", "[b]"])
