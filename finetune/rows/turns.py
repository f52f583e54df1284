"""Parts of a row, checked key by key: texts, lists, tools, and turns of both kinds to messages in OpenAI's form.

A turn says who speaks and what: {"role", "content"} as OpenAI has it, {"from", "value"} as ShareGPT has it, or a mix of
both. Every form of rows that holds turns reads them here, so that roles, masks and calls mean the same in all of them.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from finetune.chat.messages import KNOWN_KEYS, ROLES
from finetune.errors import DataError, did_you_mean, nearest

Message = dict[str, Any]

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",  # these three stand in the first exports of ShareGPT
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "function_call": "assistant",
    "tool_call": "assistant",  # ms-swift's, as is the response
    "observation": "tool",
    "tool_response": "tool",
    "tool": "tool",
}
_CALLS = ("function_call", "tool_call")

# What torchtune and TRL's fork, ms-swift, axolotl and OpenAI call the flag that says whether a turn is trained on.
MASK_KEYS = ("train", "loss", "training", "weight")
_MASK_WORDS = re.compile(
    r"(?<![a-z])(no|un)?(mask(ed|ing)?|train(ed|ing|able)?|learn(ed|able|ing)?|loss(es)?|ignored?|weights?"
    r"|supervised?|skip(ped)?|excluded?)(?![a-z])"
)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")


class Row:
    """A row and its place, so that every fault names both."""

    def __init__(self, row: dict[str, Any], source: str):
        self.row = row
        self.source = source

    def fail(self, key: str, what: str, fix: str) -> NoReturn:
        """Raise the fault of a key."""
        raise DataError(what, where=f"{self.source}, key {key}", fix=fix)

    def has(self, key: str) -> bool:
        """Whether there is a value under a key. Null and absent are one: Arrow files cannot do otherwise."""
        return self.row.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        """The text under a key; `default` where it is absent or null."""
        value = self.row.get(key)
        if value is None and default is not None:
            return default
        if key not in self.row:
            self.fail(key, f"the key is missing; the row has {keys_of(self.row)}", "Give it a text.")
        if not isinstance(value, str):
            self.fail(key, f"found {kind_of(value)}", "It must be a text.")
        return value

    def items(self, key: str) -> list[Any]:
        """The list under a key, not empty."""
        if key not in self.row:
            self.fail(key, f"the key is missing; the row has {keys_of(self.row)}", "Give it a list of messages.")
        value = self.row[key]
        if not isinstance(value, list):
            self.fail(key, f"found {kind_of(value)}", "It must be a list of messages.")
        if not value:
            self.fail(key, "the list is empty", "Give at least one message.")
        return value

    def tools(self, wrap: bool = False) -> list[dict[str, Any]] | None:
        """The row's tools, a list or its JSON text; None where there are none.

        Args:
            wrap: Bring sharegpt's bare {"name", "parameters"} into OpenAI's form, which templates show to the model.
        """
        value = self.row.get("tools")
        if isinstance(value, str):
            value = parse_json(self, "tools", value) if value.strip() else None
        if value is None or value == []:
            return None
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            self.fail("tools", f"found {kind_of(value)}", "It must be a list of tool definitions (objects).")
        if wrap:
            value = [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
        return value

    def system(self) -> list[Message]:
        """The message under `system`; none where it is empty."""
        text = self.text("system", default="")
        return [{"role": "system", "content": text}] if text else []

    def history(self) -> list[Message]:
        """The turns under `history`, pairs of prompt and response."""
        history = self.row.get("history")
        if history is not None and not isinstance(history, list):
            self.fail("history", f"found {kind_of(history)}", "It must be a list of [prompt, response] pairs.")
        messages: list[Message] = []
        for i, turn in enumerate(history or []):
            if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
                self.fail(f"history[{i}]", f"found {kind_of(turn)}", "It must be a pair of texts: [prompt, response].")
            messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        return messages

    def turns(self, key: str) -> list[Message]:
        """The turns under a key, of either kind, with the row's system message before them."""
        said = [turn(self, item, f"{key}[{i}]") for i, item in enumerate(self.items(key))]
        system = self.system()
        if system and said[0]["role"] in ("system", "developer"):
            if said[0]["content"] == system[0]["content"]:
                return said
            self.fail("system", f"{key} begins with a system message too", "Keep one of the two.")
        return system + said


def turn(row: Row, item: Any, key: str) -> Message:
    """One turn as a message in OpenAI's form; its flag, if any, under `train`."""
    if not isinstance(item, dict):
        row.fail(key, f"found {kind_of(item)}", 'A turn is an object: {"role", "content"} or {"from", "value"}.')
    # Null and absent are one: APIs write null, Arrow files cannot do otherwise.
    item = {name: value for name, value in item.items() if value is not None or name in _SPOKEN}
    who = "from" if "from" in item and "role" not in item else "role"
    said = "value" if "value" in item and "content" not in item else "content"
    if who == "from" or _is_sharegpt_role(item.get("role")):
        return _sharegpt_turn(row, item, key, who, said)
    if said == "value":
        item["content"] = item.pop("value")
    return _openai_turn(row, item, key)


_SPOKEN = ("from", "value", "role", "content")


def _is_sharegpt_role(role: Any) -> bool:
    return isinstance(role, str) and role not in ROLES and role in SHAREGPT_ROLES


def is_turn(value: Any) -> bool:
    """Whether a value says who speaks."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


# -- OpenAI ----------------------------------------------------------------------------------------------------


def _openai_turn(row: Row, item: Message, key: str) -> Message:
    if "role" not in item:
        what = f"the key is missing; the turn has {keys_of(item)}"
        row.fail(f"{key}.role", what, 'A turn has "role" and "content", or "from" and "value".')
    role = _known_role(row, item["role"], ROLES, f"{key}.role")
    message = dict(item)
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(row, message["tool_calls"], role, f"{key}.tool_calls")
        if not message["tool_calls"]:
            del message["tool_calls"]
    if "function_call" in message:
        row.fail(f"{key}.function_call", "this old form of a call is not rendered by templates", "Use tool_calls.")
    if message.get("content") is not None:
        message["content"] = _content(row, message["content"], f"{key}.content")
    elif "tool_calls" not in message:
        what = "found null" if "content" in item else f"the key is missing; the turn has {keys_of(item)}"
        row.fail(f"{key}.content", what, "Give it a text.")
    else:
        message.pop("content", None)
    return _with_flag(row, message, key)


def _content(row: Row, content: Any, key: str) -> str:
    """Text, or OpenAI's list of text parts, which is joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content):
        for i, part in enumerate(content):
            if part["type"] != "text" or not isinstance(part.get("text"), str):
                row.fail(f"{key}[{i}]", f"a part of type {part['type']!r}", "Only parts of text can be trained on.")
        return "".join(part["text"] for part in content)
    row.fail(key, f"found {kind_of(content)}", "It must be a text.")


def _tool_calls(row: Row, calls: Any, role: str, key: str) -> list[dict[str, Any]]:
    if role != "assistant":
        row.fail(key, f"found on a message of role {role}", "Only assistant messages call tools.")
    if not isinstance(calls, list):
        row.fail(key, f"found {kind_of(calls)}", "It must be a list of calls.")
    return [_tool_call(row, call, f"{key}[{i}]") for i, call in enumerate(calls)]


def _tool_call(row: Row, call: Any, key: str) -> dict[str, Any]:
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        return {**call, "function": _function(row, call["function"], f"{key}.function")}
    return _function(row, call, key)


def _function(row: Row, function: Any, key: str) -> dict[str, Any]:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        row.fail(key, f"found {kind_of(function)}", 'A call is {"name": "...", "arguments": {...}}.')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # OpenAI's API writes the arguments as JSON text; templates would write that text as a JSON string.
        arguments = parse_json(row, f"{key}.arguments", arguments) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        row.fail(f"{key}.arguments", f"found {kind_of(arguments)}", "It must be an object, or the JSON text of one.")
    return {**function, "arguments": arguments}


# -- ShareGPT --------------------------------------------------------------------------------------------------


def _sharegpt_turn(row: Row, item: Message, key: str, who: str, said: str) -> Message:
    """A turn of ShareGPT's roles; `who` and `said` are what it calls the speaker and the text."""
    if said not in item:
        what = f"the key is missing; the turn has {keys_of(item)}"
        row.fail(f"{key}.value", what, 'A turn has "from" and "value", or "role" and "content".')
    role = _known_role(row, item[who], tuple(SHAREGPT_ROLES), f"{key}.{who}")
    value = _content(row, item[said], f"{key}.{said}")
    message = {name: other for name, other in item.items() if name not in (who, said)}
    if role in _CALLS:
        calls = parse_json(row, f"{key}.{said}", value)
        calls = calls if isinstance(calls, list) else [calls]
        functions = [_function(row, call, f"{key}.{said}") for call in calls]
        message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        message["raw"] = value
    else:
        message["content"] = value
    return _with_flag(row, {"role": SHAREGPT_ROLES[role], **message}, key)


# -- masks -----------------------------------------------------------------------------------------------------


def _with_flag(row: Row, message: Message, key: str) -> Message:
    """Bring the flag that says whether a turn is trained on under `train`, whatever the row calls it."""
    for name, value in message.items():
        if name not in (*KNOWN_KEYS, *MASK_KEYS) and _looks_like_a_mask(str(name), value):
            row.fail(
                f"{key}.{name}",
                "the key looks like a mask, and none of this name is known",
                f"Write {', '.join(MASK_KEYS[:-1])} (true or false) or {MASK_KEYS[-1]} (1 or 0), or rename the key.",
            )
    found = {name: _flag(row, message.pop(name), f"{key}.{name}") for name in MASK_KEYS if name in message}
    if not found:
        return message
    name, flag = next(iter(found.items()))
    for other, value in found.items():
        if value != flag:
            row.fail(f"{key}.{other}", f"it says {_word(value)}, but {name} says {_word(flag)}", "Keep one of the two.")
    if flag and message["role"] != "assistant":
        row.fail(
            f"{key}.{name}",
            f"true on a message of role {message['role']}",
            "Only assistant messages can be responses; use train_on: all to train on every token.",
        )
    return {**message, "train": flag}


def _looks_like_a_mask(name: str, value: Any) -> bool:
    """Whether a key has a word for masks in it, or is a mistyped mask: of true or false, for `rating` is near too."""
    mistyped = isinstance(value, bool) and nearest(name, MASK_KEYS) is not None
    return mistyped or _MASK_WORDS.search(_CAMEL.sub("_", name).lower()) is not None


def _flag(row: Row, value: Any, key: str) -> bool:
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    if isinstance(value, (int, float)) and 0 < value < 1:
        row.fail(key, f"found {value!r}, a share of the loss", "Write 1 to train on the turn, or 0 not to.")
    row.fail(key, f"found {kind_of(value)}", "It must be true or false (1 or 0).")


def _word(flag: bool) -> str:
    return "true" if flag else "false"


# -- words -----------------------------------------------------------------------------------------------------


def _known_role(row: Row, role: Any, known: tuple[str, ...], key: str) -> str:
    if isinstance(role, str) and role in known:
        return role
    row.fail(key, f"unknown role {role!r}", did_you_mean(str(role), known, f"Known are {', '.join(known)}."))


def parse_json(row: Row, key: str, text: str) -> Any:
    """The value that a text holds as JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = text if len(text) <= 60 else text[:57] + "..."
        row.fail(key, f"found {shown!r}, which is not JSON ({error})", "It must be the JSON text of an object.")


def keys_of(row: dict[str, Any]) -> str:
    """The keys of an object, for messages."""
    return ", ".join(map(str, row))[:200] or "no keys"


def kind_of(value: Any) -> str:
    """How a wrong value is named: its JSON type and, where short, itself."""
    if value is None:
        return "null"
    name = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return f"{name.get(type(value), type(value).__name__)} ({shown if len(shown) <= 60 else shown[:57] + '...'})"
