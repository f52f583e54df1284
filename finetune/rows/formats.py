"""Data rows of every known form to `Conversation` and `Preference`, checked key by key."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from finetune.chat.messages import ROLES, Conversation, Preference
from finetune.errors import DataError, did_you_mean
from finetune.methods import CONVERSATION, PREFERENCE

FORMATS = {"messages": CONVERSATION, "alpaca": CONVERSATION, "sharegpt": CONVERSATION, "preference": PREFERENCE}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_FORMS = (
    "messages: {messages}; alpaca: {instruction, output}; sharegpt: {conversations}; "
    "preference: {prompt, chosen, rejected}"
)


def detect_format(row: dict, source: str = "") -> str:
    """Name the form of a row by its keys.

    Raises:
        DataError: no form has these keys.
    """
    if "chosen" in row and "rejected" in row:
        return "preference"
    for key, name in (("messages", "messages"), ("conversations", "sharegpt"), ("instruction", "alpaca")):
        if key in row:
            return name
    found = ", ".join(map(str, row)) or "none"
    raise DataError(f"the row has no known form; its keys are: {found[:200]}", where=source, fix=f"Known are {_FORMS}.")


def parse_row(row: dict, format: str, source: str) -> Conversation | Preference:
    """Check a row and bring it into the one form.

    Args:
        row: One object of a data file.
        format: One of FORMATS, or "auto" to go by the row's keys.
        source: "file:row", named in errors.

    Raises:
        DataError: a key is missing or of the wrong type, a role is unknown; the message names the key.
    """
    if format == "auto":
        format = detect_format(row, source)
    return _PARSERS[format](_Row(row, source))


class _Row:
    """A row and its place, so that every fault names both."""

    def __init__(self, row: dict, source: str):
        self.row = row
        self.source = source

    def fail(self, key: str, what: str, fix: str) -> NoReturn:
        raise DataError(what, where=f"{self.source}, key {key}", fix=fix)

    def has(self, key: str) -> bool:
        return self.row.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        """The text under a key; `default` where it is absent or null."""
        value = self.row.get(key)
        if value is None and default is not None:
            return default
        if key not in self.row:
            self.fail(key, f"the key is missing; the row has {_keys(self.row)}", "Give it a text.")
        if not isinstance(value, str):
            self.fail(key, f"found {_kind(value)}", "It must be a text.")
        return value

    def items(self, key: str) -> list:
        if key not in self.row:
            self.fail(key, f"the key is missing; the row has {_keys(self.row)}", "Give it a list of messages.")
        value = self.row[key]
        if not isinstance(value, list):
            self.fail(key, f"found {_kind(value)}", "It must be a list of messages.")
        if not value:
            self.fail(key, "the list is empty", "Give at least one message.")
        return value

    def tools(self, wrap: bool = False) -> list[dict] | None:
        """The row's tools, a list or its JSON text; None where there are none.

        Args:
            wrap: Bring sharegpt's bare {"name", "parameters"} into OpenAI's form, which templates show to the model.
        """
        value = self.row.get("tools")
        if isinstance(value, str):
            value = _parse_json(self, "tools", value) if value.strip() else None
        if value is None or value == []:
            return None
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            self.fail("tools", f"found {_kind(value)}", "It must be a list of tool definitions (objects).")
        if wrap:
            value = [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
        return value


# -- messages (OpenAI) -----------------------------------------------------------------------------------------


def _parse_messages(row: _Row) -> Conversation:
    return Conversation(_openai_messages(row, "messages"), row.tools(), row.source)


def _openai_messages(row: _Row, key: str) -> list[dict]:
    return [_openai_message(row, message, f"{key}[{i}]") for i, message in enumerate(row.items(key))]


def _openai_message(row: _Row, message: Any, key: str) -> dict:
    if not isinstance(message, dict):
        row.fail(key, f"found {_kind(message)}", 'A message is an object with "role" and "content".')
    if "role" not in message:
        fix = (
            'Rows with "from" and "value" are sharegpt: put them under "conversations".'
            if "from" in message
            else ('A message has "role" and "content".')
        )
        row.fail(f"{key}.role", f"the key is missing; the message has {_keys(message)}", fix)
    role = _known_role(row, message["role"], ROLES, f"{key}.role")
    # Null and absent are one: APIs write null, Arrow files cannot do otherwise.
    clean = {name: value for name, value in message.items() if value is not None}
    if "tool_calls" in clean:
        clean["tool_calls"] = _tool_calls(row, clean["tool_calls"], role, f"{key}.tool_calls")
        if not clean["tool_calls"]:
            del clean["tool_calls"]
    if "function_call" in clean:
        row.fail(f"{key}.function_call", "this old form of a call is not rendered by templates", "Use tool_calls.")
    if "content" in clean:
        clean["content"] = _content(row, clean["content"], f"{key}.content")
    elif "tool_calls" not in clean:
        row.fail(f"{key}.content", f"the key is missing; the message has {_keys(message)}", "Give it a text.")
    return _with_train_flag(row, clean, key)


def _content(row: _Row, content: Any, key: str) -> str:
    """Text, or OpenAI's list of text parts, which is joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content):
        for i, part in enumerate(content):
            if part["type"] != "text" or not isinstance(part.get("text"), str):
                row.fail(f"{key}[{i}]", f"a part of type {part['type']!r}", "Only parts of text can be trained on.")
        return "".join(part["text"] for part in content)
    row.fail(key, f"found {_kind(content)}", "It must be a text.")


def _with_train_flag(row: _Row, message: dict, key: str) -> dict:
    """Check `train`. OpenAI's own `weight` (0 or 1 on assistant messages) says the same and is read as such."""
    if "weight" in message:
        weight = message.pop("weight")
        if weight not in (0, 1):
            row.fail(f"{key}.weight", f"found {weight!r}", "It must be 0 or 1.")
        if weight == 0:
            message.setdefault("train", False)
    flag = message.get("train")
    if flag is not None and not isinstance(flag, bool):
        row.fail(f"{key}.train", f"found {_kind(flag)}", "It must be true or false.")
    if flag and message["role"] != "assistant":
        row.fail(
            f"{key}.train",
            f"true on a message of role {message['role']}",
            "Only assistant messages can be responses; use train_on: all to train on every token.",
        )
    return message


def _tool_calls(row: _Row, calls: Any, role: str, key: str) -> list[dict]:
    if role != "assistant":
        row.fail(key, f"found on a message of role {role}", "Only assistant messages call tools.")
    if not isinstance(calls, list):
        row.fail(key, f"found {_kind(calls)}", "It must be a list of calls.")
    return [_tool_call(row, call, f"{key}[{i}]") for i, call in enumerate(calls)]


def _tool_call(row: _Row, call: Any, key: str) -> dict:
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        return {**call, "function": _function(row, call["function"], f"{key}.function")}
    return _function(row, call, key)


def _function(row: _Row, function: Any, key: str) -> dict:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        row.fail(key, f"found {_kind(function)}", 'A call is {"name": "...", "arguments": {...}}.')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # OpenAI's API writes the arguments as JSON text; templates would write that text as a JSON string.
        arguments = _parse_json(row, f"{key}.arguments", arguments) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        row.fail(f"{key}.arguments", f"found {_kind(arguments)}", "It must be an object, or the JSON text of one.")
    return {**function, "arguments": arguments}


# -- alpaca ----------------------------------------------------------------------------------------------------


def _parse_alpaca(row: _Row) -> Conversation:
    messages = _alpaca_prompt(row)
    messages.append({"role": "assistant", "content": row.text("output")})
    return Conversation(messages, row.tools(wrap=True), row.source)


def _alpaca_prompt(row: _Row) -> list[dict]:
    """System, history and the instruction, with the input on a new line below it."""
    messages = _system(row)
    history = row.row.get("history")
    if history is not None and not isinstance(history, list):
        row.fail("history", f"found {_kind(history)}", "It must be a list of [prompt, response] pairs.")
    for i, turn in enumerate(history or []):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            row.fail(f"history[{i}]", f"found {_kind(turn)}", "It must be a pair of texts: [prompt, response].")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    parts = [row.text("instruction"), row.text("input", default="")]
    return messages + [{"role": "user", "content": "\n".join(part for part in parts if part)}]


def _system(row: _Row) -> list[dict]:
    text = row.text("system", default="")
    return [{"role": "system", "content": text}] if text else []


# -- sharegpt --------------------------------------------------------------------------------------------------


def _parse_sharegpt(row: _Row) -> Conversation:
    return Conversation(_sharegpt_messages(row), row.tools(wrap=True), row.source)


def _sharegpt_messages(row: _Row) -> list[dict]:
    said = [_sharegpt_message(row, turn, f"conversations[{i}]") for i, turn in enumerate(row.items("conversations"))]
    system = _system(row)
    if system and said[0]["role"] == "system":
        row.fail("system", "the conversation begins with a system message too", "Keep one of the two.")
    return system + said


def _sharegpt_message(row: _Row, turn: Any, key: str) -> dict:
    if not isinstance(turn, dict):
        row.fail(key, f"found {_kind(turn)}", 'A turn is an object with "from" and "value".')
    for name in ("from", "value"):
        if name not in turn:
            fix = (
                'Rows with "role" and "content" go under "messages".'
                if "role" in turn
                else ('A turn has "from" and "value".')
            )
            row.fail(f"{key}.{name}", f"the key is missing; the turn has {_keys(turn)}", fix)
    role = _known_role(row, turn["from"], tuple(_SHAREGPT_ROLES), f"{key}.from")
    value = turn["value"]
    if not isinstance(value, str):
        row.fail(f"{key}.value", f"found {_kind(value)}", "It must be a text.")
    message: dict = {"role": _SHAREGPT_ROLES[role], "content": value}
    if role == "function_call":
        calls = _parse_json(row, f"{key}.value", value)
        calls = calls if isinstance(calls, list) else [calls]
        functions = [_function(row, call, f"{key}.value") for call in calls]
        message = {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": function} for function in functions],
            "raw": value,
        }
    if turn.get("train") is not None:
        message["train"] = turn["train"]
    return _with_train_flag(row, message, key)


# -- preference ------------------------------------------------------------------------------------------------


def _parse_preference(row: _Row) -> Preference:
    """Read any of the forms in which pairs are published.

    {"conversations", "chosen": {"from", "value"}, "rejected"}; {"prompt", "chosen", "rejected"} of text or messages;
    {"instruction", "input"?, "chosen", "rejected"}; and messages in `chosen` and `rejected` that begin with the prompt,
    which is then what both share.
    """
    for key in ("chosen", "rejected"):
        if not row.has(key):
            row.fail(key, f"the key is missing; the row has {_keys(row.row)}", "Give the two answers.")
    tools = row.tools(wrap="conversations" in row.row)
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    if "conversations" in row.row:
        prompt, key = _sharegpt_messages(row), "conversations"
    elif "prompt" in row.row:
        prompt, key = _prompt(row), "prompt"
        chosen, rejected = _behind(prompt, chosen), _behind(prompt, rejected)
    elif "instruction" in row.row:
        prompt, key = _alpaca_prompt(row), "instruction"
    else:
        prompt, chosen, rejected = _split_shared(row, chosen, rejected)
        key = "chosen"
    if prompt[-1]["role"] not in ("user", "tool"):
        row.fail(
            key,
            f"the prompt ends with a message of role {prompt[-1]['role']}",
            "It must end with a user or tool message.",
        )
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[0]["role"] != "assistant":
            found = answer[0]["role"] if answer else "nothing"
            row.fail(name, f"behind the prompt stands {found}", "It must be an assistant message.")
    return Preference(Conversation(prompt, tools, row.source), chosen, rejected, row.source)


def _prompt(row: _Row) -> list[dict]:
    if isinstance(row.row["prompt"], str):
        return _system(row) + [{"role": "user", "content": row.row["prompt"]}]
    messages = _openai_messages(row, "prompt")
    system = _system(row)
    if system and messages[0]["role"] == "system":
        row.fail("system", "the prompt begins with a system message too", "Keep one of the two.")
    return system + messages


def _answer(row: _Row, key: str) -> list[dict]:
    value = row.row[key]
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, dict):
        return [_sharegpt_message(row, value, key) if "from" in value else _openai_message(row, value, key)]
    if isinstance(value, list):
        if value and isinstance(value[0], dict) and "from" in value[0]:
            return [_sharegpt_message(row, turn, f"{key}[{i}]") for i, turn in enumerate(value)]
        return _openai_messages(row, key)
    row.fail(key, f"found {_kind(value)}", "It must be a text, a message or a list of messages.")


def _behind(prompt: list[dict], answer: list[dict]) -> list[dict]:
    """Some sets repeat the prompt inside the answers; only what follows it is the answer."""
    for start in (0, 1):  # with and without the system message
        repeated = prompt[start:]
        if repeated and len(answer) > len(repeated) and answer[: len(repeated)] == repeated:
            return answer[len(repeated) :]
    return answer


def _split_shared(row: _Row, chosen: list[dict], rejected: list[dict]) -> tuple[list[dict], list[dict], list[dict]]:
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) or shared == len(rejected):
        # Equal answers share everything; the last assistant message is then the answer, and the data check names it.
        shared = max((i for i, m in enumerate(chosen[:shared]) if m["role"] == "assistant"), default=0)
    if shared == 0:
        row.fail(
            "chosen",
            "there is no prompt: chosen and rejected share no first message",
            'Add "prompt", or begin both with the same messages.',
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


_PARSERS = {
    "messages": _parse_messages,
    "alpaca": _parse_alpaca,
    "sharegpt": _parse_sharegpt,
    "preference": _parse_preference,
}


# -- words -----------------------------------------------------------------------------------------------------


def _known_role(row: _Row, role: Any, known: tuple[str, ...], key: str) -> str:
    if isinstance(role, str) and role in known:
        return role
    row.fail(key, f"unknown role {role!r}", did_you_mean(str(role), known, f"Known are {', '.join(known)}."))


def _parse_json(row: _Row, key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = text if len(text) <= 60 else text[:57] + "..."
        row.fail(key, f"found {shown!r}, which is not JSON ({error})", "It must be the JSON text of an object.")


def _keys(row: dict) -> str:
    return ", ".join(map(str, row))[:200] or "no keys"


def _kind(value: Any) -> str:
    """How a wrong value is named: its JSON type and, where short, itself."""
    if value is None:
        return "null"
    name = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return f"{name.get(type(value), type(value).__name__)} ({shown if len(shown) <= 60 else shown[:57] + '...'})"
