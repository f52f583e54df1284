"""Model and adapter folders against transformers and PEFT, in both directions.

Runs where FINETUNE_REFERENCE_PYTHON (torch, transformers 5, peft) is set, and again for FINETUNE_REFERENCE_PYTHON_T4
(the same with transformers 4) where that is.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.export.export import export
from finetune.model.adapters import LoraSettings
from tests.model.compute import difference, logits, prompts, shake
from tests.tiny import Shape, tiny_model

PYTHONS = {
    "transformers5": os.environ.get("FINETUNE_REFERENCE_PYTHON"),
    "transformers4": os.environ.get("FINETUNE_REFERENCE_PYTHON_T4"),
}
pytestmark = pytest.mark.skipif(
    not any(PYTHONS.values()), reason="FINETUNE_REFERENCE_PYTHON names no Python with torch and transformers"
)
SCRIPT = Path(__file__).with_name("ref_model.py")
SHAPE = Shape(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2)
EVERY_MODULE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(params=[name for name, python in PYTHONS.items() if python])
def reference(request, tmp_path):
    """A function that runs steps in the reference environment and returns the arrays they wrote."""

    def run(*steps: dict) -> list[np.ndarray | None]:
        np.save(tmp_path / "ids.npy", prompts(rows=4, length=48))
        for number, step in enumerate(steps):
            step.setdefault("ids", str(tmp_path / "ids.npy"))
            step.setdefault("output", str(tmp_path / f"output{number}.npy"))
        (tmp_path / "job.json").write_text(json.dumps({"steps": steps}))
        command = [PYTHONS[request.param], SCRIPT, tmp_path / "job.json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        return [np.load(step["output"]) if step["output"].endswith(".npy") else None for step in steps]

    run.name = request.param
    return run


def ours(folder: Path) -> np.ndarray:
    from finetune.model.load import load_model

    return logits(load_model(folder).model, prompts(rows=4, length=48))


def test_logits_of_every_kind_of_folder(reference, tmp_path):
    kinds = [
        {"tied": tied, "dtype": dtype, "max_shard_bytes": shard, "rope": rope}
        for tied in (True, False)
        for dtype, shard, rope in (
            ("float32", None, "theta"),
            ("bfloat16", None, "theta"),
            ("float16", 60_000, "theta"),
            ("bfloat16", 60_000, "parameters"),
            ("float32", 60_000, "parameters"),
        )
    ]
    if reference.name == "transformers4":  # which does not know rope_parameters
        kinds = [kind for kind in kinds if kind["rope"] == "theta"]
    folders = [tiny_model(tmp_path / str(i), shape=SHAPE, seed=i, **kind) for i, kind in enumerate(kinds)]
    expected = reference(*({"do": "logits", "model": str(folder)} for folder in folders))
    differences = [difference(ours(folder), answer) for folder, answer in zip(folders, expected)]
    assert max(differences) < 1e-5, differences


def test_long_positions(reference, tmp_path):
    """The rotary table is grown beyond its first length; positions up to 5,000."""
    folder = tiny_model(tmp_path / "m", shape=Shape(max_position_embeddings=8192), rope_theta=1e6)
    np.save(tmp_path / "long.npy", prompts(rows=1, length=5000))
    answer = reference({"do": "logits", "model": str(folder), "ids": str(tmp_path / "long.npy")})[0]
    from finetune.model.load import load_model

    assert difference(logits(load_model(folder).model, prompts(rows=1, length=5000)), answer) < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_folders_that_transformers_saved(tied, reference, tmp_path):
    folder = tiny_model(tmp_path / "m", shape=SHAPE, tied=tied, rope_theta=5e5, tokenizer=False)
    save = {"do": "save", "model": str(folder)}
    saved = [
        save | {"dtype": dtype, "max_shard_size": size, "output": str(tmp_path / f"{dtype}{size}")}
        for dtype, size in (("float32", "5GB"), ("bfloat16", "40KB"), ("float16", "40KB"))
    ]
    again = [{"do": "logits", "model": step["output"], "output": f"{step['output']}.npy"} for step in saved]
    expected = reference(*saved, *again)[len(saved) :]
    differences = [difference(ours(Path(step["output"])), answer) for step, answer in zip(saved, expected)]
    assert max(differences) < 1e-5, differences


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_bit_equal_there_and_back(tied, dtype, reference, tmp_path):
    """Our export opened and saved by transformers, in shards, and read by us again."""
    folder = tiny_model(tmp_path / "m", shape=SHAPE, tied=tied, dtype=dtype)
    export(folder, tmp_path / "exported", say=lambda line: None)
    saved = str(tmp_path / "saved")
    reference(
        {"do": "save", "model": str(tmp_path / "exported"), "dtype": dtype, "max_shard_size": "60KB", "output": saved}
    )
    export(saved, tmp_path / "back", say=lambda line: None)
    stored, back = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert stored.keys() == back.keys()
    for name, weight in stored.items():
        assert back[name].dtype.name == dtype and back[name].tobytes() == weight.tobytes(), name


@pytest.mark.parametrize("variant, tied", [("lora", True), ("rslora", False), ("pissa", True)])
def test_our_adapter_in_peft_and_merged_in_transformers(variant, tied, reference, tmp_path):
    from finetune.model.load import load_model
    from finetune.model.lora import add_lora
    from finetune.model.save import save_peft

    folder = tiny_model(tmp_path / "m", shape=SHAPE, tied=tied)
    model = add_lora(load_model(folder).model, LoraSettings(rank=8, alpha=16, variant=variant), seed=1)
    shake(model, size=0.02)
    model.eval()
    expected = logits(model, prompts(rows=4, length=48))
    save_peft(model, tmp_path / "a", base=str(folder), tokenizer=folder)
    export(tmp_path / "a", tmp_path / "merged", say=lambda line: None)
    np.save(tmp_path / "prompts.npy", prompts(rows=20, length=16, seed=4))
    in_peft, merged, tokens, base_tokens = reference(
        {"do": "logits", "model": str(folder), "adapter": str(tmp_path / "a")},
        {"do": "logits", "model": str(tmp_path / "merged")},
        {"do": "greedy", "model": str(tmp_path / "merged"), "ids": str(tmp_path / "prompts.npy"), "new": 64},
        {"do": "greedy", "model": str(folder), "ids": str(tmp_path / "prompts.npy"), "new": 64},
    )
    assert difference(in_peft, expected) < 1e-5
    assert difference(merged, expected) < 1e-4
    assert np.array_equal(tokens, greedy(model, prompts(rows=20, length=16, seed=4), 64))
    assert not np.array_equal(tokens, base_tokens)


def greedy(model, ids: np.ndarray, new: int) -> np.ndarray:
    """The most likely tokens, each from a whole forward pass."""
    start = ids.shape[1]
    for _ in range(new):
        ids = np.concatenate([ids, logits(model, ids)[:, -1].argmax(-1)[:, None]], axis=1)
    return ids[:, start:]


@pytest.mark.parametrize(
    "config",
    [
        {"r": 8, "lora_alpha": 16, "target_modules": EVERY_MODULE},
        {"r": 4, "lora_alpha": 3, "target_modules": "all-linear", "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "target_modules": r".*layers\.[01]\..*(q|v)_proj", "lora_dropout": 0.1},
        {"r": 2, "lora_alpha": 8, "target_modules": ["up_proj"], "layers_to_transform": [1]},
    ],
    ids=["all", "rslora", "pattern", "one layer"],
)
def test_adapters_that_peft_saved(config, reference, tmp_path):
    folder = tiny_model(tmp_path / "m", shape=SHAPE)
    _, expected = reference(
        {"do": "adapter", "model": str(folder), "config": config, "seed": 3, "output": str(tmp_path / "a")},
        {"do": "logits", "model": str(folder), "adapter": str(tmp_path / "a")},
    )
    assert difference(ours(tmp_path / "a"), expected) < 1e-5
    export(tmp_path / "a", tmp_path / "again", format="peft", say=lambda line: None)
    left, right = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "again"))
    assert left.keys() == right.keys()
    assert all(np.array_equal(left[name], right[name]) for name in left)
    answer = reference({"do": "logits", "model": str(folder), "adapter": str(tmp_path / "again")})[0]
    assert difference(answer, expected) < 1e-6
