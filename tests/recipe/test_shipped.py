"""Every recipe that comes with the package goes through the real parser, and says what it needs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from finetune.errors import ArgumentError, RecipeError
from finetune.recipe.load import dump_recipe, load_recipe
from finetune.recipe.shipped import SHIPPED, find_recipe, shipped_recipe, shipped_recipes, summary

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_the_set_is_whole():
    names = set(shipped_recipes())
    assert names == {file.stem for file in FILES}
    for size in ("0.5b", "1.5b", "7b"):
        for tuning in ("lora", "full"):
            wanted = {f"qwen2-{size}_sft_{tuning}", f"qwen2-{size}-instruct_sft_{tuning}"}
            assert wanted | {f"qwen2-{size}-instruct_dpo_{tuning}"} <= names
    for size in ("0.5b", "1.5b", "7b", "72b"):
        instruct = {f"qwen2-{size}-instruct_{method}_qlora" for method in ("sft", "dpo")}
        assert instruct | {f"qwen2-{size}_sft_qlora"} <= names
    assert {"quickstart_sft_lora", "quickstart_sft_full"} <= names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_recipe_is_valid_and_says_what_its_name_says(file, tmp_path):
    recipe = load_recipe(file)
    model, method, tuning = file.stem.split("_")
    assert recipe.method == method
    assert (recipe.lora is not None) == (tuning != "full")
    assert (recipe.model.quantization != "none") == (tuning == "qlora")
    if model.startswith("qwen2"):
        assert recipe.model.path.lower() == f"qwen/{model}"
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_header_states_memory_devices_and_command(file):
    header = "\n".join(line for line in file.read_text().splitlines() if line.startswith("#"))
    assert len(summary(file)) > 20 and len(summary(file)) < 115
    for words in ("Needs:", "GB", "estimated, not measured", "Command:", f"finetune train {file.stem}"):
        assert words in header
    assert re.search(r"GPU|CPU", header)
    assert max(map(len, file.read_text().splitlines())) <= 120


@pytest.mark.parametrize(("name", "count"), [("sft", 20), ("preference", 20)])
def test_example_rows(name, count):
    rows = [json.loads(line) for line in (SHIPPED / f"data/examples/{name}.jsonl").read_text().splitlines()]
    assert len(rows) == count
    keys = {"sft": {"messages"}, "preference": {"prompt", "chosen", "rejected"}}[name]
    assert all(keys <= set(row) for row in rows)
    if name == "preference":
        assert all(row["chosen"] != row["rejected"] for row in rows)


def test_names_and_files_are_found():
    assert find_recipe("qwen2-0.5b_sft_lora") == SHIPPED / "recipes/qwen2-0.5b_sft_lora.yaml"
    assert find_recipe(ROOT / "recipes/qwen2-0.5b_sft_lora.yaml").is_file()
    assert shipped_recipe("qwen2-0.5b_sft_lora.yaml").is_file()
    with pytest.raises(ArgumentError, match="Did you mean qwen2-7b_sft_lora"):
        shipped_recipe("qwen2-7b_sft_lroa")
    with pytest.raises(RecipeError, match="Did you mean qwen2-7b_sft_lora"):
        find_recipe("recipe/qwen2-7b_sft_lora.yaml")
