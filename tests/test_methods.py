"""The table of methods: what it names is there, and each method's parts fit together."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest

from finetune.methods import METHODS, methods_on
from finetune.recipe.schema import DataSection, Recipe


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_names_is_there(name):
    method = METHODS[name]
    assert list(inspect.signature(import_module(method.tasks).make_tasks).parameters) == ["ready"]
    assert method.section is None or method.section in Recipe.model_fields
    for train_on in method.train_on:
        assert DataSection(train=[{"path": "rows.jsonl"}], train_on=train_on)
    assert name in methods_on(method.rows)


def test_the_methods_of_the_contract():
    minimal = {"model": {"path": "base"}, "data": {"train": [{"path": "rows.jsonl"}]}}
    assert Recipe.model_validate({"method": "sft"} | minimal).dpo is None
    assert Recipe.model_validate({"method": "dpo"} | minimal).dpo.loss_type == "sigmoid"
    assert list(METHODS) == ["sft", "dpo"]
