"""Who may ask: the names by which the server is called, the pages that may read its answers, and sound framing.

A page on the web can have its own name resolve to 127.0.0.1 and then reads what a loopback server says; only the Host
header gives that away. A page of another origin may send requests even where it cannot read the answers; only the
Origin header gives that away.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers

from finetune.console import say
from finetune.errors import ArgumentError
from finetune.serve.errors import ApiError, shown
from finetune.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
_SHOWN_PATH = 200  # characters of a path in the log


@dataclass(frozen=True)
class Access:
    """From where the server may be used.

    Attributes:
        hosts: Names that a Host header may hold, without port, beside loopback ones; None takes any.
        origins: Origins of pages that may send requests and read answers, beside the server's own; "*" takes any.
        api_key: Asked of every request to /v1; None asks none.
    """

    hosts: frozenset[str] | None = frozenset()
    origins: frozenset[str] = frozenset()
    api_key: str | None = None

    @classmethod
    def of(cls, host: str, *, hosts: list[str], origins: list[str], api_key: str | None) -> Access:
        """What the command's options mean on an address.

        Args:
            host: The address listened on. On a loopback one only loopback names are answered beside `hosts`; elsewhere
                any name is, unless `hosts` are given.

        Raises:
            ArgumentError: a host or an origin is none.
        """
        for name in hosts:
            if not name or set(name) & set("/@?# *") or _port_of(name):
                raise ArgumentError(
                    f"{name!r} is no host name", where="--allowed-host", fix="Write it without scheme and port: my.host"
                )
        for origin in origins:
            parts = urlsplit(origin)
            if origin != "*" and (not parts.scheme or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}"):
                raise ArgumentError(
                    f"{origin!r} is no origin",
                    where="--allowed-origin",
                    fix="Write scheme, host and port: http://my.host:3000",
                )
        named = frozenset(name.lower() for name in hosts)
        any_name = not is_loopback(host) and not named
        return cls(None if any_name else named | {host.lower()}, frozenset(o.lower() for o in origins), api_key)

    def knows_host(self, header: str | None) -> bool:
        """Whether a Host header names this server."""
        if self.hosts is None:
            return True
        name = _without_port(header or "").lower()
        return name in self.hosts or is_loopback(name)

    def knows_origin(self, header: str | None, host: str | None) -> bool:
        """Whether a request may come from this origin; no origin is a program or a page of the server itself."""
        if header is None or "*" in self.origins or header.lower() in self.origins:
            return True
        return bool(host) and urlsplit(header).netloc.lower() == (host or "").lower()


class Guard:
    """Refuses requests to other names, from other pages, and with two lengths."""

    def __init__(self, app: App, access: Access):
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fault = self._fault(Headers(scope=scope)) if scope["type"] == "http" else None
        if fault is None:
            await self._app(scope, receive, send)
        else:
            await JSONResponse(fault.body, fault.status, headers={"Connection": "close"})(scope, receive, send)

    def _fault(self, headers: Headers) -> ApiError | None:
        if "content-length" in headers and "transfer-encoding" in headers:
            # A proxy and a server that disagree which of them counts can be made to see different requests.
            return ApiError(400, "The request has both Content-Length and Transfer-Encoding.")
        host, origin = headers.get("host"), headers.get("origin")
        if not self._access.knows_host(host):
            return ApiError(
                403, f"This server is not called {shown(host or '')}. Start it with --allowed-host to answer to that.",
                code="host_not_allowed",
            )  # fmt: skip
        if not self._access.knows_origin(origin, host):
            return ApiError(
                403, f"Pages of {shown(origin or '')} may not use this server. Start it with --allowed-origin.",
                code="origin_not_allowed",
            )  # fmt: skip
        return None


class Observed:
    """Counts and times every HTTP request; with `verbose`, writes a line for it."""

    def __init__(self, app: App, metrics: Metrics, verbose: bool):
        self._app, self._metrics, self._verbose = app, metrics, verbose

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499

        async def watch(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        started = time.monotonic()
        try:
            await self._app(scope, receive, watch)
        finally:
            self._record(scope, status, time.monotonic() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        endpoint = getattr(route, "path", "other")  # the pattern, so that made-up paths make no new series
        self._metrics.requests.labels(endpoint, str(status)).inc()
        self._metrics.seconds.labels(endpoint).observe(seconds)
        if self._verbose:
            reply = scope.get("state", {}).get("reply")
            tokens = f"  {reply.plan.prompt_tokens} + {reply.completion_tokens} tokens" if reply else ""
            path = scope["path"][:_SHOWN_PATH]
            say(f"{time.strftime('%H:%M:%S')}  {status}  {scope['method']} {path}{tokens}  {seconds:.2f} s")


def is_loopback(host: str) -> bool:
    """Whether a name or an address, without port, means this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _port_of(netloc: str) -> str:
    return netloc[len(_without_port(netloc)) :]


def _without_port(netloc: str) -> str:
    """`[::1]:80` as `::1`, `name:80` as `name`; an address of IPv6 without brackets as it is."""
    if netloc.startswith("["):
        return netloc[1:].partition("]")[0]
    return netloc if netloc.count(":") > 1 else netloc.partition(":")[0]
