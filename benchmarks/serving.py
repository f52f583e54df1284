"""Throughput of `finetune serve`: requests one by one against all at once, through OpenAI's client.

    python benchmarks/serving.py --requests 32 --new-tokens 32

Greedy, every answer of the same length. Without --folder, the model has the shape of Qwen2-0.5B cut to --layers layers
and --vocabulary tokens, random weights and a byte-level tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.infer.scripted import Served, serving
from tests.tiny import Shape, tiny_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=16_000)
    parser.add_argument("--folder", type=Path, help="a model with a chat template, instead of random weights")
    arguments = parser.parse_args()
    from finetune.infer.open import open_model
    from finetune.serve.app import Limits

    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or tiny_model(Path(scratch), shape=shape(arguments))
        with serving(open_model(str(folder), pack=True), Limits(max_batch=arguments.requests)) as server:
            print(json.dumps(measure(server, arguments.requests, arguments.new_tokens), indent=2))


def shape(arguments: argparse.Namespace) -> Shape:
    return Shape(
        vocab_size=arguments.vocabulary,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=arguments.layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )


def measure(server: Served, requests: int, new_tokens: int) -> dict:
    client = server.client(timeout=600)

    def ask(number: int) -> tuple[str, int]:
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": f"{'Tell me more. ' * (number % 5)}Number {number}?"}],
            max_tokens=new_tokens,
            temperature=0,
            extra_body={"stop_token_ids": []},
        )
        return answer.choices[0].message.content, answer.usage.completion_tokens

    ask(0)
    started = time.perf_counter()
    alone = [ask(number) for number in range(requests)]
    one_by_one = time.perf_counter() - started
    with ThreadPoolExecutor(requests) as pool:
        started = time.perf_counter()
        together = list(pool.map(ask, range(requests)))
        at_once = time.perf_counter() - started
    tokens = sum(count for _, count in alone)
    return {
        "requests": requests,
        "new_tokens": new_tokens,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "tokens_per_second_one_by_one": tokens / one_by_one,
        "tokens_per_second_at_once": tokens / at_once,
        "ratio": one_by_one / at_once,
        "answers_equal": alone == together,
    }


if __name__ == "__main__":
    main()
