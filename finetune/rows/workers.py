"""Processes that tokenize: fresh interpreters without paddle, each at the other end of a pipe.

They are started as programs, not through `multiprocessing`, which would run the caller's main module in each of them
and leave them waiting when the caller is killed. A worker that finds the pipe closed ends, so none outlives its parent
by more than the block it is at.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from finetune import errors
from finetune.chat.tokenizer import Tokenizer
from finetune.errors import DataError, TrainingError, UserError
from finetune.rows.encode import Encoder, Result, Settings, Task

MAX_WORKERS = 16
# Blocks sent out or done, but not yet handed on in order, for each worker: what a slow block may hold up.
_AHEAD = 4
_CODE = "import sys; sys.path[:] = {path!r}; from {module} import {name} as run; run({fd})"


def worker_count() -> int:
    """One for each core that this process may use, up to `MAX_WORKERS`."""
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS)


class Worker:
    """A process that runs a function of (connection's file descriptor).

    Args:
        function: A function at the top level of a module; `connect` gives it its end of the pipe.
    """

    def __init__(self, function: Callable[[int], None]):
        self.connection, theirs = Pipe()
        code = _CODE.format(path=sys.path, module=function.__module__, name=function.__name__, fd=theirs.fileno())
        # A core each: the threads of tokenizers and NumPy would only get into each other's way.
        alone = {"TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | alone,
                # Ctrl-C and a manager's SIGTERM reach a whole process group; the parent decides what they mean.
                start_new_session=True,
            )

    def receive(self) -> Any:
        """What the process sends next.

        Raises:
            UserError: what the process raised.
            TrainingError: it ended.
        """
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if kind == "error":
            raise getattr(errors, value[0]).of(value[1])
        if kind == "crash":
            raise RuntimeError(f"in a process that tokenizes:\n{value}")
        return value

    def send(self, value: object) -> None:
        """Send it something; it must be waiting for it, or both sides may wait for ever.

        Raises:
            TrainingError: it ended.
        """
        try:
            self.connection.send(value)
        except OSError:
            raise self._ended() from None

    def _ended(self) -> TrainingError:
        code = self.process.wait()
        if code == -signal.SIGKILL:  # what the kernel sends when memory runs out
            return TrainingError(
                "a process that tokenizes was killed",
                fix="Memory may have run out; then close other programs, or run on a machine with more.",
            )
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return TrainingError(f"a process that tokenizes {how}", fix="Run the same command again.")

    def close(self) -> None:
        """End the process, whatever it is at."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


def connect(fd: int) -> Connection:
    """The worker's end of the pipe. Cluster managers signal every process of a job, of whichever session."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return Connection(fd)


def answer(connection: Connection, make: Callable[[], object]) -> bool:
    """Send what `make` returns, or what it raises; False where the parent is gone or nothing can follow."""
    try:
        message, good = ("value", make()), True
    except UserError as error:
        message, good = ("error", (type(error).__name__, error.faults)), False
    except Exception:  # a fault of the program: the parent shows it
        message, good = ("crash", traceback.format_exc()), False
    try:
        connection.send(message)
    except OSError:
        return False
    return good


def serve(fd: int) -> None:
    """Do tasks until the parent closes the pipe."""
    connection = connect(fd)
    try:
        content, settings = connection.recv()
        encoder = Encoder(Tokenizer.of_content(content), settings)
        while True:
            task = connection.recv()
            if not answer(connection, partial(encoder.encode, task)):
                return
    except (EOFError, OSError):
        return


def encode_all(
    tasks: Iterator[Task | DataError],
    tokenizer: Tokenizer,
    settings: Settings,
    *,
    prepare: Callable[[Task], Task],
    count: int,
) -> Iterator[tuple[Task, Result] | DataError]:
    """Do tasks in several processes and hand the results on in the order of the tasks.

    Args:
        tasks: What to do; errors among them are handed on in their place.
        prepare: Called with each task when it is sent out.
        count: Processes.
    """
    workers: list[Worker] = []
    try:
        for _ in range(count):
            workers.append(Worker(serve))
        content = tokenizer.content()
        for worker in workers:
            worker.send((content, settings))
        yield from _in_order(tasks, workers, prepare)
    finally:
        for worker in workers:
            worker.close()


@dataclass
class _Entry:
    """A task that was sent out, and its result once it is there; or an error in its place."""

    task: Task | DataError
    result: Result | None = None

    @property
    def done(self) -> tuple[Task, Result] | DataError | None:
        if isinstance(self.task, DataError):
            return self.task
        return None if self.result is None else (self.task, self.result)


def _in_order(
    tasks: Iterator[Task | DataError], workers: list[Worker], prepare: Callable[[Task], Task]
) -> Iterator[tuple[Task, Result] | DataError]:
    idle = list(workers)
    busy: dict[Connection, tuple[Worker, _Entry]] = {}
    order: deque[_Entry] = deque()
    upcoming = next(tasks, None)
    while upcoming is not None or order:
        while upcoming is not None and len(order) < _AHEAD * len(workers):
            if isinstance(upcoming, DataError):
                order.append(_Entry(upcoming))
            elif idle:
                # One task at a time: a worker that sends a result reads nothing, and both sides would wait for ever.
                worker, task = idle.pop(), prepare(upcoming)
                worker.send(task)
                order.append(_Entry(task))
                busy[worker.connection] = worker, order[-1]
            else:
                break
            upcoming = next(tasks, None)
        while order and (done := order[0].done) is not None:
            order.popleft()
            yield done
        ready = wait(list(busy)) if order else ()
        for connection in [connection for connection in busy if connection in ready]:
            worker, entry = busy.pop(connection)
            entry.result = worker.receive()
            idle.append(worker)
