"""The training cases: tokens and pairs per second, memory, and whether both sides have the same losses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import (
    CHECKED_STEPS,
    TOLERANCE,
    largest_difference,
    per_step,
    row_flops,
    spread,
    step_rates,
)
from benchmarks.folders import LORA, MAX_LENGTH, SHAPES, Rows, make_adapter, make_model, make_rows
from benchmarks.processes import WorkerError, run_worker, scratch
from benchmarks.rounds import Settings, Sides, in_turn, say
from finetune.chat.tokenizer import Tokenizer
from finetune.model.adapters import LoraSettings

BETA = 0.1
# What each variant of TRL's run changes. `defaults` recomputes activations, as TRL does when nothing is said; the
# others do not, as we do not.
PEERS = {
    "sft": {
        "defaults": {"gradient_checkpointing": True},
        "plain": {},
        "padding_free": {"padding_free": True, "max_length": None},
    },
    "dpo": {
        "defaults": {"gradient_checkpointing": True},
        "plain": {},
        "precomputed": {"precompute_ref_log_probs": True},
    },
}


@dataclass(frozen=True)
class Training:
    """A training case: method, tuning, and the rows of a step."""

    method: str
    lora: bool
    batch_size: int
    unit: str

    def __call__(self, name: str, settings: Settings) -> dict:
        """Run the case."""
        job, rows = self.job(settings)
        runs = {variant: self._peer(job, rows, options) for variant, options in PEERS[self.method].items()}
        sides, fastest = in_turn(
            name, settings, self._ours(job, rows), runs, lambda a: a["rates"][f"{self.unit}_per_second"]
        )
        checks = {
            variant: largest_difference(losses(sides.ours[0]), losses(answers[0]))
            for variant, answers in sides.peers.items()
        }
        say(f"{name}: largest relative difference of the first {CHECKED_STEPS} losses {max(checks.values()):.1e}")
        result = self._result(settings, sides, fastest, rows)
        return result | {"loss_differences": checks, "passed": max(checks.values()) <= TOLERANCE}

    def job(self, settings: Settings) -> tuple[dict, Rows]:
        """What both workers are told, and the rows."""
        shape = SHAPES[settings.shape]
        model = make_model(settings.work / "models" / settings.shape, shape)
        job = base_job(self.method, model, steps=settings.steps, batch_size=self.batch_size)
        if self.lora:
            job["adapter"] = str(make_adapter(settings.work / "models" / f"{settings.shape}-lora", model, shape))
        folder = settings.work / "rows" / f"{self.method}-{settings.shape}-{settings.steps}"
        tokenizer = Tokenizer.from_folder(model)
        rows = make_rows(folder, self.method, tokenizer, steps=settings.steps, batch_size=self.batch_size)
        return job, rows

    def _ours(self, job: dict, rows: Rows) -> Callable[[], dict]:
        def run() -> dict:
            with scratch() as folder:
                recipe = write_recipe(folder / "recipe.yaml", job | {"rows": str(rows.path)})
                return self._rated(run_worker("ours", job | {"recipe": str(recipe)}), rows, job)

        return run

    def _peer(self, job: dict, rows: Rows, options: dict) -> Callable[[], dict]:
        def run() -> dict:
            answer = run_worker("peer", job | {"rows": str(rows.path), "options": options})
            if answer.pop("tokens") != rows.tokens:
                raise WorkerError("TRL made other tokens of these rows than we do")
            return self._rated(answer, rows, job)

        return run

    def _rated(self, answer: dict, rows: Rows, job: dict) -> dict:
        """The answer with its rates."""
        shape = SHAPES[Path(job["model"]).name]
        flops = [
            row_flops(shape, lengths, targets, lora=self.lora) for lengths, targets in zip(rows.lengths, rows.targets)
        ]
        work = {
            "tokens": rows.tokens,
            "flops": flops,
            "pairs" if self.method == "dpo" else "rows": [1] * len(flops),
        }
        work = {unit: per_step(values, self.batch_size) for unit, values in work.items()}
        return answer | {"rates": step_rates(answer, work)}

    def _result(self, settings: Settings, sides: Sides, fastest: str, rows: Rows) -> dict:
        pairs = [sides.of_round(i, fastest) for i in range(settings.rounds)]
        key = f"{self.unit}_per_second"
        cpu = f"{self.unit}_per_cpu_second"
        peaks = [(mine["steps"][-1]["peak"], other["steps"][-1]["peak"]) for mine, other in pairs]
        gflops = max(answer["matmul_gflops"] for pair in pairs for answer in pair)
        return {
            "unit": f"{self.unit}/s",
            "settings": {
                "batch_size": self.batch_size,
                "max_length": MAX_LENGTH,
                "steps": settings.steps,
                "rows": rows.source,
            },
            "ratio": spread([m["rates"][key] / o["rates"][key] for m, o in pairs]),
            "cpu_ratio": spread([m["rates"][cpu] / o["rates"][cpu] for m, o in pairs]),
            "memory_ratio": spread([mine / other for mine, other in peaks]),
            "peer_variant": fastest,
            "matmul_gflops": gflops,
            "ours": _side([m for m, _ in pairs], key, gflops),
            "peer": _side([o for _, o in pairs], key, gflops),
            "variants": {variant: _side(answers, key, gflops) for variant, answers in sides.peers.items()},
            "rounds": {"ours": sides.ours, "peers": sides.peers},
        }


def _side(answers: list[dict], key: str, gflops: float) -> dict:
    return {
        "rate": spread([answer["rates"][key] for answer in answers]),
        "tokens_per_second": spread([answer["rates"]["tokens_per_second"] for answer in answers]),
        "peak": max(answer["steps"][-1]["peak"] for answer in answers),
        "flop_utilisation": spread([answer["rates"]["flops_per_second"] / gflops / 1e9 for answer in answers]),
        "matmul_gflops": max(answer["matmul_gflops"] for answer in answers),
        "threads": answers[0]["threads"],
        "versions": answers[0]["versions"],
    }


def losses(answer: dict) -> list[float]:
    """The loss of each step."""
    return [step["loss"] for step in answer["steps"]]


def base_job(method: str, model: Path, *, steps: int, batch_size: int) -> dict:
    """What both workers are told of a run, in the words of tests/parity/ref_common.py. Full fine-tuning."""
    return {
        "task": "train",
        "method": method,
        "model": str(model),
        "max_length": MAX_LENGTH,
        "max_steps": steps,
        "batch_size": batch_size,
        "accumulation": 1,
        "learning_rate": 1e-4,
        "scheduler": "constant",  # so that a shorter run has the same first steps
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": 42,
        "beta": BETA,
    }


def write_recipe(path: Path, job: dict, lora: LoraSettings = LORA) -> Path:
    """Our recipe of a job."""
    recipe = {
        "method": job["method"],
        "model": {
            "path": job.get("adapter") or job["model"],
            "dtype": "float32",
            "quantization": job.get("quantization", "none"),
        },
        "data": {"train": [{"path": job["rows"]}], "max_length": job["max_length"]},
        "training": {
            "output_dir": str(path.with_suffix("")),
            "max_steps": job["max_steps"],
            "per_device_train_batch_size": job["batch_size"],
            "learning_rate": job["learning_rate"],
            "lr_scheduler_type": job["scheduler"],
            "seed": job["seed"],
            "recompute": job.get("recompute", False),
            "save_steps": 10_000,
            "shuffle": False,
        },
    }
    if job.get("adapter"):
        recipe["lora"] = {"rank": lora.rank, "alpha": lora.alpha}
    if job["method"] == "sft":
        recipe["data"]["train_on"] = "last_response"  # TRL's completion
    else:
        recipe["dpo"] = {"beta": job["beta"], "loss_type": "sigmoid"}
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path
