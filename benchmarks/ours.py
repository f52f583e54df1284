"""Our side of a case, in a process of its own: `python -m benchmarks.ours JOB.json`."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks.measure import MATMUL_SHAPE, Marks, Stopwatch, matmul_gflops, peak_bytes, thread_count, write_answer


class _LastStep(BaseException):
    """Ends a run after its last step: its saving is no part of the figures, and TRL is told not to save."""


def train(job: dict) -> None:
    """Run the recipe; note each step when its row of metrics.jsonl is written."""
    from finetune.recipe.load import load_recipe
    from finetune.report.metrics import MetricsWriter
    from finetune.train import run

    marks, write = Marks(job), MetricsWriter.write

    def marked(self, row) -> None:
        write(self, row)
        marks.add(row["step"], row["loss"])
        if row["step"] == job["max_steps"]:
            raise _LastStep

    MetricsWriter.write = marked
    recipe = load_recipe(job["recipe"])
    reference = _timed_reference() if recipe.method == "dpo" else {}
    try:
        run.train(recipe)
    except _LastStep:
        pass
    _finish(job, steps=marks.steps, reference=reference, threads=thread_count(), matmul_gflops=_matmul())


def _timed_reference() -> dict[str, float]:
    """Time what is spent on the reference before the first step; filled in later."""
    from finetune.train.preference import task as dpo

    make, spent = dpo.make_references, {}

    def timed(*args):
        watch = Stopwatch()
        made = make(*args)
        spent.update(watch.read())
        return made

    dpo.make_references = timed
    return spent


def _matmul() -> float:
    from finetune.model.runtime import paddle

    library = paddle()
    m, k, n = MATMUL_SHAPE
    a, b = library.randn([m, k]), library.randn([k, n])
    return matmul_gflops(lambda: library.matmul(a, b), MATMUL_SHAPE)


def prepare(job: dict) -> None:
    """Read and tokenize the recipe's rows, as `finetune train` does before weights load."""
    from finetune.recipe.load import load_recipe
    from finetune.train.preflight import settle
    from finetune.train.prepare import prepare as prepare_run

    recipe = load_recipe(job["recipe"])
    watch = Stopwatch()
    prepared = prepare_run(settle(recipe))
    spent = watch.read()
    counts = {"rows": len(prepared.train.rows), "targets": int(prepared.train.rows.num_supervised.sum())}
    _finish(job, spent=spent, **counts)


def _finish(job: dict, **answer) -> None:
    names = ("paddle-finetune", "paddlepaddle", "paddlenlp", "tokenizers", "numpy")
    chosen = ("MKL_NUM_THREADS", "MKL_DEBUG_CPU_TYPE", "OMP_NUM_THREADS")
    settings = {name: os.environ[name] for name in chosen if name in os.environ}
    versions = {name: version(name) for name in names}
    write_answer(job, versions=versions, environment=settings, peak=peak_bytes(), **answer)


if __name__ == "__main__":
    read = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    {"train": train, "prepare": prepare}[read["task"]](read)
