"""Requests of many clients on one model: one thread decodes, requests join and leave between two tokens."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace

from finetune.compute.cache import capacity_for
from finetune.console import say
from finetune.errors import FinetuneError
from finetune.infer.engine import Batch, Engine
from finetune.infer.prefix import PrefixCache
from finetune.infer.row import Output, Request, Row
from finetune.infer.sampling import TokenLogprob
from finetune.serve.metrics import Metrics

# Positions of the cache, per row of a full batch. Long rows share the same memory: fewer of them run together.
_POSITIONS_PER_ROW = 2048
# While others are answered, a prompt is read in pieces that take as long as so many of their tokens ...
_STEPS_PER_PIECE = 3
# ... but of no fewer tokens than these, and of no more than those, as long as it is not known how fast they are read.
_LEAST_PIECE, _FIRST_PIECE = 16, 64
# Short prompts that are read together have no more tokens than this.
_TOGETHER = 512
# A row is let in only with this much room for its answer, so that it is not put back at once.
_HEADROOM = 128


class QueueFull(Exception):
    """Too many requests wait already."""


class ServerClosed(Exception):
    """The server is stopping and takes no more work."""


@dataclass(frozen=True)
class Event:
    """News of one answer.

    Attributes:
        prompt, sample: Which of the ticket's requests, and which of its samples.
        text: What is new; of an answer that is not streamed, the whole.
        logprobs: The new tokens' log-probabilities and where their text begins.
        output: The whole answer, with the last event.
        prompt_logprobs: As the row's.
    """

    prompt: int
    sample: int
    text: str
    logprobs: list[tuple[TokenLogprob, int]]
    output: Output | None
    prompt_logprobs: list[TokenLogprob]


@dataclass(eq=False)
class Ticket:
    """What one client asked for, and the channel on which its answers come.

    Attributes:
        rows: How many answers.
        streaming: Whether news are wanted before an answer is whole.
        left: How many answers the engine has not finished.
    """

    rows: int
    streaming: bool
    left: int = field(init=False)
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    started: bool = False
    _news: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.left = self.rows

    async def events(self) -> AsyncIterator[Event]:
        """Everything that happens until all answers are whole.

        Raises:
            FinetuneError: the engine failed.
            ServerClosed: the server stopped first.
        """
        left = self.rows
        while left:
            news = await self._news.get()
            if isinstance(news, Exception):
                raise news
            left -= news.output is not None
            yield news

    def put(self, news: Event | Exception) -> None:
        self._news.put_nowait(news)


class Scheduler:
    """Continuous batching over an engine.

    Args:
        max_batch: Most rows decoded together.
        max_queue: Most rows that wait for a place.
        prefix_positions: Most positions of prompts and answers that are remembered, for prompts that begin alike.
        max_positions: Most positions of the cache, rows times longest row; at least one row of the model's whole
            context always fits. Where running rows outgrow it, the youngest is put back into the queue and read again
            later.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        *,
        max_batch: int,
        max_queue: int,
        prefix_positions: int = 0,
        max_positions: int | None = None,
    ):
        self.engine, self.metrics = engine, metrics
        self.max_batch, self.max_queue = max_batch, max_queue
        self.max_positions = max(max_positions or max_batch * _POSITIONS_PER_ROW, capacity_for(engine.context))
        # A request's index is (its ticket, its number there).
        self._waiting: deque[Request] = deque()
        self._paused: deque[Row] = deque()
        self._open: set[Ticket] = set()
        self._prefixes = PrefixCache(prefix_positions) if prefix_positions else None
        self._batch = Batch(engine, self._prefixes)
        self._pace = _Pace()
        self._joining = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    # -- for the event loop ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin, and send news to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Finish the token at hand and end. Who still waits is told."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def running(self) -> int:
        """Rows being decoded."""
        return len(self._batch.rows) + self._joining + len(self._batch.entering)

    @property
    def queued(self) -> int:
        """Rows that wait for a place."""
        return sum(request.sampling.n for request in list(self._waiting)) + len(self._paused)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, requests: list[Request], *, streaming: bool) -> Ticket:
        """Queue requests, all or none.

        Raises:
            QueueFull, ServerClosed.
        """
        ticket = Ticket(sum(request.sampling.n for request in requests), streaming)
        with self._changed:
            if self._stopping:
                raise ServerClosed
            if self.running + self.queued + ticket.rows > self.max_batch + self.max_queue:
                raise QueueFull
            self._open.add(ticket)
            self._waiting.extend(replace(request, index=(ticket, i)) for i, request in enumerate(requests))
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Give up what is not answered yet. The rows leave before the next token."""
        with self._changed:
            ticket.cancelled = True
            self._open.discard(ticket)
            self._waiting = deque(request for request in self._waiting if request.index[0] is not ticket)
            self._changed.notify()

    # -- for the engine's thread -----------------------------------------------------------------------------------

    def _work(self) -> None:
        with self.engine.evaluating():
            while True:
                with self._changed:
                    while not (self._waiting or self._paused or self._rows() or self._stopping):
                        self._changed.wait()
                    if self._stopping:
                        return self._fail(ServerClosed())
                    gone = [row for row in self._rows() if _ticket(row).cancelled]
                    self._paused = deque(row for row in self._paused if not _ticket(row).cancelled)
                try:
                    self._turn(gone)
                except Exception as error:
                    self._fail(_described(error))

    def _turn(self, gone: list[Row]) -> None:
        """One token for every row, after those who leave and those who come, and a piece of a prompt."""
        batch = self._batch
        batch.drop(gone)
        with self._changed:
            resumed, joining = self._admit()
            self._joining = len(resumed) + sum(request.sampling.n for request in joining)
        batch.resume(resumed)
        for group in _groups(joining):
            batch.begin(group)
        self._joining = 0
        self.metrics.prompt_tokens.inc(sum(len(request.prompt) for request in joining))
        self.metrics.reused_tokens.inc(batch.reused)
        batch.reused = 0
        if batch.entering:
            started = time.monotonic()
            batch.read(self._pace.piece if batch.rows else None)
            self._pace.saw_piece(batch.tokens_read, time.monotonic() - started)
            self._report(batch.started)
        self._make_room()
        if batch.rows:
            decoded, started = list(batch.rows), time.monotonic()
            batch.step()
            self._pace.saw_step(time.monotonic() - started)
            self._report(decoded)

    def _rows(self) -> list[Row]:
        """All rows that have a place."""
        return self._batch.rows + self._batch.entering

    def _admit(self) -> tuple[list[Row], list[Request]]:
        """Who gets a place now: rows that were put back first, then the queue in its order."""
        longest = max((_length(row) for row in self._rows()), default=0)
        rows = len(self._rows())
        resumed: list[Row] = []
        joining: list[Request] = []

        def fits(length: int, count: int) -> bool:
            nonlocal longest, rows
            capacity = capacity_for(max(longest, length) + _HEADROOM)
            if rows and (rows + count > self.max_batch or (rows + count) * capacity > self.max_positions):
                return False
            longest, rows = max(longest, length), rows + count
            return True

        while self._paused and fits(_length(self._paused[0]), 1):
            resumed.append(self._paused.popleft())
        while not self._paused and self._waiting and fits(*_size(self._waiting[0])):
            joining.append(self._waiting.popleft())
        return resumed, joining

    def _make_room(self) -> None:
        """Put the youngest rows back where the next token would outgrow the cache."""
        rows, entering = list(self._batch.rows), self._batch.entering
        out: list[Row] = []
        while len(rows) > 1:
            capacity = capacity_for(max(_length(row) for row in rows + entering) + 1)
            if (len(rows) + len(entering)) * capacity <= self.max_positions:
                break
            out.append(rows.pop())
        self._batch.drop(out)
        with self._changed:
            self._paused.extendleft(out)

    def _report(self, rows: list[Row]) -> None:
        news: list[tuple[Ticket, Event | Exception]] = []
        for row in rows:
            ticket, prompt = row.request.index
            if row.error is not None:
                self.cancel(ticket)
                ticket.left = 0
                news.append((ticket, _described(row.error)))
            if ticket.cancelled:
                continue
            if not ticket.started:
                ticket.started = True
                self.metrics.first_token_seconds.observe(time.monotonic() - ticket.submitted)
            if ticket.streaming or row.finish_reason is not None:
                text, logprobs = row.new_text(), row.new_logprobs()
                output = row.output() if row.finish_reason is not None else None
                if output is not None:
                    self._finish(ticket)
                if text or logprobs or output:
                    news.append((ticket, Event(prompt, row.sample, text, logprobs, output, row.prompt_logprobs)))
        self.metrics.generated_tokens.inc(sum(bool(row.tokens) for row in rows))
        self._send(news)

    def _send(self, news: list[tuple[Ticket, Event | Exception]]) -> None:
        def hand_out() -> None:
            for ticket, item in news:
                ticket.put(item)

        if news and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(hand_out)

    def _finish(self, ticket: Ticket) -> None:
        ticket.left -= 1
        if not ticket.left:
            with self._changed:
                self._open.discard(ticket)

    def _fail(self, error: Exception) -> None:
        """Tell everyone whose answer is not whole, and start from nothing."""
        with self._changed:
            tickets = list(self._open)
            self._open.clear()
            self._waiting.clear()
            self._paused.clear()
            self._batch, self._joining = Batch(self.engine, self._prefixes), 0
            for ticket in tickets:
                ticket.left = 0
        self._send([(ticket, error) for ticket in tickets])


class _Pace:
    """How many tokens of a prompt take as long as _STEPS_PER_PIECE steps of the others, as measured while it runs."""

    def __init__(self) -> None:
        self._step = self._token = 0.0

    @property
    def piece(self) -> int:
        if not self._step or not self._token:
            return _FIRST_PIECE
        return max(_LEAST_PIECE, int(_STEPS_PER_PIECE * self._step / self._token))

    def saw_step(self, seconds: float) -> None:
        self._step = _blended(self._step, seconds)

    def saw_piece(self, tokens: int, seconds: float) -> None:
        self._token = _blended(self._token, seconds / tokens)


def _blended(before: float, now: float) -> float:
    return 0.7 * before + 0.3 * now if before else now


def _groups(requests: list[Request]) -> Iterator[list[Request]]:
    """Requests whose prompts are read together: neighbours of few tokens in all, so that none waits for a long one."""
    group: list[Request] = []
    tokens = 0
    for request in requests:
        if group and tokens + len(request.prompt) > _TOGETHER:
            yield group
            group, tokens = [], 0
        group.append(request)
        tokens += len(request.prompt)
    if group:
        yield group


def _described(error: Exception) -> FinetuneError:
    """What clients are told; the server's log has the rest."""
    if isinstance(error, FinetuneError):
        return error
    say("".join(traceback.format_exception(error)), style="red")
    return FinetuneError(f"the engine failed ({type(error).__name__})", fix="The server's log says where.")


def _ticket(row: Row) -> Ticket:
    return row.request.index[0]


def _length(row: Row) -> int:
    return len(row.request.prompt) + len(row.tokens)


def _size(request: Request) -> tuple[int, int]:
    return len(request.prompt), request.sampling.n
