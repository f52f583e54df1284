"""samples.json: what the tuned model answers to a few rows, beside what the rows say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from finetune.chat.example import IGNORE
from finetune.files import write_json

if TYPE_CHECKING:
    from finetune.chat.tokenizer import Tokenizer
    from finetune.train.prepare import Prepared

COUNT = 3
Answer = Callable[[Any, Any, Sequence[Sequence[int]]], list[str]]


def write_samples(path: Path, prepared: Prepared, model: Any, answer: Answer, when: Literal["before", "after"]) -> None:
    """Answer the first evaluation rows (training rows where there are none) and write them down.

    Args:
        model: The model before training, or the tuned one.
        answer: (model, tokenizer, prompts as token ids) -> texts; given from outside, since training does not know of
            decoding.
        when: Which of the two it is. Answers from before training that `path` holds are kept beside those after it.
    """
    rows = prepared.first_rows if prepared.eval is None else prepared.eval.rows
    examples = [rows[i].wanted for i in range(min(COUNT, len(rows)))]
    cut = [last_response(example.labels) for example in examples]
    decode = prepared.tokenizer.decode
    prompts = [example.input_ids[:start] for example, (start, _) in zip(examples, cut)]
    keep = [i for i, prompt in enumerate(prompts) if len(prompt)]
    texts = answer(model, prepared.tokenizer, [prompts[i] for i in keep])
    earlier = _earlier(path) if when == "after" else {}
    samples = []
    for i, text in zip(keep, texts):
        prompt = decode(prompts[i].tolist(), skip_special_tokens=False)
        reference = decode(examples[i].input_ids[slice(*cut[i])].tolist(), skip_special_tokens=True)
        before = {"before": earlier[prompt]} if prompt in earlier else {}
        plain = without_tags(prepared.tokenizer, prompts[i])
        samples.append({"prompt": prompt, "plain": plain, "reference": reference, **before, when: text})
    write_json(path, samples, sort_keys=False)


def _earlier(path: Path) -> dict[str, str]:
    """Answers from before training by prompt, as far as the file holds them."""
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
        return {sample["prompt"]: sample["before"] for sample in samples if "before" in sample}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def without_tags(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """What a prompt says without the tags of whatever template: the text between added tokens, a line each."""
    tags = tokenizer.backend.get_added_tokens_decoder()
    runs = [list(run) for tag, run in groupby(ids.tolist(), key=tags.__contains__) if not tag]
    return "\n".join(filter(None, (tokenizer.decode(run).strip() for run in runs)))


def last_response(labels: np.ndarray) -> tuple[int, int]:
    """[start, end) of the last run of supervised tokens; labels int [L], -100 where not supervised.

    >>> last_response(np.array([-100, 5, -100, 6, 7, -100]))
    (3, 5)
    """
    supervised = np.flatnonzero(labels != IGNORE)
    breaks = np.flatnonzero(np.diff(supervised) > 1)
    start = supervised[breaks[-1] + 1] if len(breaks) else supervised[0]
    return int(start), int(supervised[-1]) + 1
