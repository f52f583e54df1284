"""Start the processes of a run, and end with the exit code of the one that failed.

On one machine they are started here, so that rank 0 keeps the terminal; `paddle.distributed.launch` redirects it and
loses exit codes. Over several machines it is used for the rendezvous.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import ArgumentError, FinetuneError, Interrupted, TrainingError, UserError
from finetune.model.runtime import gpu_count
from finetune.recipe.load import dump_recipe

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 30
_AT_ONCE_SECONDS = 2
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

STOPPED_UNSAVED = (
    "stopped; nothing was saved since the last checkpoint. To go on from it, run it again with "
    "training.resume_from_checkpoint=auto (the default)."
)


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
        if nnodes > 1 and master is not None:
            launcher = ["-m", "paddle.distributed.launch", "--master", master, "--nnodes", str(nnodes)]
            launcher += ["--nproc_per_node", str(nproc), "--log_dir", str(folder / "log")]
            commands = [
                ([sys.executable, *launcher, "-m", "finetune.train.processes.worker", *arguments], _environment(nproc))
            ]
        else:
            commands = _commands(arguments, nproc)
        with _Processes() as processes:
            for command, env in commands:
                processes.start(command, env)
            codes = processes.wait()
        if any(codes) or not codes:
            raise _first_error(folder, codes, asked=processes.asked > 0)


def _commands(arguments: list[str], nproc: int) -> list[tuple[list[str], dict[str, str]]]:
    """Command line and environment of each process on this machine."""
    # The paths of this process and not the current folder, which `python -m` would put first: it may be a stranger's.
    code = f"import sys; sys.path[:] = {sys.path!r}; from finetune.train.processes.worker import end; end()"
    command = [sys.executable, "-I", "-c", code, *arguments]
    ports = _free_ports(nproc + 1)
    endpoints = [f"127.0.0.1:{port}" for port in ports[1:]]
    commands = []
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
        commands.append((command, env))
    return commands


def _environment(nproc: int) -> dict[str, str]:
    env = dict(os.environ)
    # The cores are shared by the processes of this machine (runtime.py would give all of them to each).
    env.setdefault("MKL_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    env.setdefault("PADDLE_DISTRI_BACKEND", "nccl" if gpu_count() else "gloo")
    return env


class _Processes:
    """Processes that end with this one, and that are asked to stop when it is.

    Attributes:
        asked: How many signals asked to stop.
    """

    def __init__(self):
        self.asked = 0
        self._all: list[subprocess.Popen] = []
        self._deadline = math.inf
        self._libc = ctypes.CDLL(None)  # opened here: a forked child does as little as it can

    def __enter__(self) -> _Processes:
        # A signal that is ignored, as nohup does with SIGHUP, stays so.
        signums = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
        self._previous = {signum: signal.signal(signum, self._forward) for signum in signums}
        return self

    def __exit__(self, *error) -> None:
        for process in self._all:
            process.kill()  # of those that have ended, it does nothing
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def start(self, command: list[str], env: dict[str, str]) -> None:
        """Start one, unless a signal has asked to stop."""
        if self.asked:
            return
        parent = os.getpid()

        def tie() -> None:
            self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it ended before the tie was made
                os._exit(1)

        # In a session of its own, Ctrl-C reaches it once, forwarded, and not a second time from the terminal.
        self._all.append(subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=tie))

    def wait(self) -> list[int]:
        """Wait for all; when one fails, or on Ctrl-C, ask the others to stop, and end them if they do not."""
        if self.asked:  # perhaps before the last one was among those that are told
            self._send(signal.SIGTERM)
        failed = False
        while any(process.poll() is None for process in self._all):
            if not failed and any(process.poll() for process in self._all):
                failed = True
                self._deadline = min(self._deadline, time.monotonic() + _GRACE_SECONDS)
                self._send(signal.SIGTERM)
            if time.monotonic() > self._deadline:
                self._send(signal.SIGKILL)
            time.sleep(_POLL_SECONDS)
        return [process.returncode for process in self._all]

    def _forward(self, signum, frame) -> None:
        self.asked += 1
        if self.asked > 1:  # one that waits for another rank never gets to its handler
            self._deadline = min(self._deadline, time.monotonic() + _AT_ONCE_SECONDS)
        # Not what came: SIGINT would have each process that still loads print a traceback.
        self._send(signal.SIGTERM)

    def _send(self, signum: int) -> None:
        for process in self._all:
            process.send_signal(signum)


def _first_error(folder: Path, codes: list[int], asked: bool) -> FinetuneError:
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("error-*.json"))]
    if not reports and asked:
        return Interrupted(STOPPED_UNSAVED)
    if not reports:
        failed = next(code for code in codes if code)
        if failed == -signal.SIGKILL:
            what = "a training process was killed, as the system does where memory runs out"
            return TrainingError(what, fix="The same command with --dry-run names the cheapest change that takes less.")
        return TrainingError(f"a training process ended with code {failed} and without a message")
    # One rank's fault stops the others, so what the user can mend goes first.
    first = min(reports, key=lambda report: (report["exit_code"] != UserError.exit_code, report["time"]))
    if first["stopped"]:
        return Interrupted(first["text"])
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
