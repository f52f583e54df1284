"""Tool calls in a model's text: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Qwen's templates ask for."""

from __future__ import annotations

import json
from dataclasses import dataclass

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

    def __init__(self):
        self._text = ""
        self._called = False

    def push(self, piece: str) -> list[str | ToolCall]:
        """Add text; returns what became certain."""
        self._text += piece
        found: list[str | ToolCall] = []
        while (start := self._text.find(OPEN)) >= 0:
            end = self._text.find(CLOSE, start)
            if end < 0:
                return found + self._take(start)
            inside = self._text[start + len(OPEN) : end]
            call = _parse(inside)
            if call is None:
                found += self._take(end + len(CLOSE), keep_space=True)
                continue
            found += [*self._take(start), call]
            self._text = self._text[end + len(CLOSE) - (start - self._held(start)) :] if False else self._rest(end)
            self._called = True
        return found + self._take(self._certain())
