"""OpenAI's requests, checked and turned into work for the engine. Every fault is an `ApiError` naming its parameter.

A key that this server would have to ignore is an error, unless ignoring it cannot change an answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune.chat.render import prompt_ids
from finetune.errors import ArgumentError, CheckpointError, DataError, did_you_mean
from finetune.infer.engine import Request
from finetune.infer.open import Opened
from finetune.infer.prompts import check_characters
from finetune.infer.sampling import MAX_TOP_LOGPROBS, Sampling
from finetune.rows.formats import parse_row

MAX_STOPS, MAX_STOP_LENGTH = 16, 500
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own, for /v1/completions
_HARMLESS = {
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
}


class ApiError(Exception):
    """An answer with OpenAI's error object.

    Attributes:
        status: HTTP status code.
        body: {"error": {"message", "type", "param", "code"}}.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            status, "server_error" if status >= 500 else "invalid_request_error"
        )
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        super().__init__(message)


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool | None = None


class _Body(BaseModel):
    """What both endpoints know. Descriptions stand in messages: "<name> must be <description>"."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str = Field(description="the name of a model, see /v1/models")
    stream: bool | None = Field(None, description="true or false")
    stream_options: _StreamOptions | None = Field(None, description='an object like {"include_usage": true}')
    max_tokens: int | None = Field(None, description="a whole number")
    temperature: float | None = Field(None, description="a number")
    top_p: float | None = Field(None, description="a number")
    top_k: int | None = Field(None, description="a whole number")
    min_p: float | None = Field(None, description="a number")
    repetition_penalty: float | None = Field(None, description="a number")
    presence_penalty: float | None = Field(None, description="a number")
    frequency_penalty: float | None = Field(None, description="a number")
    seed: int | None = Field(None, description="a whole number")
    n: int | None = Field(None, description="a whole number")
    stop: str | list[str] | None = Field(None, description="a text or a list of texts")
    stop_token_ids: list[int] | None = Field(None, description="a list of token ids")
    logit_bias: dict[str, float] | None = Field(None, max_length=0, description="left out; it is not supported")


class _ChatBody(_Body):
    messages: list[Any] = Field(min_length=1, description="a list of at least one message")
    tools: list[Any] | None = Field(None, description="a list of tool definitions")
    tool_choice: Any = None
    max_completion_tokens: int | None = Field(None, description="a whole number")
    logprobs: bool | None = Field(None, description="true or false")
    top_logprobs: int | None = Field(None, description=f"a whole number from 0 to {MAX_TOP_LOGPROBS}")
    response_format: dict | None = Field(None, description='{"type": "text"}')


class _CompletionBody(_Body):
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="a text, a list of texts, a list of token ids or a list of such lists"
    )
    logprobs: int | None = Field(None, description=f"a whole number from 0 to {MAX_TOP_LOGPROBS}")
    echo: bool | None = Field(None, description="false")
    suffix: str | None = Field(None, max_length=0, description="left out; it is not supported")
    best_of: int | None = Field(None, description="left out; it is not supported")


@dataclass(frozen=True)
class Plan:
    """A checked request.

    Attributes:
        requests: One per prompt.
        stream, include_usage: As asked for.
        reads_tool_calls: Whether tool calls are looked for in the answer.
    """

    requests: list[Request]
    stream: bool
    include_usage: bool
    reads_tool_calls: bool = False

    @property
    def samples(self) -> int:
        return self.requests[0].sampling.n

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)


class RequestReader:
    """Reads bodies for one model.

    Args:
        name: What the model is called in requests.
        max_new_tokens: Most tokens of an answer; None leaves it to the model's context.
        max_rows: Most answers that one request may ask for at once.
    """

    def __init__(self, opened: Opened, name: str, *, max_new_tokens: int | None, max_batch: int, max_queue: int):
        self.name = name
        self._opened = opened
        self._context = opened.engine.context
        self._max_new_tokens = min(max_new_tokens or self._context, self._context)
        self._max_batch, self._max_rows = max_batch, max_batch + max_queue

    def chat(self, raw: Any) -> Plan:
        """Read the body of /v1/chat/completions.

        Raises:
            ApiError: 400 or 404.
        """
        body = self._body(raw, _ChatBody)
        tools = self._tools(body)
        logprobs = None
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
        if body.logprobs:
            logprobs = body.top_logprobs or 0
        if body.response_format not in (None, {"type": "text"}):
            raise ApiError(400, "Only the response format text is supported.", param="response_format")
        limit_name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        sampling = self._sampling(body, getattr(body, limit_name), None, logprobs, limit_name, "top_logprobs")
        ids = self._render(body.messages, tools)
        return self._plan(body, [self._request(ids, sampling, "messages")], reads_tool_calls=bool(tools))

    def completion(self, raw: Any) -> Plan:
        """Read the body of /v1/completions.

        Raises:
            ApiError: 400 or 404.
        """
        body = self._body(raw, _CompletionBody)
        for name, value in (("echo", body.echo), ("best_of", body.best_of not in (None, body.n or 1))):
            if value:
                raise ApiError(400, f"{name} is not supported.", param=name)
        sampling = self._sampling(
            body, body.max_tokens, DEFAULT_COMPLETION_TOKENS, body.logprobs, "max_tokens", "logprobs"
        )
        prompts = body.prompt
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        if not prompts:
            raise ApiError(400, "The list of prompts is empty.", param="prompt")
        if len(prompts) * sampling.n > self._max_rows:
            raise ApiError(
                400, f"{len(prompts)} prompts are too many; this server takes {self._max_rows} rows.", param="prompt"
            )
        return self._plan(body, [self._request(self._encode(prompt), sampling, "prompt") for prompt in prompts])

    def _plan(self, body: _Body, requests: list[Request], reads_tool_calls: bool = False) -> Plan:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        return Plan(requests, bool(body.stream), include_usage, reads_tool_calls)

    def _body(self, raw: Any, form: type[_Body]) -> Any:
        if not isinstance(raw, dict):
            raise ApiError(400, "The body must be a JSON object.")
        try:
            check_characters(raw, "body")
            body = form.model_validate(raw)
        except ValidationError as error:
            raise _invalid(error, form) from error
        except DataError as error:
            raise ApiError(400, str(error)) from error
        for name in body.model_extra:
            if name not in _HARMLESS:
                said = f"This server does not support the parameter {name}. {did_you_mean(name, form.model_fields)}"
                raise ApiError(400, said.rstrip(), param=name)
        if body.model != self.name:
            raise ApiError(
                404,
                f"The model {body.model!r} does not exist; this server has {self.name!r}.",
                param="model",
                code="model_not_found",
            )
        return body

    def _sampling(
        self,
        body: Any,
        max_tokens: int | None,
        default: int | None,
        logprobs: int | None,
        limit_name: str,
        logprobs_name: str,
    ) -> Sampling:
        if max_tokens is not None and max_tokens > self._max_new_tokens < self._context:
            raise ApiError(
                400, f"{limit_name} is {max_tokens}; this server allows {self._max_new_tokens}.", param=limit_name
            )
        asked = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
        others = {
            "max_new_tokens": min(default or self._max_new_tokens, self._max_new_tokens)
            if max_tokens is None
            else max_tokens,
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            # Negative seeds are allowed there, but are none for NumPy.
            "seed": None if body.seed is None else body.seed % 2**64,
            "n": 1 if body.n is None else body.n,
            "stop": self._stops(body.stop),
            "stop_token_ids": None if body.stop_token_ids is None else tuple(body.stop_token_ids),
            "logprobs": logprobs,
        }
        try:
            sampling = Sampling.under_model(self._opened.generation_config, asked, **others)
        except ArgumentError as error:
            name = error.faults[0].where
            param = {"max_new_tokens": limit_name, "logprobs": logprobs_name}.get(name, name)
            raise ApiError(
                400, f"{error.faults[0].what.replace(name, param)}. {error.faults[0].fix}", param=param
            ) from error
        if sampling.n > self._max_batch:
            raise ApiError(400, f"n is {sampling.n}; this server allows {self._max_batch}.", param="n")
        return sampling

    def _stops(self, stop: str | list[str] | None) -> tuple[str, ...]:
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if len(stops) > MAX_STOPS or any(len(text) > MAX_STOP_LENGTH for text in stops):
            raise ApiError(
                400,
                f"stop holds more than {MAX_STOPS} texts, or one of over {MAX_STOP_LENGTH} characters.",
                param="stop",
            )
        return stops

    def _tools(self, body: _ChatBody) -> list[dict] | None:
        if body.tool_choice not in (None, "auto", "none"):
            raise ApiError(400, 'tool_choice must be "auto" or "none".', param="tool_choice")
        for i, tool in enumerate(body.tools or ()):
            function = tool.get("function") if isinstance(tool, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                wanted = '{"type": "function", "function": {"name": "...", "parameters": {...}}}'
                raise ApiError(400, f"tools[{i}] must be {wanted}.", param=f"tools[{i}]")
        if not body.tools or body.tool_choice == "none":
            return None
        if not self._template(body.tools).knows_tools:
            raise ApiError(400, "The model's chat template does not know tools.", param="tools")
        return body.tools

    def _template(self, tools: list | None):
        try:
            return self._opened.tokenizer.template_for(tools)
        except CheckpointError as error:
            raise ApiError(400, "The model has no chat template; use /v1/completions.") from error

    def _render(self, messages: list[Any], tools: list[dict] | None) -> list[int]:
        self._template(tools)
        messages = [
            {**message, "role": "system"}
            if isinstance(message, dict) and message.get("role") == "developer"
            else message
            for message in messages
        ]
        try:
            return prompt_ids(
                self._opened.tokenizer, parse_row({"messages": messages, "tools": tools}, "messages", "body")
            )
        except DataError as error:
            fault = error.faults[0]
            key = re.search(r"key (\S+)$", fault.where or "")
            text = f"{fault.what.rstrip('.')}. {fault.fix}" if fault.fix else fault.what
            param = key.group(1) if key else "messages"
            raise ApiError(400, f"{param}: {text}", param=param) from error

    def _encode(self, prompt: str | list[int]) -> list[int]:
        return self._opened.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def _request(self, ids: list[int], sampling: Sampling, param: str) -> Request:
        if len(ids) >= self._context:
            raise ApiError(
                400,
                f"This model's maximum context length is {self._context} tokens, and the {param} took {len(ids)}, "
                "which leaves no room for an answer. Shorten it.",
                param=param,
                code="context_length_exceeded",
            )
        try:
            return self._opened.engine.request(ids, sampling)
        except DataError as error:
            raise ApiError(400, f"{error.faults[0].what}. {error.faults[0].fix}", param=param) from error


def _invalid(error: ValidationError, form: type[_Body]) -> ApiError:
    first = error.errors()[0]
    param = str(first["loc"][0])
    if first["type"] == "missing":
        return ApiError(400, f"The parameter {param} is missing.", param=param)
    return ApiError(400, f"{param} must be {form.model_fields[param].description}.", param=param)
