"""Prompts that are given back before their answers: `echo` of /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.chat.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Echo:
    """A prompt's text, and where in it the text of each of its tokens begins."""

    text: str
    starts: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, ids: Sequence[int], unwritten: int = 0) -> Echo:
        """Decode a prompt, special tokens and all.

        Args:
            unwritten: Tokens at its beginning that the client did not write, such as a BOS; they have no text.
        """
        decoder = StreamDecoder(tokenizer, skip_special_tokens=False)
        starts, text = [0] * unwritten, ""
        for token in ids[unwritten:]:
            starts.append(len(text))
            text += decoder.push(token)
        return cls(text + decoder.finish(), starts)
