"""What a run is told about cards, held against the estimate of the recipe that the advice makes."""

from __future__ import annotations

import pytest

from finetune.recipe.load import load_recipe
from finetune.recipe.shipped import find_recipe
from finetune.train.cards import CARDS, Load, least_change, smallest_card
from tests.runs import finetune, write_recipe
from tests.train.test_shipped import model_of

CASES = ("qwen2-0.5b_sft_full", "qwen2-1.5b-instruct_dpo_full", "qwen2-7b-instruct_sft_lora", "qwen2-7b_sft_full")


def load_of(name: str, *changes: str) -> Load:
    """A shipped recipe with rows as long as it allows, changed by the arguments of a command line."""
    recipe = load_recipe(find_recipe(name), list(changes))
    span = recipe.data.max_length * (2 if recipe.method == "dpo" else 1)
    rows = recipe.training.per_device_train_batch_size
    return Load(recipe, model_of(name), "bfloat16", tokens=span * rows, largest=span, length=span)


@pytest.mark.parametrize("name", CASES)
def test_the_change_is_enough_and_no_part_of_it_too_much(name):
    load = load_of(name)
    fits = smallest_card(load)
    smaller = [card for card in CARDS if fits is None or card < fits]
    assert smaller and any(least_change(load, card) for card in smaller)
    for card in smaller:
        change = least_change(load, card)
        if change is None:
            continue
        parts = change.split(" ")
        assert load_of(name, *parts).fits(card), (card, change)
        for part in parts:
            fewer = [other for other in parts if other != part]
            if part != "lora.rank=16" and not part.startswith("training.gradient_accumulation"):
                assert not load_of(name, *fewer).fits(card), (card, change, part)


def test_a_card_keeps_room_for_more_than_the_run():
    load = load_of("qwen2-7b-instruct_sft_lora")
    total = load.size().total
    assert smallest_card(load) == next(card for card in CARDS if total * 1.1 + 0.8e9 <= card * 1e9) == 24


def test_what_changes_least_comes_first():
    assert least_change(load_of("qwen2-0.5b_sft_full"), 16).startswith("training.per_device_train_batch_size=1")
    assert least_change(load_of("qwen2-0.5b_sft_full"), 12) == "training.recompute=true"
    assert least_change(load_of("qwen2-7b-instruct_sft_lora"), 16) == "model.quantization=nf4"
    assert least_change(load_of("qwen2-7b-instruct_sft_qlora"), 8) is None


def test_the_dry_run_says_it(tmp_path, tiny_folder, capsys):
    assert finetune("train", write_recipe(tmp_path, tiny_folder), "--dry-run") == 0
    assert "8 GB or more, in bfloat16" in capsys.readouterr().err
