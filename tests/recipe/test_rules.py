"""Rules over several keys: each broken once, with the key and the fix it names, and its allowed neighbour."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.errors import ArgumentError, RecipeError
from finetune.recipe.load import load_recipe
from finetune.recipe.rules import check_world_size

BASE = "method: sft\nmodel: {path: base}\ndata: {train: [{path: rows.jsonl}]}\n"


@pytest.fixture(autouse=True)
def in_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(BASE)


def load(overrides: str):
    return load_recipe("r.yaml", overrides.split())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("dpo.beta=0.2", "dpo is set, but method is sft"),
        ("method=dpo data.train_on=all", "data.train_on is all"),
        ("lora.target_modules=[q_prj]", "Did you mean q_proj?"),
        ("lora.target_modules=[q_proj,q_proj]", "twice"),
        ("lora.target_modules=all_linear", "Did you mean all-linear?"),
        ("lora.variant=pissa model.quantization=int8", "lora.variant is pissa, which changes the base's weights, but"),
        ("lora.variant=pissa lora.dropout=0.1", "lora.dropout is 0.1, but pissa"),
        ("lora.variant=lora lora.loraplus_lr_ratio=4", "loraplus_lr_ratio is set"),
        ("data.eval=a data.eval_fraction=0.1", "both set"),
        (
            'data.train.0.columns={"instructoin":"a"}',
            "has instructoin, which rows of format auto do not have. Did you mean",
        ),
        (
            'data.train.0.columns={"output":"a"} data.train.0.format=text',
            "has output, which rows of format text do not have",
        ),
        ('data.train.0.columns={"question":"query","a":"response"}', "comes first: {query: question, response: a}."),
        ('data.train.0.columns={"messages":"a","output":"b"}', "has keys that no form has together"),
        ("training.max_steps=3 training.num_train_epochs=1", "both set"),
        ("training.warmup_steps=3 training.warmup_ratio=0.1", "both above 0"),
        ("training.lr_scheduler_type=constant training.warmup_steps=3", "constant_with_warmup"),
        ("training.lr_scheduler_type=constant training.warmup_ratio=0.1", "constant_with_warmup"),
        ("training.lr_scheduler_type=cosine_with_min_lr", "min_lr_ratio is not set"),
        ("training.min_lr_ratio=0.1", "cosine, which does not use it"),
        ("training.eval_steps=5", "nothing to evaluate on"),
        ("training.load_best_model_at_end=true", "nothing to evaluate on"),
        ("training.early_stopping_patience=2", "nothing to evaluate on"),
        (
            "data.eval=a training.load_best_model_at_end=true training.save_steps=5 training.eval_steps=2",
            "not a multiple",
        ),
        ("method=dpo dpo.loss_type=hinge dpo.label_smoothing=0.1", "hinge does not use it"),
        ("method=dpo dpo.simpo_gamma=0.5", "sigmoid does not use it"),
        ("method=dpo dpo.dpop_lambda=5", "sigmoid does not use it"),
        ("method=dpo dpo.loss_type=orpo dpo.sft_loss_ratio=1", "orpo already contains"),
        ("method=dpo dpo.loss_type=simpo dpo.reference_free=false", "simpo has no reference model"),
        ("method=dpo dpo.loss_type=orpo dpo.reference=other", "orpo has no reference model"),
        ("method=dpo dpo.loss_type=simpo dpo.precompute_ref_log_probs=true", "precompute_ref_log_probs is true"),
        ("method=dpo dpo.reference_free=true dpo.precompute_ref_log_probs=true", "reference_free is true"),
        ("method=dpo dpo.reference_free=true dpo.reference=other", "reference_free is true"),
        ("method=dpo dpo.loss_type=dpop dpo.reference_free=true", "dpop needs a reference"),
        ("distributed.sharding=stage2 distributed.sharding_parallel_degree=1", "nothing is sharded"),
        ("distributed.sharding_parallel_degree=2", "distributed.sharding is not set"),
        ("distributed.sharding_parallel_degree=0", "-1 for all"),
    ],
)
def test_broken_rules_are_one_fault_each(overrides, words):
    with pytest.raises(RecipeError) as error:
        load(overrides)
    assert len(error.value.faults) == 1
    assert words in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        "method=dpo data.packing=true",
        "method=dpo dpo.label_smoothing=0.1",
        "method=dpo dpo.loss_type=hinge dpo.label_smoothing=0.0",
        "method=dpo dpo.loss_type=simpo dpo.simpo_gamma=1.5 dpo.beta=2",
        "method=dpo dpo.loss_type=dpop dpo.dpop_lambda=5",
        "method=dpo dpo.loss_type=orpo",
        "method=dpo dpo.reference=other",
        "method=dpo dpo.reference_free=true",
        "method=dpo dpo.precompute_ref_log_probs=false",
        "method=dpo dpo.sft_loss_ratio=0.5",
        "lora.variant=pissa",
        "lora.variant=rslora lora.dropout=0.1",
        "lora.variant=dora model.quantization=nf4",
        "lora.variant=lora_plus lora.loraplus_lr_ratio=4",
        "lora.target_modules=[q_proj,down_proj]",
        "training.lr_scheduler_type=constant",
        "training.lr_scheduler_type=cosine_with_min_lr training.min_lr_ratio=0.1",
        "data.eval_fraction=0.1 training.load_best_model_at_end=true training.early_stopping_patience=2",
        "data.eval=a training.eval_steps=3",
        "distributed.sharding=stage1 distributed.sharding_parallel_degree=2",
        "distributed.sharding=stage3",
    ],
)
def test_neighbours_of_the_rules_are_fine(overrides):
    load(overrides)


@pytest.mark.parametrize(("method", "format"), [("sft", "preference"), ("dpo", "alpaca"), ("dpo", "messages")])
def test_formats_fit_the_method(method, format):
    with pytest.raises(RecipeError, match=rf"data.eval\[0\].format is {format}, but method is {method}"):
        load_recipe("r.yaml", [f"method={method}", f"data.eval=[{{path: a, format: {format}}}]"])


def test_world_size():
    recipe = load("distributed.tensor_parallel_degree=2 distributed.pipeline_parallel_degree=2")
    check_world_size(recipe, 4)
    check_world_size(recipe, 8)
    with pytest.raises(ArgumentError, match="multiple of 4 processes, but there are 6"):
        check_world_size(recipe, 6)
    check_world_size(load("distributed.sharding=stage1"), 3)
