"""Our cost as work grows: sequence length, batch, LoRA rank, rows. `python -m benchmarks.scaling [SERIES ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.figures import step_rates
from benchmarks.folders import LORA, ROOT, SHAPES, SMALLEST, make_adapter, make_model, numbered_rows, write_jsonl
from benchmarks.machine import RESULTS, machine, write_record
from benchmarks.processes import WorkerError, run_worker, scratch
from benchmarks.rounds import say
from benchmarks.training import base_job, write_recipe
from finetune.model.adapters import LoraSettings

STEPS = 3  # the first, which also makes the optimizer's state, is not counted
WARM_UP = 1
LENGTHS = (256, 512, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8, 16, 32)
BATCH_LENGTH = 256
RANKS = (4, 16, 64, 256)
RANK_LENGTH = 512
ROW_COUNTS = (1_000, 10_000, 100_000, 1_000_000)
_WORDS = ["the quick brown fox jumps over the lazy dog and again".split()[i % 11] for i in range(2 * LENGTHS[-1])]
Points = Iterator[dict]


def by_length(work: Path, shape: str, largest: int) -> Points:
    """A LoRA step on one row of so many tokens."""
    for length in _up_to(LENGTHS, largest):
        yield _step(work, shape, size=length, length=length, batch_size=1)


def by_batch(work: Path, shape: str, largest: int) -> Points:
    """A LoRA step on so many rows of 256 tokens."""
    for count in _up_to(BATCHES, largest):
        yield _step(work, shape, size=count, length=BATCH_LENGTH, batch_size=count)


def by_rank(work: Path, shape: str, largest: int) -> Points:
    """A LoRA step of this rank on one row of 512 tokens."""
    for rank in _up_to(RANKS, largest):
        yield _step(work, shape, size=rank, length=RANK_LENGTH, batch_size=1, rank=rank)


def by_rows(work: Path, shape: str, largest: int) -> Points:
    """Preparation of so many rows, caches empty."""
    job = base_job("sft", make_model(work / "models" / "smallest", SMALLEST), steps=1, batch_size=8)
    for count in _up_to(ROW_COUNTS, largest):
        path = numbered_rows(work / "rows" / f"{count}.jsonl", count)
        with scratch() as folder:
            recipe = write_recipe(folder / "recipe.yaml", job | {"rows": str(path)})
            answer = run_worker("ours", job | {"task": "prepare", "recipe": str(recipe)}, memory=True)
        path.unlink()
        yield _point(count, answer["spent"]["wall"], answer["spent"]["cpu"], answer["rows"], answer["process"]["peak"])


# What is varied, the unit of work, the largest size that is run unless asked for, and how it is run.
SERIES: dict[str, tuple[str, str, int, Callable[[Path, str, int], Points]]] = {
    "length": ("tokens in the row", "tokens", LENGTHS[-1], by_length),
    "batch": (f"rows of {BATCH_LENGTH} tokens", "tokens", BATCHES[-1], by_batch),
    "rank": ("LoRA rank", "tokens", RANKS[-1], by_rank),
    "rows": ("rows", "rows", ROW_COUNTS[-1], by_rows),
}


def _up_to(sizes: tuple[int, ...], largest: int) -> list[int]:
    return [size for size in sizes if size <= largest]


def _step(work: Path, shape: str, *, size: int, length: int, batch_size: int, rank: int = LORA.rank) -> dict:
    """The mean step after the first, on rows that fill the length."""
    model = make_model(work / "models" / shape, SHAPES[shape])
    settings = LoraSettings(rank=rank, alpha=2.0 * rank)
    adapter = make_adapter(work / "models" / f"{shape}-lora-{rank}", model, SHAPES[shape], settings)
    job = base_job("sft", model, steps=STEPS, batch_size=batch_size) | {"adapter": str(adapter), "max_length": length}
    with scratch() as folder:
        path = write_jsonl(folder / "rows.jsonl", filled_rows(length, STEPS * batch_size))
        recipe = write_recipe(folder / "recipe.yaml", job | {"rows": str(path)}, settings)
        answer = run_worker("ours", job | {"recipe": str(recipe)})
    rates = step_rates(answer, {"steps": [1.0] * STEPS}, WARM_UP)
    cpu = 1 / rates["steps_per_cpu_second"]
    return _point(size, 1 / rates["steps_per_second"], cpu, length * batch_size, answer["steps"][-1]["peak"])


def filled_rows(length: int, count: int) -> list[dict]:
    """Conversations that are longer than `length` tokens, so that each is cut to it; about half is an answer."""
    question, answer = " ".join(_WORDS[: length // 2]), " ".join(_WORDS[:length])
    return [
        {"messages": [{"role": "user", "content": f"{n} {question}"}, {"role": "assistant", "content": answer}]}
        for n in range(count)
    ]


def _point(size: int, seconds: float, cpu_seconds: float, work: int, peak: int) -> dict:
    return {"size": size, "seconds": seconds, "cpu_seconds": cpu_seconds, "work": work, "peak": peak}


def main(arguments: list[str] | None = None) -> int:
    """Measure the series asked for and write them after each point; 1 if one ended early."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("series", nargs="*", metavar="SERIES", help=f"of {', '.join(SERIES)}")
    parser.add_argument("--shape", choices=SHAPES, default="6l")
    parser.add_argument("--largest", type=int, help="leave out larger sizes")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "benchmarks")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<date and time>-scaling.json")
    asked = parser.parse_args(arguments)
    if unknown := [name for name in asked.series if name not in SERIES]:
        parser.error(f"no such series: {', '.join(unknown)} (choose from {', '.join(SERIES)})")
    output = asked.output or RESULTS / f"{datetime.now(timezone.utc):%Y-%m-%d-%H%M}-scaling.json"
    record: dict = {"machine": machine(), "settings": {"shape": asked.shape, "steps": STEPS}, "scaling": {}}
    failed = False
    for name in asked.series or SERIES:
        label, unit, largest, measure = SERIES[name]
        points: list[dict] = []
        shape = "none" if name == "rows" else asked.shape
        record["scaling"][name] = {"label": label, "unit": unit, "shape": shape, "points": points}
        try:
            for point in measure(asked.work.resolve(), asked.shape, asked.largest or largest):
                points.append(point)
                say(f"{name} {point['size']:,}: {point['seconds']:.3g} s, CPU {point['cpu_seconds']:.3g} s")
                write_record(output, record)
        except WorkerError as error:
            say(f"{name} ended early: {error}")
            failed = True
    say(f"written: {output}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
