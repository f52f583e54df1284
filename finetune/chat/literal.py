"""Special tokens that users wrote, kept as the text that they are: transformers' `split_special_tokens`, for contents.

What the template itself writes stays special. A mark that nobody wrote is put into special texts before a template is
rendered, so that the tokenizer does not see them; what lies between the tokens it does see is encoded without the mark,
by a tokenizer that knows no special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import tokenizers

from finetune.chat.tokenizer import Tokenizer

_FIRST_MARK, _LAST_MARK = 0xE000, 0x10FFFD  # of the private characters; no content that fits a context has them all


class Literal:
    """Marks what users wrote, and encodes what was rendered from it. For several threads at once."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._plain = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        self._plain.encode_special_tokens = True
        self._special = frozenset(tokenizer.all_special_ids)
        self._first = re.compile(f"(?={'|'.join(map(re.escape, tokenizer.special_texts)) or '(?!)'}).", re.DOTALL)

    def mark_for(self, written: Any) -> str | None:
        """A character that is nowhere in `written`, a JSON value; None where no special text is."""
        texts = list(_texts(written))
        if not any(self._first.search(text) for text in texts):
            return None
        used = set().union(*texts)
        return next(chr(code) for code in range(_FIRST_MARK, _LAST_MARK) if chr(code) not in used)

    def marked(self, written: Any, mark: str) -> Any:
        """`written` with the mark behind the first character of each special text."""
        if isinstance(written, str):
            return self._first.sub(lambda found: found.group() + mark, written)
        if isinstance(written, list):
            return [self.marked(item, mark) for item in written]
        if isinstance(written, dict):
            return {self.marked(key, mark): self.marked(value, mark) for key, value in written.items()}
        return written

    def encode(self, rendered: str, mark: str) -> list[int]:
        """Token ids of a rendered text with marks."""
        seen = self._tokenizer.backend.encode_batch([rendered], add_special_tokens=False)[0]
        special = [(token, span) for token, span in zip(seen.ids, seen.offsets) if token in self._special]
        starts = [0, *(stop for _, (_, stop) in special)]
        stops = [*(start for _, (start, _) in special), len(rendered)]
        between = [rendered[start:stop].replace(mark, "") for start, stop in zip(starts, stops)]
        parts = self._plain.encode_batch_fast(between, add_special_tokens=False)
        ids = list(parts[0].ids)
        for (token, _), part in zip(special, parts[1:]):
            ids += [token, *part.ids]
        return ids


def _texts(written: Any) -> Iterator[str]:
    """All texts in a JSON value, keys too."""
    if isinstance(written, str):
        yield written
    elif isinstance(written, list):
        for item in written:
            yield from _texts(item)
    elif isinstance(written, dict):
        for key, value in written.items():
            yield key
            yield from _texts(value)
