"""`finetune evaluate` against lm-evaluation-harness's own Hugging Face model. Needs FINETUNE_REFERENCE_PYTHON."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.evaluate.tasks import NAMES, write_tasks
from tests.tiny import tiny_model

PYTHON = os.environ.get("FINETUNE_REFERENCE_PYTHON")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="FINETUNE_REFERENCE_PYTHON names no Python with torch and lm_eval"),
    pytest.mark.timeout(1000),
]
SCRIPT = Path(__file__).with_name("ref_evaluate.py")


@pytest.mark.parametrize("form", ["chat", "raw"])
def test_answers_and_results(form, tmp_path):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from finetune.evaluate.harness import EvaluatedModel
    from finetune.infer.open import open_model

    model, tasks, output = tiny_model(tmp_path / "tiny"), write_tasks(tmp_path / "tasks"), tmp_path / "reference.json"
    command = [PYTHON, SCRIPT, model, tasks, ",".join(NAMES), form, output]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=900)
    theirs = json.loads(output.read_text())
    ours = simple_evaluate(
        EvaluatedModel(open_model(str(model)), batch_size=8),
        tasks=list(NAMES),
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        apply_chat_template=form == "chat",
        fewshot_as_multiturn=form == "chat",
    )
    for name in NAMES:
        answers = [sample["resps"] for sample in ours["samples"][name]]
        assert len(answers) == len(theirs["answers"][name]) == 30
        if name == "sums_answer":
            assert answers == theirs["answers"][name]
        else:
            assert _flat(answers) == pytest.approx(_flat(theirs["answers"][name]), rel=1e-5, abs=1e-4)
        for key, value in theirs["results"][name].items():
            if "," in key and isinstance(value, float):
                assert ours["results"][name][key] == pytest.approx(value, rel=1e-4), key


def _flat(answers) -> np.ndarray:
    """Log-probabilities, and whether each is greedy as 0 or 1."""
    return np.array([float(value) for sample in answers for value in np.ravel(np.array(sample, dtype=object))])
