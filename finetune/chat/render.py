"""Messages to (input_ids, labels): the one rendering that SFT, DPO, preview and generation share.

The whole conversation is rendered once and tokenized once, so the ids are those of transformers'
`apply_chat_template(tokenize=True)`. Which characters are a response is found by rendering prefixes of the
conversation (`View`); a token is supervised when its characters overlap a response. Plain text, which no template
renders, is tokenized as transformers' `tokenizer(text)` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers

from finetune.chat.example import IGNORE, Example, PairExample, shared_prompt_length
from finetune.chat.messages import OWN_KEYS, Conversation, PlainText, Preference
from finetune.chat.template import ChatTemplate, TemplateFault
from finetune.chat.tokenizer import Tokenizer
from finetune.chat.view import Message, Span, View, check_characters
from finetune.errors import CheckpointError, DataError


@dataclass(frozen=True)
class Rendered:
    """The text of a row and which characters are trained on.

    Attributes:
        text: All of it.
        spans: Supervised characters [start, end), sorted and disjoint.
        source: "file:row".
        surplus: What the template's generation prompt has beyond what stands before an answer here, see `View`.
        prompt: Of plain text, what stands before the completion; None for a text without prompt and for conversations.
        plain: Whether it is plain text, around which the tokenizer puts its own tokens (BOS).
    """

    text: str
    spans: list[Span]
    source: str
    surplus: str = ""
    prompt: str | None = None
    plain: bool = False


# -- text ------------------------------------------------------------------------------------------------------


def render_conversation(tokenizer: Tokenizer, conversation: Conversation, train_on: str = "responses") -> Rendered:
    """Render a conversation and find its supervised characters.

    A response is the content of an assistant message through its end-of-turn token (`<|im_end|>`), without the
    header before and the newline after it.

    Args:
        train_on: "responses" (every assistant message behind what is given), "last_response", or "all" (every
            character of the text). A message's own `train` flag wins over it.

    Raises:
        DataError: the template refuses the messages, leaves out what they say, or does not render prefixes of them as
            prefixes.
    """
    messages, tools = _shown(tokenizer, conversation), conversation.tools
    view = View(tokenizer, messages, tools, conversation.source)
    flags = [message.get("train") for message in conversation.messages]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "all":
        kept_out = [view.message(i) for i, flag in enumerate(flags) if flag is False]
        spans = _without((0, len(view.text)), kept_out)
    else:
        wanted = [i for i in answers if i >= conversation.given]
        wanted = wanted if train_on == "responses" else wanted[-1:]
        spans = view.responses([i for i in answers if flags[i] or (flags[i] is None and i in wanted)])
    return Rendered(view.text, spans, conversation.source, view.surplus)


def render_plain(tokenizer: Tokenizer, row: PlainText, train_on: str = "responses") -> Rendered:
    """Put the end of text behind a text; supervised is the completion with it, or (train_on: all) everything.

    Raises:
        DataError: the text holds half of a character pair. CheckpointError: the tokenizer names no end of text.
    """
    end = tokenizer.eos_token
    if end is None:
        raise CheckpointError(
            "the tokenizer names no eos_token, which ends a text",
            where="tokenizer_config.json",
            fix="Name it there, as the original model does.",
        )
    prompt = None if train_on == "all" else row.prompt
    text = (row.prompt or "") + row.completion + ("" if row.completion.endswith(end) else end)
    check_characters(text, row.source)
    return Rendered(text, [(len(prompt or ""), len(text))], row.source, prompt=prompt, plain=True)


def _shown(tokenizer: Tokenizer, conversation: Conversation) -> list[Message]:
    """The messages as the template gets them: our own keys removed, roles and tool calls as the template knows them."""
    template = tokenizer.template_for(conversation.tools)
    return [
        {key: value for key, value in fitted.items() if key not in OWN_KEYS}
        for fitted in (_fitted(message, template, conversation.source) for message in conversation.messages)
    ]


def _fitted(message: Message, template: ChatTemplate, source: str) -> Message:
    if message["role"] == "developer" and not template.mentions("developer"):
        # OpenAI's newer word for the same; a template that has never heard of it would write it as a role of its own.
        message = {**message, "role": "system"}
    return _fit_tool_calls(message, template, source)


def _fit_tool_calls(message: Message, template: ChatTemplate, source: str) -> Message:
    if "tool_calls" not in message or template.knows_tool_calls:
        return message
    if "raw" in message:
        # A sharegpt row says how the call is written; that text is what such a model has to learn.
        return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": message["raw"]}
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
    encodings = tokenizer.encode_batch(
        [item.text for item in rendered], offsets=not all(item.plain for item in rendered)
    )
    encode = {False: _encode_spans, True: lambda item, encoding: _encode_plain(tokenizer, item, encoding)}
    return [encode[item.plain](item, encoding) for item, encoding in zip(rendered, encodings, strict=True)]


def _encode_spans(item: Rendered, encoding: tokenizers.Encoding) -> Example:
    ids = np.array(encoding.ids, dtype=np.int32)
    labels = np.full_like(ids, IGNORE)
    for span in item.spans:
        first, after = _token_range(encoding, span, len(item.text))
        labels[first:after] = ids[first:after]
    return Example(ids, labels, item.source)


def _encode_plain(tokenizer: Tokenizer, item: Rendered, encoding: tokenizers.Encoding) -> Example:
    """Supervised is what follows the tokens that the prompt alone has too, as TRL has it: a token that would join the
    prompt's end and the completion's beginning is one the model has to learn."""
    before, after = tokenizer.around
    ids = np.array([*before, *encoding.ids, *after], dtype=np.int32)
    if item.prompt is None:
        return Example(ids, ids.copy(), item.source)
    prompt = np.array([*before, *tokenizer.encode(item.prompt, add_special_tokens=False)], dtype=np.int32)
    size = min(len(prompt), len(ids))
    differing = np.flatnonzero(prompt[:size] != ids[:size])
    labels = ids.copy()
    labels[: int(differing[0]) if len(differing) else size] = IGNORE
    return Example(ids, labels, item.source)


def _token_range(encoding: tokenizers.Encoding, span: Span, length: int) -> tuple[int, int]:
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
        view = View(tokenizer, _shown(tokenizer, whole), prompt.tools, preference.source)
        header = view.header_start(first), view.header_end(first)
        wanted = [
            i
            for i in range(first, len(whole.messages))
            if whole.messages[i]["role"] == "assistant" and whole.messages[i].get("train") is not False
        ]
        sides.append(Rendered(view.text, view.responses(wanted), preference.source, view.surplus))
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
    header = len(tokenizer.encode(pair.chosen.text[slice(*pair.header)], add_special_tokens=False))
    return PairExample(chosen.input_ids[:shared], chosen, rejected, min(header, shared), chosen.source)


def prompt_text(tokenizer: Tokenizer, conversation: Conversation, **variables: Any) -> str:
    """The text of a prompt with the generation header, as generation sees it.

    Args:
        variables: What else the template gets, such as `enable_thinking`.

    Raises:
        DataError: the template refuses the messages.
    """
    messages = _shown(tokenizer, conversation)
    try:
        return tokenizer.render(messages, conversation.tools, add_generation_prompt=True, **variables)
    except TemplateFault as error:
        raise DataError(
            f"the model's chat template refused the messages: {error}", where=conversation.source
        ) from error


def prompt_ids(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Ids of `prompt_text`.

    Raises:
        DataError: the template refuses the messages.
    """
    return tokenizer.encode(prompt_text(tokenizer, conversation), add_special_tokens=False)
