"""One answer in the making: which token comes next, where the answer ends, what of its text is certain. No paddle."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from finetune.chat.tokenizer import StreamDecoder
from finetune.infer.sampling import Sampling, TokenLogprob, choose, penalize, token_logprob


@dataclass(frozen=True)
class Output:
    """One generated answer.

    Attributes:
        tokens: Generated token ids; a stop token that ended the row is among them.
        text: Their text, without special tokens and cut before a stop text. Empty without a tokenizer.
        finish_reason: "stop" (stop token or stop text) or "length" (max_new_tokens or the model's context).
        logprobs: One entry per token when asked for, else None.
        prompt_tokens: Length of the prompt.
        score: Mean of the tokens' logits, penalties taken off.
    """

    tokens: list[int]
    text: str
    finish_reason: str
    logprobs: list[TokenLogprob] | None
    prompt_tokens: int
    score: float


class Progress(Protocol):
    """How far one answer has come in its grammar."""

    def allow(self, scores: np.ndarray) -> np.ndarray:
        """Scores [V] with those of tokens that may not come next at minus infinity; a copy."""

    def accept(self, token: int) -> bool:
        """Go on by a token; whether the answer is whole and nothing can follow."""


class Grammar(Protocol):
    """What answers may look like."""

    def start(self) -> Progress:
        """At the beginning of an answer."""


@dataclass(frozen=True)
class Request:
    """A prompt, int64 [L], and what is asked for; `index` is the caller's, to know answers by.

    Attributes:
        grammar: What the answer must be; None leaves it free.
        scored: Whether the prompt's own tokens get log-probabilities, as `sampling.logprobs` says.
        answered: False where the prompt is only read.
    """

    prompt: np.ndarray
    sampling: Sampling
    index: Any = 0
    grammar: Grammar | None = None
    scored: bool = False
    answered: bool = True


class PromptScores:
    """Log-probabilities of a prompt's tokens, as its reading goes on.

    Attributes:
        found: Of the tokens but the first, so far.
    """

    def __init__(self, request: Request):
        self.found: list[TokenLogprob] = []
        self._prompt, self._top = request.prompt, request.sampling.logprobs or 0

    def __call__(self, logits: np.ndarray) -> None:
        """Go on by the logits behind the next tokens, float32 [N, V]."""
        for scores in logits:
            self.found.append(token_logprob(scores, int(self._prompt[len(self.found) + 1]), self._top))


@dataclass
class Row:
    """One answer in the making. Depends on its own logits and its own random generator only.

    Attributes:
        prompt_logprobs: Of the prompt's tokens but the first, once it is read; empty where they are not wanted.
        error: What went wrong while its next token was chosen. It is finished then, and has no output.
    """

    request: Request
    sample: int
    stop_ids: frozenset[int]
    limit: int
    decoder: StreamDecoder | None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    error: Exception | None = None

    def __post_init__(self) -> None:
        seed = self.request.sampling.seed
        self._rng = np.random.default_rng(None if seed is None else [seed, self.sample])
        self._counts: dict[int, int] = {}
        self._progress = None if self.request.grammar is None else self.request.grammar.start()
        self._bias = _bias(self.request.sampling.logit_bias)
        self._sum = 0.0  # of the tokens' logits
        self._sent = 0
        self._ends: list[int] = []  # length of the text after each token; kept only beside log-probabilities
        self._told = 0
        self._cut = False

    @property
    def sequence(self) -> np.ndarray:
        """Prompt and answer so far, int64."""
        return np.concatenate([self.request.prompt, np.asarray(self.tokens, dtype=np.int64)])

    @cached_property
    def _prompt_ids(self) -> np.ndarray:
        return np.unique(self.request.prompt)

    @property
    def likeliest(self) -> bool:
        """Whether the next token is just the largest logit."""
        sampling = self.request.sampling
        return (
            sampling.temperature == 0.0
            and not sampling.penalized
            and not sampling.logit_bias
            and self._progress is None
            and sampling.logprobs is None
            and len(self.tokens) >= sampling.min_new_tokens
        )

    def advance(self, scores: np.ndarray) -> None:
        """Choose the next token from logits, float32 [V]."""
        sampling = self.request.sampling
        adjusted = scores
        if sampling.penalized:
            adjusted = penalize(scores, sampling, self._prompt_ids, self._counts)
        if self._bias is not None:
            adjusted = adjusted.copy()
            adjusted[self._bias[0]] += self._bias[1]
        if self._progress is not None:
            adjusted = self._progress.allow(adjusted)
        if len(self.tokens) < sampling.min_new_tokens:
            adjusted = self._without_ends(adjusted)
        token = choose(adjusted, sampling, self._rng)
        if sampling.logprobs is not None:
            self.logprobs.append(token_logprob(scores, token, sampling.logprobs))
        self.accept(token, float(adjusted[token]))
        if self._progress is not None and self._progress.accept(token) and self.finish_reason != "stop":
            self.finish_reason = "stop"
            self.text += self.decoder.finish() if self.decoder is not None else ""

    def _without_ends(self, scores: np.ndarray) -> np.ndarray:
        """Scores without tokens that would end the row; as they are where nothing else may come."""
        others = scores.copy()
        others[[token for token in self.stop_ids if token < len(scores)]] = -np.inf
        return others if others.max() > -np.inf else scores

    def accept(self, token: int, logit: float) -> None:
        """Add a token, and find out whether the row ends with it."""
        self.tokens.append(token)
        self._sum += logit
        self._counts[token] = self._counts.get(token, 0) + 1
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        if self.decoder is None:
            return
        piece = "" if self.finish_reason == "stop" else self.decoder.push(token)
        if self.finish_reason:
            piece += self.decoder.finish()
        before = len(self.text)
        self.text += piece
        if self.request.sampling.logprobs is not None:
            self._ends.append(len(self.text))
        self._cut_at_stop(before)

    def _cut_at_stop(self, before: int) -> None:
        stops = self.request.sampling.stop
        found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in stops]
        found = [place for place in found if place >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.finish_reason = "stop"
            self._cut = True

    def new_text(self) -> str:
        """The text that became certain since the last call. A possible beginning of a stop text is held back."""
        end = len(self.text)
        if self.finish_reason is None:
            end -= max((overlap(self.text, stop) for stop in self.request.sampling.stop), default=0)
        piece = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def new_logprobs(self) -> list[tuple[TokenLogprob, int]]:
        """Log-probabilities of the tokens whose text `new_text` has given out, each with where its text begins.

        Neither a stop token nor tokens of a stop text are among them. A token that shows nothing yet, such as the first
        byte of a character, comes with the next that does.
        """
        starts = [0, *self._ends]
        end = len(self._ends)
        if self.finish_reason is None:
            while end > self._told and (self._ends[end - 1] > self._sent or self._ends[end - 1] == starts[end - 1]):
                end -= 1
        told = range(self._told, end)
        self._told = end
        limit = len(self.text) if self._cut else len(self.text) + 1
        return [
            (self.logprobs[i], starts[i]) for i in told if self.tokens[i] not in self.stop_ids and starts[i] < limit
        ]

    def output(self) -> Output:
        """The whole answer.

        Raises:
            Exception: `error`, where there is one.
        """
        if self.error is not None:
            raise self.error
        logprobs = self.logprobs if self.request.sampling.logprobs is not None else None
        return Output(
            self.tokens,
            self.text,
            self.finish_reason or "length",
            logprobs,
            len(self.request.prompt),
            self._sum / max(1, len(self.tokens)),
        )


def _bias(pairs: tuple[tuple[int, float], ...]) -> tuple[np.ndarray, np.ndarray] | None:
    """Token ids, int64, and what is added to their scores, float32."""
    if not pairs:
        return None
    tokens, values = zip(*pairs)
    return np.array(tokens, np.int64), np.array(values, np.float32)


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
