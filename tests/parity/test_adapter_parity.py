"""Adapters of every kind that PEFT writes, and ours of the same kinds, against PEFT.

Runs where FINETUNE_REFERENCE_PYTHON names a Python with torch, transformers and peft. tests/model/test_adapter_kinds.py
has the same kinds against a closed form.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from finetune.export.export import export
from finetune.model.adapters import LoraSettings
from tests.model.compute import difference, logits, prompts
from tests.tiny import Shape, tiny_model

PYTHON = os.environ.get("FINETUNE_REFERENCE_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="FINETUNE_REFERENCE_PYTHON names no Python with torch and peft")
SCRIPT = Path(__file__).with_name("ref_model.py")
SHAPE = Shape(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2)
IDS = prompts(rows=4, length=48)
KINDS = {
    "patterns": {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
                 "alpha_pattern": {"down_proj": 3}},
    "one by its whole name": {"target_modules": ["q_proj"],
                              "rank_pattern": {"^model.layers.2.self_attn.q_proj": 3, "^layers.1.self_attn.q_proj": 2}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding, tied by PEFT": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "both": {"target_modules": ["lm_head", "embed_tokens", "v_proj"], "use_rslora": True},
    "saved": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved embedding": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    "saved, tied by PEFT": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"],
                            "ensure_weight_tying": True},
    "norms": {"target_modules": ["v_proj"], "modules_to_save": ["norm"]},
    "a projection": {"target_modules": ["v_proj"], "modules_to_save": ["up_proj"]},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "dora of the ends": {"target_modules": ["embed_tokens", "q_proj", "lm_head"], "use_dora": True, "use_rslora": True},
    "all biases": {"target_modules": ["v_proj", "up_proj"], "bias": "all"},
    "biases": {"target_modules": ["v_proj", "up_proj"], "bias": "lora_only"},
}  # fmt: skip
OURS = {
    "dora": LoraSettings(rank=4, alpha=8, variant="dora"),
    "ends": LoraSettings(rank=4, alpha=8, target_modules=("embed_tokens", "lm_head", "q_proj")),
    "dora of the ends": LoraSettings(rank=4, target_modules=("embed_tokens", "lm_head"), variant="dora"),
    "saved": LoraSettings(rank=4, modules_to_save=("embed_tokens", "lm_head"), target_modules=("v_proj",)),
    "pissa of the ends": LoraSettings(rank=4, target_modules=("embed_tokens", "lm_head"), variant="pissa"),
}


def reference(folder: Path, steps: list[dict]) -> list[np.ndarray | None]:
    """What the steps wrote; the file names are theirs."""
    np.save(folder / "ids.npy", IDS)
    (folder / "job.json").write_text(json.dumps({"steps": [{"ids": str(folder / "ids.npy")} | step for step in steps]}))
    done = subprocess.run([PYTHON, SCRIPT, folder / "job.json"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return [np.load(step["output"]) for step in steps if step["do"] == "logits"]


def ours(folder: Path) -> np.ndarray:
    from finetune.model.load import load_model

    return logits(load_model(folder).model, IDS)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_peft_saved(tied, tmp_path):
    base = tiny_model(tmp_path / "base", shape=SHAPE, tied=tied)
    folders = {kind: tmp_path / str(number) for number, kind in enumerate(KINDS)}

    def told(what: str, folder: Path) -> dict:
        return {"do": what, "model": str(base), "adapter": str(folder), "output": f"{folder}.npy"}

    steps = []
    for kind, folder in folders.items():
        config = {"r": 4, "lora_alpha": 8} | KINDS[kind]
        steps += [{"do": "adapter", "model": str(base), "config": config, "seed": 3, "output": str(folder)}]
        steps += [told("logits", folder)]
    expected = dict(zip(folders, reference(tmp_path, steps)))
    again, merged = {}, {}
    for kind, folder in folders.items():
        assert difference(ours(folder), expected[kind]) < 1e-5, kind
        again[kind], merged[kind] = folder.with_name(f"{folder.name}p"), folder.with_name(f"{folder.name}m")
        export(folder, again[kind], format="peft", say=lambda line: None)
        export(folder, merged[kind], say=lambda line: None)
    in_peft = reference(tmp_path, [told("logits", folder) for folder in again.values()])
    whole = [{"do": "logits", "model": str(folder), "output": f"{folder}.npy"} for folder in merged.values()]
    for kind, left, right in zip(KINDS, in_peft, reference(tmp_path, whole)):
        assert difference(left, expected[kind]) < 1e-5, kind
        assert difference(right, expected[kind]) < 1e-5, kind


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_ours_in_peft(tied, tmp_path):
    from finetune.model.load import load_model
    from finetune.model.lora import add_lora
    from finetune.model.save import save_peft
    from finetune.model.tensors import as_numpy, set_parameter

    base, random = tiny_model(tmp_path / "base", shape=SHAPE, tied=tied), np.random.default_rng(0)
    expected = {}
    for number, (kind, settings) in enumerate(OURS.items()):
        model = add_lora(load_model(base, untied=True).model, settings)
        for parameter in model.parameters():
            if not parameter.stop_gradient:
                set_parameter(parameter, as_numpy(parameter) + 0.02 * random.standard_normal(parameter.shape))
        model.eval()
        save_peft(model, tmp_path / str(number), base=str(base))
        expected[kind] = logits(model, IDS)
    steps = [
        {"do": "logits", "model": str(base), "adapter": str(tmp_path / str(n)), "output": str(tmp_path / f"{n}.npy")}
        for n in range(len(OURS))
    ]
    for kind, found in zip(OURS, reference(tmp_path, steps)):
        assert difference(found, expected[kind]) < 1e-5, kind
