"""Every shipped recipe takes two steps, on a tiny model in place of the one it names."""

from __future__ import annotations

import pytest

from finetune.recipe.load import load_recipe
from finetune.recipe.shipped import shipped_recipes
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
