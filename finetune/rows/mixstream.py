"""Streams mixed by weight: one for each source, of which units are taken in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.chat.tokenizer import Tokenizer
from finetune.errors import FinetuneError
from finetune.rows.datafiles import Source
from finetune.rows.dataset import DataReport
from finetune.rows.encode import COUNTS
from finetune.rows.mix import next_source
from finetune.rows.stream import Position, RowStream, StreamSettings


@dataclass(frozen=True)
class MixPosition:
    """Where a rank stands in a mix of streams.

    Attributes:
        parts: Where it stands in each.
        taken: Rows taken of each, which say whose turn it is.
        done: Epochs of each that are done.
    """

    parts: tuple[Position, ...]
    taken: tuple[int, ...]
    done: tuple[float, ...]

    @property
    def epoch(self) -> int:
        """Epochs of the mix that are over: how often each source was gone through at least."""
        return int(min(self.done))


class MixedStream:
    """Streams of several sources as one. After any n rows each source has given its share, to within a unit.

    Attributes:
        report, position, fault: As those of `RowStream`; the position is that of all streams.
    """

    def __init__(self, streams: Sequence[RowStream], weights: Sequence[float]):
        self.streams, self.shares = list(streams), [weight / sum(weights) for weight in weights]
        self.fault: FinetuneError | None = None
        self.report = DataReport(files=[file for stream in streams for file in stream.report.files])
        self.position = self._before = _start(len(streams))
        # By the unit's number in the whole: the stream, and its number there.
        self._units: dict[int, tuple[int, int]] = {}
        self._count = 0

    def start(self, state: dict[str, Any] | None) -> None:
        """Begin to work ahead, from the beginning or from the position that a checkpoint holds as plain values."""
        parts: Sequence[dict[str, Any] | None] = [None] * len(self.streams)
        if state is not None:
            parts = state["parts"]
            positions = tuple(Position(**part) for part in state["parts"])
            self.position = MixPosition(positions, tuple(state["taken"]), tuple(state["done"]))
        for stream, part in zip(self.streams, parts, strict=True):
            stream.start(part)

    def close(self) -> None:
        """End the workers."""
        for stream in self.streams:
            stream.close()

    def take(self, count: int) -> tuple[list[int], float]:
        """As `RowStream.take`."""
        turns: list[int] = []
        taken = list(self.position.taken)
        for _ in range(count):
            number = next_source(self.shares, taken)
            # Nothing is taken before all units are at hand: a fault may end the step.
            taken[number] += self.streams[number].rows_ahead(turns.count(number))
            turns.append(number)
        done, units = list(self.position.done), {}
        for number in sorted(set(turns)):
            numbers, done[number] = self.streams[number].take(turns.count(number))
            units[number] = iter(numbers)
        self._units = {self._count + i: (number, next(units[number])) for i, number in enumerate(turns)}
        self._count += count
        self._before = self.position
        self.position = MixPosition(tuple(stream.position for stream in self.streams), tuple(taken), tuple(done))
        self._sum_up()
        return list(self._units), min(done)

    def put_back(self) -> None:
        """As `RowStream.put_back`."""
        self.position = self._before

    def _sum_up(self) -> None:
        reports = [stream.report for stream in self.streams]
        for name in ("read", "kept", "tokens", "supervised_tokens", *COUNTS):
            setattr(self.report, name, sum(getattr(report, name) for report in reports))
        self.report.longest = max(report.longest for report in reports)
        self.report.notes = [note for report in reports for note in report.notes]

    def pack(self, unit: int) -> list[int]:
        """The rows of a unit of the step that was taken last, as `self[row]` takes them."""
        number, own = self._units[unit]
        return [row * len(self.streams) + number for row in self.streams[number].pack(own)]

    def __getitem__(self, row: int) -> Any:
        own, number = divmod(row, len(self.streams))
        return self.streams[number][own]


def _start(count: int) -> MixPosition:
    return MixPosition((Position(),) * count, (0,) * count, (0.0,) * count)


def open_stream(
    sources: Sequence[Source], tokenizer: Tokenizer, settings: StreamSettings, base: Path | None = None
) -> RowStream | MixedStream:
    """The stream of all sources: one after the other, or mixed where they have weights.

    Raises:
        DataError: a source names no file.
    """
    weights = [source.weight for source in sources if source.weight is not None]
    if len(weights) < len(sources):
        return RowStream(sources, tokenizer, settings, base)
    return MixedStream([RowStream([source], tokenizer, settings, base) for source in sources], weights)
