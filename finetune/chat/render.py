"""Messages to (input_ids, labels): the one rendering that SFT, DPO, preview and generation share.

The whole conversation is rendered once and tokenized once, so the ids are those of transformers'
`apply_chat_template(tokenize=True)`. Which characters are a response is found by rendering prefixes of the
conversation; a token is supervised when its characters overlap a response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.chat.example import IGNORE, Example, PairExample, shared_prompt_length
from finetune.chat.messages import OWN_KEYS, Conversation, Preference
from finetune.chat.template import ChatTemplate, TemplateFault
from finetune.chat.tokenizer import Tokenizer
from finetune.errors import CheckpointError, DataError

Span = tuple[int, int]
_MARKS = [chr(code) for code in range(0xF8C0, 0xF8D0)]  # private use: no meaning, neither space nor letter


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation and which characters are trained on: sorted, disjoint [start, end)."""

    text: str
    spans: list[Span]
    source: str


# -- text ------------------------------------------------------------------------------------------------------


def render_conversation(tokenizer: Tokenizer, conversation: Conversation, train_on: str = "responses") -> Rendered:
    """Render a conversation and find its supervised characters.

    A response is the content of an assistant message through its end-of-turn token (`<|im_end|>`), without the
    header before and the newline after it.

    Args:
        train_on: "responses" (every assistant message), "last_response", or "all" (every character of the text).
            A message's own `train` flag wins over it.

    Raises:
        DataError: the template refuses the messages, or does not render prefixes of them as prefixes.
    """
    messages, tools = _shown(tokenizer, conversation), conversation.tools
    view = _View(tokenizer, messages, tools, conversation.source)
    flags = [message.get("train") for message in conversation.messages]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "all":
        kept_out = [view.message(i) for i, flag in enumerate(flags) if flag is False]
        return Rendered(view.text, _without((0, len(view.text)), kept_out), conversation.source)
    wanted = answers if train_on == "responses" else answers[-1:]
    chosen = [i for i in answers if flags[i] or (flags[i] is None and i in wanted)]
    return Rendered(view.text, view.responses(chosen), conversation.source)


class _View:
    """One conversation as its template shows it: the text, and where each message stands in it."""

    def __init__(self, tokenizer: Tokenizer, messages: list[dict], tools: list | None, source: str):
        self.tokenizer, self.messages, self.tools, self.source = tokenizer, messages, tools, source
        self.text = self._render(messages)
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"the text holds half of a character pair (\\u{ord(self.text[error.start]):04x} alone)",
                where=source,
                fix="Write the character itself, or both halves of its \\u escape.",
            ) from error

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
        """Where the content of assistant message `index` begins: the length of what a generation prompt would be."""
        if index == 0:
            return self._first_header_end()
        prompt = self._render(self.messages[:index], header=True)
        self._check_prefix(prompt, f"messages before number {index + 1}")
        self._check_header(index, len(prompt))
        return len(prompt)

    def header_start(self, index: int) -> int:
        return self._end(index - 1)

    def _first_header_end(self) -> int:
        # Templates do not render an empty prompt faithfully (a default system message would be missing), so the
        # header is learnt from this message and found in the text.
        header = self._render(self.messages[:1], header=True)[len(self._render(self.messages[:1])) :]
        at = self.text.find(header)
        if not header or at < 0:
            raise self._fault("the conversation starts with an assistant message, whose beginning cannot be found")
        return at + len(header)

    def _end(self, index: int) -> int:
        if index == len(self.messages) - 1:
            return len(self.text)
        head = self._render(self.messages[: index + 1])
        self._check_prefix(head, f"first {index + 1} messages")
        return len(head)

    def _render(self, messages: list[dict], header: bool = False) -> str:
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


def _shown(tokenizer: Tokenizer, conversation: Conversation) -> list[dict]:
    """The messages as the template gets them: our own keys removed, tool calls in the form the template knows."""
    template = tokenizer.template_for(conversation.tools)
    return [
        {key: value for key, value in fitted.items() if key not in OWN_KEYS}
        for fitted in (_fit_tool_calls(message, template, conversation.source) for message in conversation.messages)
    ]


def _fit_tool_calls(message: dict, template: ChatTemplate, source: str) -> dict:
    if "tool_calls" not in message or template.knows_tool_calls:
        return message
    if "raw" in message:
        # A sharegpt row says how the call is written; that text is what such a model has to learn.
        return {"role": message["role"], "content": message["raw"], "train": message.get("train")}
    raise DataError(
        "the row has tool_calls, which the model's chat template does not render",
        where=source,
        fix="Use a model whose template knows tools (Qwen2.5-Instruct), or write the calls as content.",
    )


def _without(whole: Span, holes: list[Span]) -> list[Span]:
    spans, start = [], whole[0]
    for hole_start, hole_end in sorted(holes):
        if start < hole_start:
            spans.append((start, hole_start))
        start = max(start, hole_end)
    return spans + ([(start, whole[1])] if start < whole[1] else [])


# -- tokens ----------------------------------------------------------------------------------------------------


def encode_rendered(tokenizer: Tokenizer, rendered: Sequence[Rendered]) -> list[Example]:
    """Tokenize texts, on all cores, and mark the supervised tokens."""
    encodings = tokenizer.encode_batch([item.text for item in rendered])
    examples = []
    for item, encoding in zip(rendered, encodings, strict=True):
        ids = np.array(encoding.ids, dtype=np.int32)
        labels = np.full_like(ids, IGNORE)
        for span in item.spans:
            first, after = _token_range(encoding, span, len(item.text))
            labels[first:after] = ids[first:after]
        examples.append(Example(ids, labels, item.source))
    return examples


def _token_range(encoding, span: Span, length: int) -> tuple[int, int]:
    """The tokens [first, after) whose characters overlap the span.

    `char_to_token` searches in Rust; turning all offsets into Python objects would cost more than tokenizing.
    """
    start, end = span
    if start >= end:
        return 0, 0
    first = encoding.char_to_token(start)
    after = encoding.char_to_token(end) if end < length else len(encoding)
    if first is None or after is None:
        # A character that normalization merged into its neighbour (an accent at the border) belongs to no token.
        offsets = np.asarray(encoding.offsets).reshape(-1, 2)
        overlapping = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
        return (int(overlapping[0]), int(overlapping[-1]) + 1) if len(overlapping) else (0, 0)
    while after < len(encoding) and encoding.token_to_chars(after)[0] < end:
        after += 1
    return first, after


@dataclass(frozen=True)
class RenderedPair:
    """Both sides of a preference as text, and the characters of the generation header."""

    chosen: Rendered
    rejected: Rendered
    header: Span


def render_preference(tokenizer: Tokenizer, preference: Preference) -> RenderedPair:
    """Render prompt + chosen and prompt + rejected; supervised are the assistant messages behind the prompt.

    Raises:
        DataError: as `render_conversation`.
    """
    prompt = preference.prompt
    first = len(prompt.messages)
    sides, header = [], (0, 0)
    for answer in (preference.chosen, preference.rejected):
        whole = Conversation(prompt.messages + answer, prompt.tools, preference.source)
        view = _View(tokenizer, _shown(tokenizer, whole), prompt.tools, preference.source)
        header = view.header_start(first), view.header_end(first)
        wanted = [
            i
            for i in range(first, len(whole.messages))
            if whole.messages[i]["role"] == "assistant" and whole.messages[i].get("train") is not False
        ]
        sides.append(Rendered(view.text, view.responses(wanted), preference.source))
    return RenderedPair(sides[0], sides[1], header)


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[RenderedPair]) -> list[PairExample]:
    """Tokenize rendered preferences, each side in one go."""
    examples = encode_rendered(tokenizer, [side for pair in pairs for side in (pair.chosen, pair.rejected)])
    return [
        _pair(tokenizer, pair, chosen, rejected)
        for pair, chosen, rejected in zip(pairs, examples[::2], examples[1::2], strict=True)
    ]


def _pair(tokenizer: Tokenizer, pair: RenderedPair, chosen: Example, rejected: Example) -> PairExample:
    shared = shared_prompt_length(chosen, rejected)
    header = len(tokenizer.encode(pair.chosen.text[slice(*pair.header)]))
    return PairExample(chosen.input_ids[:shared], chosen, rejected, min(header, shared), chosen.source)


def prompt_ids(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Ids of a prompt with the generation header, as generation sees it.

    Raises:
        DataError: the template refuses the messages.
    """
    messages = _shown(tokenizer, conversation)
    try:
        return tokenizer.encode(tokenizer.render(messages, conversation.tools, add_generation_prompt=True))
    except TemplateFault as error:
        raise DataError(
            f"the model's chat template refused the messages: {error}", where=conversation.source
        ) from error
