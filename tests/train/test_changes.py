"""Runs that change: they go on longer by themselves, and with another rate or other rows when that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from finetune.train.schedule import learning_rate
from tests.invariants.test_sft import final_digest
from tests.runs import finetune, steps, write_recipe, write_rows

CONSTANT = "training.lr_scheduler_type=constant"
LORA = "lora={rank: 2, alpha: 4, dropout: 0.2}"


def manifest(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text(encoding="utf-8"))


def beta1_power(run: Path, step: int) -> float:
    """How often the optimizer has stepped, as it says itself: beta1 to that power."""
    state = load_file(run / "checkpoints" / f"step-{step}" / "optimizer.safetensors")
    return float(next(value for name, value in state.items() if name.endswith("beta1_pow_acc")).item())


@pytest.mark.parametrize("more", [[LORA], ["method=dpo", "dpo.loss_type=hinge"]], ids=["sft lora", "dpo full"])
def test_20_steps_and_then_40_are_40_at_once(more, tmp_path, tiny_folder, capfd):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=40, learning_rate=1e-3)
    if "method=dpo" in more:
        rows = [{"prompt": f"say {i}", "chosen": f"{i} it is", "rejected": f"no {i * i}"} for i in range(24)]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    assert finetune("train", recipe, CONSTANT, *more, f"training.output_dir={whole}") == 0
    assert finetune("train", recipe, CONSTANT, *more, f"training.output_dir={parts}", "training.max_steps=20") == 0
    assert manifest(parts)["status"] == "finished"
    capfd.readouterr()
    assert finetune("train", recipe, CONSTANT, *more, f"training.output_dir={parts}") == 0
    assert "Going on to step 40 (training.max_steps 20 -> 40).\n" in capfd.readouterr().err
    assert final_digest(parts) == final_digest(whole)
    assert [row["loss"] for row in steps(parts)] == [row["loss"] for row in steps(whole)]
    history = manifest(parts)["history"]
    assert history == [{"after_step": 20, "changes": {"training.max_steps": [20, 40]}}]


def test_more_epochs_follow_the_longer_schedule_and_say_so(tmp_path, tiny_folder, capfd):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=None, num_train_epochs=1.0, learning_rate=1e-3)
    assert finetune("train", recipe) == 0
    capfd.readouterr()
    assert finetune("train", recipe, "training.num_train_epochs=2", "--dry-run") == 0
    line = "Going on to step 12 (training.num_train_epochs 1.0000 -> 2.0000); from here on the cosine schedule is that"
    assert line in " ".join(capfd.readouterr().err.split())
    assert finetune("train", recipe, "training.num_train_epochs=2") == 0
    rates = [row["learning_rate"] for row in steps(tmp_path / "run")]
    expected = [
        learning_rate(step, name="cosine", base=1e-3, warmup_steps=0, total_steps=6 if step < 6 else 12)
        for step in range(12)
    ]
    assert rates == expected
    assert beta1_power(tmp_path / "run", 12) == pytest.approx(0.9**13, rel=1e-5)  # Paddle keeps the next step's


def test_a_run_does_not_end_before_its_checkpoint(tmp_path, tiny_folder, capfd):
    recipe = write_recipe(tmp_path, tiny_folder)
    assert finetune("train", recipe) == 0
    assert finetune("train", recipe, "training.max_steps=3") == 2
    assert "training.max_steps: the run would end at step 3, but " in capfd.readouterr().err


def test_another_rate_only_when_it_is_named(tmp_path, tiny_folder, capfd):
    recipe, run = write_recipe(tmp_path, tiny_folder, save_steps=2), tmp_path / "run"
    assert finetune("train", recipe, CONSTANT) == 0
    rate = (CONSTANT, "training.learning_rate=5e-4", "training.max_steps=6")
    assert finetune("train", recipe, *rate) == 2
    assert "go on with it by training.allow_changes=[training.learning_rate]" in capfd.readouterr().err
    assert finetune("train", recipe, *rate, "training.allow_changes=[learning_rate]") == 0
    assert "Changed after step 4, as training.allow_changes says: training.learning_rate 0.0010 -> 5.00e-04" in (
        " ".join(capfd.readouterr().err.split())
    )
    assert [row["learning_rate"] for row in steps(run)] == [1e-3] * 4 + [5e-4] * 2
    assert beta1_power(run, 6) == pytest.approx(0.9**7, rel=1e-5)
    assert manifest(run)["history"] == [
        {"after_step": 4, "changes": {"training.learning_rate": [1e-3, 5e-4], "training.max_steps": [4, 6]}}
    ]
    # The change is the run's own from here on; what it was allowed is not asked for again.
    assert "allow_changes: []" in (run / "recipe.yaml").read_text()
    assert finetune("train", run / "recipe.yaml", "training.max_steps=8") == 0
    assert [entry["after_step"] for entry in manifest(run)["history"]] == [4, 6]


def test_other_rows_only_when_they_are_named_and_from_the_checkpoint_that_is_named(tmp_path, tiny_folder, capfd):
    recipe, run = write_recipe(tmp_path, tiny_folder, save_steps=2), tmp_path / "run"
    assert finetune("train", recipe) == 0
    write_rows(tmp_path / "train.jsonl", 12, seed=5)
    assert finetune("train", recipe) == 2
    assert "training.allow_changes=[data.train]" in capfd.readouterr().err
    other, at = tmp_path / "other", run / "checkpoints" / "step-2"
    start = (f"training.resume_from_checkpoint={at}", f"training.output_dir={other}")
    assert finetune("train", recipe, *start, "training.allow_changes=[data]") == 0
    assert [row["step"] for row in steps(other)] == [3, 4]
    assert manifest(other)["data"]["train"]["read"] == 12
    (entry,) = manifest(other)["history"]
    assert entry["after_step"] == 2 and list(entry["changes"]) == ["data.train"]


def test_a_stream_of_other_rows_begins_anew(tmp_path, tiny_folder, capfd):
    recipe, run = write_recipe(tmp_path, tiny_folder, max_steps=3), tmp_path / "run"
    assert finetune("train", recipe, CONSTANT, "data.streaming=true") == 0
    write_rows(tmp_path / "train.jsonl", 12, seed=5)
    longer = (CONSTANT, "data.streaming=true", "training.max_steps=5")
    assert finetune("train", recipe, *longer) == 2
    assert "no longer what they were" in capfd.readouterr().err
    assert finetune("train", recipe, *longer, "training.allow_changes=[data.train]") == 0
    assert [row["step"] for row in steps(run)] == [1, 2, 3, 4, 5]
    assert steps(run)[3]["epoch"] == pytest.approx(4 / 12)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.allow_changes=[lerning_rate]"], "Did you mean learning_rate?"),
        (["training.allow_changes=[model.path]"], "names 'model.path', which is no key that may change"),
        (["training.allow_changes=[seed]", "training.resume_from_checkpoint=never"], "nothing to differ from"),
    ],
)
def test_what_allow_changes_cannot_name(overrides, said, tmp_path, tiny_folder, capfd):
    assert finetune("train", write_recipe(tmp_path, tiny_folder), *overrides) == 2
    assert said in capfd.readouterr().err


def test_weights_of_another_shape_are_not_gone_on_with(tmp_path, tiny_folder, capfd):
    recipe = write_recipe(tmp_path, tiny_folder)
    assert finetune("train", recipe, LORA) == 0
    assert finetune("train", recipe, "lora={rank: 4, alpha: 4}", "training.allow_changes=[learning_rate]") == 2
    said = capfd.readouterr().err
    assert "lora.rank: is 4, but the checkpoint was written with 2" in said and "allow_changes" not in said
