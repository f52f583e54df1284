"""Decoding speed against transformers' `generate`: float32, greedy, both with all cores, on the shape of Qwen2-0.5B.

    python benchmarks/decode.py --reference .venv-reference/bin/python --output decode.json

Both sides hold the same random weights in a process of their own and take turns, round by round, so that both meet the
same disturbances. A round is one answer of N + 1 tokens minus one of 1 token, which leaves the decoding alone. Needs a
quiet machine, 6 GB of memory and (for the weights, kept with --folder) 2 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measure import peak_bytes

PROMPT_TOKENS = 64
SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
}


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        work(arguments)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        if not (folder / "model.safetensors").exists():
            write_model(folder, arguments.layers)
        result = compare(arguments, folder)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", help="Python with torch and transformers")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="rows decoded together")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--folder", type=Path, help="where the weights are, or shall be kept")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--worker", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.worker and not arguments.reference:
        parser.error("--reference is missing: a Python with torch and transformers (make parity installs one)")
    return arguments


def write_model(folder: Path, layers: int) -> None:
    """Random weights of the shape; no tokenizer."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.tiny import Shape, tiny_model

    tiny_model(folder, shape=Shape(**{**SHAPE, "num_hidden_layers": layers}), tokenizer=False)


# -- the one who compares ------------------------------------------------------------------------------------------


class Worker:
    """One side, in a process of its own: told a batch size, it answers with the seconds of a round."""

    def __init__(self, python: str, side: str, folder: Path, new_tokens: int):
        command = [python, __file__, "--worker", side, "--folder", str(folder), "--new-tokens", str(new_tokens)]
        # The reference has its own packages; ours must find this repository whether it is installed or not.
        path = "" if side == "theirs" else str(Path(__file__).resolve().parent.parent)
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.versions = self._read()

    def round(self, batch: int) -> dict:
        self._process.stdin.write(f"{batch}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(self._process.args)} ended with exit code {self._process.wait()}")
        return json.loads(line)


def compare(arguments: argparse.Namespace, folder: Path) -> dict:
    workers = {
        "ours": Worker(sys.executable, "ours", folder, arguments.new_tokens),
        "theirs": Worker(arguments.reference, "theirs", folder, arguments.new_tokens),
    }
    result = {
        "shape": {**SHAPE, "num_hidden_layers": arguments.layers},
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "load_before": os.getloadavg()[0],
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": arguments.new_tokens,
        "rounds": arguments.rounds,
        "versions": {side: worker.versions for side, worker in workers.items()},
        "batches": {},
    }
    for batch in arguments.batch:
        rounds: dict[str, list[dict]] = {side: [] for side in workers}
        for number in range(arguments.rounds + 1):
            for side, worker in list(workers.items())[:: 1 if number % 2 else -1]:
                taken = worker.round(batch)
                if number:  # the first round warms up
                    rounds[side].append(taken)
        result["batches"][str(batch)] = summary(batch, arguments.new_tokens, rounds)
    result["load_after"] = os.getloadavg()[0]
    for worker in workers.values():
        worker.close()
    return result


def summary(batch: int, new_tokens: int, rounds: dict[str, list[dict]]) -> dict:
    speeds = {side: [batch * new_tokens / r["seconds"] for r in taken] for side, taken in rounds.items()}
    found: dict = {
        side: {
            "tokens_per_second": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
            "cpu_seconds": statistics.median(r["cpu_seconds"] for r in rounds[side]),
            "peak": max(r["peak"] for r in rounds[side]),
        }
        for side, values in speeds.items()
    }
    pairs = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds["theirs"])]
    ratio = found["ours"]["tokens_per_second"] / found["theirs"]["tokens_per_second"]
    found["ratio"] = {"of_medians": ratio, "lowest_round": min(pairs), "highest_round": max(pairs)}
    found["same_tokens"] = rounds["ours"][-1]["tokens"] == rounds["theirs"][-1]["tokens"]
    return found


# -- the ones compared ---------------------------------------------------------------------------------------------


def work(arguments: argparse.Namespace) -> None:
    """Answer batch sizes on stdin until it ends."""
    answer, versions = {"ours": ours, "theirs": theirs}[arguments.worker](arguments.folder)
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        prompts = make_prompts(int(line))
        short, long = timed(answer, prompts, 1), timed(answer, prompts, arguments.new_tokens + 1)
        seconds, cpu = long[0] - short[0], long[1] - short[1]
        taken = {"seconds": seconds, "cpu_seconds": cpu, "peak": peak_bytes(), "tokens": long[2]}
        print(json.dumps(taken), flush=True)


def make_prompts(batch: int) -> list[list[int]]:
    return [[(7919 * row + 104_729 * place) % 150_000 for place in range(PROMPT_TOKENS)] for row in range(batch)]


def timed(answer: Callable, prompts: list[list[int]], count: int) -> tuple[float, float, list[list[int]]]:
    started, cpu = time.perf_counter(), time.process_time()
    tokens = answer(prompts, count)
    return time.perf_counter() - started, time.process_time() - cpu, tokens


def ours(folder: Path) -> tuple[Callable, dict]:
    from finetune.compute.packed import pack
    from finetune.infer.engine import Engine
    from finetune.infer.sampling import Sampling
    from finetune.model.load import load_model
    from finetune.model.runtime import paddle

    model = load_model(str(folder), dtype="float32").model
    pack(model)  # as `generate`, `chat` and `serve` do
    engine = Engine(model, stop_token_ids=[])

    def answer(prompts: list[list[int]], count: int) -> list[list[int]]:
        outputs = engine.generate(prompts, Sampling(max_new_tokens=count), batch_size=len(prompts))
        return [output.tokens for output in outputs]

    return answer, {"python": platform.python_version(), "paddle": paddle().__version__}


def theirs(folder: Path) -> tuple[Callable, dict]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)

    def answer(prompts: list[list[int]], count: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            made = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count
            )
        return made[:, ids.shape[1] :].tolist()

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return answer, {"python": platform.python_version(), **versions}


if __name__ == "__main__":
    main()
