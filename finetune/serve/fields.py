"""Checks of what a request holds beyond plain numbers: lists and objects, whose cost a client chooses.

A list's length is looked at before its items, and the first fault ends the reading: naming every fault of a list of a
million items took 40 seconds and 11 GB.
"""

from __future__ import annotations

from typing import Any

from finetune.chat.messages import ROLES
from finetune.serve.errors import ApiError, shown

MAX_STOPS, MAX_STOP_LENGTH = 16, 500
MAX_STOP_TOKENS = 1000
MAX_TOOLS = 1000
_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    return "null" if value is None else _KINDS[type(value)]


def prompts(value: Any, *, most: int, context: int) -> list[str | list[int]]:
    """The prompts of /v1/completions, one or several, as texts or token ids.

    Args:
        most: Prompts that one request may have.
        context: A prompt must be shorter, in tokens.

    Raises:
        ApiError: 400.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise _wrong_prompt(f"prompt is {kind(value)}")
    if not value:
        raise ApiError(400, "prompt is an empty list. Give at least one text or token id.", param="prompt")
    if type(value[0]) is int:
        return [_token_ids(value, "prompt", context)]
    if len(value) > most:
        raise ApiError(400, f"prompt holds {len(value):,} prompts; this server takes {most}.", param="prompt")
    return [_prompt(item, f"prompt[{i}]", context) for i, item in enumerate(value)]


def _prompt(item: Any, name: str, context: int) -> str | list[int]:
    if isinstance(item, list):
        return _token_ids(item, name, context)
    if not isinstance(item, str):
        raise _wrong_prompt(f"{name} is {kind(item)}")
    return item


def _wrong_prompt(found: str) -> ApiError:
    wanted = "It must be a text, a list of texts, a list of token ids or a list of such lists."
    return ApiError(400, f"{found}. {wanted}", param="prompt")


def _token_ids(value: list[Any], name: str, context: int) -> list[int]:
    if not value:
        raise ApiError(400, f"{name} is an empty list. Give at least one token id.", param="prompt")
    if len(value) >= context:
        raise too_long("prompt", f"{len(value):,} tokens", context)
    if set(map(type, value)) != {int}:
        place = next(i for i, item in enumerate(value) if type(item) is not int)
        raise _wrong_prompt(f"{name}[{place}] is {kind(value[place])}")
    return value


def too_long(param: str, took: str, context: int) -> ApiError:
    """A prompt that leaves no room for an answer."""
    return ApiError(
        400,
        f"This model's maximum context length is {context} tokens, and the {param} took {took}, "
        "which leaves no room for an answer. Shorten it.",
        param=param,
        code="context_length_exceeded",
    )


def messages(value: Any, context: int) -> list[dict[str, Any]]:
    """The messages of a chat with their contents as texts, roles as templates know them.

    Args:
        context: There must be fewer messages; each takes a token at least.

    Raises:
        ApiError: 400, naming the first message that is wrong. Calls of tools are not looked into.
    """
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages must be a list of at least one message.", param="messages")
    if len(value) >= context:
        raise too_long("messages", f"{len(value):,} messages", context)
    return [_message(item, f"messages[{i}]") for i, item in enumerate(value)]


def _message(item: Any, name: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ApiError(400, f'{name} is {kind(item)}. It must be an object with "role" and "content".', param=name)
    role = item.get("role")
    if role not in (*ROLES, "developer"):
        found = shown(role) if isinstance(role, str) else kind(role)
        known = ", ".join((*ROLES, "developer"))
        raise ApiError(400, f"{name}.role is {found}. Known are {known}.", param=f"{name}.role")
    content = item.get("content")
    if content is None and not item.get("tool_calls"):
        found = "null" if "content" in item else "missing"
        what = (
            "Only an assistant message that calls tools may go without." if role == "assistant" else "Give it a text."
        )
        raise ApiError(400, f"{name}.content is {found}. {what}", param=f"{name}.content")
    message = {key: held for key, held in item.items() if key not in ("train", "weight", "loss", "training")}
    message["role"] = "system" if role == "developer" else role
    return message if content is None else {**message, "content": _content(content, f"{name}.content")}


def _content(content: Any, name: str) -> str:
    """A text, or OpenAI's list of parts, of which only texts can be read."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{name} is {kind(content)}. It must be a text or a list of text parts.", param=name)
    return "".join(_part(part, f"{name}[{i}]") for i, part in enumerate(content))


def _part(part: Any, name: str) -> str:
    found = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(found, str):
        raise ApiError(400, f'{name} must be a part such as {{"type": "text", "text": "..."}}.', param=name)
    if found != "text":
        raise ApiError(400, f"{name} is a part of type {shown(found)}. This model reads text only.", param=name)
    text = part.get("text")
    if not isinstance(text, str):
        raise ApiError(400, f"{name}.text is {kind(text)}. It must be a text.", param=f"{name}.text")
    return text


def stops(value: Any) -> tuple[str, ...]:
    """The texts that end an answer.

    Raises:
        ApiError: 400.
    """
    texts = [value] if isinstance(value, str) else value if value is not None else []
    if not isinstance(texts, list):
        raise ApiError(400, f"stop is {kind(value)}. It must be a text or a list of texts.", param="stop")
    if len(texts) > MAX_STOPS:
        raise ApiError(400, f"stop holds {len(texts):,} texts; at most {MAX_STOPS} can be looked for.", param="stop")
    for i, text in enumerate(texts):
        name = "stop" if isinstance(value, str) else f"stop[{i}]"
        if not isinstance(text, str):
            raise ApiError(400, f"{name} is {kind(text)}. It must be a text.", param="stop")
        if not text:
            raise ApiError(400, f"{name} is an empty text, which every answer begins with. Leave it out.", param="stop")
        if len(text) > MAX_STOP_LENGTH:
            raise ApiError(
                400, f"{name} has {len(text):,} characters; at most {MAX_STOP_LENGTH} are looked for.", param="stop"
            )
    return tuple(texts)


def stop_token_ids(value: Any, vocabulary: int) -> tuple[int, ...] | None:
    """The tokens that end an answer; None leaves the model's own.

    Raises:
        ApiError: 400.
    """
    if value is None:
        return None
    name = "stop_token_ids"
    if not isinstance(value, list) or len(value) > MAX_STOP_TOKENS:
        raise ApiError(400, f"{name} must be a list of at most {MAX_STOP_TOKENS:,} token ids.", param=name)
    for i, token in enumerate(value):
        if type(token) is not int or not 0 <= token < vocabulary:
            found = token if type(token) is int and abs(token) < 2**63 else kind(token)
            raise ApiError(400, f"{name}[{i}] is {found}. It must be a token id below {vocabulary}.", param=name)
    return tuple(value)


def logit_bias(value: Any, vocabulary: int) -> tuple[tuple[int, float], ...]:
    """What is added to the scores of single tokens.

    Raises:
        ApiError: 400.
    """
    name = "logit_bias"
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > vocabulary:
        raise ApiError(400, f'{name} must be an object like {{"token id": -100 to 100}}.', param=name)
    return tuple(_bias(key, bias, vocabulary) for key, bias in value.items())


def _bias(key: str, bias: Any, vocabulary: int) -> tuple[int, float]:
    name = "logit_bias"
    if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary):
        raise ApiError(400, f"{name} has the key {shown(key)}. It must be a token id below {vocabulary}.", param=name)
    if type(bias) not in (int, float) or not -100 <= bias <= 100:
        raise ApiError(400, f"{name}[{key}] must be a number from -100 to 100.", param=name)
    return int(key), float(bias)


def tools(value: Any) -> list[dict[str, Any]]:
    """The definitions of tools.

    Raises:
        ApiError: 400.
    """
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise ApiError(400, f"tools must be a list of at most {MAX_TOOLS:,} tool definitions.", param="tools")
    for i, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            wanted = '{"type": "function", "function": {"name": "...", "parameters": {...}}}'
            raise ApiError(400, f"tools[{i}] must be {wanted}.", param=f"tools[{i}]")
    return value


def tool_choice(value: Any, given: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Whether tools must be called, and which may be.

    Args:
        given: The tools of the request.

    Returns:
        "auto", "none", "required" or "named"; the tools, for "named" those of the name only.

    Raises:
        ApiError: 400.
    """
    name = "tool_choice"
    if value is None or value in ("auto", "none"):
        return value or "auto", given
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    chosen = function.get("name") if isinstance(function, dict) else None
    if value != "required" and not isinstance(chosen, str):
        wanted = '"auto", "none", "required" or {"type": "function", "function": {"name": "..."}}'
        raise ApiError(400, f"{name} must be {wanted}.", param=name)
    if not given:
        raise ApiError(400, f"{name} asks for a call, and there are no tools.", param=name)
    if value == "required":
        return "required", given
    named = [tool for tool in given if tool["function"]["name"] == chosen]
    if not named:
        raise ApiError(400, f"{name} names {shown(str(chosen))}, which is not among the tools.", param=name)
    return "named", named


def response_schema(value: Any) -> dict[str, Any] | bool | None:
    """The JSON schema that an answer must keep to; None where any text will do.

    Raises:
        ApiError: 400.
    """
    name = "response_format"
    kind_of = value.get("type") if isinstance(value, dict) else None
    if value is None or kind_of == "text":
        return None
    if kind_of == "json_object":
        return {"type": "object"}
    held = value.get("json_schema") if isinstance(value, dict) and kind_of == "json_schema" else None
    schema = held.get("schema") if isinstance(held, dict) else None
    if not isinstance(schema, (dict, bool)):
        wanted = (
            '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": {...}}}'
        )
        raise ApiError(400, f"{name} must be {wanted}.", param=name)
    return schema


def template_variables(value: Any) -> dict[str, Any]:
    """Further variables for the chat template, such as {"enable_thinking": false}.

    Raises:
        ApiError: 400.
    """
    name = "chat_template_kwargs"
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ApiError(400, f"{name} is {kind(value)}. It must be an object.", param=name)
    for key in _RESERVED:
        if key in value:
            raise ApiError(400, f"{name} may not hold {key}, which the request itself sets.", param=name)
    return value
