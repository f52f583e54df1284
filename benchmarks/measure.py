"""What a worker notes of itself: time, CPU time, memory, threads. Standard library only; used on both sides."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

MATMUL_SHAPE = (1024, 896, 4864)


def peak_bytes() -> int:
    """Most resident memory of this process so far. VmHWM begins anew with each program, unlike ru_maxrss."""
    return _status("VmHWM") * 1024


def thread_count() -> int:
    """Threads alive in this process."""
    return _status("Threads")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Stopwatch:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), cpu_seconds()

    def read(self) -> dict[str, float]:
        """{"wall", "cpu"}."""
        return {"wall": time.perf_counter() - self._wall, "cpu": cpu_seconds() - self._cpu}


class Marks:
    """The moment at which each optimizer step was logged."""

    def __init__(self, job: dict):
        self._watch, self._path = Stopwatch(), job.get("marks")
        self.steps: list[dict] = []

    def add(self, step: int, loss: float) -> None:
        """Note a step."""
        mark = {"step": step, "loss": float(loss), "peak": peak_bytes(), **self._watch.read()}
        self.steps.append(mark)
        if self._path:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(mark) + "\n")


def matmul_gflops(multiply: Callable[[], object], shape: tuple[int, int, int], repeats: int = 7) -> float:
    """Best speed of a matrix product, [m, k] by [k, n]: what the library gets out of this machine just now."""
    m, k, n = shape
    multiply()
    best = float("inf")
    for _ in range(repeats):
        watch = Stopwatch()
        multiply()
        best = min(best, watch.read()["wall"])
    return 2 * m * k * n / best / 1e9


def write_answer(job: dict, **answer) -> None:
    """What the worker hands back."""
    Path(job["output"]).write_text(json.dumps(answer), encoding="utf-8")
