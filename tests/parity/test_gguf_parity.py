"""GGUF exports opened by llama.cpp: tokens, template and answers. Needs FINETUNE_REFERENCE_PYTHON with xllamacpp."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from finetune.chat.tokenizer import Tokenizer
from finetune.export.formats import QUANTIZED
from tests.tiny import Shape, tiny_model, write_json

PYTHON = os.environ.get("FINETUNE_REFERENCE_PYTHON")
QWEN = Path(__file__).parents[3] / "shared" / "qwen2-tokenizer"
SCRIPT = Path(__file__).with_name("ref_llama.py")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="FINETUNE_REFERENCE_PYTHON names no Python with xllamacpp"),
    pytest.mark.timeout(600),
]
# How far llama.cpp's logits (standard deviation 3.2) may be from ours over the same file, dequantized. Measured: 6e-6,
# 0.004, 0.04, 0.16. float32 differs by the order of additions; the others multiply in their own format (q8_0:
# activations of 8 bits too), where we multiply in float32.
LIMITS = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.2} | dict.fromkeys(QUANTIZED, 0.4)
MESSAGES = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": " 4.\n"},
    {"role": "user", "content": "谢谢 🙂"},
]
TEXTS = [
    "Hello world, it's 12345 o'clock!",
    "  leading and trailing  \n\n\tтекст 世界 🙂é́",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "def f(x):\n    return x ** 2  # ½\r\n",
]
NEW = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small model with the real tokenizer where it is at hand, else with the tests' own."""
    place = tmp_path_factory.mktemp("gguf") / "model"
    if not QWEN.is_dir():
        return tiny_model(place, shape=Shape(hidden_size=64, intermediate_size=96), tied=False, seed=5)
    shape = Shape(vocab_size=151_936, hidden_size=64, intermediate_size=96, max_position_embeddings=1024)
    tiny_model(place, shape=shape, tied=False, seed=5, tokenizer=False)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(QWEN / name, place)
    write_json(place / "generation_config.json", {"eos_token_id": [151_645, 151_643], "pad_token_id": 151_643})
    return place


@pytest.fixture(scope="module")
def exported(folder) -> dict[str, Path]:
    from finetune.export.export import export

    return {dtype: export(folder, folder.with_name(dtype), format="gguf", dtype=dtype).folder for dtype in LIMITS}


@pytest.fixture(scope="module")
def job() -> dict:
    rng = np.random.default_rng(7)
    prompts = [rng.integers(0, 400, length).tolist() for length in (1, 5, 12, 40, 90)]
    return {"texts": TEXTS, "messages": MESSAGES, "prompts": prompts, "new_tokens": NEW}


@pytest.fixture(scope="module")
def answers(exported, job, tmp_path_factory) -> dict[str, dict]:
    found = subprocess.run([PYTHON, "-c", "import xllamacpp"], capture_output=True, timeout=60)
    if found.returncode:
        pytest.skip("the reference environment has no xllamacpp, the llama.cpp build of tests/parity/requirements.txt")
    place = tmp_path_factory.mktemp("llama")
    files = [str(next(folder.glob("*.gguf"))) for folder in exported.values()]
    write_json(place / "job.json", {**job, "files": files})
    done = subprocess.run(
        [PYTHON, SCRIPT, place / "job.json", place / "answers.json"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(exported, json.loads((place / "answers.json").read_text()), strict=True))


def test_llama_cpp_reads_texts_into_the_same_tokens(answers, folder):
    tokenizer = Tokenizer.from_folder(folder)
    for answer in answers.values():
        assert answer["tokens"] == [tokenizer.encode(text) for text in TEXTS]


def test_llama_cpp_renders_messages_alike(answers, folder):
    tokenizer = Tokenizer.from_folder(folder)
    expected = tokenizer.render(MESSAGES, add_generation_prompt=True)
    assert {answer["rendered"] for answer in answers.values()} == {expected}


def test_greedy_tokens_in_float32_are_ours(answers, folder, job):
    from finetune.infer.open import open_model
    from finetune.infer.sampling import Sampling

    sampling = Sampling(max_new_tokens=NEW, stop_token_ids=())
    outputs = open_model(str(folder), pack=True).engine.generate(job["prompts"], sampling)
    assert answers["float32"]["greedy"] == [output.tokens for output in outputs]


@pytest.mark.parametrize("dtype", LIMITS)
def test_logits_of_the_likeliest_tokens_are_those_of_the_file(answers, exported, folder, job, dtype):
    """As differences to the likeliest one's: llama.cpp tells log-probabilities, whose sum over 151,936 it rounds."""
    from finetune.infer.engine import Engine
    from finetune.model.load import load_model

    engine = Engine(load_model(next(exported[dtype].glob("*.gguf")), dtype="float32").model)
    _, logits = engine.decoder.read([np.array(prompt) for prompt in job["prompts"]])
    for row, first in zip(logits.numpy(), answers[dtype]["first"], strict=True):
        ids, theirs = [int(token) for token in first], np.array(list(first.values()))
        np.testing.assert_allclose(theirs - theirs[0], row[ids] - row[ids[0]], atol=LIMITS[dtype], rtol=0)
