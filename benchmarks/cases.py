"""The cases: what is run on both sides, and what becomes of it. docs/performance.md says what is measured."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.figures import CHECKED_STEPS, TOLERANCE, largest_difference, spread
from benchmarks.folders import ROOT, SHAPES, SMALLEST, make_model, numbered_rows
from benchmarks.processes import PEER, reference_python, run_process, run_worker, scratch
from benchmarks.rounds import Settings, in_turn, say
from benchmarks.training import Training, base_job, losses, write_recipe

CORES = len(os.sched_getaffinity(0))
# TRL's preparation: as it comes; on all cores; on all cores of messages, which it renders by the template itself.
PREPARERS = {
    "defaults": {},
    "parallel": {"dataset_num_proc": CORES},
    "conversational": {"dataset_num_proc": CORES, "conversational": True},
}


def prepare(name: str, settings: Settings) -> dict:
    """Rows per second from a JSONL file to tokens and labels, caches empty. Memory is that of all processes."""
    model = make_model(settings.work / "models" / "smallest", SMALLEST)
    job = base_job("sft", model, steps=1, batch_size=8)
    rows = numbered_rows(settings.work / "rows" / f"{settings.rows}.jsonl", settings.rows)
    job |= {"task": "prepare", "rows": str(rows)}

    def ours() -> dict:
        with scratch() as folder:
            recipe = write_recipe(folder / "recipe.yaml", job)
            return run_worker("ours", job | {"recipe": str(recipe)}, memory=True)

    peers = {
        variant: (lambda o=options: run_worker("peer", job | {"options": o}, memory=True))
        for variant, options in PREPARERS.items()
    }
    sides, fastest = in_turn(name, settings, ours, peers, lambda answer: settings.rows / answer["spent"]["wall"])
    pairs = [sides.of_round(i, fastest) for i in range(settings.rounds)]
    # Given messages, TRL also trains on the newline behind each response.
    newlines = {variant: settings.rows * bool(options.get("conversational")) for variant, options in PREPARERS.items()}
    counts = {(answer["rows"], answer["targets"]) for answer in sides.ours}
    counts |= {(a["rows"], a["targets"] - newlines[name]) for name, answers in sides.peers.items() for a in answers}

    def side(answers: list[dict]) -> dict:
        rate = spread([settings.rows / answer["spent"]["wall"] for answer in answers])
        peak = max(answer["process"]["peak"] for answer in answers)
        return {"rate": rate, "peak": peak, "versions": answers[0]["versions"]}

    return {
        "unit": "rows/s",
        "shape": "-",
        "settings": {"rows": settings.rows},
        "ratio": spread([o["spent"]["wall"] / m["spent"]["wall"] for m, o in pairs]),
        "cpu_ratio": spread([o["spent"]["cpu"] / m["spent"]["cpu"] for m, o in pairs]),
        "memory_ratio": spread([m["process"]["peak"] / o["process"]["peak"] for m, o in pairs]),
        "peer_variant": fastest,
        "ours": side([m for m, _ in pairs]),
        "peer": side([o for _, o in pairs]),
        "variants": {variant: side(answers) for variant, answers in sides.peers.items()},
        "rounds": {"ours": sides.ours, "peers": sides.peers},
        "passed": len(counts) == 1,
    }


def startup(name: str, settings: Settings) -> dict:
    """Seconds from starting the process to the first logged step, tiny model, full fine-tuning."""
    case = Training("sft", False, 8, "tokens")
    job, rows = case.job(replace(settings, shape="tiny", steps=CHECKED_STEPS))
    job |= {"max_steps": 1, "rows": str(rows.path)}

    def ours() -> dict:
        with scratch() as folder:
            recipe = write_recipe(folder / "recipe.yaml", job)
            watch = recipe.with_suffix("") / "metrics.jsonl"
            process = run_process([sys.executable, "-m", "finetune", "train", str(recipe)], folder, watch)
            return {"process": process, "steps": [json.loads(watch.read_text().splitlines()[0])]}

    def peer() -> dict:
        with scratch() as folder:
            path, watch = folder / "job.json", folder / "marks.jsonl"
            asked = job | {"options": {}, "output": str(folder / "answer.json"), "marks": str(watch)}
            path.write_text(json.dumps(asked), encoding="utf-8")
            process = run_process([reference_python(), str(PEER), str(path)], folder, watch)
            return {"process": process, "steps": [json.loads(watch.read_text().splitlines()[0])]}

    ours(), peer()  # files into the page cache, modules compiled: as the second run on a machine
    sides, variant = in_turn(name, settings, ours, {"defaults": peer}, lambda answer: 1 / answer["process"]["first"])
    pairs = [sides.of_round(i, variant) for i in range(settings.rounds)]
    difference = largest_difference(losses(sides.ours[0]), losses(sides.peers[variant][0]), count=1)
    return {
        "unit": "s",
        "shape": "tiny",
        "settings": {"rows": len(rows.tokens)},
        "ratio": spread([m["process"]["first"] / o["process"]["first"] for m, o in pairs]),
        "cpu_ratio": spread([m["process"]["cpu"] / o["process"]["cpu"] for m, o in pairs]),
        "peer_variant": variant,
        "ours": {"rate": spread([m["process"]["first"] for m, _ in pairs])},
        "peer": {"rate": spread([o["process"]["first"] for _, o in pairs])},
        "loss_differences": {variant: difference},
        "rounds": {"ours": sides.ours, "peers": sides.peers},
        "passed": difference <= TOLERANCE,
    }


@dataclass(frozen=True)
class Decoding:
    """Tokens per second of greedy decoding beside transformers' `generate`: benchmarks/decode.py."""

    batch_size: int

    def __call__(self, name: str, settings: Settings) -> dict:
        """Run the case."""
        shape = SMALLEST if settings.shape == "tiny" else SHAPES[settings.shape]
        folder = make_model(settings.work / "models" / ("smallest" if shape is SMALLEST else settings.shape), shape)
        with scratch() as place:
            options = {"--reference": reference_python(), "--batch": self.batch_size, "--rounds": settings.rounds}
            options |= {"--layers": shape.num_hidden_layers, "--folder": folder, "--output": place / "decode.json"}
            words = [str(word) for option in options.items() for word in option]
            process = run_process([sys.executable, str(ROOT / "benchmarks" / "decode.py"), *words], place)
            found = json.loads((place / "decode.json").read_text(encoding="utf-8"))
        result = found["batches"][str(self.batch_size)]
        say(f"{name}: {result['ours']['tokens_per_second']:,.3g}/s, {result['theirs']['tokens_per_second']:,.3g}/s")
        ratio, cpu = result["ratio"], result["theirs"]["cpu_seconds"] / result["ours"]["cpu_seconds"]
        return {
            "unit": "tokens/s",
            "settings": {key: found[key] for key in ("prompt_tokens", "new_tokens", "rounds")},
            "ratio": {"median": ratio["of_medians"], "min": ratio["lowest_round"], "max": ratio["highest_round"]},
            "cpu_ratio": spread([cpu]),
            "memory_ratio": spread([result["ours"]["peak"] / result["theirs"]["peak"]]),
            "peer_variant": "transformers",
            "ours": _decoded(result["ours"], found["versions"]["ours"]),
            "peer": _decoded(result["theirs"], found["versions"]["theirs"]),
            "rounds": {"ours": [{"process": process}], "peers": {}},
            "passed": result["same_tokens"],
        }


def _decoded(side: dict, versions: dict) -> dict:
    rate = {"median": side["tokens_per_second"], "min": side["lowest"], "max": side["highest"]}
    return {"rate": rate, "peak": side["peak"], "versions": versions}


CASES: dict[str, Callable[[str, Settings], dict]] = {
    "sft_lora": Training("sft", True, 8, "tokens"),
    "sft_full": Training("sft", False, 8, "tokens"),
    "dpo_lora": Training("dpo", True, 4, "pairs"),
    "prepare": prepare,
    "startup": startup,
    "decode": Decoding(1),
    "decode_batch": Decoding(8),
}
