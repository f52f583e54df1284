"""One conversation as its chat template shows it: the text, and where each message stands in it."""

from __future__ import annotations

import os
import re
from typing import Any

from finetune.chat.lost import find_lost
from finetune.chat.template import TemplateFault
from finetune.chat.tokenizer import Tokenizer
from finetune.errors import CheckpointError, DataError

Message = dict[str, Any]
Span = tuple[int, int]
_MARKS = [chr(code) for code in range(0xF8C0, 0xF8D0)]  # private use: no meaning, neither space nor letter


class View:
    """A conversation and its text.

    Attributes:
        text: All of it.
        surplus: What the generation prompt has beyond what the text has before an answer; empty where the text has all
            of it. Known once the answer was looked for.

    Raises:
        DataError: the template refuses the messages, or leaves out what they say.
    """

    def __init__(self, tokenizer: Tokenizer, messages: list[Message], tools: list[Message] | None, source: str):
        self.tokenizer, self.messages, self.tools, self.source = tokenizer, messages, tools, source
        self.surplus = ""
        self.text = self._render(messages)
        check_characters(self.text, source)
        template = tokenizer.template_for(tools)
        lost = find_lost(messages, tools, self.text, template.source, lambda marked: tokenizer.render(marked, tools))
        if lost is not None:
            raise self._fault(*lost)

    def responses(self, indices: list[int]) -> list[Span]:
        """Characters of these assistant messages, in order."""
        found = self._by_marks(indices) if len(indices) > 1 else None
        return found or [self.response(index) for index in indices]

    def _by_marks(self, indices: list[int]) -> list[Span] | None:
        """The same in one further rendering, where prefixes would take time that grows with the square of the turns.

        The first response is found by prefixes. Contents are then rendered between two marks; this counts only if the
        text without marks is the text itself, and every content stands between the same header and end-of-turn token
        as the first. Otherwise (tool calls, empty or trimmed contents) None.
        """
        first = self.response(indices[0])
        header = self.text[self.header_start(indices[0]) : first[0]] if indices[0] else ""
        end_token = next((t for t in self.tokenizer.special_texts if self.text.endswith(t, *first)), None)
        contents = [self.messages[i].get("content") for i in indices if not self.messages[i].get("tool_calls")]
        if not header or end_token is None or len(contents) < len(indices) or None in contents:
            return None
        marks = [mark for mark in _MARKS if mark not in self.text][:2]
        if len(marks) < 2:
            return None
        messages = list(self.messages)
        for index in indices:
            messages[index] = {**messages[index], "content": f"{marks[0]}{messages[index]['content']}{marks[1]}"}
        try:
            marked = self.tokenizer.render(messages, self.tools)
        except TemplateFault:
            return None
        spans = [
            (start, end + len(end_token))
            for start, end in _between(marked, *marks)
            if self.text.endswith(header, 0, start) and self.text.startswith(end_token, end)
        ]
        same_text = marked.translate(dict.fromkeys(map(ord, marks))) == self.text
        return spans if same_text and len(spans) == len(indices) and spans[0] == first else None

    def response(self, index: int) -> Span:
        """Characters of an assistant message: after its header, through its end-of-turn token."""
        start = self.header_end(index)
        end = self._end(index)
        segment = self.text[start:end].rstrip()
        for token in self.tokenizer.special_texts:
            if segment.endswith(token):
                return start, start + len(segment)
        return start, end

    def message(self, index: int) -> Span:
        """Characters of any message with its header; those of an assistant message without header, as `response`."""
        if self.messages[index]["role"] == "assistant":
            return self.response(index)
        return (self._end(index - 1) if index else 0), self._end(index)

    def header_end(self, index: int) -> int:
        """Where the content of assistant message `index` begins: the length of what a generation prompt would be.

        A template may end the generation prompt in more than the message has (`<think>` and a newline, where the
        answer is given without thoughts). What both begin with is then the prompt.
        """
        if index == 0:
            return self._first_header_end()
        prompt = self._render(self.messages[:index], header=True)
        if self.text.startswith(prompt):
            self._check_header(index, len(prompt))
            return len(prompt)
        before = self._end(index - 1)
        shared = self._without_content(index, len(os.path.commonprefix([prompt, self.text])))
        if shared <= before:
            self._check_prefix(prompt, f"messages before number {index + 1}")
        self._note_surplus(prompt[shared:])
        return shared

    def _without_content(self, index: int, end: int) -> int:
        """Where message `index` begins, if what prompt and text share up to `end` holds its first characters too."""
        content = self.messages[index].get("content") or ""
        for text in (content, content.strip()):
            for start in range(end, end - len(text) - 1, -1):
                if text and self.text.startswith(text, start):
                    return start
        return end

    def _note_surplus(self, surplus: str) -> None:
        self.surplus = self.surplus or surplus

    def header_start(self, index: int) -> int:
        return self._end(index - 1)

    def _first_header_end(self) -> int:
        # Templates do not render an empty prompt faithfully (a default system message would be missing), so the
        # header is learnt from this message and found in the text.
        header = self._render(self.messages[:1], header=True)[len(self._render(self.messages[:1])) :]
        at = self.text.find(header)
        if header and at >= 0:
            return at + len(header)
        content = (self.messages[0].get("content") or "").strip()
        starts = [match.start() for match in re.finditer(re.escape(content), self.text)] if content else []
        shared = {start: _ends_in(self.text[:start], header) for start in starts}
        start = max(starts, key=lambda start: shared[start], default=0)
        if not shared.get(start):
            raise self._fault("the conversation starts with an assistant message, whose beginning cannot be found")
        self._note_surplus(header[shared[start] :])
        return start

    def _end(self, index: int) -> int:
        if index == len(self.messages) - 1:
            return len(self.text)
        head = self._render(self.messages[: index + 1])
        self._check_prefix(head, f"first {index + 1} messages")
        return len(head)

    def _render(self, messages: list[Message], header: bool = False) -> str:
        try:
            return self.tokenizer.render(messages, self.tools, add_generation_prompt=header)
        except TemplateFault as error:
            raise self._fault(f"the model's chat template refused the messages: {error}") from error

    def _check_prefix(self, text: str, what: str) -> None:
        if not self.text.startswith(text):
            raise self._fault(
                f"the chat template writes the {what} differently once others follow, "
                "so the response cannot be told from the prompt",
                "Use train_on: last_response or train_on: all, or a template that only ever appends.",
            )

    def _check_header(self, index: int, start: int) -> None:
        opens_special = self.text.startswith(tuple(self.tokenizer.special_texts), start)
        # The content may open with a special token too; only a prompt without any header is at fault.
        if opens_special and start == self._end(index - 1):
            raise CheckpointError(
                "the chat template ignores add_generation_prompt, so the assistant's header would be trained on",
                where="chat template",
                fix="Add {% if add_generation_prompt %}...{% endif %} at its end, as the -Instruct models have it.",
            )

    def _fault(self, what: str, fix: str | None = None) -> DataError:
        return DataError(what, where=self.source, fix=fix)


def _between(marked: str, before: str, after: str) -> list[Span]:
    """What stands between the marks, as places in the text without them; nothing where marks do not come in pairs."""
    head, *parts = marked.split(before)
    spans, at = [], len(head)
    for part in parts:
        if part.count(after) != 1:
            return []
        spans.append((at, at + part.index(after)))
        at += len(part) - 1
    return spans


def _ends_in(text: str, header: str) -> int:
    """How many first characters of a header a text ends in."""
    return next((size for size in range(len(header), 0, -1) if text.endswith(header[:size])), 0)


def check_characters(text: str, source: str) -> None:
    """Refuse half of a character pair, which JSON can write and which is no text.

    Raises:
        DataError: there is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds half of a character pair (\\u{ord(text[error.start]):04x} alone)",
            where=source,
            fix="Write the character itself, or both halves of its \\u escape.",
        ) from error
