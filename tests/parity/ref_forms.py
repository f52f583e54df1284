"""What transformers and TRL make of rows of their own forms: `python ref_forms.py JOB.json ...` in the reference
environment.

A job is {"model", "rows", "output", "plain": texts, "template": the chat template with {% generation %} around what is
trained on}. Its rows are {"form", ...}: `text` and `prompt_completion` (texts) go through TRL's SFTTrainer, `messages`
through transformers with the template's own mask, `pair` through TRL's `maybe_extract_prompt` and transformers.

The answer: `plain`, the ids of each text; `rows`, of each {"input_ids", "labels"}, or two of them for a pair.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import Dataset
from ref_common import load_tokenizer
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer
from trl.data_utils import maybe_extract_prompt


def by_trl(job: dict, tokenizer, rows: list[dict]) -> list[dict]:
    """Rows of one form as SFTTrainer prepares them."""
    arguments = SFTConfig(output_dir=job["output"] + ".run", shuffle_dataset=False, use_cpu=True, report_to=[])
    model = AutoModelForCausalLM.from_pretrained(job["model"])
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in trainer.train_dataset]


def by_transformers(job: dict, tokenizer, messages: list[dict]) -> dict:
    """A conversation with the mask of its template's markers."""
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    options = {"chat_template": job["template"], "return_dict": True, "return_assistant_tokens_mask": True}
    masked = tokenizer.apply_chat_template(messages, **options)
    assert masked["input_ids"] == ids, "the marked template renders something else"
    return {"input_ids": ids, "labels": [i if on else -100 for i, on in zip(ids, masked["assistant_masks"])]}


def pair(job: dict, tokenizer, row: dict) -> dict:
    """Both sides of a preference, with the mask on what follows the prompt."""
    row = maybe_extract_prompt(row)
    sides = {}
    for side in ("chosen", "rejected"):
        prompt = [{**message, "train": False} for message in row["prompt"]]
        sides[side] = by_transformers(job, tokenizer, prompt + row[side])
    return sides


def run(job: dict) -> None:
    """Answer one job."""
    tokenizer = load_tokenizer(job)
    rows = [json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]
    answers: list[dict | None] = [None] * len(rows)
    for form in ("text", "prompt_completion"):
        places = [i for i, row in enumerate(rows) if row["form"] == form]
        given = [{key: value for key, value in rows[i].items() if key != "form"} for i in places]
        for i, answer in zip(places, by_trl(job, tokenizer, given)):
            answers[i] = answer
    for i, row in enumerate(rows):
        if row["form"] == "messages":
            answers[i] = by_transformers(job, tokenizer, row["messages"])
        if row["form"] == "pair":
            answers[i] = pair(job, tokenizer, {key: value for key, value in row.items() if key != "form"})
    answer = {"plain": [tokenizer(text)["input_ids"] for text in job["plain"]], "rows": answers}
    Path(job["output"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    for path in sys.argv[1:]:
        run(json.loads(Path(path).read_text(encoding="utf-8")))
