"""Connections: the address, what a client may take its time with, how many there may be, and how the server ends.

uvicorn does the work. It waits without end for a request that comes slowly or an answer that is not taken, and lets an
ending server cut answers off in the middle; what is added here are ends to that.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import resource
import socket
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from finetune.console import say
from finetune.errors import ArgumentError
from finetune.serve.errors import ApiError

GRACE_SECONDS = 30
HEAD_SECONDS = 20
"""For the first line and the headers of a request."""
BODY_SECONDS = 120
"""For its body, once the headers are there."""
UNSENT_SECONDS = 60
"""For a client to take what waits for it, so that the buffer is empty once."""
LAST_SECONDS = 2
"""For last words when the grace is over."""
MOST_CONNECTIONS = 1000
# Connections that the kernel holds until they are accepted, and those that are accepted in one turn of the event loop.
_QUEUE, _AT_ONCE = 128, 4
# Turns of the loop from accepting one connection too many until it is closed, and some to spare.
_TURNS = 8
# Files that the process has open beside connections, and may open for a while.
_OTHER_FILES = 64
_LOG_SECONDS = 60
_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


def listen(host: str, port: int) -> socket.socket:
    """Take the address before the model is loaded, so that one in use is said at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = _Listener(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise ArgumentError(f"the host is not known: {error}", where=f"--host {host}", fix="Use 127.0.0.1.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ArgumentError(
            f"the address cannot be used: {getattr(error, 'strerror', None) or error}",
            where=f"--host {host} --port {port}",
            fix="Choose another port; 0 takes any free one.",
        ) from error
    return listener


def most_connections() -> int:
    """Connections that leave files for everything else, those among them that are accepted to be turned away."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(8, min(MOST_CONNECTIONS, files - _OTHER_FILES - _AT_ONCE * _TURNS))


class _Listener(socket.socket):
    """A socket whose queue is as long as it was, however few connections are accepted at a time.

    asyncio calls both the backlog. It asks nobody whether there is room for what it accepts, so that with a long one
    a flood takes all files before a single connection can be turned away.
    """

    def listen(self, backlog: int = _QUEUE, /) -> None:
        super().listen(_QUEUE)


class Server(uvicorn.Server):
    """uvicorn's server with time limits and an end that leaves nobody without an answer.

    When the signal to end has come, requests being answered have `grace` seconds, or until a second signal. Then
    `on_cut` is called, which must end the rest; LAST_SECONDS later connections are closed, whatever is left.

    Args:
        on_start: Called when connections are taken.
        on_cut: Tells everyone who still waits for an answer that none comes.
    """

    def __init__(
        self,
        app: Any,
        on_start: Callable[[], None],
        on_cut: Callable[[], Awaitable[None]],
        grace: float = GRACE_SECONDS,
    ):
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http=Connection,
                ws="none",
                log_config=None,
                log_level="error",
                access_log=False,
                backlog=_AT_ONCE,
                server_header=False,
            )
        )
        self._on_start, self._on_cut, self._grace = on_start, on_cut, grace
        self._hurried = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        with_others = [logging.getLogger(name) for name in ("uvicorn.error", "asyncio")]
        for logger in with_others:
            if not any(isinstance(handler, _SparseLog) for handler in logger.handlers):
                logger.addHandler(_SparseLog())
                logger.propagate = False
        asyncio.get_running_loop().set_exception_handler(_unhandled)
        await super().startup(sockets)
        if self.started:
            self._on_start()

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.check(now)
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The second signal ends the grace, of whichever kind the two are."""
        self._hurried = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        cutting = asyncio.create_task(self._cut())
        await super().shutdown(sockets)
        cutting.cancel()

    async def _cut(self) -> None:
        await self._until(lambda: self._hurried, self._grace)
        await self._on_cut()
        await self._until(lambda: not self.server_state.connections, LAST_SECONDS)
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.transport.abort()

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            await asyncio.sleep(0.05)


class Connection(H11Protocol):
    """uvicorn's connection, which is looked at once a second."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        # What the client is at, "head" or "body", and since when; None while it waits for its answer.
        self._stage: str | None = "head"
        self._since = time.monotonic()
        self._unsent_since: float | None = None
        if len(self.connections) > most_connections():
            self._refuse(ApiError(503, "Too many connections are open. Try again later.", code="too_many_connections"))

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        stage = {h11.IDLE: "head", h11.SEND_BODY: "body"}.get(self.conn.their_state)
        if stage != self._stage:
            self._stage, self._since = stage, time.monotonic()

    def check(self, now: float) -> None:
        """End what takes too long."""
        if not self.transport.get_write_buffer_size():
            self._unsent_since = None
        elif self._unsent_since is None:
            self._unsent_since = now
        elif now - self._unsent_since > UNSENT_SECONDS:
            self.transport.abort()
        limit = {"head": HEAD_SECONDS, "body": BODY_SECONDS}.get(self._stage or "")
        if limit is not None and now - self._since > limit and not self.transport.is_closing():
            self._refuse(ApiError(408, f"The {self._stage} of the request did not come within {limit} seconds."))

    def shutdown(self) -> None:
        """A request that has not come whole is not waited for."""
        if self._stage == "body" and self.cycle is not None and not self.cycle.response_started:
            self._refuse(stopping())
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "This is not an HTTP request."))

    def _refuse(self, error: ApiError) -> None:
        """Answer in place of the application, and close."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(_raw(error))
        self.transport.close()


def stopping() -> ApiError:
    """What everyone is told whom an ending server does not answer."""
    return ApiError(503, "The server is stopping.", code="server_closed")


def _raw(error: ApiError) -> bytes:
    body = json.dumps(error.body).encode()
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def _unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """No file for a connection is nobody's mistake: asyncio tries again in a second, and a line says it."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        reason = os.strerror(error.errno).lower()
        logging.getLogger("asyncio").error("New connections wait until there is room for them (%s).", reason)
    else:
        loop.default_exception_handler(context)


class _SparseLog(logging.Handler):
    """Writes a message once a minute, however often it comes: a client must not be able to fill a disk."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._said: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        place = f"{record.pathname}:{record.lineno}"
        if now - self._said.get(place, -_LOG_SECONDS) < _LOG_SECONDS:
            return
        self._said[place] = now
        say(self.format(record), style="red")
