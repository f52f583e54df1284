"""Preference training: the two layouts, the references, the step's means, and runs from start to end."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from finetune.model.runtime import paddle as bring_up
from tests.runs import WORDS, finetune, metrics, steps

paddle = bring_up()

from finetune.chat.tokenizer import Tokenizer
from finetune.compute.layout import lay_out_pairs, lay_out_samples
from finetune.compute.losses import LOSSES
from finetune.model.adapters import LoraSettings
from finetune.model.load import load_model
from finetune.model.lora import add_lora
from finetune.recipe.load import load_recipe
from finetune.rows.dataset import build_dataset
from finetune.train.optimizer import trainable_parameters
from finetune.train.preference.pairs import PairBatch, PairBatcher
from finetune.train.preference.reference import CachedReference
from finetune.train.preference.task import DpoTask
from finetune.train.processes.parallel import World

LORA = "lora={rank: 4, alpha: 8}"
TUNINGS = {"full": "lora=null", "lora": LORA, "pissa": "lora={rank: 4, alpha: 8, variant: pissa}"}
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
COMPARED = ("loss", "grad_norm", "logps/chosen", "logps/rejected", *REWARDS)


def write_pairs(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Two-turn and one-turn prompts; the chosen answer reverses the words, the rejected one makes some up."""
    draw = random.Random(seed)
    lines = []
    for index in range(count):
        words = draw.choices(WORDS, k=draw.randint(1, 8))
        prompt = [{"role": "user", "content": "say " + " ".join(words)}]
        if index % 3 == 0:
            prompt = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}, *prompt]
        rejected = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
        lines.append(json.dumps({"prompt": prompt, "chosen": " ".join(reversed(words)), "rejected": rejected}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_recipe(folder: Path, model: Path, **training) -> Path:
    values = {
        "output_dir": str(folder / "run"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_steps": 100,
    } | training
    recipe = {
        "method": "dpo",
        "model": {"path": str(model)},
        "data": {"train": [{"path": str(write_pairs(folder / "pairs.jsonl"))}], "max_length": 128},
        "training": values,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def train(recipe: Path, run: Path, *overrides: str) -> list[dict]:
    assert finetune("train", recipe, f"training.output_dir={run}", *overrides) == 0
    return steps(run)


def column(rows: list[dict], *names: str) -> list[float]:
    return [row[name] for row in rows for name in names]


def pairs_of(recipe: Path):
    recipe = load_recipe(recipe)
    tokenizer = Tokenizer.from_folder(recipe.model.path)
    dataset, _ = build_dataset(recipe.data.train, tokenizer, data=recipe.data, method="dpo")
    return dataset, tokenizer, recipe.dpo


# -- one micro-batch -------------------------------------------------------------------------------------------


def loss_and_gradients(model, section, batcher, batches: list[PairBatch]):
    task = DpoTask(model, batcher, section, CachedReference(np.full((len(batcher.dataset), 2), -60.0)))
    model.train()
    task.begin_step(batches, World())
    total, sums = 0.0, {}
    for batch in batches:
        loss, parts = task.loss(batch, sum(task.weight(b) for b in batches))
        loss.backward()
        total += float(loss)
        sums = {name: sums.get(name, 0.0) + value for name, value in parts.items()}
    gradients = {name: p.grad.numpy().copy() for name, p in trainable_parameters(model).items() if p.grad is not None}
    model.clear_gradients()
    return total, sums, gradients


def assert_same(one, other, relative=1e-5):
    assert other[0] == pytest.approx(one[0], rel=relative)
    assert other[1] == pytest.approx(one[1], rel=relative)
    assert one[2].keys() == other[2].keys()
    for name, gradient in one[2].items():
        scale = max(np.abs(gradient).max(), 1e-6)
        np.testing.assert_allclose(other[2][name], gradient, atol=relative * scale, err_msg=name)


@pytest.fixture(params=["full", "lora"])
def setting(request, tmp_path, tiny_folder):
    dataset, tokenizer, section = pairs_of(write_recipe(tmp_path, tiny_folder))
    model = load_model(tiny_folder, training=True).model
    if request.param == "lora":
        model = add_lora(model, LoraSettings(rank=4, alpha=8.0), seed=0)
        draw = np.random.default_rng(0)
        for parameter in trainable_parameters(model).values():
            parameter.set_value(paddle.to_tensor(draw.normal(0, 0.1, parameter.shape).astype("float32")))
    return model, section.model_copy(update={"sft_loss_ratio": 0.3}), dataset


def parts_of(pair):
    prompt = len(pair.prompt_ids)
    ends = [int(np.flatnonzero(side.labels >= 0)[-1]) + 1 for side in (pair.chosen, pair.rejected)]
    sides = [(s.input_ids[prompt:end], s.labels[prompt:end]) for s, end in zip((pair.chosen, pair.rejected), ends)]
    return pair.prompt_ids, *sides


def test_shared_prompt_equals_separate_sequences(setting):
    model, section, dataset = setting
    batcher = PairBatcher(dataset, [[i] for i in range(len(dataset))])
    parts, indices = [parts_of(dataset[i]) for i in range(8)], np.arange(8)

    def run(layout):
        return loss_and_gradients(model, section, batcher, [PairBatch(layout, indices)])

    separate = [
        (np.concatenate([prompt, ids]), np.concatenate([np.full(len(prompt), -100), labels]))
        for prompt, *responses in parts
        for ids, labels in responses
    ]
    assert_same(run(lay_out_samples(separate)), run(lay_out_pairs(parts)))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_eight_pairs_at_once_equal_eight_accumulated(setting, loss_type):
    model, section, dataset = setting
    section = section.model_copy(update={"loss_type": loss_type, "simpo_gamma": 0.5, "dpop_lambda": 5.0})
    batcher = PairBatcher(dataset, [[i] for i in range(len(dataset))])
    whole = loss_and_gradients(model, section, batcher, [batcher.batch(list(range(8)))])
    parts = loss_and_gradients(model, section, batcher, [batcher.batch([i]) for i in range(8)])
    assert_same(whole, parts)


def test_only_response_tokens_are_scored(setting):
    _, _, dataset = setting
    batcher = PairBatcher(dataset, [[i] for i in range(len(dataset))])
    layout = batcher.batch([0]).layout
    pair = dataset[0]
    scored = np.concatenate([side.labels[side.labels >= 0] for side in (pair.chosen, pair.rejected)])
    np.testing.assert_array_equal(layout.targets, scored)


# -- runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("precompute", ["true", "false"])
def test_the_first_step_is_ln_2(tmp_path, tiny_folder, tuning, precompute):
    recipe = write_recipe(tmp_path, tiny_folder)
    rows = train(recipe, tmp_path / "run", TUNINGS[tuning], f"dpo.precompute_ref_log_probs={precompute}")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert max(abs(rows[0][name]) for name in REWARDS) < 1e-6
    assert rows[-1]["rewards/margins"] > 0


@pytest.mark.parametrize("tuning", TUNINGS)
def test_cached_equals_live(tmp_path, tiny_folder, tuning):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=9)  # one and a half epochs
    cached = train(recipe, tmp_path / "cached", TUNINGS[tuning])
    live = train(recipe, tmp_path / "live", TUNINGS[tuning], "dpo.precompute_ref_log_probs=false")
    assert column(live, "loss", "grad_norm") == pytest.approx(column(cached, "loss", "grad_norm"), rel=1e-5)
    assert column(live, *REWARDS) == pytest.approx(column(cached, *REWARDS), rel=1e-5, abs=1e-6)
    assert len(list((tmp_path / "cached" / "reference").glob("*.safetensors"))) == 1
    assert not (tmp_path / "live" / "reference").exists()


def test_packed_equals_unpacked(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder, shuffle=False, per_device_train_batch_size=24)
    apart = train(recipe, tmp_path / "apart")
    packed = train(recipe, tmp_path / "packed", "data.packing=true")
    assert column(packed, "loss", "grad_norm") == pytest.approx(column(apart, "loss", "grad_norm"), rel=1e-5)


def test_two_processes_equal_one(tmp_path, tiny_folder):
    """With kto_pair, which needs a mean over all ranks before the loss."""
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=4)
    options = "dpo.loss_type=kto_pair", "data.eval_fraction=0.3"
    one = train(recipe, tmp_path / "one", *options, "training.per_device_train_batch_size=8")
    split = "training.per_device_train_batch_size=4", "--nproc", "2"
    two = train(recipe, tmp_path / "two", *options, *split)
    assert column(two, *COMPARED) == pytest.approx(column(one, *COMPARED), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path, tiny_folder, tuning):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=8, save_steps=3)
    options = [TUNINGS[tuning], "data.eval_fraction=0.2", "training.lr_scheduler_type=constant"]
    whole = train(recipe, tmp_path / "whole", *options)
    for name, keep_cache in (("cache", True), ("no-cache", False)):
        run = tmp_path / name
        train(recipe, run, *options, "training.max_steps=3")
        if not keep_cache:
            shutil.rmtree(run / "reference")
        again = train(recipe, run, *options)
        exact = column(again, *COMPARED) == column(whole, *COMPARED)
        # Without the cache, a full run's reference is loaded from model.path again and pissa's is residual + start
        assert exact or column(again, *COMPARED) == pytest.approx(column(whole, *COMPARED), rel=1e-5, abs=1e-6)
        assert exact or not keep_cache


def test_reference_is_the_adapter_as_it_was_when_training_goes_on(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=6, save_steps=2, learning_rate=1e-2)
    first = train(recipe, tmp_path / "first", LORA)
    assert first[-1]["rewards/margins"] > 0.01
    on = [LORA, f"model.path={tmp_path / 'first'}", "training.lr_scheduler_type=constant"]
    cached = train(recipe, tmp_path / "cached", *on)
    assert cached[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    live = train(recipe, tmp_path / "live", *on, "dpo.precompute_ref_log_probs=false")
    assert column(live, *COMPARED) == pytest.approx(column(cached, *COMPARED), rel=1e-5, abs=1e-6)
    # and after a resume it is still that adapter, not the checkpoint's
    run = tmp_path / "resumed"
    train(recipe, run, *on, "dpo.precompute_ref_log_probs=false", "training.max_steps=4")
    resumed = train(recipe, run, *on, "dpo.precompute_ref_log_probs=false")
    assert column(resumed, *COMPARED) == column(live, *COMPARED)


def test_another_model_as_reference(tmp_path, tiny_folder, tiny_untied_folder):
    recipe = write_recipe(tmp_path, tiny_folder)
    own = train(recipe, tmp_path / "own", "dpo.precompute_ref_log_probs=false")
    same = train(recipe, tmp_path / "same", f"dpo.reference={tiny_folder}")
    assert column(same, *COMPARED) == pytest.approx(column(own, *COMPARED), rel=1e-5, abs=1e-6)
    other = train(recipe, tmp_path / "other", f"dpo.reference={tiny_untied_folder}")
    assert abs(other[0]["loss"] - math.log(2)) > 1e-3
    live = train(
        recipe, tmp_path / "live", f"dpo.reference={tiny_untied_folder}", "dpo.precompute_ref_log_probs=false", LORA
    )
    assert live[0]["loss"] == pytest.approx(other[0]["loss"], rel=1e-5)


def test_a_reference_with_another_vocabulary_is_refused(tmp_path, tiny_folder, capfd):
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    token, rank = next((t, r) for t, r in tokenizer["model"]["vocab"].items() if r == 350)
    del tokenizer["model"]["vocab"][token]
    tokenizer["model"]["vocab"]["zzzz"] = rank
    tokenizer["model"]["merges"] = [m for m in tokenizer["model"]["merges"] if "".join(m) != token and token not in m]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = write_recipe(tmp_path, tiny_folder)
    assert finetune("train", recipe, f"dpo.reference={other}") == 2
    assert "another vocabulary" in capfd.readouterr().err


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_losses_without_reference_load_none(tmp_path, tiny_folder, loss, monkeypatch):
    from finetune.train.preference import reference

    monkeypatch.setattr(reference, "_open_live", None)
    rows = train(write_recipe(tmp_path, tiny_folder), tmp_path / "run", f"dpo.loss_type={loss}")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert not (tmp_path / "run" / "reference").exists()


def test_reference_free_takes_zeros(tmp_path, tiny_folder):
    rows = train(write_recipe(tmp_path, tiny_folder), tmp_path / "run", "dpo.reference_free=true")
    assert rows[0]["rewards/chosen"] == pytest.approx(0.1 * rows[0]["logps/chosen"], rel=1e-6)


def test_evaluation_and_best_checkpoint(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=6, eval_steps=2, save_steps=2, load_best_model_at_end=True)
    train(recipe, tmp_path / "run", "data.eval_fraction=0.25", LORA)
    evaluations = [row for row in metrics(tmp_path / "run") if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [2, 4, 6]
    assert {f"eval_{name}" for name in DpoTask.metric_names} <= set(evaluations[0])
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").exists()


def test_the_cache_is_used_again_and_never_trusted_blindly(tmp_path, tiny_folder, monkeypatch, capfd):
    from finetune.train.preference import reference

    recipe, run = write_recipe(tmp_path, tiny_folder), tmp_path / "run"
    opened = []
    really = reference._open_live
    monkeypatch.setattr(reference, "_open_live", lambda *given: opened.append(1) or really(*given))
    anew = "training.resume_from_checkpoint=never"
    first = train(recipe, run, anew)
    assert len(opened) == 1
    assert column(train(recipe, run, anew), *COMPARED) == column(first, *COMPARED)
    assert len(opened) == 1, "the cache was there"
    tensors = next((run / "reference").glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:50])
    capfd.readouterr()
    assert column(train(recipe, run, anew), *COMPARED) == column(first, *COMPARED)
    assert len(opened) == 2
    assert "computed again" in capfd.readouterr().err
    # Another template makes another text, other data other pairs: the key changes
    train(recipe, run, anew, "data.max_length=60")
    assert len(opened) == 3
    assert len(list((run / "reference").glob("*.safetensors"))) == 2


def test_only_pairs_that_the_run_reaches_are_scored(tmp_path, tiny_folder):
    from safetensors.numpy import load_file

    run = tmp_path / "run"
    train(write_recipe(tmp_path, tiny_folder, max_steps=2), run, "training.resume_from_checkpoint=never")
    known = load_file(next((run / "reference").glob("*.safetensors")))
    assert np.isfinite(known["chosen"]).sum() == 8
    assert len(known["chosen"]) == 24


def test_the_bar_and_the_evaluation_say_accuracy_and_margin(tmp_path, tiny_folder, capfd):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=2, eval_steps=2)
    train(recipe, tmp_path / "run", "data.eval_fraction=0.25", LORA)
    lines = capfd.readouterr().err.splitlines()
    shown = {word: next(line for line in lines if line.startswith(word)) for word in ("train 2/2", "evaluate")}
    assert re.match(r"train 2/2  loss \S+  accuracy \S+  margin \S+  ", shown["train 2/2"])
    assert re.match(r"evaluate \S+  step 2  eval loss \S+  accuracy \S+  margin \S+  ", shown["evaluate"])
