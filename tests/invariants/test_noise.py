"""Runs with NEFTune's noise: the same bits after a stop, and evaluations that see none of it."""

from __future__ import annotations

import pytest

from tests.invariants.test_quantized import preference_rows
from tests.invariants.test_sft import final_digest, losses_and_norms, train
from tests.runs import metrics, write_recipe

NOISE = "training.neftune_noise_alpha=5"
LORA = "lora={rank: 4}"


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_stopped_run_goes_on_to_the_same_bits(method, tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder, lr_scheduler_type="constant")
    how = [LORA, NOISE, f"method={method}"]
    if method == "dpo":
        how += [f"data.train=[{{path: {preference_rows(tmp_path)}}}]", "dpo.precompute_ref_log_probs=false"]
    whole = train(recipe, tmp_path / "whole", *how)
    stopped = train(recipe, tmp_path / "stopped", *how, "training.max_steps=2")
    assert final_digest(train(recipe, stopped, *how)) == final_digest(whole)
    plain = train(recipe, tmp_path / "plain", *(change for change in how if change != NOISE))
    assert losses_and_norms(plain) != pytest.approx(losses_and_norms(whole), rel=1e-3)


def test_recompute_repeats_the_noise(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder)
    kept = train(recipe, tmp_path / "kept", NOISE)
    again = train(recipe, tmp_path / "again", NOISE, "training.recompute=true")
    assert losses_and_norms(again) == pytest.approx(losses_and_norms(kept), rel=1e-6)


def test_evaluation_sees_no_noise(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder)
    # So small a rate that both models stay as they are
    still = "training.max_steps=1", "training.learning_rate=1e-12", "data.eval_fraction=0.2"
    losses = [
        next(row["eval_loss"] for row in metrics(train(recipe, tmp_path / name, *still, *noise)) if "eval_loss" in row)
        for name, noise in (("plain", ()), ("noisy", (NOISE,)))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
