"""Start one side of a case in a fresh process and wait for its answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.folders import ROOT

PEER = Path(__file__).with_name("peer.py")
TIMEOUT = 3600.0
_SAMPLE_SECONDS = 0.25
_UNSET = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "MKL_DEBUG_CPU_TYPE",
    "TOKENIZERS_PARALLELISM",
    "PYTHONPATH",
    "PYTHONDONTWRITEBYTECODE",  # would have every process compile its modules anew
    "FINETUNE_CACHE",
)


class WorkerError(RuntimeError):
    """A side of a case ended badly."""


def reference_python() -> str:
    """The Python that has TRL: FINETUNE_REFERENCE_PYTHON, or that of the environment which `make bench` makes."""
    found = os.environ.get("FINETUNE_REFERENCE_PYTHON") or str(ROOT / ".venv-reference" / "bin" / "python")
    if not Path(found).exists():
        raise WorkerError(
            f"{found} is not there: run `make bench`, or name a Python that has trl in FINETUNE_REFERENCE_PYTHON"
        )
    return found


def run_worker(side: str, job: dict, *, memory: bool = False) -> dict:
    """Run a job and return its answer.

    Args:
        side: ours or peer.
        job: What the worker reads. `output` is filled in.
        memory: As for `run_process`.

    Returns:
        The answer, and `process`: wall and CPU seconds from start to end, children included, and the load average of
        the last minute before and after.

    Raises:
        WorkerError: with the end of what the process wrote to stderr.
    """
    with scratch() as folder:
        job = job | {"output": str(folder / "answer.json")}
        path = folder / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.ours"] if side == "ours" else [reference_python(), str(PEER)]
        process = run_process([*command, str(path)], folder, memory=memory)
        return json.loads(Path(job["output"]).read_text(encoding="utf-8")) | {"process": process}


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for one process: its job, caches and outputs. Beside the models, since /tmp may be memory."""
    parent = ROOT / "outputs" / "benchmarks" / "scratch"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="run-", dir=parent) as folder:
        yield Path(folder)


def environment(folder: Path) -> dict[str, str]:
    """As a user's, with caches that are empty and no network; thread counts are each side's own choice."""
    kept = {name: value for name, value in os.environ.items() if name not in _UNSET}
    caches = {"HF_HOME": f"{folder}/hf", "XDG_CACHE_HOME": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
    return kept | caches


def run_process(command: list[str], folder: Path, watch: Path | None = None, *, memory: bool = False) -> dict:
    """Run a command to its end.

    Args:
        command: Program and arguments.
        folder: Folder for its caches and for what it prints.
        watch: A JSONL file; the time until its first line is whole becomes `first`.
        memory: Watch the memory of all its processes. Counting its pages costs a large process several percent of a
            core, so only where there are several; one process notes its own peak (VmHWM) for nothing.

    Returns:
        {"wall", "cpu", "load_before", "load_after"}, and where asked for "first", seconds, and "peak", the most memory
        in bytes that it and its children were seen to have together, pages that several of them map counted once.

    Raises:
        WorkerError: it ended with another code than 0, or took longer than TIMEOUT.
    """
    log, load = folder / "stderr.txt", os.getloadavg()[0]
    with open(log, "wb") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment(folder), stdout=errors, stderr=errors)
        try:
            first = _first_line(process, watch, started) if watch else None
            status, usage, peak = _wait(process, started, memory)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
    wall = time.perf_counter() - started
    if status != 0:
        raise WorkerError(
            f"{' '.join(command[:3])} ended with code {status}:\n{log.read_text(errors='replace')[-3000:]}"
        )
    times = {
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "load_before": load,
        "load_after": os.getloadavg()[0],
    }
    return times | ({"first": first} if watch else {}) | ({"peak": peak} if memory else {})


def _wait(process: subprocess.Popen, started: float, memory: bool):
    peak, sampled = 0, 0.0
    while time.perf_counter() - started < TIMEOUT:
        if memory and time.perf_counter() - sampled > _SAMPLE_SECONDS:
            peak, sampled = max(peak, tree_bytes(process.pid)), time.perf_counter()
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage, peak
        time.sleep(0.02)
    raise WorkerError(f"no end after {TIMEOUT:.0f} s")


def tree_bytes(pid: int) -> int:
    """Memory of a process and its descendants, shared pages divided among those that map them (PSS)."""
    folder = Path("/proc") / str(pid)
    try:
        rollup = (folder / "smaps_rollup").read_text(encoding="ascii")
        children = " ".join(path.read_text(encoding="ascii") for path in folder.glob("task/*/children")).split()
    except OSError:  # it has ended
        return 0
    own = next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return own + sum(map(tree_bytes, map(int, children)))


def _first_line(process: subprocess.Popen, path: Path, started: float) -> float | None:
    """Seconds until the file holds a whole line; None if the process ends without one."""
    while time.perf_counter() - started < TIMEOUT:
        if path.exists() and b"\n" in path.read_bytes():
            return time.perf_counter() - started
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return None
        time.sleep(0.005)
    return None
