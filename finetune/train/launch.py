"""Start the processes of a run, and end with the exit code of the one that failed.

On one machine they are started here, so that rank 0 keeps the terminal; `paddle.distributed.launch` redirects it and
loses exit codes. Over several machines it is used for the rendezvous.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import ArgumentError, FinetuneError, TrainingError, UserError
from finetune.recipe.load import dump_recipe

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 30


def launch(recipe: Recipe, *, nproc: int, nnodes: int, master: str | None) -> None:
    """Run the recipe in nproc processes on each of nnodes machines, and wait.

    Raises:
        ArgumentError: several machines without `--master`.
        FinetuneError: what the first failing process raised, with its exit code.
    """
    if nnodes > 1 and not master:
        raise ArgumentError(
            f"--nnodes {nnodes} was given without --master",
            where="--master",
            fix="Give HOST:PORT of the first machine, the same on all machines.",
        )
    with tempfile.TemporaryDirectory(prefix="finetune-") as scratch:
        folder = Path(scratch)
        job = folder / "recipe.yaml"
        job.write_text(dump_recipe(recipe), encoding="utf-8")
        arguments = [str(job), str(folder)]
        if nnodes > 1:
            launcher = ["-m", "paddle.distributed.launch", "--master", master, "--nnodes", str(nnodes)]
            launcher += ["--nproc_per_node", str(nproc), "--log_dir", str(folder / "log")]
            command = [sys.executable, *launcher, "-m", "finetune.worker", *arguments]
            codes = _wait([subprocess.Popen(command, env=_environment(nproc), start_new_session=True)])
        else:
            codes = _wait(_start(arguments, nproc))
        if any(codes):
            raise _first_error(folder, codes)


def _start(arguments: list[str], nproc: int) -> list[subprocess.Popen]:
    # The paths of this process and not the current folder, which `python -m` would put first: it may be a stranger's.
    code = f"import sys; sys.path[:] = {sys.path!r}; from finetune.worker import end; end()"
    command = [sys.executable, "-I", "-c", code, *arguments]
    ports = _free_ports(nproc + 1)
    endpoints = [f"127.0.0.1:{port}" for port in ports[1:]]
    processes = []
    for rank in range(nproc):
        env = _environment(nproc) | {
            "PADDLE_MASTER": f"127.0.0.1:{ports[0]}",
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_TRAINERS_NUM": str(nproc),
            "PADDLE_GLOBAL_SIZE": str(nproc),
            "PADDLE_GLOBAL_RANK": str(rank),
            "PADDLE_LOCAL_SIZE": str(nproc),
            "PADDLE_LOCAL_RANK": str(rank),
            "PADDLE_NNODES": "1",
            "PADDLE_RANK_IN_NODE": str(rank),
            "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
            "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
            "FLAGS_selected_gpus": str(rank),
        }
        # In a session of its own, Ctrl-C reaches it once, forwarded, and not a second time from the terminal.
        processes.append(subprocess.Popen(command, env=env, start_new_session=True))
    return processes


def _environment(nproc: int) -> dict[str, str]:
    env = dict(os.environ)
    # The cores are shared by the processes of this machine (runtime.py would give all of them to each).
    env.setdefault("MKL_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    env.setdefault("PADDLE_DISTRI_BACKEND", "gloo" if not has_gpu() else "nccl")
    return env


def has_gpu() -> bool:
    """Whether an NVIDIA driver is loaded; asked without importing paddle."""
    return Path("/proc/driver/nvidia/version").exists()


def _wait(processes: list[subprocess.Popen]) -> list[int]:
    """Wait for all; when one fails, or on Ctrl-C, ask the others to stop, and end them if they do not."""

    def forward(signum, frame):
        for process in processes:
            process.send_signal(signum)

    previous = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        deadline = None
        while any(process.poll() is None for process in processes):
            if deadline is None and any(process.poll() for process in processes):
                deadline = time.monotonic() + _GRACE_SECONDS
                for process in processes:
                    process.terminate()
            if deadline is not None and time.monotonic() > deadline:
                for process in processes:
                    process.kill()
            time.sleep(_POLL_SECONDS)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    return [process.returncode for process in processes]


def _first_error(folder: Path, codes: list[int]) -> FinetuneError:
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("error-*.json"))]
    if not reports:
        failed = next(code for code in codes if code)
        return TrainingError(f"a training process ended with code {failed} and without a message")
    # One rank's fault stops the others, so what the user can mend goes first.
    first = min(reports, key=lambda report: (report["exit_code"] != UserError.exit_code, report["time"]))
    kind = UserError if first["exit_code"] == UserError.exit_code else TrainingError
    return kind(first["text"])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
