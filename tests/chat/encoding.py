"""Rows to tokens one by one, as tests ask for them."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.chat.example import Example, PairExample
from finetune.chat.messages import Conversation, Preference
from finetune.chat.render import encode_pairs, encode_rendered, render_conversation, render_preference
from finetune.chat.tokenizer import Tokenizer


def encode_conversations(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], train_on: str = "responses"
) -> list[Example]:
    """Rendered and tokenized, together."""
    return encode_rendered(tokenizer, [render_conversation(tokenizer, c, train_on) for c in conversations])


def encode_conversation(tokenizer: Tokenizer, conversation: Conversation, train_on: str = "responses") -> Example:
    """Rendered and tokenized, by itself."""
    return encode_conversations(tokenizer, [conversation], train_on)[0]


def encode_preference(tokenizer: Tokenizer, preference: Preference) -> PairExample:
    """Rendered and tokenized, by itself."""
    return encode_pairs(tokenizer, [render_preference(tokenizer, preference)])[0]
