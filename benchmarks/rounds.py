"""Both sides in turn, round after round."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

Runner = Callable[[], dict]


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    work: Path
    shape: str = "6l"
    rounds: int = 3
    steps: int = 8
    all_variants: bool = False
    rows: int = 50_000
    variants: tuple[str, ...] = ()  # of the peer's, those to run; () is all


@dataclass
class Sides:
    """Answers by side, ours and the peer's variants, over the rounds."""

    ours: list[dict] = field(default_factory=list)
    peers: dict[str, list[dict]] = field(default_factory=dict)

    def of_round(self, index: int, variant: str) -> tuple[dict, dict]:
        """Our answer of a round and that of a variant which was run in every round."""
        return self.ours[index], self.peers[variant][index]


def in_turn(
    name: str, settings: Settings, ours: Runner, peers: dict[str, Runner], rate: Callable[[dict], float]
) -> tuple[Sides, str]:
    """Run both sides in alternating order.

    The peer's variants (those asked for) are run in the first round, the fastest of them in the others (or all, if
    asked for).

    Args:
        rate: Of an answer, what is compared; more is better.

    Returns:
        All answers, and the variant with the best median rate.
    """
    sides = Sides()
    chosen = [variant for variant in peers if variant in settings.variants] or list(peers)
    for index in range(settings.rounds):
        turns = [("ours", ours), *((variant, peers[variant]) for variant in chosen)]
        for side, run in turns if index % 2 == 0 else turns[::-1]:
            answer = run()
            (sides.ours if side == "ours" else sides.peers.setdefault(side, [])).append(answer)
            load = answer["process"]["load_before"]
            turn = f"{name}, round {index + 1} of {settings.rounds}, {side}"
            say(f"{turn}: {rate(answer):,.3g}/s (load before: {load:.1f})")
        if index == 0 and not settings.all_variants:
            chosen = [_fastest(sides, chosen, rate)]
    return sides, _fastest(sides, chosen, rate)


def _fastest(sides: Sides, variants: Iterable[str], rate: Callable[[dict], float]) -> str:
    return max(variants, key=lambda variant: median(map(rate, sides.peers[variant])))
