"""kill -9 at random moments, then the same command again, until it is done: nothing is lost and nothing differs.

    python -m pytest tests/soak/test_kills.py                 # 100 kills
    FINETUNE_SOAK_KILLS=10 FINETUNE_SOAK_SEED=7 python -m pytest tests/soak/test_kills.py

Each command runs in a process of its own, forked from one that has imported everything and computed nothing: the four
seconds that the imports take would be most of the time.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import pytest

import finetune.infer.samples
import finetune.train.preference.task
import finetune.train.session  # noqa: F401
from finetune import cli
from finetune.recipe.load import load_recipe
from finetune.train.checkpoint import list_steps, open_checkpoint
from tests.runs import WORDS, metrics, write_recipe

pytestmark = pytest.mark.timeout(0)

KILLS = int(os.environ.get("FINETUNE_SOAK_KILLS", "100"))
SEED = int(os.environ.get("FINETUNE_SOAK_SEED", "0"))
STEPS, SAVE_STEPS = 36, 2
LORA = "lora={rank: 4, alpha: 8, dropout: 0.2}"
PACKED = ["data.packing=true", "data.max_length=160"]
ACCUMULATED = "training.gradient_accumulation_steps=2"
CASES = {
    "sft full, packed, accumulated": ["method=sft", *PACKED, ACCUMULATED],
    "sft lora with dropout, accumulated": ["method=sft", LORA, ACCUMULATED],
    "dpo full, accumulated, rarely logged": ["method=dpo", ACCUMULATED, "training.logging_steps=5"],
    "dpo lora with dropout, packed": ["method=dpo", LORA, *PACKED],
    "sft full, evaluated, best kept": [
        "method=sft",
        "data.eval_fraction=0.2",
        "training.eval_steps=2",
        "training.load_best_model_at_end=true",
        "training.save_total_limit=1",
    ],
    "sft lora with dropout, packed": ["method=sft", LORA, *PACKED],
    "sft lora with dropout, streamed": ["method=sft", LORA, "data.streaming=true", ACCUMULATED],
    "sft full, streamed, packed": ["method=sft", *PACKED, "data.streaming=true"],
    "sft qlora with dropout, 8-bit moments of the embeddings": [
        "method=sft",
        "lora={rank: 4, alpha: 8, dropout: 0.2, modules_to_save: [embed_tokens]}",
        "model.quantization=nf4",
        "training.optim=adamw_8bit",
    ],
    "dpo with dora on int8": ["method=dpo", "lora={rank: 4, variant: dora}", "model.quantization=int8"],
    "dpo lora, reference live": ["method=dpo", LORA, "dpo.precompute_ref_log_probs=false", ACCUMULATED],
}


def write_pairs(path: Path, count: int = 24) -> Path:
    draw = random.Random(1)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            words = draw.choices(WORDS, k=draw.randint(1, 8))
            pair = {"chosen": " ".join(reversed(words)), "rejected": " ".join(["no", *words])}
            file.write(json.dumps({"prompt": "say " + " ".join(words), **pair}) + "\n")
    return path


class Process:
    """A command line in a process of its own."""

    def __init__(self, arguments: list[str], log: Path):
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number, stream in ((1, "stdout"), (2, "stderr")):
                os.dup2(file, number)
                setattr(sys, stream, open(number, "w", closefd=False, encoding="utf-8"))
            code = cli._run(arguments, debug=True)
            sys.stderr.flush()
            os._exit(code)
        finally:
            os._exit(99)

    def poll(self) -> int | None:
        """The exit code, or minus the signal; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return self.code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@dataclass
class Job:
    """One command and its folder, killed and started again."""

    command: list[str]
    run: Path
    draw: random.Random
    log: Path
    kills: Counter = field(default_factory=Counter)
    resumed: int = 0

    def once(self, kind: str) -> bool:
        """Run until the moment of the kind has come, and kill. False: the run was done before that."""
        newest = max(list_steps(self.run / "checkpoints"), default=0)
        process = Process(self.command, self.log)
        self.wait(process, kind)
        process.kill()
        code = process.wait()
        said = self.log.read_text(encoding="utf-8", errors="replace")
        assert code in (0, -9), said
        if found := re.search(r"resumed after step +(\d+)", said):
            assert int(found[1]) == newest, f"{newest} was saved\n{said}"
            self.resumed += 1
        assert "damaged" not in said and "Traceback" not in said, said
        if code == -9:
            self.kills[kind] += 1
        self.check_what_is_left()
        return code == -9

    def wait(self, process: Process, kind: str) -> None:
        """Return at a random moment of the kind: while it starts, saves, trains, or ends; or at the end of another."""
        if kind == "starting":
            stop = time.monotonic() + self.draw.uniform(0.01, 2)
            while process.poll() is None and time.monotonic() < stop:
                time.sleep(0.01)
            return
        longest = {"saving": 0.06, "training": 0.3, "ending": 1.5}.get(kind)
        if longest is None:
            process.wait()
            return
        left = self.draw.randint(1, 5)
        seen: set[str] = set()
        fresh_end = False  # the last step was made by this process, not by one before
        rows = self.rows()
        while process.poll() is None:
            if kind == "saving":
                fresh = self.hidden() - seen
                seen |= fresh
                left -= len(fresh)
            elif kind == "training":
                left -= max(0, self.rows() - rows)
                rows = self.rows()
            elif max(list_steps(self.run / "checkpoints"), default=0) == STEPS:
                left, longest = 0, longest if fresh_end else 3
            else:
                fresh_end = True
            if left <= 0:
                time.sleep(self.draw.uniform(0, longest))
                return
            time.sleep(0.0005 if kind == "saving" else 0.01)

    def hidden(self) -> set[str]:
        """Folders that are being written or deleted."""
        try:
            return {entry.name for entry in os.scandir(self.run / "checkpoints") if entry.name.startswith(".")}
        except OSError:
            return set()

    def rows(self) -> int:
        try:
            return (self.run / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def check_what_is_left(self) -> None:
        """Every checkpoint that can be seen is good, and no more steps are lost than were made since the last."""
        steps = list_steps(self.run / "checkpoints")
        for step in steps:
            assert open_checkpoint(self.run / "checkpoints" / f"step-{step}").step == step
        path = self.run / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        logged = [json.loads(line)["step"] for line in lines if line.endswith(b"\n")]
        assert max(logged, default=0) - max(steps, default=0) <= SAVE_STEPS


def weights(run: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (run / "final").glob("*.safetensors")}


def numbers(run: Path) -> list[tuple]:
    timed = ("tokens_per_second", "seconds")
    return [tuple((k, v) for k, v in row.items() if k not in timed) for row in metrics(run)]


def check_equal(run: Path, undisturbed: Path) -> None:
    assert weights(run) == weights(undisturbed) != {}
    every = load_recipe(run / "recipe.yaml").training.logging_steps
    logged = [row["step"] for row in metrics(run) if "loss" in row]
    assert logged == [step for step in range(1, STEPS + 1) if step % every == 0 or step == STEPS]
    assert numbers(run) == numbers(undisturbed)
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {path.name for path in (undisturbed / "checkpoints").iterdir()}
    assert {path.name for path in run.iterdir()} == {path.name for path in undisturbed.iterdir()}
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (run, undisturbed)]
    assert [manifest["status"] for manifest in manifests] == ["finished"] * 2
    assert manifests[0]["steps"] == manifests[1]["steps"] and manifests[0]["tokens"] == manifests[1]["tokens"]


def test_killed_runs_end_as_undisturbed_ones(tmp_path, tiny_folder, capfd):
    draw = random.Random(SEED)
    recipe = write_recipe(
        tmp_path, tiny_folder, max_steps=STEPS, save_steps=SAVE_STEPS, save_total_limit=2, per_device_train_batch_size=2
    )
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    undisturbed: dict[str, Path] = {}
    kills: Counter = Counter()
    runs = 0
    for name in cycle(CASES):
        if kills.total() >= KILLS:
            break
        values = [*CASES[name], *([f"data.train={pairs}"] if "dpo" in name else [])]
        command = ["train", str(recipe), *values]
        folder = tmp_path / f"run-{runs}"
        if name not in undisturbed:
            undisturbed[name] = tmp_path / f"undisturbed-{len(undisturbed)}"
            whole = Process([*command, f"training.output_dir={undisturbed[name]}"], tmp_path / "log.txt")
            assert whole.wait() == 0, (tmp_path / "log.txt").read_text()
        job = Job([*command, f"training.output_dir={folder}"], folder, draw, tmp_path / "log.txt", kills)
        kinds = ("saving", "training", "saving", "ending", "starting", "saving")
        while job.once(draw.choice(kinds) if kills.total() < KILLS else "not any more"):
            pass
        check_equal(folder, undisturbed[name])
        runs += 1
        with capfd.disabled():
            shown = ", ".join(f"{kind} {count}" for kind, count in kills.items())
            print(
                f"{time.strftime('%H:%M:%S')} {name}: equal after {job.resumed} resumptions; kills: {shown}", flush=True
            )
    assert kills.total() >= KILLS
