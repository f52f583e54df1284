"""How the next token is chosen: the settings, and the arithmetic on one row of scores. No paddle here.

Everything works on one row at a time, in NumPy, with a random generator of its own: what a row draws depends on its
seed and its scores only. Scores differ in their last bits (1e-6) with the number of rows that are multiplied together
and with the pieces in which a prompt was read, as in every engine. Greedy answers and draws are the same alone and
beside others, but where the two foremost tokens are as close as that.

Order and meaning follow transformers' logits processors: repetition penalty, then (ours, as in OpenAI's interface)
presence and frequency penalty and the bias of single tokens, then temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.errors import ArgumentError, Fault

MAX_TOP_LOGPROBS = 20
DEFAULT_MAX_NEW_TOKENS = 512
DEFAULT_BATCH_SIZE = 8
DEFAULT_MAX_BATCH, DEFAULT_MAX_QUEUE, DEFAULT_PREFIX_CACHE = 32, 256, 16_384  # of the server
# Scores divided by less overflow; as in vLLM, such a temperature means the likeliest token.
_LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Sampling:
    """What a request asks for.

    Attributes:
        max_new_tokens: Most tokens to add; the model's context may end a row earlier.
        min_new_tokens: No stop token is chosen before this many.
        temperature: 0 takes the likeliest token (greedy); above 0 draws. Below 1e-5 becomes 0.
        top_p: Keep the likeliest tokens whose probabilities sum to this; 1 keeps all.
        top_k: Keep this many of the likeliest tokens; 0 keeps all.
        min_p: Drop tokens less likely than this share of the likeliest one; 0 keeps all.
        repetition_penalty: Above 1 makes tokens of the prompt and the answer less likely (Keskar et al. 2019).
        presence_penalty: Taken off the score of every token the answer already holds.
        frequency_penalty: Taken off once per occurrence in the answer.
        seed: The same seed gives the same draws; None draws afresh.
        n: Samples per prompt.
        stop: Texts that end a row; the text is cut before them.
        stop_token_ids: Tokens that end a row; None means the model's own.
        logit_bias: (token, what is added to its score), after the penalties.
        logprobs: None for none; K for the chosen token's and the K likeliest tokens' log-probabilities, nats, from
            the model's distribution before penalties and filters.
    """

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        faults = [
            Fault(f"{name} is {getattr(self, name)}", where=name, fix=f"Use {fix}.")
            for name, (valid, fix) in _RANGES.items()
            if not valid(getattr(self, name))
        ]
        if faults:
            raise ArgumentError.of(faults)
        if self.temperature < _LEAST_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)

    @property
    def penalized(self) -> bool:
        """Whether scores change with what was said before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @classmethod
    def from_generation_config(cls, config: dict[str, Any], **overrides: Any) -> Sampling:
        """Read a `generation_config.json` the way transformers does; `overrides` win.

        Without `do_sample` the row is greedy, whatever temperature says; with it, transformers' defaults are
        temperature 1 and top_k 50. The repetition penalty holds in both.
        """
        values: dict[str, Any] = {"repetition_penalty": _given(config.get("repetition_penalty"), 1.0)}
        if config.get("do_sample"):
            values["temperature"] = _given(config.get("temperature"), 1.0)
            values["top_k"] = _given(config.get("top_k"), 50)
            values["top_p"] = _given(config.get("top_p"), 1.0)
            values["min_p"] = _given(config.get("min_p"), 0.0)
        return cls(**{**values, **overrides})

    @classmethod
    def under_model(cls, config: dict[str, Any], asked: dict[str, Any], **others: Any) -> Sampling:
        """The model's own settings under those asked for: `chat` and `serve`.

        Asking for a way to draw asks for drawing; temperature 0 is greedy whatever the model says.

        Args:
            config: The model's generation_config.json.
            asked: temperature, top_p, top_k, min_p, repetition_penalty; None leaves the model's.
            others: Every other setting.
        """
        asked = {name: value for name, value in asked.items() if value is not None}
        if not config.get("do_sample"):
            draws = any(name != "repetition_penalty" for name in asked)
            config = {"repetition_penalty": config.get("repetition_penalty"), "do_sample": draws, "top_k": 0}
        if asked.get("temperature") == 0:
            config = {**config, "do_sample": False}
        return cls.from_generation_config({**config, **asked}, **others)


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; None where `optional`."""

    low: float
    high: float = float("inf")
    whole: bool = False
    optional: bool = False

    def __call__(self, value: Any) -> bool:
        if value is None:
            return self.optional
        kinds = (int, np.integer) if self.whole else (int, float, np.integer, np.floating)
        return not isinstance(value, bool) and isinstance(value, kinds) and bool(self.low <= value <= self.high)


def _whole(low: int, high: float = float("inf"), *, optional: bool = False) -> Range:
    return Range(low, high, whole=True, optional=optional)


def range_of(name: str) -> Range:
    """What a setting that is a number may be."""
    valid, _ = _RANGES[name]
    assert isinstance(valid, Range)
    return valid


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (_whole(1), "a whole number of at least 1"),
    "min_new_tokens": (_whole(0), "a whole number of at least 0"),
    "temperature": (Range(0, 1e6), "0 (greedy) or a positive number up to 1000000"),
    "top_p": (Range(0, 1), "a number from 0 to 1"),
    "top_k": (_whole(0), "0 (off) or a positive whole number"),
    "min_p": (Range(0, 1), "a number from 0 to 1"),
    "repetition_penalty": (Range(1e-3, 1e3), "a number from 0.001 to 1000; 1 is off"),
    "presence_penalty": (Range(-2, 2), "a number from -2 to 2"),
    "frequency_penalty": (Range(-2, 2), "a number from -2 to 2"),
    "seed": (_whole(0, optional=True), "a whole number of at least 0"),
    "n": (_whole(1), "a whole number of at least 1"),
    "stop": (lambda value: type(value) is tuple and all(type(s) is str and s for s in value), "non-empty texts"),
    "logprobs": (_whole(0, MAX_TOP_LOGPROBS, optional=True), f"a whole number from 0 to {MAX_TOP_LOGPROBS}"),
}


def penalize(scores: np.ndarray, sampling: Sampling, prompt: np.ndarray, counts: dict[int, int]) -> np.ndarray:
    """Lower the scores of tokens that were used before.

    Args:
        scores: Logits, float32 [V]; not changed.
        prompt: The prompt's distinct token ids, int64 [P]. Only the repetition penalty looks at them.
        counts: How often each token occurs in the answer so far.

    Returns:
        float32 [V].
    """
    scores = scores.copy()
    answer = np.fromiter(counts, dtype=np.int64, count=len(counts))
    if sampling.repetition_penalty != 1.0:
        used = np.union1d(prompt, answer)
        used = used[used < len(scores)]
        penalty = np.float32(sampling.repetition_penalty)
        scores[used] = np.where(scores[used] < 0, scores[used] * penalty, scores[used] / penalty)
    if len(answer) and (sampling.presence_penalty or sampling.frequency_penalty):
        times = np.fromiter(counts.values(), dtype=np.float32, count=len(counts))
        scores[answer] -= np.float32(sampling.presence_penalty) + np.float32(sampling.frequency_penalty) * times
    return scores


def support(scores: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may be drawn, and their probabilities.

    Args:
        scores: Logits after penalties, float32 [V].

    Returns:
        Token ids in ascending order, int64 [S]; probabilities summing to 1, float64 [S].
    """
    scores = scores / np.float32(sampling.temperature)
    if 0 < sampling.top_k < len(scores):
        # As in transformers, tokens that tie with the k-th stay too.
        kth = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        ids = np.flatnonzero(scores >= kth)
    else:
        ids = np.flatnonzero(scores > -np.inf)
    probabilities = softmax(scores[ids])
    if sampling.top_p < 1.0:
        keep = _nucleus(probabilities, sampling.top_p)
        ids, probabilities = ids[keep], probabilities[keep] / probabilities[keep].sum()
    if sampling.min_p > 0.0:
        keep = probabilities >= sampling.min_p * probabilities.max()
        ids, probabilities = ids[keep], probabilities[keep] / probabilities[keep].sum()
    return ids, probabilities


def _nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """Which tokens top-p keeps, bool [S]: those whose sum with all less likely ones is above 1 - top_p.

    Compared in float32, as transformers does. Tokens below (1 - top_p) / S cannot reach the threshold together, so
    only the others are sorted: thousands instead of a whole vocabulary.
    """
    threshold = np.float32(1.0 - top_p)
    likely = np.flatnonzero(probabilities > (1.0 - top_p) / len(probabilities) * 0.5)
    rest = probabilities.sum() - probabilities[likely].sum()
    order = likely[np.argsort(probabilities[likely], kind="stable")]
    reached = (rest + np.cumsum(probabilities[order])).astype(np.float32) > threshold
    reached[-1] = True
    keep = np.zeros(len(probabilities), dtype=bool)
    keep[order[reached]] = True
    return keep


def softmax(scores: np.ndarray) -> np.ndarray:
    """float64 probabilities of float32 scores [S]."""
    weights = np.exp(scores.astype(np.float64) - float(scores.max()))
    return weights / weights.sum()


def choose(scores: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> int:
    """The next token from scores after penalties, float32 [V]: the likeliest, or a draw.

    Each token of the vocabulary gets an exponential time, divided by its probability, and the earliest is drawn: of
    independent exponential times with rates p, the first is that of i with probability p_i. Where scores differ in
    their last bits, only the two earliest can change places. A draw by inverse distribution moves to another token
    whenever a sum of probabilities crosses the drawn number (figures: docs/log.md).
    """
    if sampling.temperature == 0.0:
        return int(scores.argmax())
    times = rng.standard_exponential(len(scores))  # of all tokens, so that each keeps its own whatever may be drawn
    ids, probabilities = support(scores, sampling)
    with np.errstate(divide="ignore"):  # what is too unlikely for float64 comes never
        return int(ids[np.argmin(times[ids] / probabilities)])


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token's log-probability, and the likeliest alternatives as (token, log-probability)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprob(scores: np.ndarray, token: int, k: int) -> TokenLogprob:
    """Read `token` and the `k` likeliest tokens off the model's own logits, float32 [V]."""
    values = scores.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    top: tuple[tuple[int, float], ...] = ()
    if k:
        likeliest = np.argpartition(values, -k)[-k:] if k < len(values) else np.arange(len(values))
        likeliest = likeliest[np.argsort(-values[likeliest], kind="stable")]
        top = tuple((int(i), float(values[i])) for i in likeliest)
    return TokenLogprob(token, float(values[token]), top)
