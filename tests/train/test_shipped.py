"""Every shipped recipe takes two steps, on a tiny model in place of the one it names."""

from __future__ import annotations

import re

import pytest

from docs.reference import MODELS
from finetune.model.family import Qwen2
from finetune.recipe.load import load_recipe
from finetune.recipe.shipped import shipped_recipes
from finetune.train.estimate import estimate
from tests.runs import finetune, steps

NAMES = [name for name in shipped_recipes() if not name.startswith("quickstart")]


@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name, tmp_path, tiny_folder):
    small = [
        f"model.path={tiny_folder}",
        "data.max_length=256",
        "training.max_steps=2",
        "training.per_device_train_batch_size=2",
        "training.gradient_accumulation_steps=2",
        f"training.output_dir={tmp_path / 'run'}",
    ]
    assert finetune("train", name, *small) == 0
    assert [row["step"] for row in steps(tmp_path / "run")] == [1, 2]
    adapter = load_recipe(name).lora is not None
    assert (tmp_path / "run" / "final" / "adapter_config.json").exists() == adapter


def model_of(name: str) -> Qwen2:
    """The model of a recipe of this name."""
    return MODELS[name.split("-")[1].split("_")[0]]


@pytest.mark.parametrize("name", NAMES)
def test_memory_in_the_header_is_the_estimate(name):
    config = model_of(name)
    header = " ".join(line.strip("# ") for line in shipped_recipes()[name].read_text().splitlines() if "#" in line[:1])
    recipe = load_recipe(name)
    span = recipe.data.max_length * (2 if recipe.method == "dpo" else 1)
    tokens = span * recipe.training.per_device_train_batch_size
    count, room = re.search(r"(one|four) GPUs? of (\d+) GB", header).groups()
    if recipe.distributed.sharding:
        told = re.search(r"About (\d+) GB each on four GPUs, (\d+) GB on eight, (\d+) GB on one", header).groups()
        asked = list(zip(["bfloat16"] * 3, map(int, told), (4, 8, 1)))
    else:
        asked = [("bfloat16", int(re.search(r"About (\d+) GB together", header)[1]), 1)]
    assert asked[0][1] < int(room) and asked[0][2] == {"one": 1, "four": 4}[count]
    if cpu := re.search(r"On CPU \(float32\) about (\d+) GB", header):
        asked.append(("float32", int(cpu[1]), 1))
    for dtype, told, shards in asked:
        size = estimate(recipe, config, dtype=dtype, tokens_per_micro_batch=tokens, length=span, shards=shards)
        found = size.total / 1e9
        assert abs(found - told) <= 0.5 + 0.02 * found, f"{dtype}: {told} GB in the header, {found:.1f} estimated"
