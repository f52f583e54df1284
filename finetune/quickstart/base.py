"""The quickstart's base model before it has read anything: its own tokenizer, a Qwen2 config and random weights.

numpy only: the folder is in Hugging Face layout, so everything else can be left to `finetune train`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from finetune.chat.folder import QWEN2_PATTERN
from finetune.chat.tokenizer import Tokenizer
from finetune.model.config import read_config

VOCABULARY = 1024
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Qwen2's."""

PLAIN_TEXT = "{% for message in messages %}{{ message['content'] + '<|endoftext|>' }}{% endfor %}"
"""For pretraining: the text and its end."""

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "max_window_layers": 2,
    "use_sliding_window": False,
    "sliding_window": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
    "torch_dtype": "float32",
    "use_cache": True,
}
# initializer_range is near hidden_size ** -0.5; Qwen2's 0.02, meant for wide models, was not tried with these texts.


def train_tokenizer(texts: Iterable[str]) -> tokenizers.Tokenizer:
    """Train a byte-level BPE vocabulary of `VOCABULARY` tokens, cut and normalised as Qwen2's is."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return backend


def save_tokenizer(backend: tokenizers.Tokenizer, folder: Path, template: str) -> None:
    """Write the tokenizer with a chat template."""
    special = {"eos_token": "<|im_end|>" if template == CHATML else "<|endoftext|>", "pad_token": "<|endoftext|>"}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "unk_token": None,
        **special,
    }
    Tokenizer(backend, special_tokens=special, templates={"default": template}, config=config).save(folder)


def random_weights(seed: int) -> dict[str, np.ndarray]:
    """Weights in Hugging Face names and layout: normal matrices, zero biases, norms of one."""
    draw = np.random.default_rng(seed)
    weights = {}
    for name, shape in read_config(CONFIG, Path("config.json")).shapes.items():
        if len(shape) == 2:
            weights[name] = (draw.standard_normal(shape) * CONFIG["initializer_range"]).astype(np.float32)
        else:
            weights[name] = np.full(shape, 0 if name.endswith(".bias") else 1, np.float32)
    return weights


def write_model(folder: Path, backend: tokenizers.Tokenizer, seed: int) -> None:
    """Write a whole model folder with random weights and the pretraining template."""
    folder.mkdir(parents=True, exist_ok=True)
    end_of_text, end_of_turn = (backend.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>"))
    config = {**CONFIG, "bos_token_id": end_of_text, "eos_token_id": end_of_turn}
    generation = {"do_sample": False, "eos_token_id": [end_of_turn, end_of_text], "pad_token_id": end_of_text}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    save_file(random_weights(seed), folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(backend, folder, PLAIN_TEXT)
