"""Processes that prepare rows: what they load, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from finetune.chat.tokenizer import Tokenizer
from finetune.errors import TrainingError
from finetune.rows.workers import Worker, answer, connect
from tests.chat.cases import said

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def many_rows(tmp_path) -> Path:
    """20,000 rows, more than a test waits for."""
    path = tmp_path / "a.jsonl"
    rows = ({"messages": said("q" * (i % 7 + 1), f"answer {i} " + "x" * (i % 23))} for i in range(20_000))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def report_modules(fd: int) -> None:
    connection = connect(fd)
    from finetune.rows import workers

    assert workers.serve
    answer(connection, lambda: sorted(sys.modules))


def end_at_once(fd: int) -> None:
    os._exit(7)


def test_workers_load_no_paddle():
    worker = Worker(report_modules)
    try:
        modules = worker.receive()
    finally:
        worker.close()
    assert "tokenizers" in modules and "finetune.rows.encode" in modules
    assert not {"paddle", "paddlenlp", "datasets", "torch", "typer"} & set(modules)


def test_a_worker_that_dies_is_an_error():
    worker = Worker(end_at_once)
    try:
        with pytest.raises(TrainingError, match="ended with code 7"):
            worker.receive()
    finally:
        worker.close()


def send_sigterm(fd: int) -> None:
    """What a cluster's manager does, which signals all processes of a job."""
    connection = connect(fd)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    answer(connection, lambda: "here")
    connection.recv()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def be_killed(fd: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_leave_signals_to_the_parent_and_only_a_kill_is_taken_for_lack_of_memory():
    worker, killed = Worker(send_sigterm), Worker(be_killed)
    try:
        assert worker.receive() == "here"
        worker.send(None)
        with pytest.raises(TrainingError, match="ended by SIGTERM. Run the same command again"):
            worker.receive()
        with pytest.raises(TrainingError, match="was killed. Memory may have run out"):
            killed.receive()
    finally:
        worker.close()
        killed.close()


def test_a_signal_to_the_process_group_ends_the_work_without_a_word_on_memory(tiny_tokenizer_folder, many_rows):
    command = [sys.executable, "-c", preparing(many_rows, tiny_tokenizer_folder, handle="SystemExit(143)")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **pipes) as process:
        process.stdout.readline()  # the first block is done
        os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert said == ""


def preparing(data: Path, tokenizer: Path, handle: str = "KeyboardInterrupt()") -> str:
    """A program that prepares rows in two processes and prints its progress; SIGTERM raises `handle` in it."""
    code = f"""
    import signal
    from types import SimpleNamespace as Of
    from finetune.rows import dataset, inputs
    from finetune.chat.tokenizer import Tokenizer

    def stop(*_):
        raise {handle}

    signal.signal(signal.SIGTERM, stop)
    dataset.LARGE_BYTES = 0
    dataset.worker_count = lambda: 2
    read_blocks = inputs.read_blocks
    inputs.read_blocks = lambda file, size: read_blocks(file, 20_000)
    source = Of(path={str(data)!r}, format="auto", columns={{}}, split="train", samples=None, weight=None)
    data = Of(max_length=100, overlong="truncate", train_on="responses")
    tokenizer = Tokenizer.from_folder({str(tokenizer)!r})
    dataset.build_dataset([source], tokenizer, data=data, method="sft", progress=lambda *a: print(*a, flush=True))
    """
    return textwrap.dedent(code)


def test_no_worker_outlives_a_killed_parent(tiny_tokenizer_folder, many_rows):
    command = [sys.executable, "-c", preparing(many_rows, tiny_tokenizer_folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        process.stdout.readline()  # the first block is done
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
    assert len(children) == 2
    deadline = time.monotonic() + 30
    while any(_runs(child) for child in children):
        assert time.monotonic() < deadline, "a worker still runs"
        time.sleep(0.1)


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_another_process_gets_the_same_tokenizer(tiny_tokenizer_folder):
    ours = Tokenizer.from_folder(tiny_tokenizer_folder)
    theirs = Tokenizer.of_content(json.loads(json.dumps(ours.content())))
    assert theirs.content() == ours.content()
    messages = said("What is 12 + 30?", "42")
    assert theirs.apply_chat_template(messages) == ours.apply_chat_template(messages)
