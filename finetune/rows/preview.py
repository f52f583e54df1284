"""What the model will see: rows as they are trained on, for people in colour and for programs as JSON."""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from finetune.chat.example import IGNORE, Example, PairExample
from finetune.chat.tokenizer import Tokenizer
from finetune.model.resolve import resolve_model
from finetune.rows.dataset import DataReport, build_dataset

TRAINED = "bold black on green3"
SEEN = "dim"
# Where there is no colour, brackets that text hardly ever has.
OPEN, CLOSE = "⟦", "⟧"
# Control characters of the data must not reach the terminal; their pictures do (U+2400 and on).
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421"}
# These have no pictures, and some terminals obey them too (U+009B is ESC [).
_PICTURES |= {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}


def preview(recipe: Any, n: int | None = 3, as_json: bool = False, base: Path | None = None) -> None:
    """Print the first rows of a recipe's training data as the model gets them.

    Args:
        recipe: A checked recipe.
        n: How many rows; None for all.
        as_json: One JSON object per row on stdout, see `json_row`. Otherwise a view with supervised tokens marked.
        base: The recipe's folder, for data paths relative to it.

    Raises:
        DataError: a row is wrong. CheckpointError: the model's folder or tokenizer is.
    """
    source = resolve_model(recipe.model.path)
    tokenizer = Tokenizer.from_folder(source.tokenizer_folder)
    rows, report = build_dataset(
        recipe.data.train,
        tokenizer,
        data=recipe.data,
        method=recipe.method,
        base=base,
        limit=n,
        vocab_size=source.config.vocab_size,
    )
    if as_json:
        for row in rows:
            sys.stdout.write(json.dumps(json_row(row), ensure_ascii=False) + "\n")
        sys.stderr.writelines(f"{note}\n" for note in report.notes)
    else:
        _show(Console(highlight=False), tokenizer, list(rows), report)


def json_row(row: Example | PairExample) -> dict[str, Any]:
    """A row as the contract has it: source, input_ids and labels, or these two under chosen and rejected."""
    if isinstance(row, PairExample):
        return {"source": row.source, "chosen": _ids(row.chosen), "rejected": _ids(row.rejected)}
    return {"source": row.source, **_ids(row)}


def _ids(example: Example) -> dict[str, list[int]]:
    return {"input_ids": example.input_ids.tolist(), "labels": example.labels.tolist()}


def marked_text(tokenizer: Tokenizer, example: Example, *, colour: bool, start: int = 0) -> Text:
    """The text of an example with its supervised runs marked.

    Args:
        colour: Mark by colour; otherwise by ⟦ ⟧.
        start: First token shown.
    """
    text = Text()
    tokens = zip(example.input_ids[start:].tolist(), (example.labels[start:] != IGNORE).tolist(), strict=True)
    for trained, run in groupby(tokens, key=lambda token: token[1]):
        words = tokenizer.decode([token for token, _ in run]).translate(_PICTURES)
        if colour:
            text.append(words, TRAINED if trained else SEEN)
        else:
            text.append(f"{OPEN}{words}{CLOSE}" if trained else words)
    return text


def _show(console: Console, tokenizer: Tokenizer, rows: list[Example | PairExample], report: DataReport) -> None:
    colour = console.color_system is not None
    mark = Text(" trained on ", TRAINED) if colour else Text(f"{OPEN}trained on{CLOSE}")
    _print(console, Text.assemble(mark, "  ", Text("seen only", SEEN if colour else "")))
    for row in rows:
        if isinstance(row, PairExample):
            _show_pair(console, tokenizer, row, colour)
        else:
            _heading(console, f"{row.source} · {_counts(row)}")
            _print(console, marked_text(tokenizer, row, colour=colour))
    for note in report.notes:
        _print(console, Text(f"\n{note}"))


def _show_pair(console: Console, tokenizer: Tokenizer, pair: PairExample, colour: bool) -> None:
    shared = len(pair.prompt_ids)
    _heading(console, f"{pair.source} · prompt, {shared:,} tokens")
    prompt = Example(pair.prompt_ids, pair.chosen.labels[:shared], pair.source)
    _print(console, marked_text(tokenizer, prompt, colour=colour))
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        _heading(console, f"{pair.source} · {name}, with the prompt {_counts(side)}")
        _print(console, marked_text(tokenizer, side, colour=colour, start=shared))


def _counts(example: Example) -> str:
    return f"{len(example.input_ids):,} tokens, {example.num_supervised:,} trained on"


def _heading(console: Console, text: str) -> None:
    _print(console, Text(f"\n── {text} ──", "cyan"))


def _print(console: Console, text: Text) -> None:
    # Soft wrap: the terminal breaks lines, so that what is copied or piped is the text itself.
    console.print(text, soft_wrap=True)
