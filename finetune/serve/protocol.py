"""OpenAI's requests, checked and turned into work for the engine. Every fault is an `ApiError` naming its parameter.

A key that this server would have to ignore is an error, unless ignoring it cannot change an answer.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.config import JsonDict

from finetune.chat.literal import Literal
from finetune.chat.messages import Conversation
from finetune.chat.render import prompt_text
from finetune.errors import ArgumentError, CheckpointError, DataError, did_you_mean
from finetune.infer.open import Opened
from finetune.infer.row import Grammar, Request
from finetune.infer.sampling import MAX_TOP_LOGPROBS, Sampling, range_of
from finetune.rows.formats import parse_row
from finetune.serve import fields
from finetune.serve.echo import Echo
from finetune.serve.errors import ApiError, shown

if TYPE_CHECKING:
    from finetune.serve.grammar import Grammars

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own, for /v1/completions
_LONGEST_NAME = 64  # of a parameter that is looked up among the known ones
HARMLESS = {
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
}
_NULL: JsonDict = {"type": "null"}


def _list(kind: str) -> JsonDict:
    """How /openapi.json writes a list."""
    return {"type": "array", "items": {"type": kind}}


def _within(setting: str) -> JsonDict:
    """How /openapi.json writes what a number may be."""
    allowed = range_of(setting)
    bounds: JsonDict = {"minimum": allowed.low}
    return bounds if allowed.high == float("inf") else {**bounds, "maximum": allowed.high}


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool | None = None


class _Body(BaseModel):
    """What both endpoints know. Descriptions stand in messages: "<name> must be <description>".

    Lists and objects are taken as they are, for `fields` to read.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    model: str = Field(description="the name of a model, see /v1/models")
    stream: bool | None = Field(None, description="true or false")
    stream_options: _StreamOptions | None = Field(None, description='an object like {"include_usage": true}')
    max_tokens: int | None = Field(None, description="a whole number", json_schema_extra={"minimum": 0})
    min_tokens: int | None = Field(None, description="a whole number", json_schema_extra=_within("min_new_tokens"))
    temperature: float | None = Field(None, description="a number", json_schema_extra=_within("temperature"))
    top_p: float | None = Field(None, description="a number", json_schema_extra=_within("top_p"))
    top_k: int | None = Field(None, description="a whole number", json_schema_extra=_within("top_k"))
    min_p: float | None = Field(None, description="a number", json_schema_extra=_within("min_p"))
    repetition_penalty: float | None = Field(
        None, description="a number", json_schema_extra=_within("repetition_penalty")
    )
    presence_penalty: float | None = Field(None, description="a number", json_schema_extra=_within("presence_penalty"))
    frequency_penalty: float | None = Field(
        None, description="a number", json_schema_extra=_within("frequency_penalty")
    )
    seed: int | None = Field(None, description="a whole number")
    n: int | None = Field(None, description="a whole number", json_schema_extra=_within("n"))
    stop: Any = Field(None, json_schema_extra={"anyOf": [{"type": "string"}, _list("string"), _NULL]})
    stop_token_ids: Any = Field(None, json_schema_extra={"anyOf": [_list("integer"), _NULL]})
    ignore_eos: bool | None = Field(None, description="true or false")
    logit_bias: Any = Field(None, json_schema_extra={"type": ["object", "null"]})


class ChatBody(_Body):
    """Of /v1/chat/completions."""

    messages: Any = Field(json_schema_extra=_list("object"))
    tools: Any = Field(None, json_schema_extra={"anyOf": [_list("object"), _NULL]})
    tool_choice: Any = Field(None, json_schema_extra={"type": ["string", "object", "null"]})
    max_completion_tokens: int | None = Field(
        None, description="a whole number", json_schema_extra=_within("max_new_tokens")
    )
    logprobs: bool | None = Field(None, description="true or false")
    top_logprobs: int | None = Field(
        None, description=f"a whole number from 0 to {MAX_TOP_LOGPROBS}", json_schema_extra=_within("logprobs")
    )
    response_format: Any = Field(None, json_schema_extra={"type": ["object", "null"]})
    chat_template_kwargs: Any = Field(None, json_schema_extra={"type": ["object", "null"]})
    parallel_tool_calls: bool | None = Field(None, description="true or false")


class CompletionBody(_Body):
    """Of /v1/completions."""

    prompt: Any = Field(json_schema_extra={"type": ["string", "array"]})
    logprobs: int | None = Field(
        None, description=f"a whole number from 0 to {MAX_TOP_LOGPROBS}", json_schema_extra=_within("logprobs")
    )
    echo: bool | None = Field(None, description="true or false")
    suffix: str | None = Field(None, max_length=0, description="left out; it is not supported")
    best_of: int | None = Field(None, description="left out; it is not supported")


_Form = TypeVar("_Form", bound=_Body)


@dataclass(frozen=True)
class Plan:
    """A checked request.

    Attributes:
        requests: One per prompt.
        stream, include_usage: As asked for.
        reads_tool_calls: Whether tool calls are looked for in the answer.
        echoes: The requests' prompts, where the answers are to begin with them.
    """

    requests: list[Request]
    stream: bool
    include_usage: bool
    reads_tool_calls: bool = False
    echoes: tuple[Echo, ...] = ()

    @property
    def samples(self) -> int:
        return self.requests[0].sampling.n

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)


class RequestReader:
    """Reads bodies for one model, in any thread.

    Args:
        name: What the model is called in requests.
        max_new_tokens: Most tokens of an answer; None leaves it to the model's context.
        max_batch: Most samples of a prompt.
        max_queue: How many answers, beside `max_batch`, one request may ask for at once.
        split_special_tokens: Whether special tokens in what a chat's messages and tools say are just text.
    """

    def __init__(
        self,
        opened: Opened,
        name: str,
        *,
        max_new_tokens: int | None,
        max_batch: int,
        max_queue: int,
        split_special_tokens: bool = False,
    ):
        self.name = name
        self._literal = Literal(opened.tokenizer) if split_special_tokens else None
        self._opened = opened
        self._context = opened.engine.context
        self._max_new_tokens = min(max_new_tokens or self._context, self._context)
        self._max_batch, self._max_rows = max_batch, max_batch + max_queue
        self._rendering = threading.Lock()  # a template counts its steps, for one text at a time

    @cached_property
    def _grammars(self) -> Grammars:
        from finetune.serve.grammar import Grammars

        engine = self._opened.engine
        return Grammars(self._opened.tokenizer, engine.decoder.vocab_size, sorted(engine.stop_token_ids))

    def chat(self, raw: Any) -> Plan:
        """Read the body of /v1/chat/completions.

        Raises:
            ApiError: 400 or 404.
        """
        body = self._body(raw, ChatBody)
        tools = self._tools(body)
        logprobs = None
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
        if body.logprobs:
            logprobs = body.top_logprobs or 0
        limit_name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        sampling = self._sampling(body, getattr(body, limit_name), None, logprobs, limit_name, "top_logprobs")
        text, mark = self._render(body, tools)
        if mark is None or self._literal is None:
            ids = self._encode(text, "messages", add_special_tokens=False)
        else:
            self._check_length(text, "messages")
            ids = self._literal.encode(text, mark)
        request = replace(self._request(ids, sampling, "messages"), grammar=self._grammar(body, tools))
        return self._plan(body, [request], reads_tool_calls=bool(tools))

    def completion(self, raw: Any) -> Plan:
        """Read the body of /v1/completions.

        Raises:
            ApiError: 400 or 404.
        """
        body = self._body(raw, CompletionBody)
        if body.best_of not in (None, body.n or 1):
            raise ApiError(400, "best_of is not supported.", param="best_of")
        only_read = bool(body.echo) and body.max_tokens == 0
        limit = 1 if only_read else body.max_tokens
        sampling = self._sampling(body, limit, DEFAULT_COMPLETION_TOKENS, body.logprobs, "max_tokens", "logprobs")
        prompts = fields.prompts(body.prompt, most=self._max_rows // sampling.n, context=self._context)
        ids = [
            prompt if isinstance(prompt, list) else self._encode(prompt, "prompt", add_special_tokens=True)
            for prompt in prompts
        ]
        requests = [self._request(prompt, sampling, "prompt") for prompt in ids]
        plan = self._plan(body, requests)
        if not body.echo:
            return plan
        scored = sampling.logprobs is not None
        echoed = [replace(request, scored=scored, answered=not only_read) for request in requests]
        return replace(plan, requests=echoed, echoes=tuple(map(self._echo, prompts, ids)))

    def _echo(self, prompt: str | list[int], ids: list[int]) -> Echo:
        tokenizer = self._opened.tokenizer
        return Echo.of(tokenizer, ids, unwritten=len(tokenizer.around[0]) if isinstance(prompt, str) else 0)

    def _plan(self, body: _Body, requests: list[Request], reads_tool_calls: bool = False) -> Plan:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        return Plan(requests, bool(body.stream), include_usage, reads_tool_calls)

    def _body(self, raw: Any, form: type[_Form]) -> _Form:
        if not isinstance(raw, dict):
            raise ApiError(400, "The body must be a JSON object.")
        try:
            body = form.model_validate(raw)
        except ValidationError as error:
            raise _invalid(error, form) from error
        for name in body.model_extra or ():
            if name not in HARMLESS:
                hint = did_you_mean(name, form.model_fields) if len(name) < _LONGEST_NAME else ""
                said = f"This server does not know the parameter {shown(name)}. {hint}"
                raise ApiError(400, said.rstrip(), param=name[:80])
        if body.model != self.name:
            raise ApiError(
                404,
                f"The model {shown(body.model)} does not exist; this server has {self.name!r}.",
                param="model",
                code="model_not_found",
            )
        return body

    def _sampling(
        self,
        body: _Body,
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
        vocabulary = self._opened.engine.decoder.vocab_size
        stop_ids = fields.stop_token_ids(body.stop_token_ids, vocabulary)
        limit = min(default or self._max_new_tokens, self._max_new_tokens) if max_tokens is None else max_tokens
        others = {
            "max_new_tokens": limit,
            "min_new_tokens": body.min_tokens or 0,
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            # Negative seeds are allowed there, but are none for NumPy.
            "seed": None if body.seed is None else body.seed % 2**64,
            "n": 1 if body.n is None else body.n,
            "stop": fields.stops(body.stop),
            "stop_token_ids": stop_ids or () if body.ignore_eos else stop_ids,
            "logprobs": logprobs,
            "logit_bias": fields.logit_bias(body.logit_bias, vocabulary),
        }
        names = {"max_new_tokens": limit_name, "min_new_tokens": "min_tokens", "logprobs": logprobs_name}
        try:
            sampling = Sampling.under_model(self._opened.generation_config, asked, **others)
        except ArgumentError as error:
            name = error.faults[0].where or ""
            param = names.get(name, name)
            raise ApiError(
                400, f"{error.faults[0].what.replace(name, param)}. {error.faults[0].fix}", param=param
            ) from error
        if sampling.n > self._max_batch:
            raise ApiError(400, f"n is {sampling.n}; this server allows {self._max_batch}.", param="n")
        if sampling.min_new_tokens > sampling.max_new_tokens:
            raise ApiError(
                400, f"min_tokens is {sampling.min_new_tokens}, above {limit_name}, {limit}.", param="min_tokens"
            )
        return sampling

    def _tools(self, body: ChatBody) -> list[dict[str, Any]] | None:
        tools = fields.tools(body.tools)
        choice, _ = fields.tool_choice(body.tool_choice, tools)
        if not tools or choice == "none":
            return None
        if not self._template_knows_tools(tools):
            raise ApiError(400, "The model's chat template does not know tools.", param="tools")
        return tools

    def _grammar(self, body: ChatBody, tools: list[dict[str, Any]] | None) -> Grammar | None:
        """What the answer must be: calls of tools, or JSON."""
        schema = fields.response_schema(body.response_format)
        choice, wanted = fields.tool_choice(body.tool_choice, tools or [])
        if choice in ("required", "named"):
            several = choice == "required" and body.parallel_tool_calls is not False
            return self._made("tools", lambda: self._grammars.tool_calls(wanted, several=several))
        return None if schema is None else self._made("response_format", lambda: self._grammars.json(schema))

    def _made(self, param: str, make: Callable[[], Grammar]) -> Grammar:
        try:
            return make()
        except ArgumentError as error:
            raise ApiError(400, f"{param}: {error.faults[0].what}. {error.faults[0].fix}", param=param) from error

    def _template_knows_tools(self, tools: list[dict[str, Any]] | None) -> bool:
        try:
            return self._opened.tokenizer.template_for(tools).knows_tools
        except CheckpointError as error:
            raise ApiError(400, "The model has no chat template; use /v1/completions.") from error

    def _render(self, body: ChatBody, tools: list[dict[str, Any]] | None) -> tuple[str, str | None]:
        """The prompt's text, and the mark in it (see `Literal`) where special tokens are to be text."""
        self._template_knows_tools(tools)
        messages = fields.messages(body.messages, self._context)
        for message in messages:
            if message["role"] != "assistant":  # of those, templates may drop the reasoning
                self._check_length(message.get("content") or "", "messages")
        variables = fields.template_variables(body.chat_template_kwargs)
        mark = None if self._literal is None else self._literal.mark_for([messages, tools, variables])
        if self._literal is not None and mark is not None:
            messages, tools, variables = self._literal.marked([messages, tools, variables], mark)
        try:
            conversation = parse_row({"messages": messages, "tools": tools}, "messages", "body")
            assert isinstance(conversation, Conversation)
            with self._rendering:
                return prompt_text(self._opened.tokenizer, conversation, **variables), mark
        except DataError as error:
            fault = error.faults[0]
            key = re.search(r"key (\S+)$", fault.where or "")
            text = f"{fault.what.rstrip('.')}. {fault.fix}" if fault.fix else fault.what
            param = key.group(1) if key else "messages"
            raise ApiError(400, f"{param}: {text}", param=param) from error

    def _encode(self, text: str, param: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text that may fit the context."""
        self._check_length(text, param)
        return self._opened.tokenizer.encode(text, add_special_tokens)

    def _check_length(self, text: str, param: str) -> None:
        least = self._opened.tokenizer.least_tokens(text, self._context)
        if least:
            raise fields.too_long(param, f"at least {least:,} tokens", self._context)

    def _request(self, ids: list[int], sampling: Sampling, param: str) -> Request:
        if len(ids) >= self._context:
            raise fields.too_long(param, f"{len(ids):,} tokens", self._context)
        try:
            return self._opened.engine.request(ids, sampling)
        except DataError as error:
            raise ApiError(400, f"{error.faults[0].what}. {error.faults[0].fix}", param=param) from error


def _invalid(error: ValidationError, form: type[_Body]) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = str(first["loc"][0])
    if first["type"] == "missing":
        return ApiError(400, f"The parameter {param} is missing.", param=param)
    return ApiError(400, f"{param} must be {form.model_fields[param].description}.", param=param)
