"""Text generation: requests become rows, rows are decoded together, and a finished row makes room for the next.

    engine = Engine(model, tokenizer)
    outputs = engine.generate([prompt_ids, ...], Sampling(max_new_tokens=64))
    for delta in engine.stream(prompt_ids, Sampling(temperature=0.7, seed=1)): print(delta.text, end="")

`Batch` is the layer below, for a caller that has its own loop (a server): `begin` requests at any time, `read` a piece
of their prompts between two tokens, `step` once per token, `drop` a row whose reader has gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

from finetune.chat.tokenizer import StreamDecoder, Tokenizer
from finetune.compute.cache import KVCache
from finetune.compute.decoder import Decoder, Reading
from finetune.errors import DataError, FinetuneError
from finetune.infer.prefix import PrefixCache
from finetune.infer.row import Output, PromptScores, Request, Row
from finetune.infer.sampling import DEFAULT_BATCH_SIZE, Sampling


@dataclass(frozen=True)
class Delta:
    """A piece of a streamed answer; the last one carries the whole as `output`."""

    text: str
    output: Output | None = None


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
            token = int(ids.max() if ids.min() >= 0 else ids.min())
            what, fix = f"the prompt holds token {token}, and the model has {vocabulary}", "Use the model's tokenizer."
            if self.tokenizer is not None and 0 <= token < len(self.tokenizer):
                what, fix = self.tokenizer.beyond(token, vocabulary)
            raise DataError(what, where=f"prompt {index + 1}", fix=fix)
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


@dataclass(eq=False)
class _Entering:
    """Rows whose prompts are being read together; row i continues prompts[source[i]]."""

    rows: list[Row]
    prompts: list[np.ndarray]
    source: list[int]
    reading: Reading


class Batch:
    """The rows being decoded, and their cache: row i of the cache belongs to rows[i].

    Args:
        prefixes: What to remember of prompts and answers, for prompts that begin alike; None remembers nothing.

    Attributes:
        rows: Rows that are not finished.
        started: Rows that got a token by the last `read`, finished or not.
        tokens_read: Tokens of prompts that the last `read` read.
        reused: Tokens of prompts that were not read because they had been before.
    """

    def __init__(self, engine: Engine, prefixes: PrefixCache | None = None):
        self._engine, self._prefixes = engine, prefixes
        self._cache: KVCache | None = None
        self._entering: deque[_Entering] = deque()
        self.rows: list[Row] = []
        self.started: list[Row] = []
        self.tokens_read = self.reused = 0

    @property
    def entering(self) -> list[Row]:
        """Rows whose prompts are being read."""
        return [row for group in self._entering for row in group.rows]

    def join(self, requests: list[Request]) -> list[Row]:
        """Read the prompts, once each however many samples are asked for, and choose the first tokens.

        Returns:
            Rows that finished with their first token.
        """
        self.begin(requests)
        started, finished = [], []
        while self._entering:
            finished += self.read()
            started += self.started
        self.started = started
        return finished

    def begin(self, requests: list[Request]) -> None:
        """Take requests in; their prompts are read by `read`."""
        if requests:
            source = [i for i, request in enumerate(requests) for _ in range(request.sampling.n)]
            rows = [self._row(request, s) for request in requests for s in range(request.sampling.n)]
            hear = [PromptScores(request) if request.scored else None for request in requests]
            for row, i in zip(rows, source):
                if heard := hear[i]:
                    row.prompt_logprobs = heard.found
            self._enter(rows, [request.prompt for request in requests], source, hear)

    def resume(self, rows: list[Row]) -> None:
        """Take rows that were dropped in again; what they have so far is read by `read`."""
        for row in rows:
            self._enter([row], [row.sequence], [0], [None])

    def _enter(
        self,
        rows: list[Row],
        prompts: list[np.ndarray],
        source: list[int],
        hear: Sequence[Callable[[np.ndarray], None] | None],
    ) -> None:
        """Args as `_Entering`; hear[i] is told the logits behind each token of prompts[i], which is then read anew."""
        known = [
            self._prefixes.match(prompt) if self._prefixes and heard is None else []
            for prompt, heard in zip(prompts, hear)
        ]
        reading = self._engine.decoder.reading(prompts, known, hear)
        self.reused += sum(map(len, prompts)) - reading.left
        self._entering.append(_Entering(rows, prompts, source, reading))

    def read(self, tokens: int | None = None) -> list[Row]:
        """Read on, one pass over the weights, in prompts that came with one call of `begin`; each call has its turn.

        Where that ends them, their rows get their first tokens and are decoded from now on.

        Args:
            tokens: Most tokens that are read; None takes as many as a pass can.

        Returns:
            Rows that finished with their first token.
        """
        self.started, self.tokens_read = [], 0
        if not self._entering:
            return []
        group = self._entering[0]
        self.tokens_read = group.reading.advance(tokens)
        self._entering.rotate(-1)
        if group.reading.left:
            return []
        self._entering.remove(group)
        return self._start(group)

    def _start(self, group: _Entering) -> list[Row]:
        cache, logits = group.reading.finish()
        for i, prompt in enumerate(group.prompts):
            self._remember(prompt, cache, i)
        rows, source = group.rows, group.source
        self.started = rows
        _advance(rows, logits, source)
        kept = [i for i, row in enumerate(rows) if row.finish_reason is None]
        if kept:
            if [source[i] for i in kept] != list(range(len(group.prompts))):
                cache.select([source[i] for i in kept])
            if self._cache is None:
                self._cache = cache
            else:
                self._cache.extend(cache)
            self.rows += [rows[i] for i in kept]
        return [row for row in rows if row.finish_reason is not None]

    def _remember(self, tokens: np.ndarray, cache: KVCache, row: int) -> None:
        if self._prefixes is not None:
            self._prefixes.store(tokens, partial(cache.take, row))

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
        """Take rows out, read or being read. What they have read is remembered."""
        if not rows:
            return
        gone = {id(row) for row in rows}
        self._leave_entering(gone)
        for i, row in enumerate(self.rows):
            if id(row) in gone and self._cache is not None:
                self._remember(row.sequence[:-1], self._cache, i)  # the last token was chosen, and not read
        kept = [i for i, row in enumerate(self.rows) if id(row) not in gone]
        if not kept:
            self._cache = None
        elif self._cache is not None and len(kept) < len(self.rows):
            self._cache.select(kept)
        self.rows = [self.rows[i] for i in kept]

    def _leave_entering(self, gone: set[int]) -> None:
        for group in list(self._entering):
            kept = [i for i, row in enumerate(group.rows) if id(row) not in gone]
            group.rows, group.source = [group.rows[i] for i in kept], [group.source[i] for i in kept]
            if not kept:
                self._entering.remove(group)

    def _row(self, request: Request, sample: int) -> Row:
        engine = self._engine
        room = min(request.sampling.max_new_tokens, engine.context - len(request.prompt))
        stop_ids = request.sampling.stop_token_ids
        return Row(
            request=request,
            sample=sample,
            stop_ids=engine.stop_token_ids if stop_ids is None else frozenset(stop_ids),
            limit=room if request.answered else 0,
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
        if not row.limit:
            row.finish_reason = "length"
            continue
        try:
            if scores is None or row.likeliest:
                row.accept(int(tokens[i]), float(largest[i]))
            else:
                row.advance(scores[i])
        except Exception as error:  # its settings are its own, and so is what they lead to: the others go on
            row.error, row.finish_reason = error, "error"
