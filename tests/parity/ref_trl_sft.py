"""TRL's SFTTrainer on each job: `python ref_trl_sft.py JOB.json ...` in the reference environment.

The job is that of `ref_common`, and `mask`:
- `completion`: rows {"messages"}; the last assistant message is TRL's completion. The prompt is rendered by
  transformers with the generation header; the completion is the message's content, to which TRL adds the end-of-turn
  token. (Given messages, TRL would also train on the newline that the template writes after that token.)
- `assistant`: rows {"messages"}; TRL renders the whole conversation and masks by the template's generation markers.

The answer adds `examples`: the token ids and labels TRL made of each row.
"""

from __future__ import annotations

from datasets import Dataset
from ref_common import (
    Recorded,
    in_float32,
    load_model,
    load_tokenizer,
    read_jobs,
    read_rows,
    training_arguments,
    write_answer,
)
from trl import SFTConfig, SFTTrainer


class RecordedSFTTrainer(Recorded, SFTTrainer):
    """SFTTrainer that records."""


def as_completion(row: dict, tokenizer) -> dict:
    """Prompt text and completion text of a row."""
    *prompt, last = row["messages"]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return {"prompt": text, "completion": last["content"]}


def run(job: dict) -> None:
    """Train one job and write its answer."""
    tokenizer = load_tokenizer(job)
    rows = read_rows(job)
    completion = job["mask"] == "completion"
    data = [as_completion(row, tokenizer) if completion else {"messages": row["messages"]} for row in rows]
    arguments = SFTConfig(
        **training_arguments(job),
        completion_only_loss=completion,
        assistant_only_loss=not completion,
        shuffle_dataset=False,
        packing=False,
    )
    trainer = RecordedSFTTrainer(
        model=load_model(job), args=arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer
    )
    examples = [{"input_ids": e["input_ids"], "labels": e["labels"]} for e in trainer.train_dataset]
    in_float32(trainer.model, job)
    trainer.train()
    write_answer(job, trainer, examples=examples)


if __name__ == "__main__":
    for each in read_jobs():
        run(each)
