"""What the parity tests share: rows, adapters, jobs for the reference, and the comparison of two runs."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from finetune.model.adapter_config import peft_config
from finetune.model.adapters import LoraSettings
from finetune.report.metrics import read_metrics
from tests.tiny import Shape

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
REFERENCE_PYTHON = os.environ.get("FINETUNE_REFERENCE_PYTHON")
needs_reference = pytest.mark.skipif(
    not REFERENCE_PYTHON, reason="FINETUNE_REFERENCE_PYTHON names no python with trl (run `make parity`)"
)
# In multiples of 64: others bitsandbytes 0.50.2 dequantizes wrong on CPU, as if no block went over the end of a row.
SHAPE = Shape(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
LORA = LoraSettings(rank=4, alpha=8.0)
STEPS = 20
RELATIVE = 1e-4
RUN = {
    "max_length": 256,
    "max_steps": STEPS,
    "batch_size": 2,
    "accumulation": 1,
    "learning_rate": 1e-3,
    "scheduler": "cosine",
    "warmup_steps": 3,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "seed": 7,
}
_WORDS = "what is the sum of quick brown fox and lazy dog 12 30 42 please write 一个人 今天 天气很好 naïve 🙂".split()


def write_rows(path: Path, rows: list[dict]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def conversations(count: int, seed: int) -> list[dict]:
    """Rows {"messages"} of one to three turns, some with a system message, lengths far apart."""
    chance = random.Random(seed)
    rows = []
    for index in range(count):
        messages = [{"role": "system", "content": _text(chance, 2, 6)}] if index % 3 == 0 else []
        for _ in range(chance.randint(1, 3)):
            messages += [{"role": "user", "content": _text(chance, 2, 12)}]
            messages += [{"role": "assistant", "content": _text(chance, 1, 14)}]
        rows.append({"messages": messages})
    return rows


def preferences(count: int, seed: int) -> list[dict]:
    """Rows {"prompt", "chosen", "rejected"}, prompts of one or two turns."""
    rows = []
    chance = random.Random(seed + 1)
    for row in conversations(count, seed):
        messages = row["messages"]
        keep = 4 if messages[0]["role"] == "system" else 3
        prompt = messages[: min(keep, len(messages) - 1)]
        prompt = prompt if prompt[-1]["role"] == "user" else prompt[:-1]
        rows.append({"prompt": prompt, "chosen": _text(chance, 1, 16), "rejected": _text(chance, 1, 16)})
    return rows


def _text(chance: random.Random, least: int, most: int) -> str:
    return " ".join(chance.choice(_WORDS) for _ in range(chance.randint(least, most)))


def write_adapter(folder: Path, base: Path, *, started: bool) -> Path:
    """A PEFT adapter on every projection, A random; B zero, or (started) small and random."""
    chance = np.random.default_rng(3)
    head = SHAPE.hidden_size // SHAPE.num_attention_heads
    kv, hidden, ffn = head * SHAPE.num_key_value_heads, SHAPE.hidden_size, SHAPE.intermediate_size
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, ffn),
        "mlp.up_proj": (hidden, ffn),
        "mlp.down_proj": (ffn, hidden),
    }
    tensors = {}
    for layer in range(SHAPE.num_hidden_layers):
        for name, (inputs, outputs) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            a = chance.uniform(-1, 1, (LORA.rank, inputs)) * inputs**-0.5
            b = chance.standard_normal((outputs, LORA.rank)) * (0.05 if started else 0.0)
            tensors[f"{prefix}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = b.astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = [name.rpartition(".")[2] for name in shapes]
    config = peft_config(LORA, str(base), targets)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def run_reference(script: str, jobs: dict[str, dict], folder: Path) -> dict[str, dict]:
    """Run jobs in the reference environment, in one process; answers by the same names."""
    files = []
    for name, job in jobs.items():
        job["output"] = str(folder / f"{name}.answer.json")
        files.append(folder / f"{name}.job.json")
        files[-1].write_text(json.dumps(job), encoding="utf-8")
    # One thread: the models are tiny, and waiting threads would only take turns with the other tests
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "PYTHONPATH": ""}
    command = [REFERENCE_PYTHON, str(HERE / script), *map(str, files)]
    done = subprocess.run(command, env=os.environ | settings, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: json.loads(Path(job["output"]).read_text(encoding="utf-8")) for name, job in jobs.items()}


def write_recipe(path: Path, job: dict, **sections: dict) -> Path:
    """The recipe of a job; `sections` adds method, dpo, and more keys of data."""
    lora = None
    if job.get("adapter"):
        lora = {"rank": LORA.rank, "alpha": LORA.alpha, "dropout": 0.0, "target_modules": "all-linear"}
    recipe = {
        "method": sections.get("method", "sft"),
        "model": {
            "path": job.get("adapter") or job["model"],
            "dtype": "float32",
            "quantization": job.get("quantization", "none"),
        },
        "data": {"train": [{"path": job["rows"]}], "max_length": job["max_length"], **sections.get("data", {})},
        "training": {
            "output_dir": str(path.with_suffix("")),
            "max_steps": job["max_steps"],
            "per_device_train_batch_size": job["batch_size"],
            "gradient_accumulation_steps": job["accumulation"],
            "learning_rate": job["learning_rate"],
            "lr_scheduler_type": job["scheduler"],
            "warmup_steps": job["warmup_steps"],
            "weight_decay": job["weight_decay"],
            "max_grad_norm": job["max_grad_norm"],
            "seed": job["seed"],
            "optim": {"adamw_bnb_8bit": "adamw_8bit"}.get(job.get("optim"), "adamw"),
            "shuffle": False,
        },
    }
    recipe |= {"lora": lora} if lora else {}
    recipe |= {"dpo": sections["dpo"]} if "dpo" in sections else {}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def steps_of(recipe: Path) -> list[dict]:
    """The training rows of a run's metrics.jsonl."""
    return [row for row in read_metrics(recipe.with_suffix("") / "metrics.jsonl") if "loss" in row]


def largest_difference(ours: list[dict], theirs: list[dict], key: str, floor=lambda row: 0.0) -> float:
    """Largest relative difference of a metric over the steps.

    Args:
        floor: Of a step of the reference, the absolute difference that its own float32 sums cannot resolve.
    """
    assert len(ours) == len(theirs) == STEPS
    worst = 0.0
    for mine, other in zip(ours, theirs):
        assert mine["step"] == other["step"]
        gap = abs(mine[key] - other[key])
        worst = max(worst, gap / abs(other[key]) if gap > floor(other) else 0.0)
    return worst
