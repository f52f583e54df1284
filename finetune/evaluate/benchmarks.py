"""The benchmarks of Qwen2-Instruct's model page, by the names that the page gives them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark of the page is run.

    Attributes:
        task: Its name in lm-evaluation-harness.
        metric: The figure that stands for it, as the harness names it ("metric,filter").
        folder: Where its files are under lm_eval/tasks; "" is not known. The harness has more than 10,000 task files.
        num_fewshot: Examples before each question; None takes the harness's own number.
    """

    task: str
    metric: str
    folder: str
    num_fewshot: int | None = None


# Shots and metrics: https://qwenlm.github.io/blog/qwen2 and the Qwen2 technical report (arXiv:2407.10671), section 5.
BENCHMARKS = {
    "mmlu": Benchmark("mmlu", "acc,none", "mmlu/default", 5),
    "humaneval": Benchmark("humaneval_instruct", "pass@1,create_test", "humaneval", 0),
    "gsm8k": Benchmark("gsm8k", "exact_match,flexible-extract", "gsm8k"),
    "ceval": Benchmark("ceval-valid", "acc,none", "ceval", 5),
    "ifeval": Benchmark("ifeval", "prompt_level_strict_acc,none", "ifeval", 0),
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name; any other name is the harness's own task, with its first metric."""
    return BENCHMARKS.get(name.lower().replace("-", "").replace("_", ""), Benchmark(name, "", ""))
