"""Our QLoRA beside our LoRA and TRL's QLoRA (bitsandbytes): seconds a step and peak memory.

    python -m benchmarks.qlora [--model FOLDER] [--rounds N] [--steps N] [--batch N] [--length N] [--sides NAME ...]

All sides get one adapter, the same rows and float32, and are fresh processes that take turns. The model is a Hugging
Face folder of Qwen2's form, or has the shape of Qwen2-0.5B and random weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

from benchmarks.figures import CHECKED_STEPS, TOLERANCE, largest_difference, step_rates
from benchmarks.folders import ROOT, SHAPES, linear_sizes, make_adapter, make_model, write_jsonl
from benchmarks.machine import RESULTS, machine, write_record
from benchmarks.processes import run_worker, scratch
from benchmarks.rounds import say
from benchmarks.training import base_job, losses, write_recipe
from finetune.model.quantize import Quantization
from tests.tiny import Shape

NF4 = {"quantization": "nf4"}
# Who runs, and what is changed of the job of plain LoRA.
SIDES: dict[str, tuple[str, dict]] = {
    "lora": ("ours", {}),
    "qlora": ("ours", NF4),
    "qlora_recompute": ("ours", NF4 | {"recompute": True}),
    "trl_qlora": ("peer", NF4),
    "trl_qlora_checkpointing": ("peer", NF4 | {"options": {"gradient_checkpointing": True}}),
}
# What is asked of the first by the second: of speed at least, of peak memory at most.
RATIOS = {
    ("qlora", "lora"): {"speed": 0.75},
    ("qlora", "trl_qlora"): {"speed": 2.0, "peak": 1.0},
    ("qlora_recompute", "trl_qlora_checkpointing"): {"speed": 2.0, "peak": 1.0},
}


def main(arguments: list[str] | None = None) -> int:
    """Run the sides in turn, write the results; 1 where the QLoRA sides have other losses."""
    asked = _parse(arguments)
    model = asked.model or make_model(asked.work / "models" / "24l", SHAPES["24l"])
    shape = shape_of(model)
    adapter = make_adapter(asked.work / "models" / f"{model.resolve().name}-qlora", model, shape)
    rows = conversations(asked.length, asked.steps * asked.batch)
    job = base_job("sft", model, steps=asked.steps, batch_size=asked.batch)
    job |= {"adapter": str(adapter), "max_length": 2 * asked.length, "options": {}}
    answers: dict[str, list[dict]] = {name: [] for name in asked.sides}
    for index in range(asked.rounds):
        for name in asked.sides if index % 2 == 0 else asked.sides[::-1]:
            answer = run(SIDES[name][0], job | SIDES[name][1], rows)
            answers[name].append(answer)
            say(f"round {index + 1}, {name}: {seconds(answer):.3g} s a step, {peak(answer) / 2**30:.2f} GiB")
    quantized = [losses(found[0]) for name, found in answers.items() if name != "lora"]
    difference = max((largest_difference(quantized[0], other) for other in quantized[1:]), default=0.0)
    settings = {"rounds": asked.rounds, "steps": asked.steps, "batch": asked.batch, "length": asked.length}
    record = {
        "machine": machine(),
        "settings": settings | {"model": model.resolve().name},
        "layer_weights_of_lora": share_of_weights(shape),
        "loss_difference": difference,
        "sides": {
            name: {"seconds": [seconds(answer) for answer in found], "peak": [peak(answer) for answer in found]}
            for name, found in answers.items()
        },
        "ratios": ratios(answers),
    }
    output = asked.output or RESULTS / f"{datetime.now(timezone.utc):%Y-%m-%d-%H%M}-qlora.json"
    write_record(output, record)
    print(json.dumps({key: record[key] for key in ("layer_weights_of_lora", "loss_difference", "ratios")}, indent=1))
    say(f"written: {output}; the losses of the first {CHECKED_STEPS} steps differ by {difference:.1e}")
    return int(difference > TOLERANCE)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.qlora", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; default: Qwen2-0.5B's shape, random weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of which the first two are not counted")
    parser.add_argument("--batch", type=int, default=2, help="rows a step")
    parser.add_argument("--length", type=int, default=256, help="words of a row, about its tokens")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="NAME")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "benchmarks", help="where models are made")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<date and time>-qlora.json")
    return parser.parse_args(arguments)


def shape_of(model: Path) -> Shape:
    """The shape that a folder's config.json says."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return Shape(**{field.name: config[field.name] for field in fields(Shape)})


def conversations(length: int, count: int) -> list[dict]:
    """Rows of about so many tokens, half of them an answer."""
    words = "the quick brown fox jumps over the lazy dog and again".split()
    question, answer = (" ".join(words[i % 11] for i in range(length // 2)) for _ in range(2))
    return [
        {"messages": [{"role": "user", "content": f"{n} {question}"}, {"role": "assistant", "content": answer}]}
        for n in range(count)
    ]


def run(side: str, job: dict, rows: list[dict]) -> dict:
    """One run to its last step."""
    with scratch() as folder:
        job = job | {"rows": str(write_jsonl(folder / "rows.jsonl", rows))}
        if side == "ours":
            job |= {"recipe": str(write_recipe(folder / "recipe.yaml", job))}
        return run_worker(side, job)


def seconds(answer: dict) -> float:
    """Of the mean step after the first two."""
    return 1 / step_rates(answer, {"steps": [1.0] * len(answer["steps"])})["steps_per_second"]


def peak(answer: dict) -> int:
    """Most resident memory up to the last step."""
    found: int = answer["steps"][-1]["peak"]
    return found


def share_of_weights(shape: Shape) -> float:
    """Bytes of the layers' matrices in doubly quantized nf4, of those in float32."""
    sizes = linear_sizes(shape).values()
    quantized = sum(Quantization("nf4").nbytes(inputs, outputs) for inputs, outputs in sizes)
    return quantized / sum(4 * inputs * outputs for inputs, outputs in sizes)


def ratios(answers: dict[str, list[dict]]) -> dict[str, dict]:
    """How many times as fast, and with what share of its peak memory, one side ran as another in the same round."""
    found = {}
    for (left, right), asked in RATIOS.items():
        if not (answers.get(left) and answers.get(right)):
            continue
        pairs = list(zip(answers[left], answers[right]))
        found[f"{left} / {right}"] = {
            "speed": median(seconds(theirs) / seconds(ours) for ours, theirs in pairs),
            "peak": median(peak(ours) / peak(theirs) for ours, theirs in pairs),
            "asked": asked,
        }
    return found


if __name__ == "__main__":
    sys.exit(main())
