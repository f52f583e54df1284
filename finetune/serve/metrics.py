"""What the server counts, in Prometheus' form."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "finetune_requests", "HTTP requests answered", ["endpoint", "status"], registry=registry
        )
        self.prompt_tokens = Counter("finetune_prompt_tokens", "Tokens of prompts read", registry=registry)
        self.reused_tokens = Counter(
            "finetune_prompt_tokens_reused", "Tokens of prompts remembered from others", registry=registry
        )
        self.generated_tokens = Counter("finetune_generated_tokens", "Tokens generated", registry=registry)
        self.cancelled = Counter("finetune_cancelled", "Requests whose client went away", registry=registry)
        self.seconds = Histogram(
            "finetune_request_seconds",
            "Time to the end of an answer",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "finetune_first_token_seconds",
            "Time from a request to its first token",
            buckets=_SECONDS,
            registry=registry,
        )

    def watch(self, name: str, text: str, value: Callable[[], int]) -> None:
        """Add a gauge that is read when it is asked for."""
        Gauge(name, text, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self._registry)
