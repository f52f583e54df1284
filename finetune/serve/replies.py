"""The engine's news in OpenAI's form. A whole answer is the sum of the pieces that streaming would send."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from functools import lru_cache
from typing import Any

from finetune import __version__
from finetune.chat.tokenizer import Tokenizer
from finetune.infer.sampling import TokenLogprob
from finetune.serve.echo import Echo
from finetune.serve.protocol import Plan
from finetune.serve.scheduler import Event
from finetune.serve.tool_calls import ToolCall, ToolCallReader

Json = dict[str, Any]
_NO_ECHO = Echo("", [])


class TokenTexts:
    """The text and bytes of single tokens, for log-probabilities."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._added = {id: token.content for id, token in tokenizer.backend.get_added_tokens_decoder().items()}

    def bytes(self, token: int) -> bytes:
        """A token's bytes; empty for one that only the model's vocabulary has."""
        if token in self._added:
            return self._added[token].encode()
        text = self._tokenizer.backend.id_to_token(token) or ""
        table = _byte_of_character()
        if all(character in table for character in text):
            return bytes(table[character] for character in text)
        return text.encode()

    def text(self, token: int) -> str:
        return self.bytes(token).decode(errors="replace")


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's writing of bytes as printable characters: those that are printable stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class _Reply(ABC):
    """What both endpoints share: the envelope, the choices' numbers, the counts.

    Args:
        whole, piece: Names of the object when it is whole and when it is streamed.
    """

    prefix = whole = piece = ""

    def __init__(self, plan: Plan, model: str, tokens: TokenTexts):
        self.plan, self._tokens = plan, tokens
        self.completion_tokens = 0
        self._head: Json = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"paddle-finetune-{__version__}",
        }
        self._choices: dict[int, Any] = {}

    @property
    def usage(self) -> Json:
        prompt, completion = self.plan.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def stream(self, events: AsyncIterator[Event]) -> AsyncIterator[Json]:
        """The chunks of a streamed answer."""
        counts = {"usage": None} if self.plan.include_usage else {}
        for choice in self._opening():
            yield self._chunk(choice) | counts
        async for event in events:
            for choice in self._pieces(event):
                yield self._chunk(choice) | counts
        if self.plan.include_usage:
            yield {**self._head, "object": self.piece, "choices": [], "usage": self.usage}

    async def collect(self, events: AsyncIterator[Event]) -> Json:
        """The whole answer."""
        choices: dict[int, Json] = {i: self._empty(i) for i in range(self.plan.samples * len(self.plan.requests))}
        async for event in events:
            for piece in self._pieces(event):
                self._add(choices[piece["index"]], piece)
        return {**self._head, "object": self.whole, "choices": list(choices.values()), "usage": self.usage}

    def _chunk(self, choice: Json) -> Json:
        return {**self._head, "object": self.piece, "choices": [choice]}

    def _opening(self) -> Iterator[Json]:
        return iter(())

    def _pieces(self, event: Event) -> list[Json]:
        if event.output is not None:
            self.completion_tokens += len(event.output.tokens)
        return self._choice_pieces(event.prompt * self.plan.samples + event.sample, event)

    @abstractmethod
    def _choice_pieces(self, index: int, event: Event) -> list[Json]:
        """The chunks' choices that an event makes."""

    @abstractmethod
    def _empty(self, index: int) -> Json:
        """A choice before anything was said."""

    @abstractmethod
    def _add(self, choice: Json, piece: Json) -> None:
        """Join a chunk's choice to the whole one."""


class ChatReply(_Reply):
    """/v1/chat/completions."""

    prefix, whole, piece = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _opening(self) -> Iterator[Json]:
        for index in range(self.plan.samples):
            yield _choice(index, delta={"role": "assistant", "content": ""})

    def _choice_pieces(self, index: int, event: Event) -> list[Json]:
        calls = self._choices.setdefault(index, _Calls()) if self.plan.reads_tool_calls else None
        parts = [event.text] if calls is None and event.text else []
        if calls is not None:
            parts = calls.reader.push(event.text) + (calls.reader.finish() if event.output else [])
        deltas = [{"content": part} if isinstance(part, str) else {"tool_calls": [calls.add(part)]} for part in parts]
        if event.logprobs and not deltas:
            deltas = [{}]
        pieces = [_choice(index, delta=delta) for delta in deltas]
        if event.logprobs:
            pieces[0]["logprobs"] = {"content": [self._logprob(entry) for entry, _ in event.logprobs], "refusal": None}
        if event.output is not None:
            reason = "tool_calls" if calls is not None and calls.count else event.output.finish_reason
            pieces.append(_choice(index, delta={}, finish_reason=reason))
        return pieces

    def _logprob(self, entry: TokenLogprob) -> Json:
        top = [self._token(token, logprob) for token, logprob in entry.top]
        return self._token(entry.token, entry.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float) -> Json:
        content = self._tokens.bytes(token)
        return {"token": self._tokens.text(token), "logprob": logprob, "bytes": list(content)}

    def _empty(self, index: int) -> Json:
        asked = self.plan.requests[0].sampling.logprobs is not None
        logprobs: Json | None = {"content": [], "refusal": None} if asked else None
        message = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": None}

    def _add(self, choice: Json, piece: Json) -> None:
        message, delta = choice["message"], piece["delta"]
        if "content" in delta:
            message["content"] = (message["content"] or "") + delta["content"]
        for call in delta.get("tool_calls", ()):
            message["content"] = message["content"] or None
            message.setdefault("tool_calls", []).append({key: call[key] for key in ("id", "type", "function")})
        if piece["logprobs"]:
            choice["logprobs"]["content"] += piece["logprobs"]["content"]
        choice["finish_reason"] = piece["finish_reason"]


class _Calls:
    """The tool calls of one choice."""

    def __init__(self) -> None:
        self.reader, self.count = ToolCallReader(), 0

    def add(self, call: ToolCall) -> Json:
        self.count += 1
        function = {"name": call.name, "arguments": call.arguments}
        return {
            "index": self.count - 1,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": function,
        }


class TextReply(_Reply):
    """/v1/completions."""

    prefix, whole, piece = "cmpl", "text_completion", "text_completion"

    def _choice_pieces(self, index: int, event: Event) -> list[Json]:
        pieces: list[Json] = []
        echo = self.plan.echoes[event.prompt] if self.plan.echoes else _NO_ECHO
        if self.plan.echoes and index not in self._choices:
            self._choices[index] = echo
            pieces.append(self._echoed(index, echo, event))
        if event.text or event.logprobs or event.output is not None:
            reason = event.output.finish_reason if event.output is not None else None
            piece = {"index": index, "text": event.text, "logprobs": None, "finish_reason": reason}
            if event.logprobs:
                starts = [len(echo.text) + start for _, start in event.logprobs]
                piece["logprobs"] = self._logprobs([entry for entry, _ in event.logprobs], starts)
            pieces.append(piece)
        return pieces

    def _echoed(self, index: int, echo: Echo, event: Event) -> Json:
        """The prompt as the first piece. Nothing is before its first token, which so has no log-probability."""
        logprobs = None
        request = self.plan.requests[event.prompt]
        if request.scored:
            logprobs = self._logprobs(event.prompt_logprobs, echo.starts[1:])
            first = (self._tokens.text(int(request.prompt[0])), None, None, echo.starts[0])
            logprobs = {name: [value, *logprobs[name]] for name, value in zip(logprobs, first)}
        return {"index": index, "text": echo.text, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, entries: list[TokenLogprob], starts: list[int]) -> dict[str, list[Any]]:
        return {
            "tokens": [self._tokens.text(entry.token) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": starts,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """By text; where several tokens have the same, such as parts of characters, the likeliest counts."""
        found: dict[str, float] = {}
        for token, logprob in entry.top:
            found.setdefault(self._tokens.text(token), logprob)
        return found

    def _empty(self, index: int) -> Json:
        logprobs: Json | None = None
        if self.plan.requests[0].sampling.logprobs is not None:
            logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        return {"index": index, "text": "", "logprobs": logprobs, "finish_reason": None}

    def _add(self, choice: Json, piece: Json) -> None:
        choice["text"] += piece["text"]
        for name, values in (piece["logprobs"] or {}).items():
            choice["logprobs"][name] += values
        choice["finish_reason"] = piece["finish_reason"]


def _choice(index: int, delta: Json, finish_reason: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
