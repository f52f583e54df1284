"""Training runs for tests: tiny data, a tiny recipe, and the command line in this process or in one of its own."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

WORDS = "one two three four five six seven eight nine ten".split()


def write_rows(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Chats of different length whose answer is the question's words in reverse."""
    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            words = draw.choices(WORDS, k=draw.randint(1, 8))
            messages = [
                {"role": "user", "content": "say " + " ".join(words)},
                {"role": "assistant", "content": " ".join(reversed(words))},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def write_recipe(folder: Path, model: Path, **training) -> Path:
    """An SFT recipe over rows written beside it."""
    rows = write_rows(folder / "train.jsonl")
    values = {
        "output_dir": str(folder / "run"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_steps": 100,
    } | training
    recipe = {
        "method": "sft",
        "model": {"path": str(model)},
        "data": {"train": [{"path": str(rows)}], "max_length": 128},
        "training": values,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def finetune(*arguments: str | Path) -> int:
    """Run a command line in this process; return its exit code. Faster than a process each: paddle loads once."""
    from finetune.cli import main

    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def finetune_process(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    """Run a command line in a process of its own, as a user does."""
    command = [sys.executable, "-m", "finetune", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


def metrics(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def steps(run: Path) -> list[dict]:
    """The training rows of it."""
    return [row for row in metrics(run) if "loss" in row]
