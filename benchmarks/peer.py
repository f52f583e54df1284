"""TRL's side of a case, in a process of its own and in the reference environment: `python peer.py JOB.json`.

How TRL is driven to the same mathematics is that of the parity tests: see tests/parity/ref_common.py for the job.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests" / "parity")]

from measure import (
    MATMUL_SHAPE,
    Marks,
    Stopwatch,
    matmul_gflops,
    peak_bytes,
    thread_count,
    write_answer,
)

JOB = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
MARKS = Marks(JOB)

import torch
from datasets import Dataset
from ref_common import Recorded, in_float32, load_model, load_tokenizer, read_rows, training_arguments


class Marked(Recorded):
    """Notes each step when it is logged. Rows come in file order."""

    reference: dict[str, float] = {}

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        super().log(logs, *args, **kwargs)
        if "loss" in logs:
            MARKS.add(self.state.global_step, logs["loss"])

    def _precompute_ref_logps(self, *args, **kwargs):
        watch = Stopwatch()
        made = super()._precompute_ref_logps(*args, **kwargs)
        self.reference = watch.read()
        return made


def settings_of(job: dict) -> dict:
    """Those of the parity tests, with the optimizer that transformers takes when nothing is said."""
    return training_arguments(job) | {"optim": "adamw_torch_fused"}


def sft_settings(job: dict) -> dict:
    """The same for SFTConfig."""
    return settings_of(job) | {"completion_only_loss": True, "shuffle_dataset": False, "packing": False}


def sft_trainer(job: dict):
    """SFTTrainer on prompts and completions."""
    from ref_trl_sft import as_completion
    from trl import SFTConfig, SFTTrainer

    class MarkedSFTTrainer(Marked, SFTTrainer):
        pass

    tokenizer = load_tokenizer(job)
    settings = sft_settings(job)
    rows = Dataset.from_list([as_completion(row, tokenizer) for row in read_rows(job)])
    return MarkedSFTTrainer(
        model=load_model(job),
        args=SFTConfig(**settings | job["options"]),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def dpo_trainer(job: dict):
    """DPOTrainer on prompts, chosen and rejected responses."""
    from ref_trl_dpo import as_text
    from trl import DPOConfig, DPOTrainer

    class MarkedDPOTrainer(Marked, DPOTrainer):
        pass

    tokenizer = load_tokenizer(job)
    settings = settings_of(job) | {"beta": job["beta"], "loss_type": ["sigmoid"]}
    rows = Dataset.from_list([as_text(row, tokenizer) for row in read_rows(job)])
    return MarkedDPOTrainer(
        model=load_model(job),
        args=DPOConfig(**settings | job["options"]),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def train(job: dict) -> None:
    """Train, note each step, and say how many tokens each row has."""
    trainer = {"sft": sft_trainer, "dpo": dpo_trainer}[job["method"]](job)
    in_float32(trainer.model, job)
    tokens = [_tokens(example) for example in trainer.train_dataset]
    trainer.train()
    m, k, n = MATMUL_SHAPE
    a, b = torch.randn(m, k), torch.randn(k, n)
    with torch.no_grad():
        gflops = matmul_gflops(lambda: a @ b, MATMUL_SHAPE)
    _finish(job, steps=MARKS.steps, reference=trainer.reference, tokens=tokens, matmul_gflops=gflops)


def _tokens(example: dict) -> int:
    if "input_ids" in example:
        return len(example["input_ids"])
    return sum(len(example[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids"))


def prepare(job: dict) -> None:
    """Read and tokenize the rows, as a TRL script does before training."""
    from datasets import load_dataset
    from ref_trl_sft import as_completion
    from trl import SFTConfig, SFTTrainer

    tokenizer, model = load_tokenizer(job), load_model(job)
    options = dict(job["options"])
    convert, extra = as_completion, {"tokenizer": tokenizer}
    if options.pop("conversational", False):
        convert, extra = as_messages, {}
    watch = Stopwatch()
    rows = load_dataset("json", data_files=job["rows"], split="train")
    processes = options.get("dataset_num_proc")
    rows = rows.map(convert, fn_kwargs=extra, remove_columns=rows.column_names, num_proc=processes)
    arguments = SFTConfig(**sft_settings(job) | options)
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    spent = watch.read()
    targets = sum(sum(label != -100 for label in batch) for batch in trainer.train_dataset["labels"])
    _finish(job, spent=spent, rows=len(trainer.train_dataset), targets=targets)


def as_messages(row: dict) -> dict:
    """Prompt and completion of a row, as messages."""
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


def _finish(job: dict, **answer) -> None:
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets")}
    threads = {"threads": thread_count(), "torch_threads": torch.get_num_threads()}
    write_answer(job, versions=versions, peak=peak_bytes(), **threads, **answer)


if __name__ == "__main__":
    {"train": train, "prepare": prepare}[JOB["task"]](JOB)
