"""Text generation: requests become rows, rows are decoded together, and a finished row makes room for the next.

    engine = Engine(model, tokenizer)
    outputs = engine.generate([prompt_ids, ...], Sampling(max_new_tokens=64))
    for delta in engine.stream(prompt_ids, Sampling(temperature=0.7, seed=1)): print(delta.text, end="")

`Batch` is the layer below, for a caller that has its own loop (a server): `join` requests at any time, `step` once per
token, `drop` a row whose reader has gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from finetune.chat.tokenizer import StreamDecoder, Tokenizer
from finetune.compute.cache import KVCache
from finetune.compute.decoder import Decoder
from finetune.errors import DataError, FinetuneError
from finetune.infer.sampling import DEFAULT_BATCH_SIZE, Sampling, TokenLogprob, choose, penalize, token_logprob


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


@dataclass(frozen=True)
class Delta:
    """A piece of a streamed answer; the last one carries the whole as `output`."""

    text: str
    output: Output | None = None


@dataclass(frozen=True)
class Request:
    """A prompt, int64 [L], and what is asked for; `index` is the caller's, to know answers by."""

    prompt: np.ndarray
    sampling: Sampling
    index: Any = 0


@dataclass
class Row:
    """One answer in the making. Depends on its own logits and its own random generator only.

    Attributes:
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
    error: Exception | None = None

    def __post_init__(self):
        seed = self.request.sampling.seed
        self._rng = np.random.default_rng(None if seed is None else [seed, self.sample])
        self._counts: dict[int, int] = {}
        self._bias = _bias(self.request.sampling.logit_bias)
        self._sum = 0.0  # of the tokens' logits
        self._sent = 0
        self._ends: list[int] = []  # length of the text after each token; kept only beside log-probabilities
        self._told = 0
        self._cut = False

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
        if len(self.tokens) < sampling.min_new_tokens:
            adjusted = adjusted.copy()
            adjusted[[token for token in self.stop_ids if token < len(scores)]] = -np.inf
        token = choose(adjusted, sampling, self._rng)
        if sampling.logprobs is not None:
            self.logprobs.append(token_logprob(scores, token, sampling.logprobs))
        self.accept(token, float(adjusted[token]))

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


class Engine:
    """A model and its tokenizer, ready to answer.

    Args:
        model: PaddleNLP's Qwen2ForCausalLM or a LoRAModel around one. Read, never changed; dropout is switched off
            while the engine works and back on afterwards.
        tokenizer: Needed for text: `Output.text`, streaming and stop texts.
        stop_token_ids: Tokens that end every row whose request names none; default: the tokenizer's.
    """

    def __init__(self, model, tokenizer: Tokenizer | None = None, *, stop_token_ids: Iterable[int] | None = None):
        self.model, self.tokenizer = model, tokenizer
        self.decoder = Decoder(model)
        if stop_token_ids is None:
            stop_token_ids = tokenizer.stop_token_ids if tokenizer is not None else ()
        self.stop_token_ids = frozenset(int(token) for token in stop_token_ids)

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.decoder.context

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        on_finish: Callable[[int, Output], None] | None = None,
    ) -> list[Output]:
        """Answer prompts, at most `batch_size` rows at a time, longest prompts first.

        Args:
            prompts: Token ids, without padding.
            sampling: One for all, or one per prompt. With a seed, equal prompts get equal answers.
            on_finish: Called with the prompt's number and an answer as soon as it is there.

        Returns:
            The answers in the order of the prompts; with n > 1, a prompt's samples one after another.

        Raises:
            DataError: a prompt is empty, does not fit the context or holds a token the model does not have.
        """
        samplings = sampling if isinstance(sampling, Sequence) else [sampling or Sampling()] * len(prompts)
        requests = [self.request(p, s, index) for index, (p, s) in enumerate(zip(prompts, samplings, strict=True))]
        waiting = deque(sorted(requests, key=lambda request: -len(request.prompt)))
        done: dict[tuple[int, int], Output] = {}
        batch = Batch(self)
        with self.evaluating():
            while waiting or batch.rows:
                finished = batch.join(_admit(waiting, batch_size - len(batch.rows), batch_size))
                finished += batch.step()
                for row in finished:
                    done[row.request.index, row.sample] = row.output()
                    if on_finish is not None:
                        on_finish(row.request.index, done[row.request.index, row.sample])
        return [done[key] for key in sorted(done)]

    def stream(self, prompt: Sequence[int], sampling: Sampling | None = None) -> Generator[Delta, None, None]:
        """Answer one prompt, piece by piece; with n > 1, only the first sample. Stop reading to stop the work."""
        batch = Batch(self)
        with self.evaluating():
            batch.join([self.request(prompt, sampling or Sampling())])
            row = batch.started[0]
            while row.finish_reason is None:
                if piece := row.new_text():
                    yield Delta(piece)
                batch.step()
            yield Delta(row.new_text(), row.output())

    def request(self, prompt: Sequence[int], sampling: Sampling, index: int = 0) -> Request:
        """Check a prompt against the model.

        Raises:
            DataError: as `generate`.
        """
        vocabulary = self.decoder.vocab_size
        try:
            ids = np.asarray(prompt, dtype=np.int64).reshape(-1)
        except OverflowError as error:
            raise DataError(
                f"the prompt holds a number beyond 64 bits, and the model has {vocabulary} tokens",
                where=f"prompt {index + 1}",
                fix="Give token ids.",
            ) from error
        if len(ids) == 0:
            raise DataError("the prompt is empty", where=f"prompt {index + 1}", fix="Give at least one token.")
        if len(ids) >= self.context:
            raise DataError(
                f"the prompt has {len(ids)} tokens, and the model's context holds {self.context} with the answer",
                where=f"prompt {index + 1}",
                fix="Shorten the prompt.",
            )
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise DataError(
                f"the prompt holds token {ids.max() if ids.min() >= 0 else ids.min()}, and the model has {vocabulary}",
                where=f"prompt {index + 1}",
                fix="Use the tokenizer that belongs to the model.",
            )
        return Request(ids, sampling, index)

    @contextmanager
    def evaluating(self):
        """Switch dropout off for the time being."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            if training:
                self.model.train()


def _admit(waiting: deque[Request], free: int, batch_size: int) -> list[Request]:
    """Take requests for the free places, but not before a quarter of the batch is free: reading prompts one at a time
    would go through all weights for each."""
    if free < min(batch_size, len(waiting), max(1, batch_size // 4)):
        return []
    admitted: list[Request] = []
    while waiting and (waiting[0].sampling.n <= free or (free == batch_size and not admitted)):
        admitted.append(waiting.popleft())
        free -= admitted[-1].sampling.n
    return admitted


class Batch:
    """The rows being decoded, and their cache: row i of the cache belongs to rows[i].

    Attributes:
        rows: Rows that are not finished.
        started: Rows that the last `join` or `resume` took in, finished or not.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._cache: KVCache | None = None
        self.rows: list[Row] = []
        self.started: list[Row] = []

    def join(self, requests: list[Request]) -> list[Row]:
        """Read the prompts, once each however many samples are asked for, and choose the first tokens.

        Returns:
            Rows that finished with their first token.
        """
        rows = [self._row(request, s) for request in requests for s in range(request.sampling.n)]
        source = [i for i, request in enumerate(requests) for _ in range(request.sampling.n)]
        return self._enter(rows, [request.prompt for request in requests], source)

    def resume(self, rows: list[Row]) -> list[Row]:
        """Take rows that were dropped in again: read what they have so far, and choose the next tokens.

        Returns:
            Rows that finished with that token.
        """
        prompts = [np.concatenate([row.request.prompt, np.asarray(row.tokens, dtype=np.int64)]) for row in rows]
        return self._enter(rows, prompts, list(range(len(rows))))

    def _enter(self, rows: list[Row], prompts: list[np.ndarray], source: list[int]) -> list[Row]:
        """Row i continues prompts[source[i]]."""
        self.started = rows
        if not rows:
            return []
        cache, logits = self._engine.decoder.read(prompts)
        _advance(rows, logits, source)
        kept = [i for i, row in enumerate(rows) if row.finish_reason is None]
        if kept:
            if [source[i] for i in kept] != list(range(len(prompts))):
                cache.select([source[i] for i in kept])
            if self._cache is None:
                self._cache = cache
            else:
                self._cache.extend(cache)
            self.rows += [rows[i] for i in kept]
        return [row for row in rows if row.finish_reason is not None]

    def step(self) -> list[Row]:
        """Add one token to every row. Rows that finish leave and are returned."""
        if self._cache is None:  # there are no rows
            return []
        logits = self._engine.decoder.step([row.tokens[-1] for row in self.rows], self._cache)
        _advance(self.rows, logits, range(len(self.rows)))
        finished = [row for row in self.rows if row.finish_reason is not None]
        self.drop(finished)
        return finished

    def drop(self, rows: list[Row]) -> None:
        """Take rows out."""
        if not rows:
            return
        gone = {id(row) for row in rows}
        kept = [i for i, row in enumerate(self.rows) if id(row) not in gone]
        if not kept:
            self._cache = None
        elif self._cache is not None and len(kept) < len(self.rows):
            self._cache.select(kept)
        self.rows = [self.rows[i] for i in kept]

    def _row(self, request: Request, sample: int) -> Row:
        engine = self._engine
        stop_ids = request.sampling.stop_token_ids
        return Row(
            request=request,
            sample=sample,
            stop_ids=engine.stop_token_ids if stop_ids is None else frozenset(stop_ids),
            limit=min(request.sampling.max_new_tokens, engine.context - len(request.prompt)),
            decoder=StreamDecoder(engine.tokenizer) if engine.tokenizer is not None else None,
        )


def _advance(rows: list[Row], logits, source: Sequence[int]) -> None:
    """Give row i its next token from logits[source[i]]; logits float32 [B, V].

    Where every row only wants the likeliest token and the logits are on a GPU, only the tokens are copied from it.
    """
    scores = None
    if not logits.place.is_cpu_place() and all(row.likeliest for row in rows):
        tokens, largest = logits.argmax(axis=-1).tolist(), logits.max(axis=-1).tolist()
    else:
        scores = logits.numpy()
        tokens = scores.argmax(axis=-1)
        largest = scores[np.arange(len(scores)), tokens]
        # argmax stops at the first NaN, so that one look at the largest finds it.
        if np.isnan(largest).any():
            raise FinetuneError(
                "the model's output is not a number (NaN)",
                fix="The weights are damaged or the training diverged: try an earlier checkpoint.",
            )
    for row, i in zip(rows, source):
        try:
            if scores is None or row.likeliest:
                row.accept(int(tokens[i]), float(largest[i]))
            else:
                row.advance(scores[i])
        except Exception as error:  # its settings are its own, and so is what they lead to: the others go on
            row.error, row.finish_reason = error, "error"
