"""`python -m benchmarks [CASE ...]`: ours and TRL in turn on this machine; see docs/performance.md."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.cases import CASES
from benchmarks.chart import write_chart
from benchmarks.folders import ROOT, SHAPES
from benchmarks.machine import RESULTS, machine, write_record
from benchmarks.processes import WorkerError, reference_python
from benchmarks.rounds import Settings, say
from benchmarks.tables import plain_table, update_page


def main(arguments: list[str] | None = None) -> int:
    """Run the cases asked for; 0 if each passed, 1 if one failed, 2 without a peer to compare with."""
    asked = _parse(arguments)
    if asked.tables:
        return _write_tables(asked.tables)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worker of the moment is ended too
    try:
        reference_python()
    except WorkerError as error:
        say(str(error))
        return 2
    settings = Settings(
        asked.work.resolve(),
        asked.shape,
        asked.rounds,
        asked.steps,
        asked.all_variants,
        asked.rows,
        tuple(asked.variants),
    )
    names = "-".join(asked.cases) or "all"
    output = asked.output or RESULTS / f"{datetime.now(timezone.utc):%Y-%m-%d-%H%M}-{names}-{asked.shape}.json"
    record = {"machine": machine(), "settings": {"shape": asked.shape, "rounds": asked.rounds}, "cases": {}}
    for name in asked.cases or CASES:
        record["cases"][name] = _run(name, settings)
        write_record(output, record)
    write_chart(output.with_suffix(".svg"), [record])
    print(plain_table(record))
    say(f"written: {output} and {output.with_suffix('.svg').name}")
    return 0 if all(case["passed"] for case in record["cases"].values()) else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all when none is named")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps, of which the first two are not counted")
    parser.add_argument("--shape", choices=SHAPES, default="6l", help="of the training cases' model")
    parser.add_argument("--rows", type=int, default=50_000, help="rows of the preparation case")
    parser.add_argument("--all-variants", action="store_true", help="run each of TRL's variants in every round")
    parser.add_argument("--variants", nargs="+", default=[], metavar="NAME", help="TRL's variants to run, if not all")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "benchmarks", help="where models are made")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<date, time and cases>.json")
    parser.add_argument(
        "--tables",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="run nothing; write docs/performance.md and .svg and the README's table from these files",
    )
    asked = parser.parse_args(arguments)
    if unknown := [name for name in asked.cases if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)} (choose from {', '.join(CASES)})")
    if asked.rounds < 1 or asked.steps < 4:
        parser.error("at least 1 round and 4 steps are needed")
    return asked


def _run(name: str, settings: Settings) -> dict:
    """One case; whatever goes wrong in it is its result."""
    started = time.perf_counter()
    try:
        result = CASES[name](name, settings)
    except Exception as error:
        say(traceback.format_exc())
        last = (str(error).strip().splitlines() or [""])[-1].replace(str(ROOT), ".")
        result = {"passed": False, "error": f"{type(error).__name__}: {last}"}
    return {"shape": settings.shape, "rounds_run": settings.rounds} | result | {"took": time.perf_counter() - started}


def _write_tables(files: list[Path]) -> int:
    records = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    for page in (ROOT / "docs" / "performance.md", ROOT / "README.md"):
        update_page(page, records)
    write_chart(ROOT / "docs" / "performance.svg", records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
