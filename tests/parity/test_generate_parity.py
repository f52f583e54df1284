"""Generation against transformers: tokens, the quickstart, and the filters. Needs FINETUNE_REFERENCE_PYTHON."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from finetune.chat.tokenizer import Tokenizer
from finetune.infer.sampling import Sampling, penalize, support
from tests.tiny import Shape, tiny_model

PYTHON = os.environ.get("FINETUNE_REFERENCE_PYTHON")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="FINETUNE_REFERENCE_PYTHON names no Python with torch and transformers"),
    pytest.mark.timeout(1000),
]
SCRIPT = Path(__file__).with_name("ref_generate.py")
GREEDY = [(False, 1), (False, 8), (True, 8)]  # tied, batch size
ENDS = ([402, 400], 42)
SHAPE = Shape(hidden_size=48, num_hidden_layers=2, num_attention_heads=6, max_position_embeddings=1024)
QWEN2_05B = Shape(
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=32_768,
)
NEW = 128
QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
CONFIGS = ({}, QWEN)
PADDED = [[400, 400, 400, 65, 66, 67, 68], [70, 71, 72, 73, 74, 75, 76]]
MASK = [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]
CALLS = [
    {"input_ids": [PADDED[1]], "do_sample": False, "max_new_tokens": 64},
    {"input_ids": [PADDED[1]], "attention_mask": [MASK[1]], "do_sample": False, "max_new_tokens": 64},
    {"input_ids": PADDED, "attention_mask": MASK, "do_sample": False, "max_new_tokens": 64},
    {"input_ids": PADDED, "do_sample": False, "max_new_tokens": 64},
    {"input_ids": PADDED, "do_sample": False, "max_new_tokens": 64, "eos_token_id": 402},
    {"input_ids": PADDED, "attention_mask": MASK, "do_sample": False, "max_new_tokens": 40, "repetition_penalty": 1.5},
    {"input_ids": PADDED, "attention_mask": MASK, "do_sample": False, "max_new_tokens": 40, "min_new_tokens": 30},
    {"input_ids": PADDED, "attention_mask": MASK, "do_sample": False, "max_length": 20},
    {"input_ids": PADDED, "attention_mask": MASK, "do_sample": False},
    {"input_ids": PADDED, "attention_mask": MASK, "do_sample": True, "top_k": 1, "max_new_tokens": 40},
]
SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 20},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 0.999},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.7, "top_k": 100, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1},
]
MESSAGES = [{"role": "user", "content": "Give me a short introduction to large language model."}]


@dataclass(frozen=True)
class Job:
    """What the reference is asked, and what it answered."""

    asked: dict
    answer: dict

    @property
    def folder(self) -> Path:
        return Path(self.asked["model"])


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, Job]:
    """All jobs in one process, since loading torch and transformers takes longer than the work."""
    root = tmp_path_factory.mktemp("generate")
    asked = {}
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 400, length).tolist() for length in rng.integers(1, 160, 100)]
    for tied, size in GREEDY:
        folder = tiny_model(root / f"greedy-{tied}", shape=SHAPE, tied=tied, seed=11)
        asked[f"greedy-{tied}-{size}"] = {
            "model": str(folder),
            "greedy": {"prompts": prompts, "batch_size": size, "max_new_tokens": NEW},
        }
    for number, (config, ends) in enumerate(product(CONFIGS, ENDS)):
        folder = tiny_model(root / f"calls-{number}", shape=SHAPE, tied=False, seed=12)
        set_generation_config(folder, config, ends)
        asked[f"calls-{number}"] = {"model": str(folder), "calls": CALLS}
    folder = tiny_model(root / "quickstart", shape=SHAPE, tied=False, seed=13)
    set_generation_config(folder, QWEN, [402, 400])
    ids = Tokenizer.from_folder(folder).apply_chat_template(MESSAGES, add_generation_prompt=True)
    call = {"input_ids": [ids], "max_new_tokens": 512, "do_sample": False}
    asked["quickstart"] = {"model": str(folder), "calls": [call, {**call, "attention_mask": [[1] * len(ids)]}]}
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((16, 5000)) * rng.uniform(0.5, 6, (16, 1))).astype(np.float32)
    filters = {"logits": logits.tolist(), "prompt": rng.integers(0, 5000, 200).tolist(), "settings": SETTINGS}
    asked["filters"] = {"model": str(folder), "filters": filters}
    answers = ask(list(asked.values()), root, timeout=900)
    return {name: Job(job, found) for (name, job), found in zip(asked.items(), answers, strict=True)}


def ask(jobs: list[dict], place: Path, timeout: int | None) -> list[dict]:
    """What the reference answers to jobs, see ref_generate.py."""
    (place / "jobs.json").write_text(json.dumps(jobs))
    command = [PYTHON, SCRIPT, place / "jobs.json", place / "answers.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((place / "answers.json").read_text())


def set_generation_config(folder: Path, config: dict, ends: list[int] | int) -> None:
    settings = {**config, "eos_token_id": ends, "pad_token_id": 400}
    (folder / "generation_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("tied", "size"), GREEDY)
def test_greedy_tokens_of_100_prompts(jobs, tied, size, packed):
    from finetune.compute.packed import pack
    from finetune.infer.engine import Engine
    from finetune.model.load import load_model

    job = jobs[f"greedy-{tied}-{size}"]
    model = load_model(job.folder).model
    if packed:
        pack(model)
    engine = Engine(model)
    prompts = job.asked["greedy"]["prompts"]
    outputs = engine.generate(prompts, Sampling(max_new_tokens=NEW), batch_size=size)
    expected = job.answer["greedy"]
    assert [i for i, output in enumerate(outputs) if output.tokens != expected[i]] == []


def test_the_100_prompts_are_answered_differently(jobs):
    assert len({tuple(tokens[-20:]) for tokens in jobs["greedy-False-1"].answer["greedy"]}) > 50


@pytest.mark.timeout(0)
def test_greedy_tokens_of_the_05b_shape(tmp_path):
    """All 24 layers and the whole vocabulary, 128 tokens, batch 8 and 1. Minutes, 6 GB of memory and 2 GB of disk.

    Eight prompts, or FINETUNE_PARITY_PROMPTS of them: 100 take 25 minutes on two cores.
    """
    from finetune.compute.packed import pack
    from finetune.infer.engine import Engine
    from finetune.model.load import load_model

    folder = tiny_model(tmp_path / "m", shape=QWEN2_05B, tokenizer=False)
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 160, int(os.environ.get("FINETUNE_PARITY_PROMPTS", 8)))
    greedy = {
        "prompts": [rng.integers(0, 151_000, length).tolist() for length in lengths],
        "batch_size": 8,
        "max_new_tokens": NEW,
    }
    expected = ask([{"model": str(folder), "threads": len(os.sched_getaffinity(0)), "greedy": greedy}], tmp_path, None)
    model = load_model(folder).model
    pack(model)
    for size in (8, 1):
        outputs = Engine(model).generate(greedy["prompts"], Sampling(max_new_tokens=NEW), batch_size=size)
        assert [output.tokens for output in outputs] == expected[0]["greedy"]


@pytest.mark.parametrize("number", range(len(CONFIGS) * len(ENDS)))
def test_generate_calls_return_the_same_sequences(jobs, number):
    """With and without mask, with inferred padding, with Qwen2-Instruct's generation config; early and late ends."""
    from finetune import AutoModelForCausalLM

    job = jobs[f"calls-{number}"]
    model = AutoModelForCausalLM.from_pretrained(job.folder)
    for call, expected in zip(CALLS, job.answer["calls"], strict=True):
        assert model.generate(**call)[0].tolist() == expected, call


def test_the_quickstart_snippet(jobs):
    """The model page's lines, chat template and all; greedy, since its generation config would draw."""
    from finetune import AutoModelForCausalLM, AutoTokenizer

    job = jobs["quickstart"]
    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job.folder)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    model_inputs = tokenizer([text], return_tensors="pd")
    generated_ids = model.generate(model_inputs.input_ids, max_new_tokens=512, do_sample=False)[0]
    masked_ids = model.generate(**model_inputs, max_new_tokens=512, do_sample=False)[0]
    assert [generated_ids.tolist(), masked_ids.tolist()] == job.answer["calls"]


def test_filters_have_the_same_support_and_probabilities(jobs):
    job = jobs["filters"]
    logits = np.array(job.asked["filters"]["logits"], np.float32)
    prompt = np.unique(job.asked["filters"]["prompt"])
    for settings, expected in zip(SETTINGS, job.answer["filters"], strict=True):
        sampling = Sampling(**settings)
        for row, probabilities in zip(logits, np.array(expected)):
            adjusted = penalize(row, sampling, prompt, {}) if sampling.penalized else row
            ids, ours = support(adjusted, sampling)
            assert ids.tolist() == np.flatnonzero(probabilities).tolist(), settings
            np.testing.assert_allclose(ours, probabilities[ids], atol=1e-6)
