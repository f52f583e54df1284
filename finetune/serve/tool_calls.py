"""Tool calls in a model's text, in the form that Qwen's templates ask for.

That is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from finetune.infer.row import overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """One call; `arguments` is JSON text, as OpenAI's interface has it."""

    name: str
    arguments: str


class ToolCallReader:
    """Splits text that comes in pieces into plain text and calls.

    White space around a call belongs to neither. What stands between the tags but is no call stays text.

    >>> reader = ToolCallReader()
    >>> reader.push('Wait.\\n<tool_call>{"name": "now", "arguments": {}}</tool_call>')
    ['Wait.', ToolCall(name='now', arguments='{}')]
    """

    def __init__(self) -> None:
        self._text = ""
        self._after_call = False

    def push(self, piece: str) -> list[str | ToolCall]:
        """Add text; returns what became certain."""
        self._text += piece
        found: list[str | ToolCall] = []
        while True:
            if self._after_call:
                self._text = self._text.lstrip()
            start = self._text.find(OPEN)
            end = self._text.find(CLOSE, start) if start >= 0 else -1
            if end < 0:
                start = len(self._text) - overlap(self._text, OPEN) if start < 0 else start
                return [*found, *self._take(len(self._text[:start].rstrip()))]
            call = _parse(self._text[start + len(OPEN) : end])
            if call is None:
                found += self._take(end + len(CLOSE))
                continue
            found += [*self._take(len(self._text[:start].rstrip())), call]
            self._text = self._text[self._text.index(CLOSE) + len(CLOSE) :]
            self._after_call = True

    def finish(self) -> list[str | ToolCall]:
        """The rest. A last call whose closing tag the model left out counts."""
        head, tag, inside = self._text.partition(OPEN)
        call = _parse(inside) if tag and not head.strip() else None
        return [*self._take(len(self._text))] if call is None else [call]

    def _take(self, length: int) -> list[str]:
        piece, self._text = self._text[:length], self._text[length:]
        self._after_call = self._after_call and not piece
        return [piece] if piece else []


def _parse(text: str) -> ToolCall | None:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(call["name"], arguments)
