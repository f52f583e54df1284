"""Rows that are tokenized while the model trains, for data that is too large to be prepared beforehand.

A process of its own goes through the files, block by block, over and over. Of each block it takes this rank's share of
the rows, makes tokens of them, packs and shuffles them within the block, and stays a few blocks ahead of the step. All
of it depends on the data, the settings and the block's number alone, so that a position in the stream is enough to go
on from: what was used before is read again, and compared with what it was, but not tokenized.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from finetune.chat.tokenizer import Tokenizer
from finetune.errors import DataError, FinetuneError
from finetune.rows.block import Block
from finetune.rows.datafiles import DataFile, PlainSource, Source
from finetune.rows.dataset import DataReport, FileReport, add_named, length_notes, named_notes
from finetune.rows.encode import Encoder, Named, Result, Settings, Task
from finetune.rows.inputs import Inputs
from finetune.rows.plan import Packs, Step, pack
from finetune.rows.table import Dataset, PairDataset, Table, dataset_of
from finetune.rows.workers import Worker, answer, connect

BLOCK_BYTES = 4 * 2**20
"""Text in a block, within which rows are shuffled and packed: some 4,500 rows of alpaca's kind."""

# Blocks that wait for the step, beside the one that is being used and the one in the making.
_AHEAD = 2
_ROW_BITS = 32


@dataclass(frozen=True)
class Position:
    """Where a rank stands in the stream.

    Attributes:
        epoch, block: The block of the unit that was last taken, from 0.
        unit: How many units of the block were taken.
        digest: SHA-256 of the rank's rows of this epoch, those of the block included; None before the first block.
        form: The form of the rows before the block, in its source.
        whole: SHA-256 of an epoch; None in the first.
    """

    epoch: int = 0
    block: int = 0
    unit: int = 0
    digest: str | None = None
    form: str = "auto"
    whole: str | None = None


@dataclass(frozen=True)
class StreamSettings:
    """What the stream depends on beside the data and the tokenizer.

    Attributes:
        encode: How rows become tokens.
        room: Tokens of a pack; None does not pack.
        share: (r, n): take every n-th row, from the r-th on.
        block_bytes: Text in a block.
    """

    encode: Settings
    room: int | None
    seed: int
    shuffle: bool
    share: tuple[int, int]
    block_bytes: int = BLOCK_BYTES


@dataclass(frozen=True)
class _Block:
    """One block as the worker sends it. start, end: which share of the epoch it is, from 0 to 1."""

    position: Position
    result: Result
    rows: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    start: float
    end: float


# -- the worker --------------------------------------------------------------------------------------------------


def run(fd: int) -> None:
    """Send blocks for ever, or until something is wrong or the parent closes the pipe."""
    connection = connect(fd)
    try:
        content, settings, sources, base, start = connection.recv()
        made = _Maker(Tokenizer.of_content(content), settings, sources, base).blocks(start)
        while answer(connection, lambda: next(made)):
            pass
    except (EOFError, OSError):
        return


class _Maker:
    """Reads and tokenizes, in the worker."""

    def __init__(self, tokenizer: Tokenizer, settings: StreamSettings, sources: Sequence[Source], base: Path | None):
        self.encoder = Encoder(tokenizer, settings.encode)
        self.settings = settings
        self.inputs = Inputs(sources, base, "data.train")
        self.inputs.check_found()
        self.files = self.inputs.files
        self.states = {file.name: file.state() for file in self.files}
        self.size = max(1, self.inputs.size)

    def blocks(self, start: Position) -> Iterator[_Block]:
        """All blocks from a position on.

        Raises:
            DataError: rows are wrong; a file changed; what was read before the position is no longer what it was.
        """
        epoch, whole = start.epoch, start.whole
        while True:
            digest, done, units = hashlib.sha256(), 0, 0
            form, source = "auto", -1
            for number, task in enumerate(self._tasks()):
                digest.update(_digest(task.block, self.settings.share))
                begin, done = done, done + task.block.size
                if task.source != source:
                    form, source = task.format, task.source
                at_start = (epoch, number) == (start.epoch, start.block)
                if epoch == start.epoch and number < start.block:
                    continue
                if at_start and start.digest is not None:
                    if digest.hexdigest() != start.digest:
                        raise _changed_since()
                    form = start.form
                position = Position(epoch, number, 0, digest.hexdigest(), form, whole)
                block = self._block(task, position, begin, done)
                form = block.result.form
                units += len(block.starts) - 1
                yield block
            if whole is not None and digest.hexdigest() != whole:
                raise DataError(
                    "the rows are no longer those of the pass before",
                    where=", ".join(file.name for file in self.files[:3]),
                    fix="Give a streaming run files that nobody writes to.",
                )
            if not units and epoch > start.epoch:
                raise DataError(
                    "no row of the stream can be trained on",
                    where=", ".join(file.name for file in self.files[:3]),
                    fix="Look at them with `finetune preview`; there must be at least one for each process.",
                )
            whole, epoch = digest.hexdigest(), epoch + 1

    def _tasks(self) -> Iterator[Task]:
        """All blocks of an epoch.

        Raises:
            DataError: a file cannot be read, or changed.
        """
        for item in self.inputs.tasks(self.settings.block_bytes, self.settings.share, self._check):
            if isinstance(item, DataError):
                raise item
            yield item

    def _check(self, file: DataFile) -> None:
        if file.state() != self.states[file.name]:
            raise DataError(
                "the file changed while it was being streamed",
                where=file.name,
                fix="Give a streaming run a file that nobody writes to; a copy, say.",
            )

    def _block(self, task: Task, position: Position, begin: int, end: int) -> _Block:
        result = self.encoder.encode(replace(task, form=position.form))
        for faults in (result.faults, result.too_long):
            if faults.count:
                raise faults.error()
        packs = Packs.single(0)
        if result.part is not None:
            lengths = dataset_of(Table([result.part], [task.name]), self.settings.encode.kind).lengths
            packs = Packs.single(len(lengths)) if self.settings.room is None else pack(lengths, self.settings.room)
        if self.settings.shuffle:
            seed = [self.settings.seed, position.epoch, position.block]
            packs = packs.permuted(np.random.Generator(np.random.PCG64(seed)).permutation(len(packs)))
        shares = [min(1.0, at / self.size) for at in (begin, end)]
        return _Block(position, result, packs.rows, packs.starts, *shares)


def _digest(block: Block, share: tuple[int, int]) -> bytes:
    """SHA-256 of a rank's rows of a block, where they can be told without parsing; else of the whole block.

    A rank whose own rows are good goes on from a block in which another rank's row was mended.
    """
    first, step = share
    if block.kind != "lines" or step == 1:
        return block.sha256()
    lines = [line for line in block.content.split(b"\n") if line.strip()]
    return hashlib.sha256(b"\n".join(lines[first::step])).digest()


def _changed_since() -> DataError:
    return DataError(
        "the rows that were trained on before the checkpoint are no longer what they were",
        where="data.train",
        fix="Undo the change; or, if it mended a row, set training.resume_from_checkpoint to an earlier checkpoint's "
        "folder; or start over with training.resume_from_checkpoint=never.",
    )


# -- the run's side ----------------------------------------------------------------------------------------------


class RowStream:
    """A stream of units: rows, or packs of rows. It stands in for a dataset and its packs.

    A unit is numbered by its place in this process's part of the run; rows of units that lie behind are forgotten.

    Attributes:
        report: What became of the rows so far.
        position: After the units that were taken last; what a checkpoint holds.
        fault: What ended the stream; None while it goes on.

    Raises:
        DataError: a source names no file.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        settings: StreamSettings,
        base: Path | None = None,
    ):
        plain = [PlainSource.of(source) for source in sources]
        self._job = tokenizer, settings, plain, base
        self.settings = settings
        inputs = Inputs(sources, base, "data.train")
        inputs.check_found()
        self.files = inputs.names
        self.report = DataReport(files=[FileReport(name, None, None) for name in self.files])
        self._named: dict[str, Named] = {}
        self.fault: FinetuneError | None = None
        self.position = self._before = Position()
        self._worker: Worker | None = None
        self._queue: queue.Queue[_Block | Exception] = queue.Queue(_AHEAD)
        self._closed = threading.Event()
        # By serial number: the block, its dataset, its packs. Units that were not taken: (serial, index in the block).
        self._blocks: dict[int, tuple[_Block, Dataset | PairDataset | None, Packs]] = {}
        self._waiting: deque[tuple[int, int]] = deque()
        self._units: dict[int, tuple[int, int]] = {}
        self._serial = self._taken = self._skip = 0

    def start(self, state: dict[str, Any] | None) -> None:
        """Begin to work ahead, from the beginning or from the position that a checkpoint holds as plain values."""
        tokenizer, settings, sources, base = self._job
        position = Position() if state is None else Position(**state)
        self.position, self._skip = position, position.unit
        self._worker = worker = Worker(run)
        worker.send((tokenizer.content(), settings, sources, base, position))
        threading.Thread(target=self._receive, args=(worker,), name="stream", daemon=True).start()

    def _receive(self, worker: Worker) -> None:
        while True:
            try:
                item = worker.receive()
            except Exception as error:  # raised where the rows are asked for
                item = error
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.5)
                    break
                except queue.Full:
                    continue
            if self._closed.is_set() or isinstance(item, Exception):
                return

    def close(self) -> None:
        """End the worker."""
        self._closed.set()
        if self._worker is not None:
            self._worker.close()

    def take(self, count: int) -> tuple[list[int], float]:
        """The numbers of the next units, and the epochs done with them. Waits if the worker is behind.

        Raises:
            DataError: rows are wrong, or a file changed. Nothing was taken then.
        """
        self._wait_for(count)
        taken = [self._waiting.popleft() for _ in range(count)]
        for serial in [serial for serial in self._blocks if serial < taken[0][0]]:
            del self._blocks[serial]
        self._units = dict(enumerate(taken, self._taken))
        self._taken += count
        serial, index = taken[-1]
        block, _, packs = self._blocks[serial]
        self._before = self.position
        self.position = Position(**asdict(block.position) | {"unit": index + 1})
        done = block.start + (block.end - block.start) * (index + 1) / len(packs)
        return list(self._units), block.position.epoch + done

    def rows_ahead(self, ahead: int) -> int:
        """How many rows the unit has that stands so far ahead of the next one; raises as `take` does."""
        self._wait_for(ahead + 1)
        serial, index = self._waiting[ahead]
        return len(self._blocks[serial][2][index])

    def _wait_for(self, count: int) -> None:
        while len(self._waiting) < count:
            self._add(self._queue.get())

    def put_back(self) -> None:
        """Stand where the stream stood before the last `take`: its units are not used. Nothing can be taken then."""
        self.position = self._before

    def _add(self, item: _Block | Exception) -> None:
        if isinstance(item, Exception):
            self._queue.put(item)  # what follows is the same
            raise item
        rows, packs = None, Packs(item.rows, item.starts)
        if item.result.part is not None:
            rows = dataset_of(Table([item.result.part], self.files), self.settings.encode.kind)
        self._blocks[self._serial] = item, rows, packs
        self._waiting.extend((self._serial, index) for index in range(self._skip, len(packs)))
        self._serial, self._skip = self._serial + 1, 0
        if item.position.epoch == 0:
            self._count(item.result, rows)

    def _count(self, result: Result, rows: Dataset | PairDataset | None) -> None:
        report = self.report
        report.read += result.read
        report.longest = max(report.longest, result.longest)
        for name, count in result.counts.items():
            setattr(report, name, getattr(report, name) + count)
        if rows is not None:
            report.add(rows)
        encode = self.settings.encode
        add_named(self._named, result.named)
        report.notes = length_notes(report, encode.max_length) + named_notes(self._named, self.files)

    # -- as dataset and packs ------------------------------------------------------------------------------------

    def pack(self, unit: int) -> list[int]:
        """The rows of a unit of the step that was taken last, as `self[row]` takes them."""
        serial, index = self._units[unit]
        return [(serial << _ROW_BITS) + row for row in self._blocks[serial][2][index]]

    def __getitem__(self, row: int) -> Any:
        rows = self._blocks[row >> _ROW_BITS][1]
        if rows is None:
            raise IndexError(f"row {row} of a block that has none")
        return rows[row & ((1 << _ROW_BITS) - 1)]


class Stream(Protocol):
    """What gives out units: `RowStream`, or several of them mixed."""

    fault: FinetuneError | None
    report: DataReport

    @property
    def position(self) -> Any:
        """A dataclass of plain values, with the `epoch` that units are taken from."""
        ...

    def start(self, state: dict[str, Any] | None) -> None: ...
    def close(self) -> None: ...
    def take(self, count: int) -> tuple[list[int], float]: ...
    def put_back(self) -> None: ...
    def pack(self, unit: int) -> list[int]: ...
    def __getitem__(self, row: int) -> Any: ...


class StreamPacks:
    """The units of a stream, indexed as `Packs` are."""

    def __init__(self, stream: Stream):
        self._stream = stream

    def __getitem__(self, unit: int) -> list[int]:
        return self._stream.pack(int(unit))


@dataclass(frozen=True)
class StreamPlan:
    """A run over a stream: each step takes the next units of each rank's share; see `plan.Plan`."""

    stream: Stream
    batch_size: int
    accumulation: int
    total_steps: int
    may_fail: ClassVar[bool] = True

    def steps(self, start: int = 0) -> Iterator[Step]:
        """The steps from `start` on, which is where the stream stands. One with a fault is the last."""
        for number in range(start, self.total_steps):
            epoch = self.stream.position.epoch
            try:
                units, done = self.stream.take(self.batch_size * self.accumulation)
            except FinetuneError as error:
                self.stream.fault = error
                yield Step(number, epoch, float(epoch), [], failed=True)
                return
            rows = np.array(units, np.int64)
            batches = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
            yield Step(number, epoch, done, batches)

    def put_back(self) -> None:
        """Let a checkpoint hold the position before the last step, which this rank could make and another could not."""
        self.stream.put_back()
