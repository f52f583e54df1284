"""Runs that an older version began: today's code resumes them to the same bits, and reads their recipes.

`old_runs/` holds what cc12a39 left of two runs that were stopped halfway, of a model of 4,264 weights: LoRA with
dropout, and DPO of all weights with its reference's cache; expected.safetensors is what each came to when it was not
stopped.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.recipe.load import load_recipe
from tests.runs import finetune, steps

OLD = Path(__file__).parent / "old_runs"
STOPPED_AT = {"sft_lora": 3, "dpo_full": 2}


def weights(folder: Path) -> dict[str, np.ndarray]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


@pytest.mark.parametrize("name", STOPPED_AT)
def test_a_run_of_cc12a39_resumes_to_the_same_bits(name, tmp_path, monkeypatch, capfd):
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    run, at = tmp_path / "old" / name, STOPPED_AT[name]
    expected = load_file(run / "expected.safetensors")
    assert finetune("train", f"{name}.yaml") == 0
    assert f"resumed after step    {at}" in capfd.readouterr().err
    assert finetune("train", f"{name}.yaml", "training.output_dir=anew") == 0
    resumed, anew = weights(run / "final"), weights(tmp_path / "old" / "anew" / "final")
    assert [row["step"] for row in steps(run)] == [row["step"] for row in steps(tmp_path / "old" / "anew")]
    then = Path("checkpoints") / f"step-{at}" / "model"
    if same_bits(weights(OLD / name / then), weights(Path("anew") / then)):
        assert same_bits(resumed, expected) and same_bits(anew, expected)
    else:  # a processor that rounds otherwise than the one that the old run was made on
        for name, weight in expected.items():
            np.testing.assert_allclose(resumed[name], weight, rtol=0, atol=1e-6)
            np.testing.assert_allclose(anew[name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", STOPPED_AT)
def test_a_recipe_that_cc12a39_wrote_is_the_one_it_was_given(name, monkeypatch):
    monkeypatch.chdir(OLD)
    assert load_recipe(Path(name) / "recipe.yaml") == load_recipe(f"{name}.yaml")
