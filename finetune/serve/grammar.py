"""Answers that a grammar allows and no others: JSON, JSON of a schema, calls of tools. By llguidance.

At each token the grammar says which tokens may come next, and the rest get no chance. White space in JSON is fixed to
what Python's `json` writes: where it is free, a model can go on with newlines for ever.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import llguidance
import numpy as np
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from finetune.chat.tokenizer import Tokenizer
from finetune.errors import ArgumentError, FinetuneError

_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Makes grammars for one model, in any thread.

    Args:
        vocabulary: Tokens of the model.
        ends: Tokens that end an answer; at least one.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: Sequence[int]):
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, sorted(ends)
        self._making = threading.Lock()

    @cached_property
    def _words(self) -> llguidance.LLTokenizer:
        # Takes a second with 150,000 tokens, so only when a request asks for a grammar.
        return llguidance.LLTokenizer(
            self._tokenizer.backend.to_str(), n_vocab=self._vocabulary, eos_token=[int(end) for end in self._ends]
        )

    def json(self, schema: dict[str, Any] | bool) -> Grammar:
        """JSON that is valid under a schema.

        Raises:
            ArgumentError: it is no schema, or has a keyword that cannot be kept to.
        """
        return self._checked(llguidance.LLMatcher.grammar_from_json_schema(_formed(schema)))

    def tool_calls(self, tools: Sequence[dict[str, Any]], *, several: bool) -> Grammar:
        """Calls as Qwen's templates write them, arguments under each tool's own schema.

        Args:
            tools: In OpenAI's form, each with a name.
            several: Whether more than one call may be made.

        Raises:
            ArgumentError: as `json`, for a tool's parameters.
        """
        opening, closing = (self._tag(text) for text in ("<tool_call>", "</tool_call>"))
        lines = [
            f"start: call{' (NEWLINE call)*' if several else ''}",
            'NEWLINE: "\\n"',
            f'call: {opening} "\\n" body "\\n" {closing}',
            "body: " + " | ".join(f"tool_{i}" for i in range(len(tools))),
        ]
        for i, tool in enumerate(tools):
            function = tool["function"]
            head = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
            parameters = function.get("parameters")
            schema = {"type": "object", **parameters} if isinstance(parameters, dict) else {"type": "object"}
            lines.append(f'tool_{i}: {json.dumps(head, ensure_ascii=False)} arguments_{i} "}}"')
            lines.append(f"arguments_{i}: %json {json.dumps(_formed(schema))}")
        return self._checked(llguidance.LLMatcher.grammar_from_lark("\n".join(lines)))

    def _tag(self, text: str) -> str:
        """A tag as it stands in a grammar: a token of its own where the tokenizer has one."""
        added = {token.content for token in self._tokenizer.backend.get_added_tokens_decoder().values()}
        return text if text in added else json.dumps(text)

    def _checked(self, text: str) -> Grammar:
        with self._making:
            grammar = Grammar(text, self._words)
        error = grammar.matcher().get_error()
        if error:
            raise ArgumentError(error.strip().splitlines()[0][:300], fix="Leave the keyword out.")
        return grammar


def _formed(schema: dict[str, Any] | bool) -> dict[str, Any]:
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ArgumentError("a schema must be an object, or true", fix="Give a JSON schema.")
    return {**schema, "x-guidance": _FORM}


@dataclass(frozen=True)
class Grammar:
    """What answers may look like."""

    text: str
    words: llguidance.LLTokenizer

    def matcher(self) -> llguidance.LLMatcher:
        """At the beginning; in an error state where the text is no grammar."""
        return llguidance.LLMatcher(self.words, self.text, log_level=0)

    def start(self) -> Progress:
        """At the beginning of an answer."""
        return Progress(self)


class Progress:
    """How far one answer has come in its grammar."""

    def __init__(self, grammar: Grammar):
        self._matcher = grammar.matcher()
        self._bits = allocate_token_bitmask(1, grammar.words.vocab_size)

    def allow(self, scores: np.ndarray) -> np.ndarray:
        """Scores [V] with those of tokens that may not come next at minus infinity; a copy."""
        fill_next_token_bitmask(self._matcher, self._bits)
        self._check()
        allowed = np.unpackbits(self._bits[0].view(np.uint8), bitorder="little")[: len(scores)]
        return np.where(allowed, scores, np.float32(-np.inf))

    def accept(self, token: int) -> bool:
        """Go on by a token; whether the answer is whole and nothing can follow."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise FinetuneError(
                f"the grammar could not be kept to: {self._matcher.get_error().strip().splitlines()[0][:300]}",
                fix="Give a simpler schema.",
            )
