"""The `serve` command: OpenAI's HTTP interface over one model.

    finetune serve outputs/my-run
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \
        -d '{"model": "outputs/my-run", "messages": [{"role": "user", "content": "Hello"}]}'

Settings that a request leaves out are the model's own (generation_config.json; greedy where it says nothing), as in
`finetune chat`; beyond OpenAI's there are top_k, min_p, repetition_penalty and stop_token_ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import shlex
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from finetune.console import say, warn
from finetune.errors import ArgumentError, FinetuneError
from finetune.infer.open import Opened, open_model
from finetune.infer.sampling import DEFAULT_MAX_BATCH, DEFAULT_MAX_QUEUE
from finetune.serve.metrics import CONTENT_TYPE, Metrics
from finetune.serve.protocol import ApiError, Plan, RequestReader
from finetune.serve.replies import ChatReply, TextReply, TokenTexts
from finetune.serve.scheduler import QueueFull, Scheduler, ServerClosed, Ticket

MAX_BODY = 8 * 1024 * 1024
GRACE_SECONDS = 30


@dataclass(frozen=True)
class Limits:
    """What the server takes on.

    Attributes:
        max_batch: Most answers decoded together.
        max_queue: Most answers that wait for a place.
        max_new_tokens: Most tokens of an answer; None leaves it to the model's context.
    """

    max_batch: int = DEFAULT_MAX_BATCH
    max_queue: int = DEFAULT_MAX_QUEUE
    max_new_tokens: int | None = None


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    max_queue: int = DEFAULT_MAX_QUEUE,
    max_new_tokens: int | None = None,
    verbose: bool = False,
) -> None:
    """Serve a model until SIGINT or SIGTERM; requests being answered then have GRACE_SECONDS to end.

    Args:
        port: 0 takes any free one.
        api_key: Asked of every request to /v1; None asks none.
        verbose: A line per request.

    Raises:
        UserError: the model cannot be opened, or the address cannot be used.
    """
    listener = listen(host, port)
    with contextlib.closing(listener):
        opened = open_model(model, pack=True)
        app = build_app(opened, model, Limits(max_batch, max_queue, max_new_tokens), api_key=api_key, verbose=verbose)
        url = _url(host, listener.getsockname()[1])
        if api_key is None and not _is_loopback(host):
            warn(f"anyone who reaches {host} can use this server. Set FINETUNE_API_KEY, or use a loopback host.")
        # uvicorn raises the signal that stopped it once more when it is done; the work is over, so that is of no use.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        Server(app, lambda: _greet(url, model, opened, api_key is not None)).run(sockets=[listener])
        if app.state.scheduler.alive:  # a second Ctrl-C does not wait for requests
            app.state.scheduler.stop()
        say("Stopped.", style="dim")


class Server(uvicorn.Server):
    """uvicorn's, quiet but for a word when connections are taken."""

    def __init__(self, app: FastAPI, on_start: Callable[[], None], grace: int = GRACE_SECONDS):
        super().__init__(
            uvicorn.Config(app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=grace)
        )
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_start()


def listen(host: str, port: int) -> socket.socket:
    """Take the address before the model is loaded, so that one in use is said at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
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


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _greet(url: str, name: str, opened: Opened, key: bool) -> None:
    chats = opened.tokenizer.chat_template is not None
    said = {"messages": [{"role": "user", "content": "Hello"}]} if chats else {"prompt": "Hello", "max_tokens": 32}
    path = "/v1/chat/completions" if chats else "/v1/completions"
    headers = "-H 'Content-Type: application/json'" + (' -H "Authorization: Bearer $FINETUNE_API_KEY"' if key else "")
    body = shlex.quote(json.dumps({"model": name, **said}, ensure_ascii=False))
    say(f"Serving {name} at {url}/v1 (metrics at /metrics, health at /health). Ctrl-C stops it. Try:")
    say(f"curl {url}{path} {headers} -d {body}")


def build_app(
    opened: Opened, name: str, limits: Limits, *, api_key: str | None = None, verbose: bool = False
) -> FastAPI:
    """The HTTP application; its engine thread lives as long as the application does.

    Args:
        name: What requests call the model.
    """
    metrics = Metrics()
    scheduler = Scheduler(opened.engine, metrics, max_batch=limits.max_batch, max_queue=limits.max_queue)
    metrics.watch("finetune_running", "Answers being decoded", lambda: scheduler.running)
    metrics.watch("finetune_queue_length", "Answers that wait for a place", lambda: scheduler.queued)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        await asyncio.to_thread(scheduler.stop)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.scheduler = scheduler
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _fault)
    reader = RequestReader(
        opened,
        name,
        max_new_tokens=limits.max_new_tokens,
        max_batch=limits.max_batch,
        max_queue=limits.max_queue,
    )
    _add_routes(app, _Endpoints(scheduler, metrics, reader, TokenTexts(opened.tokenizer), api_key))
    app.add_middleware(_Observed, metrics=metrics, verbose=verbose)
    return app


def _add_routes(app: FastAPI, endpoints: _Endpoints) -> None:
    app.add_api_route("/v1/models", endpoints.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{model:path}", endpoints.model, methods=["GET"], response_model=None)
    app.add_api_route("/v1/chat/completions", endpoints.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", endpoints.completion, methods=["POST"], response_model=None)
    app.add_api_route("/health", endpoints.health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", endpoints.metrics, methods=["GET"], response_model=None)


class _Endpoints:
    """What the routes do."""

    def __init__(
        self, scheduler: Scheduler, metrics: Metrics, reader: RequestReader, tokens: TokenTexts, api_key: str | None
    ):
        self._scheduler, self._metrics, self._reader, self._tokens = scheduler, metrics, reader, tokens
        self._api_key = api_key
        self._created = int(time.time())
        self._reading = asyncio.Lock()

    async def chat(self, request: Request) -> Response:
        self._authorize(request)
        return await self._answer(request, await self._read(self._reader.chat, request), ChatReply)

    async def completion(self, request: Request) -> Response:
        self._authorize(request)
        return await self._answer(request, await self._read(self._reader.completion, request), TextReply)

    async def _read(self, read: Callable[[Any], Plan], request: Request) -> Plan:
        """The plan of a request. A long text takes seconds to tokenize, in which the others' news must go out."""
        body = await _read_json(request)
        async with self._reading:
            return await asyncio.to_thread(read, body)

    async def models(self, request: Request) -> Response:
        self._authorize(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request, model: str) -> Response:
        self._authorize(request)
        if model != self._reader.name:
            raise ApiError(404, f"The model {model!r} does not exist.", param="model", code="model_not_found")
        return JSONResponse(self._model())

    async def health(self) -> Response:
        alive = self._scheduler.alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def metrics(self) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    def _model(self) -> dict[str, Any]:
        return {"id": self._reader.name, "object": "model", "created": self._created, "owned_by": "paddle-finetune"}

    def _authorize(self, request: Request) -> None:
        if self._api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._api_key.encode()):
            raise ApiError(401, "The API key is missing or wrong.", code="invalid_api_key")

    async def _answer(self, request: Request, plan: Plan, form: type[ChatReply] | type[TextReply]) -> Response:
        reply = form(plan, self._reader.name, self._tokens)
        try:
            ticket = self._scheduler.submit(plan.requests, streaming=plan.stream)
        except QueueFull:
            raise ApiError(429, "Too many requests wait already. Try again later.", code="queue_full") from None
        except ServerClosed:
            raise ApiError(503, "The server is stopping.", code="server_closed") from None
        request.state.reply = reply
        if plan.stream:
            return StreamingResponse(self._stream(ticket, reply), media_type="text/event-stream", headers=_NO_CACHE)
        try:
            answer = await _unless_gone(request, reply.collect(ticket.events()))
        except (FinetuneError, ServerClosed) as error:
            raise _engine_error(error) from error
        finally:
            self._leave(ticket)
        return await _gone(request) if answer is None else JSONResponse(answer)

    async def _stream(self, ticket: Ticket, reply: ChatReply | TextReply) -> AsyncIterator[str]:
        try:
            async for chunk in reply.stream(ticket.events()):
                yield _event(chunk)
            yield "data: [DONE]\n\n"
        except (FinetuneError, ServerClosed) as error:
            yield _event(_engine_error(error).body)
        finally:
            self._leave(ticket)

    def _leave(self, ticket: Ticket) -> None:
        """The client has its answer, or has gone."""
        if ticket.left:
            self._metrics.cancelled.inc()
            self._scheduler.cancel(ticket)


_NO_CACHE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _engine_error(error: Exception) -> ApiError:
    if isinstance(error, ServerClosed):
        return ApiError(503, "The server is stopping.", code="server_closed")
    return ApiError(500, str(error), code="engine_failed")


async def _read_json(request: Request) -> Any:
    """The body, no longer than MAX_BODY.

    Another type than JSON is refused: browsers send plain text from any page to a loopback address without asking.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "Send the body as Content-Type: application/json.")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY:
            raise ApiError(413, f"The body is larger than {MAX_BODY:,} bytes.")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not JSON: {error}") from error


async def _unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, or None if the client goes away before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        answer.cancel()
        leaving.cancel()


async def _api_error(_: Request, error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status == 429 else {}
    if error.status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    return JSONResponse(error.body, error.status, headers=headers)


async def _http_error(_: Request, error: HTTPException) -> Response:
    """Unknown paths and methods."""
    text = {404: "There is no such path.", 405: "This path does not take this method."}
    answer = ApiError(error.status_code, text.get(error.status_code, str(error.detail)))
    return JSONResponse(answer.body, answer.status, headers=error.headers)


async def _gone(_: Request, error: Exception | None = None) -> Response:
    """499 is what web servers write down for a client that has gone; nobody reads this answer."""
    return Response(status_code=499)


async def _fault(_: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, f"The server failed ({type(error).__name__}).").body, 500)


class _Observed:
    """Counts and times every HTTP request; with `verbose`, writes a line for it."""

    def __init__(self, app: Callable[..., Awaitable[None]], metrics: Metrics, verbose: bool):
        self._app, self._metrics, self._verbose = app, metrics, verbose

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499

        async def watch(message: dict[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        started = time.monotonic()
        try:
            await self._app(scope, receive, watch)
        finally:
            self._record(scope, status, time.monotonic() - started)

    def _record(self, scope: dict[str, Any], status: int, seconds: float) -> None:
        route = scope.get("route")
        endpoint = getattr(route, "path", "other")  # the pattern, so that made-up paths make no new series
        self._metrics.requests.labels(endpoint, str(status)).inc()
        self._metrics.seconds.labels(endpoint).observe(seconds)
        if self._verbose:
            reply = scope.get("state", {}).get("reply")
            tokens = f"  {reply.plan.prompt_tokens} + {reply.completion_tokens} tokens" if reply else ""
            say(f"{time.strftime('%H:%M:%S')}  {status}  {scope['method']} {scope['path']}{tokens}  {seconds:.2f} s")
