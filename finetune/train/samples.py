"""samples.json: what the tuned model answers to a few rows, beside what the rows say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.chat.example import IGNORE
from finetune.files import write_json

if TYPE_CHECKING:
    from finetune.train.prepare import Prepared

COUNT = 3
Answer = Callable[[Any, Any, Sequence[Sequence[int]]], list[str]]


def write_samples(path: Path, prepared: Prepared, model: Any, answer: Answer) -> None:
    """Answer the first evaluation rows (training rows where there are none) and write them down.

    Args:
        model: The tuned model.
        answer: (model, tokenizer, prompts as token ids) -> texts; given from outside, since training does not know of
            decoding.
    """
    rows = prepared.first_rows if prepared.eval is None else prepared.eval.rows
    examples = [rows[i].wanted for i in range(min(COUNT, len(rows)))]
    cut = [last_response(example.labels) for example in examples]
    decode = prepared.tokenizer.decode
    prompts = [example.input_ids[:start] for example, (start, _) in zip(examples, cut)]
    keep = [i for i, prompt in enumerate(prompts) if len(prompt)]
    texts = answer(model, prepared.tokenizer, [prompts[i] for i in keep])
    samples = [
        {
            "prompt": decode(prompts[i].tolist(), skip_special_tokens=False),
            "reference": decode(examples[i].input_ids[slice(*cut[i])].tolist(), skip_special_tokens=True),
            "after": text,
        }
        for i, text in zip(keep, texts)
    ]
    write_json(path, samples, sort_keys=False)


def last_response(labels: np.ndarray) -> tuple[int, int]:
    """[start, end) of the last run of supervised tokens; labels int [L], -100 where not supervised.

    >>> last_response(np.array([-100, 5, -100, 6, 7, -100]))
    (3, 5)
    """
    supervised = np.flatnonzero(labels != IGNORE)
    breaks = np.flatnonzero(np.diff(supervised) > 1)
    start = supervised[breaks[-1] + 1] if len(breaks) else supervised[0]
    return int(start), int(supervised[-1]) + 1
