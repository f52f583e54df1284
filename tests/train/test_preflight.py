"""What a run refuses before it reads data: a dry run, the run and the launcher say the same, and all of it at once."""

from __future__ import annotations

import fcntl
import json
import shutil

import pytest

from finetune.recipe.load import load_recipe
from finetune.train import preflight
from tests.runs import finetune, write_recipe

WAYS = (["--dry-run"], [], ["--nproc", "2"])


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    """A recipe whose rows are wrong, which only who reads them can tell."""
    path = write_recipe(tmp_path, tiny_folder)
    (tmp_path / "train.jsonl").write_text("not a row\n")
    return path


def refused(capfd, recipe, *overrides: str, ways=WAYS) -> str:
    """What is said, the same in each way; no data is read, and nothing is written."""
    said = []
    for way in ways:
        assert finetune("train", recipe, *overrides, *way) == 2
        said.append(capfd.readouterr().err)
    assert len(set(said)) == 1, said
    assert "train.jsonl" not in said[0] and "read training rows" not in said[0]
    return said[0]


def test_half_precision_on_cpu(capfd, recipe, tmp_path):
    for dtype in ("bfloat16", "float16"):
        assert f"model.dtype: {dtype} was asked for" in refused(capfd, recipe, f"model.dtype={dtype}")
    assert not (tmp_path / "run").exists()


def test_all_at_once(capfd, recipe, tmp_path):
    (tmp_path / "file").write_text("")
    said = refused(
        capfd,
        recipe,
        "model.dtype=bfloat16",
        f"training.output_dir={tmp_path / 'file' / 'run'}",
        "data.max_length=600",
        "distributed.sharding=stage3",
        "lora={rank: 33, variant: pissa}",
    )
    assert said.startswith("error: 5 things are wrong")
    for what in (
        "model.dtype: bfloat16",
        "distributed.sharding",
        "file is a file",
        "max_length: is 600",
        "rank: is 33",
    ):
        assert what in said


def test_a_folder_that_is_no_run_and_one_that_another_run_holds(capfd, recipe, tmp_path):
    (tmp_path / "run" / "final").mkdir(parents=True)
    assert "is not the folder of a run" in refused(capfd, recipe)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as file:
        file.write(json.dumps({"pid": 7, "host": "elsewhere"}))
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another run is writing there (process 7 on elsewhere)" in refused(capfd, recipe, ways=WAYS[:2])


def test_a_checkpoint_that_is_not_there(capfd, recipe, tmp_path):
    said = refused(capfd, recipe, f"training.resume_from_checkpoint={tmp_path / 'step-3'}")
    assert "step-3: there is no such folder" in said


def test_more_processes_than_gpus(recipe, monkeypatch):
    monkeypatch.setattr(preflight, "gpu_count", lambda: 2)
    with pytest.raises(preflight.UserError, match="--nproc: 4 processes were asked for, but there are 2 GPUs"):
        preflight.settle(load_recipe(recipe, ["model.dtype=bfloat16"]), 4, nproc=4)
    assert preflight.settle(load_recipe(recipe, ["model.dtype=bfloat16"]), 2, nproc=2).world_size == 2


def test_a_dry_run_says_that_the_data_changed_and_leaves_the_folder_alone(capfd, tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder)
    assert finetune("train", recipe) == 0
    left = tmp_path / "run" / "checkpoints" / ".step-9.partial"
    left.mkdir()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    capfd.readouterr()
    assert finetune("train", recipe, "--dry-run") == 0
    assert "finished: 4 of 4 steps" in capfd.readouterr().err
    assert finetune("train", recipe, "--dry-run", "training.seed=1") == 2
    assert "training.seed: is 1, but the checkpoint was written with 42" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_an_adapter_trained_further_has_what_the_recipe_leaves_open(capfd, tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=1)
    shape = "lora={rank: 4, alpha: 6, variant: rslora, target_modules: [q_proj, down_proj]}"
    assert finetune("train", recipe, shape) == 0
    further = (recipe, f"model.path={tmp_path / 'run'}", f"training.output_dir={tmp_path / 'more'}")
    assert finetune("train", *further, "lora={dropout: 0.1}") == 0
    section = load_recipe(tmp_path / "more" / "recipe.yaml").lora
    assert (section.rank, section.alpha, section.variant, section.dropout) == (4, 6.0, "rslora", 0.1)
    assert sorted(section.target_modules) == ["down_proj", "q_proj"]
    assert finetune("train", tmp_path / "more" / "recipe.yaml", f"training.output_dir={tmp_path / 'again'}") == 0
    capfd.readouterr()
    other = "lora={rank: 8, target_modules: [q_proj], variant: lora}"
    said = refused(capfd, recipe, f"model.path={tmp_path / 'run'}", f"training.output_dir={tmp_path / 'no'}", other)
    for what in ("lora.rank: is 8, the adapter has 4", "lora.variant: is lora", "lora.target_modules: are q_proj, the"):
        assert what in said
    assert "lora.alpha" not in said and said.startswith("error: 3 things are wrong")  # the advice is no fault
