"""Whether a model is the one it was: a fingerprint of what its folder holds. No paddle here."""

from __future__ import annotations

import hashlib
from pathlib import Path

from finetune.chat.folder import TOKENIZER_FILES
from finetune.model.resolve import ModelSource

_BLOCKS, _BLOCK_BYTES = 64, 4096


def model_digest(source: ModelSource) -> str:
    """SHA-256 over a model's config, adapter settings and tokenizer, and over size and some blocks of its weights.

    All of the weights would take a minute for a large model at every start; another training run, another dtype and
    another merge change every block, and a file that is cut short changes its size.
    """
    digest = hashlib.sha256()
    for folder in dict.fromkeys((source.folder, source.tokenizer_folder)):
        for name in ("config.json", "adapter_config.json", "lora_config.json", *TOKENIZER_FILES):
            if (folder / name).is_file():
                digest.update(name.encode() + (folder / name).read_bytes())
    for path in source.weight_files:
        digest.update(f"{path.name} {_sample(path)}".encode())
    if source.base is not None:
        digest.update(model_digest(source.base).encode())
    return digest.hexdigest()


def _sample(path: Path) -> str:
    """SHA-256 over size and some blocks of a file, all of them where it is small; the name of what is no file."""
    if not path.is_file():
        return str(path)
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(_BLOCKS):
            file.seek(size * number // _BLOCKS)
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
