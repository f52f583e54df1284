"""Servers for tests: the application on a loopback port, over a tiny model or one that says a script."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from finetune.chat.tokenizer import Tokenizer
from finetune.infer.open import Opened
from finetune.serve.app import Limits, build_app
from finetune.serve.network import Server, listen


@dataclass
class Places:
    """Stands for the cache: how much of the script each row has said."""

    said: list[int]

    def select(self, rows: list[int]) -> None:
        self.said = [self.said[row] for row in rows]

    def extend(self, other: Places) -> None:
        self.said += other.said

    def take(self, row: int, start: int, stop: int) -> None:
        return None


@dataclass
class ScriptReading:
    """Prompts that take no time to read."""

    script: Script
    said: list[int]
    left: int

    def advance(self, tokens: int | None = None) -> int:
        read, self.left = self.left, 0
        return read

    def finish(self):
        return Places(self.said), self.script.next(self.said)


class Script:
    """Stands for the decoder: every row says the same text, then its end token, whatever was asked.

    Attributes:
        pause: Seconds per token, so that a test can act while rows are running.
        largest: Most rows seen together.
    """

    def __init__(self, opened: Opened, text: str, pause: float = 0.0):
        decoder = opened.engine.decoder
        self.context, self.vocab_size, self.pause = decoder.context, decoder.vocab_size, pause
        self._tokens = [*opened.tokenizer.encode(text), opened.tokenizer.eos_token_id]
        self.largest = 0
        self.fails = False

    def reading(self, prompts, known, hear):
        """A row that is read again has part of the script at the end of its prompt."""
        return ScriptReading(self, [self._already_said(list(prompt)) for prompt in prompts], sum(map(len, prompts)))

    def step(self, tokens, cache):
        cache.said = [place + 1 for place in cache.said]
        self.largest = max(self.largest, len(tokens))
        if self.fails:
            raise RuntimeError("the machine is on fire")
        return self.next(cache.said)

    def _already_said(self, prompt: list[int]) -> int:
        return max(n for n in range(len(self._tokens)) if n == 0 or prompt[-n:] == self._tokens[:n])

    def next(self, said: list[int]):
        import paddle

        time.sleep(self.pause)
        scores = np.zeros([len(said), self.vocab_size], np.float32)
        scores[np.arange(len(said)), [self._tokens[place] for place in said]] = 20.0
        return paddle.to_tensor(scores)


def scripted(opened: Opened, text: str, pause: float = 0.0, tokenizer: Tokenizer | None = None) -> Opened:
    """`opened` with a decoder that says `text`."""
    from finetune.infer.engine import Engine

    tokenizer = tokenizer or opened.tokenizer
    engine = Engine(opened.engine.model, tokenizer)
    engine.decoder = Script(opened, text, pause)
    return replace(opened, engine=engine, tokenizer=tokenizer)


@dataclass
class Served:
    """A running server."""

    url: str
    app: object
    server: Server

    @property
    def scheduler(self):
        return self.app.state.scheduler

    def client(self, **settings):
        import openai

        settings = {"api_key": "none", "max_retries": 0, "timeout": 60, **settings}
        return openai.OpenAI(base_url=f"{self.url}/v1", **settings)


@contextmanager
def serving(opened: Opened, limits: Limits = Limits(), grace: float = 5, **settings) -> Iterator[Served]:
    app = build_app(opened, "tiny", limits, **settings)
    listener = listen("127.0.0.1", 0)
    server = Server(app, lambda: None, lambda: asyncio.to_thread(app.state.scheduler.stop), grace=grace)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", app, server)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def wait_for(condition, seconds: float = 20.0) -> None:
    """Poll until `condition` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
