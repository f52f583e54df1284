"""Answers by transformers' `generate`, and scores by its logits processors. Runs in the reference environment only.

    python ref_generate.py JOBS.json ANSWERS.json

JOBS.json holds a list of jobs, ANSWERS.json gets their answers in order. A job has `model` (folder), maybe `threads`
(else 1), and any of
    greedy   {prompts: lists of ids, batch_size, max_new_tokens}: left-padded, with a mask, no end token
    calls    keyword arguments of single `generate` calls, `input_ids` (and `attention_mask`) as lists
    filters  {logits: [B, V] lists, settings: lists of sampling settings}: probabilities after the processors
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

PAD = 400


def greedy(model, job: dict) -> list[list[int]]:
    """New tokens of every prompt."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=job["max_new_tokens"], pad_token_id=PAD)
    model.generation_config.eos_token_id = None
    answers: list[list[int]] = []
    for start in range(0, len(job["prompts"]), job["batch_size"]):
        prompts = job["prompts"][start : start + job["batch_size"]]
        width = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        answers += model.generate(ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
    return answers


def call(model, arguments: dict) -> list[list[int]]:
    """The whole sequences of one `generate` call."""
    tensors = {name: torch.tensor(arguments.pop(name)) for name in ("input_ids", "attention_mask") if name in arguments}
    return model.generate(**tensors, **arguments).tolist()


def filtered(logits: torch.Tensor, prompt: list[int], settings: dict) -> list[list[float]]:
    """Probabilities after transformers' processors, in the order `generate` applies them."""
    processors = LogitsProcessorList()
    if settings.get("repetition_penalty", 1.0) != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    if settings.get("temperature", 1.0) != 1.0:
        processors.append(TemperatureLogitsWarper(settings["temperature"]))
    if settings.get("top_k", 0):
        processors.append(TopKLogitsWarper(settings["top_k"]))
    if settings.get("top_p", 1.0) < 1.0:
        processors.append(TopPLogitsWarper(settings["top_p"]))
    if settings.get("min_p", 0.0):
        processors.append(MinPLogitsWarper(settings["min_p"]))
    ids = torch.tensor([prompt] * len(logits))
    # In float64: torch's float32 softmax is off by up to 1.4e-6 on processors without AVX-512.
    return torch.softmax(processors(ids, logits.clone()).double(), dim=-1).tolist()


def answer(job: dict) -> dict:
    """All that one job asks for."""
    # Tiny products are slower with more threads than one, far slower on a busy machine.
    torch.set_num_threads(job.get("threads", 1))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    found: dict = {}
    if "calls" in job:
        found["calls"] = [call(model, arguments) for arguments in job["calls"]]
    if "filters" in job:
        logits, prompt = torch.tensor(job["filters"]["logits"]), job["filters"]["prompt"]
        found["filters"] = [filtered(logits, prompt, settings) for settings in job["filters"]["settings"]]
    if "greedy" in job:
        found["greedy"] = greedy(model, job["greedy"])
    return found


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with torch.no_grad():
        answers = [answer(job) for job in jobs]
    Path(sys.argv[2]).write_text(json.dumps(answers), encoding="utf-8")
