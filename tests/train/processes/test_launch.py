"""Runs of several processes: how they start alike, and how all of them end."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.errors import ArgumentError
from finetune.recipe.load import load_recipe
from finetune.train.checkpoint import list_steps
from finetune.train.preflight import settle
from finetune.train.prepare import prepare
from finetune.train.processes.parallel import World
from finetune.train.resume import find_start
from tests.runs import finetune, metrics, write_recipe


class Two(World):
    """Rank 0 of two, the other of which says something else where JSON values are gathered."""

    other: object = None

    def gather(self, value):
        return [value, value if Two.other is None else Two.other]

    def barrier(self) -> None:
        pass


def test_processes_that_would_not_start_alike_are_refused(tmp_path, tiny_folder, monkeypatch):
    recipe = write_recipe(tmp_path, tiny_folder, save_steps=2)
    assert finetune("train", recipe) == 0
    prepared = prepare(settle(load_recipe(recipe, ["training.output_dir=" + str(tmp_path / "run")])))
    start = find_start(prepared, Two(0, 2))
    assert start.step == 4
    for other, what in (([0, "anything"], "steps 0, 4"), ([4, "anything"], "different recipes, data or models")):
        monkeypatch.setattr(Two, "other", other)
        with pytest.raises(ArgumentError, match=f"{tmp_path / 'run'}: the processes .* {what}.* shared disk"):
            find_start(prepared, Two(0, 2))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen | None = None, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ranks(parent: int) -> list[int]:
    """The processes that a process has started."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def hear_all() -> None:
    """Undo what a run would leave as it finds it: shells ignore SIGINT in what they start behind, nohup SIGHUP."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


@pytest.fixture
def start_two(tmp_path, tiny_folder) -> Iterator[Callable[[], tuple[subprocess.Popen, Path]]]:
    """A function that starts a long run of two processes; what of it is left at the end of the test is killed."""
    started: list[subprocess.Popen] = []

    def start() -> tuple[subprocess.Popen, Path]:
        recipe = write_recipe(tmp_path, tiny_folder, max_steps=100_000)
        command = [sys.executable, "-m", "finetune", "train", str(recipe), "--nproc", "2"]
        outputs = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, **outputs, text=True, preexec_fn=hear_all))
        return started[0], tmp_path / "run"

    yield start
    for pid in [pid for process in started if process.poll() is None for pid in (*ranks(process.pid), process.pid)]:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def training(start_two) -> tuple[subprocess.Popen, Path]:
    """Two processes with some steps behind them."""
    process, run = start_two()
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) > 2, process)
    return process, run


def is_free(run: Path) -> bool:
    """Whether nobody holds the run's lock."""
    with open(run / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_all_with_a_checkpoint_and_the_manifest_says_so(training, signum):
    process, run = training
    process.send_signal(signum)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "\nstopped at step" in said and "a checkpoint is saved" in said and "Traceback" not in said
    assert json.loads((run / "manifest.json").read_text())["status"] == "stopped"
    assert list_steps(run / "checkpoints") == [metrics(run)[-1]["step"]]


def test_processes_whose_parent_was_killed_save_and_end(training):
    process, run = training
    children = ranks(process.pid)
    assert len(children) == 2
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: is_free(run) and not any(Path(f"/proc/{pid}/cmdline").exists() for pid in children), seconds=30)
    assert list_steps(run / "checkpoints")


def test_a_second_signal_ends_processes_that_wait_for_each_other(training):
    process, run = training
    os.kill(ranks(process.pid)[1], signal.SIGSTOP)
    time.sleep(0.5)  # the other one now waits for it
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "\nstopped; nothing was saved since the last checkpoint" in said and "Traceback" not in said
    assert is_free(run)


@pytest.mark.parametrize("pause", [0.0, 0.3, 1.5])
def test_ctrl_c_while_the_processes_load_is_one_message(start_two, pause):
    process, run = start_two()
    wait_for(lambda: len(ranks(process.pid)) == 2, process)
    time.sleep(pause)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in said and "stopped" in said and "error:" not in said
    assert not list_steps(run / "checkpoints") or "a checkpoint is saved" in said
