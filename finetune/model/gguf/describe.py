"""What a GGUF file's metadata says, as the files that stand beside weights in a Hugging Face folder.

A GGUF file has its model's sizes, tokenizer and chat template in itself. They are written once into a folder below
`cache_home()`, named by the header's hash and by this code's, so that everything that reads a model folder reads them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from finetune.chat.folder import read_folder
from finetune.errors import CheckpointError
from finetune.files import cache_home, json_text, new_folder
from finetune.model.config import read_config
from finetune.model.family import FAMILIES, Architecture
from finetune.model.gguf.container import Header, damaged, read_header

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_TOKENIZER = "tokenizer.ggml"
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_STORED = {0: "float32", 1: "float16", 30: "bfloat16"}  # by type of the embeddings; what is quantized becomes float32


def companions(file: Path) -> Path:
    """The folder with config.json, generation_config.json and the tokenizer of a GGUF file (of several: the first).

    Raises:
        CheckpointError: the file is damaged, or of an architecture or with a tokenizer that is not supported.
    """
    header = read_header(file)
    folder = cache_home() / "gguf" / hashlib.sha256(f"{header.digest} {_code()}".encode()).hexdigest()[:24]
    if not (folder / "config.json").exists():
        config, files = _config(header), _tokenizer_files(header)
        files |= {"config.json": json_text(config), "generation_config.json": json_text(_generation(header.metadata))}
        _write(folder, files, header)
    return folder


@cache
def _code() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _write(folder: Path, files: Mapping[str, str], header: Header) -> None:
    """Write them and read them back, since what is wrong with them is wrong with the file."""
    try:
        with new_folder(folder) as partial:
            for name, content in files.items():
                (partial / name).write_text(content, encoding="utf-8", newline="")
            try:
                read_folder(partial)
            except CheckpointError as error:
                what = f"its tokenizer cannot be used: {error.faults[0].what}"
                raise CheckpointError(what, where=str(header.path)) from error
    except CheckpointError:
        if not (folder / "config.json").exists():  # another process was first
            raise


def _family(header: Header) -> type[Architecture]:
    name = header.metadata.get("general.architecture")
    known = {family.GGUF: family for family in FAMILIES.values()}
    if name not in known:
        fix = f"GGUF files of the architecture {' or '.join(known)} are read."
        raise CheckpointError(f"its architecture is {str(name)[:50]!r}", where=str(header.path), fix=fix)
    return known[name]


def _config(header: Header) -> dict[str, Any]:
    """config.json, checked as any other."""
    family, embedding = _family(header), header.tensors.get("token_embd.weight")
    if embedding is None:
        raise damaged(header.path, "it has no embeddings (token_embd.weight)")

    def get(key: str, default: Any = None) -> Any:
        return header.metadata.get(f"{family.GGUF}.{key}", default)

    raw: dict[str, Any] = {
        "architectures": [family.ARCHITECTURE],
        "model_type": family.MODEL_TYPE,
        "dtype": _STORED.get(embedding.kind, "float32"),
        "hidden_act": family.ACTIVATION,
        "vocab_size": embedding.shape[0],
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv", get("attention.head_count")),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "use_sliding_window": bool(get("attention.sliding_window")),
    }
    missing = [name for name, value in raw.items() if value is None]
    if missing:
        raise damaged(header.path, f"its metadata does not say {missing[0]}")
    raw["rope_scaling"] = _rope_scaling(get)
    raw |= {name: header.metadata.get(f"{_TOKENIZER}.{name}") for name in ("bos_token_id", "eos_token_id")}
    raw["pad_token_id"] = header.metadata.get(f"{_TOKENIZER}.padding_token_id")
    if get("attention.key_length") is not None:
        raw["head_dim"] = get("attention.key_length")
    _check_heads(read_config(raw, header.path), get, header.path)
    return raw


def _check_heads(config: Architecture, get: Callable[..., Any], where: Path) -> None:
    """Values as wide as keys, and all of a head rotated."""
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, config.head_dim) != config.head_dim:
            what = f"{key} {str(get(key))[:50]} with heads of {config.head_dim} is not supported"
            raise CheckpointError(what, where=str(where))


def _rope_scaling(get: Callable[..., Any]) -> dict[str, Any] | None:
    """As config.json has it; None for the plain rotary embedding."""
    kind, linear = get("rope.scaling.type"), get("rope.scale_linear")
    if kind in (None, "", "none"):
        return {"rope_type": "linear", "factor": _shortest(linear)} if linear not in (None, 0.0, 1.0) else None
    scaling = {
        "rope_type": kind,
        "factor": _shortest(get("rope.scaling.factor")),
        "original_max_position_embeddings": get("rope.scaling.original_context_length"),
    }
    return {name: value for name, value in scaling.items() if value is not None}


def _shortest(number: Any) -> Any:
    """A float32 as the decimal number that was meant: 1e-06, and not 9.999999974752427e-07."""
    return float(str(np.float32(number))) if isinstance(number, float) else number


def _generation(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: what ends an answer, of a text and of a turn."""
    ends = [metadata.get(f"{_TOKENIZER}.{name}") for name in _ENDS]
    found = {
        "bos_token_id": metadata.get(f"{_TOKENIZER}.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)) or None,
        "pad_token_id": metadata.get(f"{_TOKENIZER}.padding_token_id"),
    }
    return {"do_sample": False} | {name: value for name, value in found.items() if value is not None}


def _tokenizer_files(header: Header) -> dict[str, str]:
    """vocab.json, merges.txt and tokenizer_config.json, as Qwen2's own folders have them.

    Which tokens are markers, and which of these are control tokens, is what the file says of each.
    """
    metadata, where = header.metadata, header.path
    model, cut = metadata.get(f"{_TOKENIZER}.model"), metadata.get(f"{_TOKENIZER}.pre", _family(header).GGUF_TOKENIZER)
    if model != "gpt2" or cut != _family(header).GGUF_TOKENIZER:
        what = f"its tokenizer is {str(model)[:50]!r} and cuts text as {str(cut)[:50]!r} does"
        fix = f"Read are those of 'gpt2' that cut as {_family(header).GGUF_TOKENIZER!r}."
        raise CheckpointError(what, where=str(where), fix=fix)
    tokens, merges, kinds = (_field(metadata, name) for name in ("tokens", "merges", "token_type"))
    kinds = kinds or [_NORMAL] * len(tokens or ())
    if not (_is_texts(tokens) and _is_texts(merges) and isinstance(kinds, list) and len(kinds) == len(tokens)):
        raise damaged(where, "its tokens, their types or its merges are no lists of like length")
    if len(set(tokens)) != len(tokens):
        raise damaged(where, "two tokens are the same text")
    # llama.cpp fills a vocabulary up with these.
    used = [n for n, kind in enumerate(kinds) if kind != _UNUSED and tokens[n] != f"[PAD{n}]"]
    rows = header.tensors["token_embd.weight"].shape[0]
    if used and used[-1] >= rows:
        raise damaged(where, f"its tokenizer has ids up to {used[-1]}, and {rows} tokens have an embedding")
    markers = {n: tokens[n] for n in used if kinds[n] in (_CONTROL, _USER_DEFINED)}
    words = {tokens[n]: n for n in used if n not in markers}
    if list(words.values()) + list(markers) != list(range(len(used))):  # markers get their ids from where they follow
        words = {tokens[n]: n for n in used}
    return {
        "vocab.json": json_text(words, indent=None, sort_keys=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges),
        "tokenizer_config.json": json_text(_tokenizer_config(header, markers), sort_keys=False),
    }


def _tokenizer_config(header: Header, markers: Mapping[int, str]) -> dict[str, Any]:
    metadata, tokens = header.metadata, header.metadata[f"{_TOKENIZER}.tokens"]

    def token(name: str) -> str | None:
        number = metadata.get(f"{_TOKENIZER}.{name}")
        if number is None:
            return None
        if type(number) is not int or not 0 <= number < len(tokens):
            raise damaged(header.path, f"{name} is {str(number)[:50]}, and there are {len(tokens)} tokens")
        return str(tokens[number])

    kinds = metadata.get(f"{_TOKENIZER}.token_type", ())
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": metadata.get(f"{_family(header).GGUF}.context_length"),
        "bos_token": token("bos_token_id") if metadata.get(f"{_TOKENIZER}.add_bos_token") else None,
        "eos_token": token("eos_token_id"),
        "pad_token": token("padding_token_id"),
        "unk_token": None,
        "added_tokens_decoder": {
            str(number): {"content": text, **plain, "special": kinds[number] == _CONTROL}
            for number, text in markers.items()
        },
    }
    templates = _templates(metadata)
    if list(templates) == ["default"]:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    return config


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name."""
    key = "tokenizer.chat_template"
    named = {name[len(key) + 1 :]: text for name, text in metadata.items() if name.startswith(f"{key}.")}
    return ({"default": metadata[key]} if key in metadata else {}) | named


def _field(metadata: Mapping[str, Any], name: str) -> Any:
    return metadata.get(f"{_TOKENIZER}.{name}")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
