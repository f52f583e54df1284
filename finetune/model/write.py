"""Models written for Hugging Face's and for PaddleNLP's readers, shard by shard, complete or not at all.

`write_*` take weights from anywhere and need no paddle; `save_*` take a model in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.chat.folder import TOKENIZER_FILES
from finetune.errors import ArgumentError, CheckpointError
from finetune.files import json_text, new_folder, read_json, within, write_json
from finetune.model import convert
from finetune.model.config import hf_config, paddle_config, read_generation_config
from finetune.model.tensorfile import Promise, write_shards
from finetune.model.weights import Weight, numpy_dtype

if TYPE_CHECKING:
    from paddle.nn import Layer

MAX_SHARD_BYTES = 5 * 10**9
Companions = dict[str, bytes]
CHAT_STOPS = ("<|im_end|>", "<|endoftext|>")


def save_hf(model: Layer, folder: str | Path, *, dtype: str | None = None, **options: Any) -> None:
    """Write a model in memory with `write_hf`, by default in its own dtype. An adapter must be merged before."""
    facts, weights, dtype = _of(model, dtype)
    write_hf(facts, weights, folder, dtype=dtype, **options)


def save_paddle(model: Layer, folder: str | Path, *, dtype: str | None = None, **options: Any) -> None:
    """Write a model in memory with `write_paddle`, by default in its own dtype. An adapter must be merged before."""
    facts, weights, dtype = _of(model, dtype)
    write_paddle(facts, weights, folder, dtype=dtype, **options)


def _of(model: Layer, dtype: str | None) -> tuple[dict, dict[str, Weight], str]:
    from finetune.model.load import facts_of, model_weights, name_of

    if hasattr(model, "lora_config"):
        fix = "Merge it first (merge_lora), or save the adapter (save_peft)."
        raise ArgumentError("the model has an adapter", fix=fix)
    return facts_of(model), model_weights(model), dtype or name_of(model.qwen2.embed_tokens.weight.dtype)


def write_hf(
    facts: dict,
    weights: dict[str, Weight],
    folder: str | Path,
    *,
    dtype: str,
    tokenizer: Path | Companions | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that transformers 4 and 5, and everything that reads their layout, open.

    Args:
        facts: The model's, as `config.read_config` gives them.
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
    tensors = {name: promise(weight, name, dtype, turn=False) for name, weight in weights.items()}
    with new_folder(Path(folder)) as partial:
        write_shards(partial, "model", tensors, max_shard_bytes, {"format": "pt"})
        write_json(partial / "config.json", hf_config(facts, dtype))
        write_companions(partial, facts, tokenizer)


def write_paddle(
    facts: dict,
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
    tensors = {convert.to_paddle(name): promise(weight, name, dtype, turn=True) for name, weight in weights.items()}
    if facts["tie_word_embeddings"]:
        tensors[convert.HEAD] = tensors[convert.to_paddle(convert.EMBEDDING)]
    with new_folder(Path(folder)) as partial:
        write_shards(partial, "model", tensors, max_shard_bytes, {"format": "np"})
        write_json(partial / "config.json", paddle_config(facts, dtype))
        write_companions(partial, facts, tokenizer)


def promise(weight: Weight, name: str, dtype: str, *, turn: bool) -> Promise:
    """A weight as it is to be stored; `turn`: in Paddle's layout."""
    shape = weight.shape[::-1] if turn and convert.is_transposed(name) else weight.shape

    def make() -> np.ndarray:
        array = cast(weight.read(), dtype, name)
        return convert.turned(array, name) if turn else array

    return Promise(numpy_dtype(dtype), shape, make)


def cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """The array in another dtype, rounded to the nearest even.

    Raises:
        ArgumentError: a finite value becomes infinite in float16.
    """
    with np.errstate(over="ignore"):
        result = array.astype(numpy_dtype(dtype), copy=False)
    if dtype == "float16" and np.isinf(result).any() and not np.isinf(array).any():
        raise ArgumentError(f"{name} has values beyond float16's 65504", where="dtype", fix="Use bfloat16 or float32.")
    return result


def read_companions(facts: dict, tokenizer: Path | None, generation: Path | None = None) -> Companions:
    """The files that stand beside weights, by name: the tokenizer's as they are, and generation_config.json.

    Args:
        facts: The model's, for its end tokens.
        tokenizer: Folder with the tokenizer, and perhaps the generation config the model came with.
        generation: That file (`ModelSource.generation_file`), where it may be in another folder.

    Raises:
        CheckpointError: one cannot be read, or is a link to a place outside of the folder.
    """
    found: Companions = {}
    for name in TOKENIZER_FILES if tokenizer else ():
        if (tokenizer / name).exists():
            try:
                found[name] = within(name, tokenizer).read_bytes()
            except OSError as error:
                raise CheckpointError(f"cannot be read: {error.strerror}", where=str(tokenizer / name)) from error
    found["generation_config.json"] = json_text(generation_config(facts, tokenizer, generation)).encode()
    return found


def write_companions(folder: Path, facts: dict, tokenizer: Path | Companions | None) -> None:
    """Write what `read_companions` reads, or has read, into a folder."""
    files = tokenizer if isinstance(tokenizer, dict) else read_companions(facts, tokenizer)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def generation_config(facts: dict, tokenizer: Path | None, generation: Path | None = None) -> dict:
    """The generation config a model came with, its end tokens completed by those of the chat template.

    A base model has only `<|endoftext|>`; tuned on chats it ends its turns with `<|im_end|>` and has to stop there.
    Arguments as for `read_companions`.
    """
    generation = generation or (tokenizer and tokenizer / "generation_config.json")
    found = read_generation_config(generation) if generation and generation.exists() else {}
    special = special_tokens(tokenizer) if tokenizer else {}
    stops = [special[token] for token in CHAT_STOPS if token in special]
    for value in (found.get("eos_token_id"), facts["eos_token_id"]):
        stops += value if isinstance(value, list) else [] if value is None else [value]
    config = {"do_sample": False} | found
    if facts["bos_token_id"] is not None:
        config.setdefault("bos_token_id", facts["bos_token_id"])
    pad = special.get("<|endoftext|>", facts["pad_token_id"])
    if pad is not None:
        config.setdefault("pad_token_id", pad)
    if stops:
        config["eos_token_id"] = list(dict.fromkeys(stops))
    return config


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
