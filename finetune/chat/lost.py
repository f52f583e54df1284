"""What a row says and its rendered text lacks.

Templates of models that reason cut the thoughts of earlier answers, others leave out what stands beside a tool call,
or the messages of a role they do not know. A row that is trained on without a part of it is not the row that was given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from finetune.chat.messages import REASONING_KEYS
from finetune.chat.template import TemplateFault

Message = dict[str, Any]
_THOUGHTS = re.compile(r"</?think>")
# Private use: around a piece of text, its number before it. They have no meaning, and are neither space nor letter.
_OPEN, _NUMBERED, _CLOSE = "\uf8d0", "\uf8d1", "\uf8d2"
_MARKED = re.compile(f"{_OPEN}(\\d+){_NUMBERED}(.*?){_CLOSE}", re.DOTALL)
_SHOWN = 60


def find_lost(
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    text: str,
    template: str,
    render: Callable[[list[Message]], str],
) -> tuple[str, str] | None:
    """The first piece of text that messages hold and their rendering lacks.

    Pieces are looked for in their order, which decides nearly always. Where one is not found, or could be a word of
    the template itself, the messages are rendered once more with each piece between marks.

    Args:
        messages: As the template gets them.
        text: Their rendering.
        template: Its source.
        render: Renders other messages the same way.

    Returns:
        (what is lost, what to do); None where nothing is.
    """
    pieces = [(i, key, piece) for i, message in enumerate(messages) for key, piece in _pieces(message)]
    words = template if tools is None else template + json.dumps(tools, ensure_ascii=False)
    if not _in_order([piece for *_, piece in pieces], text) or any(piece in words for *_, piece in pieces):
        lost = _lost_between_marks(messages, pieces, text, render)
        if lost is not None:
            return _explain(messages, *lost)
    for i, message in enumerate(messages):
        for piece in _said_in_calls(message):
            if not any(form in text for form in _forms(piece)):
                return _explain(messages, i, "tool_calls", piece)
    return None


def _pieces(message: Message) -> Iterator[tuple[str, str]]:
    """(key, text without space around it) of what a message says; thoughts within the content by themselves."""
    for key in (*REASONING_KEYS, "content"):
        value = message.get(key)
        if isinstance(value, str):
            yield from ((key, piece) for part in _THOUGHTS.split(value) if (piece := part.strip()))


def _forms(piece: str) -> list[str]:
    """How a template may write a text: as it is, or within a JSON string."""
    return list(dict.fromkeys([piece, *(json.dumps(piece, ensure_ascii=ascii)[1:-1] for ascii in (False, True))]))


def _in_order(pieces: list[str], text: str) -> bool:
    at = 0
    for piece in pieces:
        start, form = text.find(piece, at), piece
        if start < 0:
            form = next((form for form in _forms(piece) if text.find(form, at) >= 0), "")
            start = text.find(form, at) if form else -1
        if start < 0:
            return False
        at = start + len(form)
    return True


def _lost_between_marks(
    messages: list[Message], pieces: list[tuple[int, str, str]], text: str, render: Callable[[list[Message]], str]
) -> tuple[int, str, str] | None:
    if any(mark in text for mark in (_OPEN, _NUMBERED, _CLOSE)):
        return None
    numbers = iter(range(len(pieces)))
    try:
        marked = render([_with_marks(message, numbers) for message in messages])
    except TemplateFault:  # one that looks at the words: there is nothing to go by
        return None
    found = {int(number): inner for number, inner in _MARKED.findall(marked)}
    return next(
        ((i, key, piece) for n, (i, key, piece) in enumerate(pieces) if found.get(n) not in _forms(piece)), None
    )


def _with_marks(message: Message, numbers: Iterator[int]) -> Message:
    changed = dict(message)
    for key in (*REASONING_KEYS, "content"):
        if isinstance(message.get(key), str):
            parts = re.split(r"(</?think>)", message[key])
            changed[key] = "".join(
                part if not part.strip() or _THOUGHTS.fullmatch(part) else _marked(part, next(numbers))
                for part in parts
            )
    return changed


def _marked(part: str, number: int) -> str:
    start = len(part) - len(part.lstrip())
    end = len(part.rstrip())
    return f"{part[:start]}{_OPEN}{number}{_NUMBERED}{part[start:end]}{_CLOSE}{part[end:]}"


def _said_in_calls(message: Message) -> Iterator[str]:
    """The names of called functions, and all texts in their arguments."""
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        yield function["name"]
        yield from _texts(function.get("arguments"))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
        yield from (str(key) for key in value if isinstance(value, dict))


def _explain(messages: list[Message], index: int, key: str, piece: str) -> tuple[str, str]:
    message = messages[index]
    thoughts = key in REASONING_KEYS or (key == "content" and piece in _thoughts_of(message["content"]))
    shown = piece if len(piece) <= _SHOWN else f"{piece[: _SHOWN - 3]}..."
    name = "thoughts" if thoughts else "a tool call" if key == "tool_calls" else "text"
    what = f"the chat template leaves out {name} of message {index + 1}, the {message['role']}'s: {shown!r}"
    if thoughts:
        return what, (
            "Take the thoughts out of the row; or, where the template keeps those of the last answer, end the row with "
            "this answer; or use a chat template that keeps them."
        )
    return what, f"Take it out of the row, or use a chat template that shows it in a message of role {message['role']}."


def _thoughts_of(content: str) -> list[str]:
    """What stands before the last `</think>`, in pieces."""
    return [part.strip() for part in _THOUGHTS.split(content.rpartition("</think>")[0])]
