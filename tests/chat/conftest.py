"""A byte-level tokenizer without merges: one token a byte, so that expected tokens can be read as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import pytest
from tokenizers import AddedToken, models, pre_tokenizers

from finetune.chat.example import IGNORE, Example
from finetune.chat.folder import qwen2_backend
from finetune.chat.tokenizer import Tokenizer
from tests.tiny import CHATML

QWEN25 = (Path(__file__).parent / "templates/qwen2.5.jinja").read_text(encoding="utf-8")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SHARED = Path(__file__).resolve().parents[2].parent / "shared"


def byte_tokenizer(template: str | None = CHATML, merges: list[tuple[str, str]] | None = None) -> Tokenizer:
    """256 bytes, the given merges, and the special tokens."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges or []:
        vocabulary[left + right] = len(vocabulary)
    backend = qwen2_backend(models.BPE(vocab=vocabulary, merges=merges or []))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return Tokenizer(
        backend,
        special_tokens={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        templates={} if template is None else {"default": template},
    )


def marked(tokenizer: Tokenizer, example: Example) -> str:
    """The text of an example with its supervised runs in ⟦ ⟧."""
    runs = groupby(zip(example.input_ids.tolist(), example.labels.tolist(), strict=True), lambda t: t[1] != IGNORE)
    texts = [(trained, tokenizer.decode([token for token, _ in run])) for trained, run in runs]
    return "".join(f"⟦{text}⟧" if trained else text for trained, text in texts)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """With Qwen2's template."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tooled() -> Tokenizer:
    """With Qwen2.5's template, which knows tools."""
    return byte_tokenizer(QWEN25)


@pytest.fixture(scope="session")
def real() -> Tokenizer:
    """The real Qwen2 vocabulary."""
    if not (SHARED / "qwen2-tokenizer").is_dir():
        pytest.skip("../shared is not there")
    return Tokenizer.from_folder(SHARED / "qwen2-tokenizer")


@dataclass
class Settings:
    """The data section, with the schema's defaults."""

    max_length: int = 2048
    overlong: str = "truncate"
    train_on: str = "responses"


@dataclass
class From:
    """A source, with the schema's defaults."""

    path: str
    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    split: str = "train"
    samples: int | None = None
    weight: float | None = None


@pytest.fixture
def write(tmp_path) -> Callable[[str, str | bytes], str]:
    """Write a file below tmp_path; returns its path."""

    def write_file(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write_file
