"""Beginnings of prompts that were read before: a system prompt, few-shot examples, a chat's history.

Keys and values of a position depend on the tokens up to it and on nothing else. They are kept in blocks of BLOCK
tokens, each under the block before it and its own tokens, so that prompts which begin alike share them. As in vLLM
(Kwon et al. 2023, arXiv:2309.06180), but copied into each row's own stretch of the cache instead of read in place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

BLOCK = 32


@dataclass(frozen=True)
class _Block:
    number: int
    kept: Any


class PrefixCache:
    """What was read of prompts, up to a number of positions; what was not used for longest goes first.

    Args:
        positions: Most positions kept; 0 keeps none.
    """

    def __init__(self, positions: int):
        self._most = positions // BLOCK
        # By the number of the block before (0: none) and the tokens; the one used last stands last.
        self._blocks: OrderedDict[tuple[int, bytes], _Block] = OrderedDict()
        self._made = 0

    @property
    def positions(self) -> int:
        """Positions that are kept."""
        return len(self._blocks) * BLOCK

    def match(self, prompt: np.ndarray) -> list[Any]:
        """What is kept of a prompt's beginning, int64 [L], in blocks; always less than the whole of it."""
        found = [block for _, block in self._chain(prompt[:-1])]
        return [block.kept for block in found]

    def store(self, tokens: np.ndarray, take: Callable[[int, int], Any]) -> None:
        """Keep whole blocks of what a row has read.

        Args:
            tokens: All tokens whose keys and values are there, int64 [L].
            take: Copies positions [start, stop) of the row.
        """
        chain = self._chain(tokens)
        keys = [key for key, _ in chain]
        before = chain[-1][1].number if chain else 0
        for start in range(len(chain) * BLOCK, min(len(tokens) // BLOCK, self._most) * BLOCK, BLOCK):
            self._made += 1
            keys.append((before, tokens[start : start + BLOCK].tobytes()))
            self._blocks[keys[-1]] = _Block(self._made, take(start, start + BLOCK))
            before = self._made
        self._use(keys)
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)

    def _chain(self, tokens: np.ndarray) -> list[tuple[tuple[int, bytes], _Block]]:
        """The kept blocks that the tokens begin with. They now count as used."""
        found: list[tuple[tuple[int, bytes], _Block]] = []
        before = 0
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            key = before, tokens[start : start + BLOCK].tobytes()
            if key not in self._blocks:
                break
            found.append((key, self._blocks[key]))
            before = found[-1][1].number
        self._use([key for key, _ in found])
        return found

    def _use(self, keys: list[tuple[int, bytes]]) -> None:
        """The first block last, so that none goes before one that stands behind it."""
        for key in reversed(keys):
            self._blocks.move_to_end(key)
