"""The `serve` command: OpenAI's HTTP interface over one model.

    finetune serve outputs/my-run
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \
        -d '{"model": "my-run", "messages": [{"role": "user", "content": "Hello"}]}'

Settings that a request leaves out are the model's own (generation_config.json; greedy where it says nothing), as in
`finetune chat`; docs/serving.md lists what there is beyond OpenAI's.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import shlex
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from finetune import __version__
from finetune.console import say, warn
from finetune.errors import FinetuneError
from finetune.infer.open import AS_STORED, Held, Opened, open_model
from finetune.infer.sampling import DEFAULT_MAX_BATCH, DEFAULT_MAX_QUEUE, DEFAULT_PREFIX_CACHE
from finetune.serve.body import Bodies, parse
from finetune.serve.errors import ApiError, shown
from finetune.serve.guard import Access, Guard, Observed, is_loopback
from finetune.serve.metrics import CONTENT_TYPE, Metrics
from finetune.serve.network import Server, listen, stopping
from finetune.serve.openapi import Responses, errors, gives, takes
from finetune.serve.protocol import HARMLESS, ChatBody, CompletionBody, Plan, RequestReader
from finetune.serve.replies import ChatReply, TextReply, TokenTexts
from finetune.serve.scheduler import QueueFull, Scheduler, ServerClosed, Ticket

# Requests that are parsed, rendered and tokenized at once; a long one holds up only its like.
_READERS = 3


@dataclass(frozen=True)
class Limits:
    """What the server takes on.

    Attributes:
        max_batch: Most answers decoded together.
        max_queue: Most answers that wait for a place.
        max_new_tokens: Most tokens of an answer; None leaves it to the model's context.
        prefix_cache: Most tokens of prompts and answers that are remembered, for prompts that begin alike.
    """

    max_batch: int = DEFAULT_MAX_BATCH
    max_queue: int = DEFAULT_MAX_QUEUE
    max_new_tokens: int | None = None
    prefix_cache: int = DEFAULT_PREFIX_CACHE


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key: str | None = None,
    allowed_hosts: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
    max_batch: int = DEFAULT_MAX_BATCH,
    max_queue: int = DEFAULT_MAX_QUEUE,
    max_new_tokens: int | None = None,
    prefix_cache: int = DEFAULT_PREFIX_CACHE,
    split_special_tokens: bool = False,
    verbose: bool = False,
    held: Held = AS_STORED,
) -> None:
    """Serve a model until SIGINT or SIGTERM; requests being answered then have GRACE_SECONDS to end.

    Args:
        port: 0 takes any free one.
        name: What requests call the model; the last part of `model` where None.
        api_key: Asked of every request to /v1; None asks none.
        allowed_hosts, allowed_origins: As `Access.of`.
        split_special_tokens: As `RequestReader` has it.
        verbose: A line per request.
        held: How the weights are held in memory.

    Raises:
        UserError: the model cannot be opened, the address cannot be used, or a host or an origin is none.
    """
    access = Access.of(host, hosts=list(allowed_hosts), origins=list(allowed_origins), api_key=api_key)
    listener = listen(host, port)
    with contextlib.closing(listener):
        opened = open_model(model, held, pack=True)
        name = name or default_name(model)
        limits = Limits(max_batch, max_queue, max_new_tokens, prefix_cache)
        app = build_app(opened, name, limits, access=access, split_special_tokens=split_special_tokens, verbose=verbose)
        url = _url(host, listener.getsockname()[1])
        if api_key is None and not is_loopback(host):
            warn(f"anyone who reaches {host} can use this server. Set FINETUNE_API_KEY, or use a loopback host.")
        # uvicorn raises the signal that stopped it once more when it is done; the work is over, so that is of no use.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        scheduler: Scheduler = app.state.scheduler
        greet = _greeting(url, name, opened, api_key is not None)
        Server(app, greet, lambda: asyncio.to_thread(scheduler.stop)).run(sockets=[listener])
        say("Stopped.", style="dim")


def default_name(model: str) -> str:
    """What a model is called that was given as `model`: a name, never a path.

    >>> default_name("outputs/my-run"), default_name("hf:Qwen/Qwen2-0.5B@main")
    ('my-run', 'Qwen2-0.5B')
    """
    last = Path(model).name or Path(model).resolve().name
    return last.partition("@")[0].rpartition(":")[2] or "model"


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _greeting(url: str, name: str, opened: Opened, key: bool) -> Callable[[], None]:
    chats = opened.tokenizer.chat_template is not None
    said = {"messages": [{"role": "user", "content": "Hello"}]} if chats else {"prompt": "Hello", "max_tokens": 32}
    path = "/v1/chat/completions" if chats else "/v1/completions"
    headers = [
        "-H 'Content-Type: application/json'",
        *(['-H "Authorization: Bearer $FINETUNE_API_KEY"'] if key else []),
    ]
    body = shlex.quote(json.dumps({"model": name, **said}, ensure_ascii=False))
    command = " \\\n  ".join([f"curl {url}{path}", *headers, f"-d {body}"])

    def greet() -> None:
        say(f"Serving {name} at {url}/v1 (metrics at /metrics, health at /health). Ctrl-C stops it. Try:")
        say(command, to_copy=True)

    return greet


def build_app(
    opened: Opened,
    name: str,
    limits: Limits,
    *,
    access: Access = Access(),
    split_special_tokens: bool = False,
    verbose: bool = False,
) -> FastAPI:
    """The HTTP application; its engine thread lives as long as the application does.

    Args:
        name: What requests call the model.
    """
    metrics = Metrics()
    scheduler = Scheduler(
        opened.engine,
        metrics,
        max_batch=limits.max_batch,
        max_queue=limits.max_queue,
        prefix_positions=limits.prefix_cache,
    )
    metrics.watch("finetune_running", "Answers being decoded", lambda: scheduler.running)
    metrics.watch("finetune_queue_length", "Answers that wait for a place", lambda: scheduler.queued)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        await asyncio.to_thread(scheduler.stop)

    app = FastAPI(lifespan=lifespan, title="paddle-finetune", version=__version__, docs_url=None, redoc_url=None)
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
        split_special_tokens=split_special_tokens,
    )
    _add_routes(app, _Endpoints(scheduler, metrics, reader, TokenTexts(opened.tokenizer), access.api_key))
    if access.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=sorted(access.origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(Guard, access=access)
    app.add_middleware(Observed, metrics=metrics, verbose=verbose)
    return app


def _add_routes(app: FastAPI, endpoints: _Endpoints) -> None:
    asks = gives("application/json", "text/event-stream") | errors(401, 404, 413, 415, 429)
    for path, endpoint, form in (
        ("/v1/chat/completions", endpoints.chat, ChatBody),
        ("/v1/completions", endpoints.completion, CompletionBody),
    ):
        app.add_api_route(
            path, endpoint, methods=["POST"], response_model=None, responses=asks, openapi_extra=takes(form, HARMLESS)
        )
    reads: tuple[tuple[str, Callable[..., Awaitable[Response]], Responses], ...] = (
        ("/v1/models", endpoints.models, errors(401)),
        ("/v1/models/{model:path}", endpoints.model, errors(401, 404)),
        ("/health", endpoints.health, errors()),
        ("/metrics", endpoints.metrics, gives("text/plain") | errors()),
    )
    for path, read, answers in reads:
        app.add_api_route(path, read, methods=["GET"], response_model=None, responses=answers)


class _Endpoints:
    """What the routes do."""

    def __init__(
        self, scheduler: Scheduler, metrics: Metrics, reader: RequestReader, tokens: TokenTexts, api_key: str | None
    ):
        self._scheduler, self._metrics, self._reader, self._tokens = scheduler, metrics, reader, tokens
        self._api_key = api_key
        self._created = int(time.time())
        self._bodies, self._readers = Bodies(), asyncio.Semaphore(_READERS)

    async def chat(self, request: Request) -> Response:
        self._authorize(request)
        return await self._answer(request, await self._read(self._reader.chat, request), ChatReply)

    async def completion(self, request: Request) -> Response:
        self._authorize(request)
        return await self._answer(request, await self._read(self._reader.completion, request), TextReply)

    async def _read(self, read: Callable[[Any], Plan], request: Request) -> Plan:
        """The plan of a request. All of it is done beside the event loop, so that the others' news go out."""
        body = await self._bodies.read(request)
        try:
            async with self._readers:
                return await asyncio.to_thread(lambda: read(parse(body)))
        finally:
            self._bodies.release(body)

    async def models(self, request: Request) -> Response:
        self._authorize(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request, model: str) -> Response:
        self._authorize(request)
        if model != self._reader.name:
            raise ApiError(404, f"The model {shown(model)} does not exist.", param="model", code="model_not_found")
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
            raise stopping() from None
        request.state.reply = reply
        if plan.stream:
            return StreamingResponse(self._stream(ticket, reply), media_type="text/event-stream", headers=_NO_CACHE)
        try:
            answer = await _unless_gone(request, reply.collect(ticket.events()))
        except (FinetuneError, ServerClosed) as error:
            raise _engine_error(error) from error
        finally:
            self._leave(ticket)
        if answer is None:
            return await _gone(request)
        return Response(await asyncio.to_thread(_json, answer), media_type="application/json")

    async def _stream(self, ticket: Ticket, reply: ChatReply | TextReply) -> AsyncIterator[str]:
        try:
            async for chunk in reply.stream(ticket.events()):
                yield _event(chunk)
        except (FinetuneError, ServerClosed) as error:
            yield _event(_engine_error(error).body)
        finally:
            self._leave(ticket)
        yield "data: [DONE]\n\n"

    def _leave(self, ticket: Ticket) -> None:
        """The client has its answer, or has gone."""
        if ticket.left:
            self._metrics.cancelled.inc()
            self._scheduler.cancel(ticket)


_NO_CACHE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _json(answer: dict[str, Any]) -> str:
    """In Python, piece by piece: the encoder in C would keep all threads waiting while it writes a long answer."""
    return "".join(json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).iterencode(answer))


def _engine_error(error: Exception) -> ApiError:
    if isinstance(error, ServerClosed):
        return stopping()
    return ApiError(500, str(error), code="engine_failed")


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


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"Retry-After": "1"} if error.status == 429 else {}
    if error.status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    return JSONResponse(error.body, error.status, headers=headers)


async def _http_error(_: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    text = {404: "There is no such path.", 405: "This path does not take this method."}
    answer = ApiError(error.status_code, text.get(error.status_code, str(error.detail)))
    return JSONResponse(answer.body, answer.status, headers=error.headers)


async def _gone(_: Request, error: Exception | None = None) -> Response:
    """499 is what web servers write down for a client that has gone; nobody reads this answer."""
    return Response(status_code=499)


async def _fault(_: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, f"The server failed ({type(error).__name__}).").body, 500)
