"""Weights from anywhere written for Hugging Face's and for PaddleNLP's readers, shard by shard, complete or not at all.

No paddle here; models in memory are written by finetune/model/save.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from finetune.chat.folder import TOKENIZER_FILES
from finetune.errors import ArgumentError, CheckpointError
from finetune.files import json_text, new_folder, read_json, within, write_json
from finetune.model import convert
from finetune.model.config import hf_config, paddle_config, read_generation_config
from finetune.model.family import EMBEDDING, HEAD, Architecture
from finetune.model.tensorfile import Array, Promise, write_shards
from finetune.model.weights import Weight, numpy_dtype

MAX_SHARD_BYTES = 5 * 10**9
Companions = dict[str, bytes]
CHAT_STOPS = ("<|im_end|>", "<|endoftext|>")


def write_hf(
    config: Architecture,
    weights: dict[str, Weight],
    folder: str | Path,
    *,
    dtype: str,
    tokenizer: Path | Companions | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that transformers 4 and 5, and everything that reads their layout, open.

    Args:
        config: The model's description.
        weights: By Hugging Face name.
        folder: Must not exist, or be empty.
        dtype: Of the stored weights.
        tokenizer: Folder whose tokenizer files and generation config go along, the files as they are; or these as
            `read_companions` read them.
        max_shard_bytes: Size above which the weights are split.

    Raises:
        ArgumentError: a weight too large for float16.
        CheckpointError: the folder is not empty or cannot be written.
    """
    tensors = {name: promise(weight, name, dtype) for name, weight in weights.items()}
    with new_folder(Path(folder)) as partial:
        write_shards(partial, "model", tensors, max_shard_bytes, {"format": "pt"})
        write_json(partial / "config.json", hf_config(config, dtype))
        write_companions(partial, config, tokenizer)


def write_paddle(
    config: Architecture,
    weights: dict[str, Weight],
    folder: str | Path,
    *,
    dtype: str,
    tokenizer: Path | Companions | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that PaddleNLP's own `AutoModelForCausalLM.from_pretrained` opens. Arguments as for `write_hf`.

    A tied head is stored again, as PaddleNLP does: without it a load says that the head is newly initialized.
    """
    tensors = {config.paddle_name(name): _turned(config, name, weight, dtype) for name, weight in weights.items()}
    if config.tie_word_embeddings:
        tensors[f"{HEAD}.weight"] = tensors[config.paddle_name(f"{EMBEDDING}.weight")]
    with new_folder(Path(folder)) as partial:
        write_shards(partial, "model", tensors, max_shard_bytes, {"format": "np"})
        write_json(partial / "config.json", paddle_config(config, dtype))
        write_companions(partial, config, tokenizer)


def promise(weight: Weight, name: str, dtype: str) -> Promise:
    """A weight as it is to be stored."""
    return Promise(numpy_dtype(dtype), weight.shape, lambda: cast(weight.read(), dtype, name))


def _turned(config: Architecture, name: str, weight: Weight, dtype: str) -> Promise:
    """The same in Paddle's layout."""
    shape = config.paddle_shape(name)
    return Promise(numpy_dtype(dtype), shape, lambda: convert.turned(config, name, cast(weight.read(), dtype, name)))


def cast(array: Array, dtype: str, name: str) -> Array:
    """The array in another dtype, rounded to the nearest even.

    Raises:
        ArgumentError: a finite value becomes infinite in float16.
    """
    with np.errstate(over="ignore"):
        result = array.astype(numpy_dtype(dtype), copy=False)
    if dtype == "float16" and np.isinf(result).any() and not np.isinf(array).any():
        raise ArgumentError(f"{name} has values beyond float16's 65504", where="dtype", fix="Use bfloat16 or float32.")
    return result


def read_companions(config: Architecture, tokenizer: Path | None, generation: Path | None = None) -> Companions:
    """The files that stand beside weights, by name: the tokenizer's as they are, and generation_config.json.

    Args:
        config: The model's description, for its end tokens.
        tokenizer: Folder with the tokenizer, and perhaps the generation config the model came with.
        generation: That file (`ModelSource.generation_file`), where it may be in another folder.

    Raises:
        CheckpointError: one cannot be read, or is a link to a place outside of the folder.
    """
    found = {} if tokenizer is None else _tokenizer_files(tokenizer)
    found["generation_config.json"] = json_text(generation_config(config, tokenizer, generation)).encode()
    return found


def _tokenizer_files(folder: Path) -> Companions:
    found: Companions = {}
    for path in (folder / name for name in TOKENIZER_FILES):
        if path.exists():
            try:
                found[path.name] = within(path.name, folder).read_bytes()
            except OSError as error:
                raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return found


def write_companions(folder: Path, config: Architecture, tokenizer: Path | Companions | None) -> None:
    """Write what `read_companions` reads, or has read, into a folder."""
    files = tokenizer if isinstance(tokenizer, dict) else read_companions(config, tokenizer)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def generation_config(config: Architecture, tokenizer: Path | None, generation: Path | None = None) -> dict[str, Any]:
    """The generation config a model came with, its end tokens completed by those of the chat template.

    A base model has only `<|endoftext|>`; tuned on chats it ends its turns with `<|im_end|>` and has to stop there.
    Arguments as for `read_companions`.
    """
    generation = generation or (tokenizer and tokenizer / "generation_config.json")
    found = read_generation_config(generation) if generation and generation.exists() else {}
    special = special_tokens(tokenizer) if tokenizer else {}
    stops = [special[token] for token in CHAT_STOPS if token in special]
    eos = found.get("eos_token_id")
    stops += [*(eos if isinstance(eos, list) else [] if eos is None else [eos]), *config.eos_token_ids]
    settings: dict[str, Any] = {"do_sample": False} | found
    if config.bos_token_id is not None:
        settings.setdefault("bos_token_id", config.bos_token_id)
    pad = special.get("<|endoftext|>", config.pad_token_id)
    if pad is not None:
        settings.setdefault("pad_token_id", pad)
    if stops:
        settings["eos_token_id"] = list(dict.fromkeys(stops))
    return settings


def special_tokens(tokenizer: Path) -> dict[str, int]:
    """Added tokens and their ids, from tokenizer.json or tokenizer_config.json.

    Raises:
        CheckpointError: the file is damaged.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = tokenizer / name
        if not path.exists():
            continue
        try:
            if name == "tokenizer.json":
                return {str(token["content"]): int(token["id"]) for token in read_json(path).get("added_tokens") or []}
            added = read_json(path).get("added_tokens_decoder") or {}
            return {str(token["content"]): int(number) for number, token in added.items()}
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError("the list of added tokens is damaged", where=str(path)) from error
    return {}
