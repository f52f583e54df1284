"""Did-you-mean: what people and other tools call our keys leads to the key."""

from __future__ import annotations

import pytest

from finetune.recipe.names import _ALIASES, nearest_key, recipe_keys


@pytest.mark.parametrize(
    ("section", "key", "right"),
    [
        ("training", "learnig_rate", "training.learning_rate"),
        ("training", "Learning-Rate", "training.learning_rate"),
        ("", "learning_rate", "training.learning_rate"),
        ("", "lr", "training.learning_rate"),
        ("training", "lr", "training.learning_rate"),
        ("", "rank", "lora.rank"),
        ("training", "rank", "lora.rank"),
        ("lora", "r", "lora.rank"),
        ("", "lora_r", "lora.rank"),
        ("", "lora_alpha", "lora.alpha"),
        ("", "cutoff_len", "data.max_length"),
        ("", "num_epochs", "training.num_train_epochs"),
        ("", "batch_size", "training.per_device_train_batch_size"),
        ("", "model_name_or_path", "model.path"),
        ("model", "torch_dtype", "model.dtype"),
        ("", "gradient_checkpointing", "training.recompute"),
        ("dpo", "pref_loss", "dpo.loss_type"),
        ("", "trainng", "training"),
        ("", "datasets", "data.train"),
        ("data.train", "pth", "data.train.path"),
        ("distributed", "tensor_paralel_degree", "distributed.tensor_parallel_degree"),
        ("data", "packin", "data.packing"),
        ("", "zzzzzz", None),
        ("training", "x" * 100_000, None),
    ],
)
def test_nearest_key(section, key, right):
    assert nearest_key(section, key) == right


def test_every_alias_leads_to_a_key_and_shadows_none():
    keys = recipe_keys()
    for dotted, names in _ALIASES.items():
        section, _, key = dotted.rpartition(".")
        assert key in keys[section], dotted
        for name in names.split():
            assert nearest_key(section, name) == dotted, name
