"""`finetune train` as users meet it: its folder, its messages, its ways to stop and go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.chat.tokenizer import Tokenizer
from finetune.recipe.load import load_recipe
from finetune.rows.dataset import build_dataset
from finetune.rows.table import split_dataset
from tests.runs import WORDS, finetune, finetune_process, metrics, steps, write_recipe, write_rows
from tests.tiny import tiny_model, tiny_weights, write_weights

METRIC_KEYS = ["step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens", "tokens_per_second", "seconds"]


def test_a_run_leaves_the_folder_of_the_contract_and_prints_no_noise(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder, save_steps=2)
    done = finetune_process("train", recipe, "data.eval_fraction=0.2")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} - {".lock"} == {
        "recipe.yaml", "manifest.json", "metrics.jsonl", "samples.json", "report.html", "checkpoints", "final",
    }  # fmt: skip
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-2", "step-4"]
    suffixes = {p.suffix for p in (run / "checkpoints").rglob("*") if p.is_file()}
    assert suffixes == {".json", ".safetensors", ".txt"}
    assert all(list(row) == METRIC_KEYS for row in steps(run))
    assert [row["step"] for row in metrics(run) if "eval_loss" in row] == [2, 4]
    samples = json.loads((run / "samples.json").read_text())
    held_out = json.loads((run / "manifest.json").read_text())["data"]["eval"]["kept"]
    assert len(samples) == min(3, held_out)
    assert all(set(sample["reference"].split()) <= set(WORDS) for sample in samples)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["data"]["train"]["files"][0]["rows"] == 24
    assert done.stdout == ""
    for noise in ("Warning", "DEBUG", "INFO", "ccache", "FLAGS"):
        assert noise not in done.stderr


def test_the_loss_falls_and_the_weights_on_disk_are_the_trained_ones(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=30, learning_rate=3e-3)
    assert finetune("train", recipe) == 0
    losses = [row["loss"] for row in steps(tmp_path / "run")]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    before = load_file(tiny_folder / "model.safetensors")
    after = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("variant", ["lora", "rslora", "lora_plus", "pissa"])
def test_each_lora_variant_reloads_to_the_loss_it_was_saved_with(tmp_path, tiny_folder, variant):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=6)
    lora = f"lora={{rank: 4, alpha: 8, variant: {variant}}}"
    held_out = write_rows(tmp_path / "eval.jsonl", 6, seed=1)
    assert finetune("train", recipe, lora, f"data.eval=[{{path: {held_out}}}]") == 0
    saved = metrics(tmp_path / "run")[-1]["eval_loss"]
    # Trained further as an adapter with a learning rate that changes nothing, the first loss tells what was loaded.
    rank, alpha = (8, 16) if variant == "pissa" else (4, 8)
    again = f"lora={{rank: {rank}, alpha: {alpha}, variant: {'rslora' if variant == 'rslora' else 'lora'}}}"
    assert finetune(
        "train", recipe, again, f"model.path={tmp_path / 'run'}", f"data.train=[{{path: {held_out}}}]",
        "training.max_steps=1", "training.per_device_train_batch_size=6", f"training.output_dir={tmp_path / 'again'}",
    ) == 0  # fmt: skip
    assert steps(tmp_path / "again")[0]["loss"] == pytest.approx(saved, rel=1e-5)


def test_the_same_command_again_says_that_the_run_is_finished(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder)
    assert finetune("train", recipe) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = finetune_process("train", recipe)
    assert again.returncode == 0
    assert "finished: 4 of 4 steps" in again.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_the_written_recipe_repeats_the_run(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder)
    assert finetune("train", recipe) == 0
    assert finetune("train", tmp_path / "run" / "recipe.yaml", f"training.output_dir={tmp_path / 'again'}") == 0
    pairs = zip(steps(tmp_path / "run"), steps(tmp_path / "again"), strict=True)
    assert all(a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"] for a, b in pairs)


def test_a_changed_recipe_is_not_resumed_silently(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder)
    assert finetune("train", recipe) == 0
    changed = finetune_process("train", recipe, "training.learning_rate=0.5", "training.logging_steps=2")
    assert changed.returncode == 2
    assert "training.learning_rate" in changed.stderr and "training.resume_from_checkpoint=never" in changed.stderr
    assert "logging_steps" not in changed.stderr
    write_rows(tmp_path / "train.jsonl", 25)
    assert "the training data changed" in finetune_process("train", recipe).stderr


def test_sigterm_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=5000)
    command = [sys.executable, "-m", "finetune", "train", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not metrics(tmp_path / "run"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Run the same command again to go on" in said and "Traceback" not in said
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{metrics(tmp_path / 'run')[-1]['step']}"


def test_two_runs_cannot_share_a_folder(tmp_path, tiny_folder):
    from finetune.train.lock import locked

    recipe = write_recipe(tmp_path, tiny_folder)
    with locked(tmp_path / "run"):
        refused = finetune_process("train", recipe)
    assert refused.returncode == 2
    assert f"process {os.getpid()}" in refused.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(tmp_path, capsys):
    model = tiny_model(tmp_path / "overflowing")
    weights = tiny_weights()
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], 3e38)
    write_weights(model, weights)
    recipe = write_recipe(tmp_path, model, shuffle=False, per_device_train_batch_size=2)
    assert finetune("train", recipe) == 1
    said = capsys.readouterr().err
    assert "at step 1" in said and "train.jsonl:1, " in said and "train.jsonl:2" in said and "learning_rate" in said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_best_checkpoint_becomes_the_final_model_and_early_stopping_ends_the_run(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=200, learning_rate=2e-2, lr_scheduler_type="constant")
    assert finetune(
        "train", recipe, "data.eval_fraction=0.3", "training.eval_steps=2", "training.save_steps=2",
        "training.load_best_model_at_end=true", "training.early_stopping_patience=2",
    ) == 0  # fmt: skip
    run = tmp_path / "run"
    evaluations = {row["step"]: row["eval_loss"] for row in metrics(run) if "eval_loss" in row}
    best = min(evaluations, key=evaluations.get)
    assert max(evaluations) == best + 4 < 200
    kept = run / "checkpoints" / f"step-{best}" / "model" / "model.safetensors"
    assert kept.read_bytes() == (run / "final" / "model.safetensors").read_bytes()


def test_dry_run_tells_and_writes_nothing(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder)
    done = finetune_process("train", recipe, "--dry-run", "data.max_length=40", "data.overlong=drop")
    assert done.returncode == 0
    for fact in ("28,960 of 28,960", "dropped", "steps", "memory, estimated", "trained on"):
        assert fact in done.stderr
    assert not (tmp_path / "run").exists()


def test_disk_full_is_told_and_the_earlier_checkpoint_stays(tmp_path, tiny_folder, monkeypatch, capsys):
    import errno

    from finetune.train import session

    recipe = write_recipe(tmp_path, tiny_folder, save_steps=2)
    real, calls = session.save_hf, []

    def full(model, folder: Path, **options):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        real(model, folder, **options)

    monkeypatch.setattr(session, "save_hf", full)
    assert finetune("train", recipe) == 1
    assert "make room" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    assert finetune("train", recipe) == 0
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_a_model_that_cannot_be_told_to_be_this_runs_is_never_deleted(tmp_path, tiny_folder, capsys):
    recipe = write_recipe(tmp_path, tiny_folder)
    assert finetune("train", recipe) == 0
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints")
    assert finetune("train", recipe) == 2
    assert "holds a finished run" in capsys.readouterr().err
    (run / "manifest.json").unlink()
    assert finetune("train", recipe, "training.resume_from_checkpoint=never") == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert (run / "final" / "model.safetensors").exists()


def test_never_starts_over(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder, save_steps=2)
    assert finetune("train", recipe) == 0
    assert finetune("train", recipe, "training.resume_from_checkpoint=never", "training.max_steps=3") == 0
    assert [row["step"] for row in steps(tmp_path / "run")] == [1, 2, 3]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-2", "step-3"]


@pytest.mark.parametrize("place", ["checkpoint", "run", "base", "reference"])
def test_a_new_run_never_deletes_the_model_that_it_starts_from(tmp_path, tiny_folder, capsys, place):
    run, recipe = tmp_path / "run", write_recipe(tmp_path, tiny_folder, max_steps=1)
    assert finetune("train", recipe) == 0
    checkpoint = run / "checkpoints" / "step-1"
    values = [f"model.path={run if place == 'run' else checkpoint}"]
    if place == "base":
        adapter = tmp_path / "adapter"
        assert finetune("train", recipe, *values, "lora={rank: 2}", f"training.output_dir={adapter}") == 0
        values = [f"model.path={adapter}", "lora={rank: 2}"]
    elif place == "reference":
        pairs = tmp_path / "pairs.jsonl"
        pairs.write_text('{"prompt": "say one", "chosen": "one", "rejected": "two"}\n' * 8)
        values = ["method=dpo", f"data.train={pairs}", f"dpo.reference={checkpoint}"]
    capsys.readouterr()
    assert finetune("train", recipe, *values, "training.resume_from_checkpoint=never") == 2
    said = capsys.readouterr().err
    assert "which a new run in" in said and "Choose another training.output_dir" in said
    assert (checkpoint / "complete.json").exists() and (run / "final" / "model.safetensors").exists()


def test_early_stopping_is_an_end_that_the_next_run_recognises(tmp_path, tiny_folder, capsys):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=200, learning_rate=2e-2, lr_scheduler_type="constant")
    command = [
        "train", recipe, "data.eval_fraction=0.3", "training.eval_steps=2", "training.early_stopping_patience=2",
    ]  # fmt: skip
    assert finetune(*command) == 0
    run = tmp_path / "run"
    last = steps(run)[-1]["step"]
    assert last < 200
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{last}"]
    model, rows = (run / "final" / "model.safetensors").read_bytes(), metrics(run)
    capsys.readouterr()
    assert finetune(*command) == 0
    assert f"finished: {last} of 200 steps" in " ".join(capsys.readouterr().err.split())
    shutil.rmtree(run / "final")  # as if it had been killed before it wrote the final model
    assert finetune(*command) == 0
    assert (run / "final" / "model.safetensors").read_bytes() == model
    assert metrics(run) == rows
    assert finetune(*command[:-1], "training.early_stopping_patience=3") == 0
    assert steps(run)[-1]["step"] > last


def evaluated(tmp_path: Path, tiny_folder: Path, *more: str) -> list:
    """A command whose first evaluations are its best, and which keeps the newest checkpoint only."""
    recipe = write_recipe(
        tmp_path, tiny_folder, max_steps=40, learning_rate=2e-2, lr_scheduler_type="constant", save_total_limit=1
    )
    held_out = write_rows(tmp_path / "eval.jsonl", 6, seed=1)
    return ["train", recipe, f"data.eval={held_out}", "training.eval_steps=4", "training.save_steps=4", *more]


def test_a_best_model_that_was_not_kept_is_forgotten_when_it_is_asked_for(tmp_path, tiny_folder, capsys):
    command, run = evaluated(tmp_path, tiny_folder), tmp_path / "run"
    assert finetune(*command) == 0
    last = (run / "final" / "model.safetensors").read_bytes()
    best = json.loads((run / "manifest.json").read_text())["best"]["step"]
    assert best < 40 and not (run / "checkpoints" / f"step-{best}").exists()
    capsys.readouterr()
    assert finetune(*command, "training.load_best_model_at_end=true") == 0
    said = capsys.readouterr().err
    assert "the best evaluation so far does not count" in " ".join(said.split()) and "Finished" in said
    assert json.loads((run / "manifest.json").read_text())["best"] is None
    assert (run / "final" / "model.safetensors").read_bytes() == last
    assert finetune(*command, "training.load_best_model_at_end=true") == 0
    assert "finished: 40 of 40 steps" in " ".join(capsys.readouterr().err.split())


def test_the_final_model_follows_load_best_model_at_end(tmp_path, tiny_folder, capsys):
    command, run = evaluated(tmp_path, tiny_folder, "training.load_best_model_at_end=true"), tmp_path / "run"
    assert finetune(*command) == 0
    assert finetune(*command, "training.load_best_model_at_end=false") == 0
    last = run / "checkpoints" / "step-40" / "model" / "model.safetensors"
    assert (run / "final" / "model.safetensors").read_bytes() == last.read_bytes()


def test_a_best_loss_of_other_evaluation_rows_is_forgotten(tmp_path, tiny_folder):
    command, run = evaluated(tmp_path, tiny_folder, "training.load_best_model_at_end=true"), tmp_path / "run"
    assert finetune(*command) == 0
    best = json.loads((run / "manifest.json").read_text())["best"]["step"]
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-40")
    write_rows(tmp_path / "eval.jsonl", 6, seed=2)
    assert finetune(*command) == 0
    found = json.loads((run / "manifest.json").read_text())["best"]
    assert found["step"] > best
    assert found["eval_loss"] == min(
        row["eval_loss"] for row in metrics(run) if "eval_loss" in row and row["step"] > best
    )


def test_the_lock_names_nobody_once_the_run_has_ended(tmp_path, tiny_folder):
    assert finetune("train", write_recipe(tmp_path, tiny_folder, max_steps=1)) == 0
    assert (tmp_path / "run" / ".lock").read_bytes() == b""
    assert "training.output_dir=NEW_FOLDER" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_one_row_is_trained_on_although_a_share_was_to_be_evaluated_on(tmp_path, tiny_folder, capfd):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=1)
    write_rows(tmp_path / "train.jsonl", 1)
    assert finetune("train", recipe, "data.eval_fraction=0.1") == 0
    notes = json.loads((tmp_path / "run" / "manifest.json").read_text())["data"]["train"]["notes"]
    assert notes == ["1 row is trained on and not evaluated: data.eval_fraction takes effect from 2 rows on."]
    best = ("training.load_best_model_at_end=true", "training.resume_from_checkpoint=never")
    assert finetune("train", recipe, "data.eval_fraction=0.1", *best) == 2
    assert "1 row cannot be split" in capfd.readouterr().err


def test_what_is_cut_is_counted_for_each_part(tmp_path, tiny_folder):
    """Each part's own rows, held against what `preview` shows of all of them uncut."""
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=1)
    assert finetune("train", recipe, "data.eval_fraction=0.4", "data.max_length=60") == 0
    data = json.loads((tmp_path / "run" / "manifest.json").read_text())["data"]
    tokenizer = Tokenizer.from_folder(tiny_folder)
    settings = load_recipe(recipe).data
    rows, _ = build_dataset(settings.train, tokenizer, data=settings, method="sft")
    kept, held_out = split_dataset(rows, 0.4, 42)
    for part, dataset in (("train", kept), ("eval", held_out)):
        assert data[part]["truncated"] == sum(dataset.lengths > 60) > 0
        assert data[part]["read"] == data[part]["kept"] == len(dataset)
        assert f"{data[part]['truncated']} row" in data[part]["notes"][0]
