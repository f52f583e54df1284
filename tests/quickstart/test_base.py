"""The quickstart's tokenizer and random model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.chat.tokenizer import Tokenizer
from finetune.quickstart import base, tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "random"
    texts = tasks.pretraining_texts(tasks.load_countries(), tasks.load_prose())
    base.write_model(folder, base.train_tokenizer(texts), seed=1)
    return folder


def test_vocabulary_is_full_and_special_tokens_come_last(folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.backend.get_vocab_size() == base.VOCABULARY
    ids = [tokenizer.backend.token_to_id(token) for token in base.SPECIAL_TOKENS]
    assert ids == [base.VOCABULARY - 3, base.VOCABULARY - 2, base.VOCABULARY - 1]


@pytest.mark.parametrize("text", ["The capital of Peru is Lima.", "naïve 今天 🙂\n\n  x = 42", '{"capital": "Lima"}'])
def test_any_text_comes_back(folder, text):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_templates(folder, tmp_path):
    tokenizer = Tokenizer.from_folder(folder)
    messages = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "Hello<|endoftext|>"
    base.save_tokenizer(tokenizer.backend, tmp_path, base.CHATML)
    chat = Tokenizer.from_folder(tmp_path)
    assert chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_weights_fit_the_config_and_the_seed(folder):
    config = json.loads((folder / "config.json").read_text("utf-8"))
    weights = load_file(folder / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape == (config["vocab_size"], config["hidden_size"])
    assert "lm_head.weight" not in weights
    assert len(weights) == 2 + 12 * config["num_hidden_layers"]
    again = base.random_weights(1)
    assert all(np.array_equal(weights[name], again[name]) for name in again)
