"""What the two reference scripts share. Runs in the reference environment: torch, transformers, trl, peft; no paddle.

A job is a JSON file:

    model            Hugging Face folder with its tokenizer
    adapter          PEFT folder to go on training; leave out for full fine-tuning
    quantization     nf4: bitsandbytes' 4 bits, doubly quantized; leave out for float32
    optim            transformers' name of the optimizer; leave out for adamw_torch
    rows             JSONL file
    output           where the JSON answer goes
    chat_template    Jinja text in place of the tokenizer's
    max_length, max_steps, batch_size, accumulation, learning_rate, scheduler, warmup_steps, weight_decay,
    max_grad_norm, seed

The answer has `versions` and `steps`, one object per optimizer step with unrounded numbers.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def read_jobs() -> list[dict]:
    """The jobs named on the command line."""
    return [json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]]


def read_rows(job: dict) -> list[dict]:
    """The rows of the job, in file order."""
    lines = Path(job["rows"]).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def load_tokenizer(job: dict):
    """The model folder's tokenizer, with the job's chat template if it has one."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    if job.get("chat_template"):
        tokenizer.chat_template = job["chat_template"]
    return tokenizer


def load_model(job: dict):
    """The model in float32, linear layers in bitsandbytes' nf4 if the job says so, under its adapter if it has one."""
    quantization = None
    if job.get("quantization"):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=job["quantization"],
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, quantization_config=quantization, device_map="cpu"
    )
    if job.get("adapter"):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    return model


def in_float32(model, job: dict) -> None:
    """Undo what TRL does to the adapter of a quantized model: it rounds it to bfloat16."""
    if job.get("quantization"):
        stored = load_file(Path(job["adapter"]) / "adapter_model.safetensors")
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = stored[name.replace(".default", "")].to(torch.float32)


def training_arguments(job: dict) -> dict:
    """Arguments every TRL config takes; nothing that is not asked for is left to a default that could matter."""
    return {
        "output_dir": str(Path(job["output"]).with_suffix("")),
        "max_length": job["max_length"],
        "max_steps": job["max_steps"],
        "per_device_train_batch_size": job["batch_size"],
        "gradient_accumulation_steps": job["accumulation"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": job["scheduler"],
        "warmup_steps": job["warmup_steps"],
        "weight_decay": job["weight_decay"],
        "max_grad_norm": job["max_grad_norm"],
        "seed": job["seed"],
        "optim": job.get("optim", "adamw_torch"),
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


class Recorded:
    """Mixin for a TRL trainer: rows in file order, every logged number kept as it is."""

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        super().log(logs, *args, **kwargs)
        if "loss" in logs:  # the last call of a run holds totals only
            self.__dict__.setdefault("recorded", []).append({"step": self.state.global_step, **logs})


def write_answer(job: dict, trainer: Recorded, **extra) -> None:
    """Write what the trainer recorded."""
    names = ("torch", "transformers", "trl", "peft")
    answer = {"versions": {name: version(name) for name in names}, "steps": trainer.recorded, **extra}
    Path(job["output"]).write_text(json.dumps(answer), encoding="utf-8")
