"""Runs that must give the same numbers because they are the same mathematics."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import finetune, steps, write_recipe


def losses_and_norms(run: Path) -> list[float]:
    return [row[key] for row in steps(run) for key in ("loss", "grad_norm")]


def final_digest(run: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((run / "final").glob("*.safetensors"))}


def train(recipe: Path, run: Path, *overrides: str) -> Path:
    assert finetune("train", recipe, f"training.output_dir={run}", *overrides) == 0
    return run


def test_eight_rows_at_once_equal_eight_accumulated(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder)
    whole = train(recipe, tmp_path / "whole", "training.per_device_train_batch_size=8")
    parts = "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=8"
    assert losses_and_norms(train(recipe, tmp_path / "parts", *parts)) == pytest.approx(
        losses_and_norms(whole), rel=1e-5
    )


def test_packed_equals_unpacked(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder, shuffle=False, per_device_train_batch_size=24)
    apart = train(recipe, tmp_path / "apart")
    packed = train(recipe, tmp_path / "packed", "data.packing=true")
    assert steps(packed)[0]["num_tokens"] == steps(apart)[0]["num_tokens"]
    assert losses_and_norms(packed) == pytest.approx(losses_and_norms(apart), rel=1e-5)


@pytest.mark.parametrize("lora", ["null", "{rank: 4, alpha: 8, dropout: 0.3}"])
def test_recompute_changes_nothing(tmp_path, tiny_folder, lora):
    recipe = write_recipe(tmp_path, tiny_folder)
    kept = train(recipe, tmp_path / "kept", f"lora={lora}")
    again = train(recipe, tmp_path / "again", f"lora={lora}", "training.recompute=true")
    assert losses_and_norms(again) == pytest.approx(losses_and_norms(kept), rel=1e-6)


def test_two_processes_equal_one(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder)
    one = train(recipe, tmp_path / "one", "training.per_device_train_batch_size=8")
    two = train(recipe, tmp_path / "two", "training.per_device_train_batch_size=4", "--nproc", "2")
    assert losses_and_norms(two) == pytest.approx(losses_and_norms(one), rel=1e-5)


VARIANTS = {
    "full": [],
    "packed": ["data.packing=true", "data.max_length=200"],
    "lora with dropout": ["lora={rank: 4, alpha: 8, dropout: 0.3}", "training.gradient_accumulation_steps=2"],
    "pissa": ["lora={rank: 4, alpha: 8, variant: pissa}"],
}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, tiny_folder, overrides):
    recipe = write_recipe(
        tmp_path, tiny_folder, max_steps=None, num_train_epochs=3, save_steps=2, per_device_train_batch_size=2
    )
    undisturbed = train(recipe, tmp_path / "undisturbed", *overrides)
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "finetune", "train", str(recipe), f"training.output_dir={killed}", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "step-2").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "final").exists()
    train(recipe, killed, *overrides)
    assert final_digest(killed) == final_digest(undisturbed)
    assert losses_and_norms(killed) == losses_and_norms(undisturbed)


def test_eight_bit_moments_resume_and_shard_to_the_same_bits(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder, optim="adamw_8bit", lr_scheduler_type="constant")
    whole = train(recipe, tmp_path / "whole")
    stopped = train(recipe, tmp_path / "stopped", "training.max_steps=2")
    assert final_digest(train(recipe, stopped)) == final_digest(whole)
    two = "training.per_device_train_batch_size=2", "--nproc", "2"
    apart = train(recipe, tmp_path / "apart", *two)
    assert final_digest(train(recipe, tmp_path / "split", *two, "distributed.sharding=stage1")) == final_digest(apart)
