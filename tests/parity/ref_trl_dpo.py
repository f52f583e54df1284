"""TRL's preference trainers on each job: `python ref_trl_dpo.py JOB.json ...` in the reference environment.

The job is that of `ref_common`, and `loss_type`, `beta`, `label_smoothing`, `sft_loss_ratio`, `simpo_gamma`,
`precompute` with this package's names. Rows are {"prompt": messages, "chosen": text, "rejected": text}: the prompt is
rendered by transformers with the generation header, and the responses end with the end-of-turn token. (Given messages,
TRL would also score the newline that the template writes after that token.)

Which of TRL's losses stands for which of ours:
- sigmoid, hinge, ipo, sppo_hard, nca_pair: DPOTrainer's of that name; sft_loss_ratio is the weight of its `sft`.
- sigmoid with label smoothing: DPOTrainer's `aot`, one pair a batch. Its sort is then idle and the smoothed sigmoid
  remains; its `sigmoid` ignores label_smoothing.
- simpo: CPOTrainer, loss_type simpo; sft_loss_ratio is cpo_alpha.
- orpo: ORPOTrainer, its supervised term taken over the response only.
kto_pair and dpop are not in TRL 1.16.
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
from trl import DPOConfig, DPOTrainer


class RecordedDPOTrainer(Recorded, DPOTrainer):
    """DPOTrainer that records."""


def as_text(row: dict, tokenizer) -> dict:
    """Prompt, chosen and rejected text of a row; the responses with their end-of-turn token."""
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    return {"prompt": prompt} | {key: row[key] + tokenizer.eos_token for key in ("chosen", "rejected")}


def dpo_trainer(job: dict, common: dict):
    """DPOTrainer for the losses with a reference."""
    loss_type = job["loss_type"]
    if job["label_smoothing"]:
        if loss_type != "sigmoid" or job["batch_size"] != 1:
            raise SystemExit("label smoothing is compared through aot: sigmoid, one pair a batch")
        loss_type = "aot"
    terms = [(loss_type, 1.0)] + ([("sft", job["sft_loss_ratio"])] if job["sft_loss_ratio"] else [])
    arguments = DPOConfig(
        **training_arguments(job),
        beta=job["beta"],
        label_smoothing=job["label_smoothing"],
        loss_type=[name for name, _ in terms],
        loss_weights=[weight for _, weight in terms],
        precompute_ref_log_probs=job["precompute"],
    )
    return RecordedDPOTrainer(args=arguments, **common)


def cpo_trainer(job: dict, common: dict):
    """CPOTrainer for simpo."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class RecordedCPOTrainer(Recorded, CPOTrainer):
        pass

    arguments = CPOConfig(
        **training_arguments(job),
        beta=job["beta"],
        loss_type="simpo",
        simpo_gamma=job["simpo_gamma"],
        cpo_alpha=job["sft_loss_ratio"],
    )
    return RecordedCPOTrainer(args=arguments, **common)


def orpo_trainer(job: dict, common: dict):
    """ORPOTrainer with the supervised term over the chosen response in place of prompt and response."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class RecordedORPOTrainer(Recorded, ORPOTrainer):
        def concatenated_forward(self, model, batch):
            chosen, rejected, chosen_logits, rejected_logits, _ = super().concatenated_forward(model, batch)
            return chosen, rejected, chosen_logits, rejected_logits, -chosen.mean()

    return RecordedORPOTrainer(args=ORPOConfig(**training_arguments(job), beta=job["beta"]), **common)


def run(job: dict) -> None:
    """Train one job and write its answer."""
    tokenizer = load_tokenizer(job)
    rows = [as_text(row, tokenizer) for row in read_rows(job)]
    common = {"model": load_model(job), "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    build = {"simpo": cpo_trainer, "orpo": orpo_trainer}.get(job["loss_type"], dpo_trainer)
    trainer = build(job, common)
    in_float32(trainer.model, job)
    trainer.train()
    write_answer(job, trainer, examples=[_tokens(example) for example in trainer.train_dataset])


def _tokens(example: dict) -> dict:
    if "prompt_ids" in example:
        return {key: example[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")}
    sides = {key: [t for t in example[f"{key}_labels"] if t != -100] for key in ("chosen", "rejected")}
    return {"prompt_ids": example["prompt_input_ids"], "chosen_ids": sides["chosen"], "rejected_ids": sides["rejected"]}


if __name__ == "__main__":
    for each in read_jobs():
        run(each)
