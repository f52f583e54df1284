"""The tokenizer files of a model folder: which there are, and what they say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from finetune.errors import CheckpointError
from finetune.files import read_json

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ADDED_KEYS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerFolder:
    """What the files say, as `Tokenizer` takes it.

    Attributes:
        backend: Vocabulary, merges, added tokens and pipeline.
        special_tokens: Role to text.
        templates: Chat templates by name.
        config: tokenizer_config.json as it is.
        where: The folder, for messages.
    """

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    templates: dict[str, str]
    config: dict[str, Any]
    where: str


def read_folder(folder: Path) -> TokenizerFolder:
    """Read the tokenizer of a Hugging Face or PaddleNLP model folder.

    Reads tokenizer.json if there, else vocab.json and merges.txt (Qwen2's pre-tokenizer and NFC are implied), with
    tokenizer_config.json, added_tokens.json, special_tokens_map.json and the chat template, which stands in
    chat_template.jinja, tokenizer_config.json (text, or a list of named ones) or chat_template.json.

    Raises:
        CheckpointError: no tokenizer in the folder, or a file of it is damaged.
    """
    if not folder.is_dir():
        raise CheckpointError("there is no such folder", where=str(folder), fix="Give a model folder.")
    config = _read_json(folder / "tokenizer_config.json")
    backend = _read_backend(folder)
    try:
        _add_tokens(backend, folder, config)
        named = {**_read_json(folder / "special_tokens_map.json"), **config}
        special = {role: text for role in _SPECIAL_NAMES if (text := _token_text(named.get(role))) is not None}
        templates = _read_templates(folder, config)
        for text in (*special.values(), *templates.values()):
            if not isinstance(text, str):
                raise TypeError(f"{type(text).__name__} where a text should be")
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"the tokenizer's settings are not of the known form ({type(error).__name__}: {str(error)[:100]})",
            where=str(folder),
            fix="Copy the tokenizer files from the original model again.",
        ) from error
    return TokenizerFolder(backend, special, templates, config, str(folder))


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    whole = folder / "tokenizer.json"
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    try:
        if whole.is_file():
            return tokenizers.Tokenizer.from_file(str(whole))
        if vocabulary.is_file() and merges.is_file():
            return qwen2_backend(models.BPE.from_file(str(vocabulary), str(merges)))
    except BaseException as error:  # `tokenizers` raises bare Exception, and for a panic of Rust a BaseException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"the tokenizer cannot be read: {str(error)[:300]}",
            where=str(whole if whole.is_file() else vocabulary),
            fix="Copy the tokenizer files from the original model again.",
        ) from error
    raise CheckpointError(
        "there is no tokenizer in this folder",
        where=str(folder),
        fix="It needs tokenizer.json, or vocab.json and merges.txt, with tokenizer_config.json: "
        "copy them from the original model.",
    )


def qwen2_backend(model: models.BPE) -> tokenizers.Tokenizer:
    """Qwen2's pipeline around a byte-level BPE: NFC, the split pattern, bytes."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, folder: Path, config: dict[str, Any]) -> None:
    """Add the tokens that the folder's other files name and the backend lacks, each at the id it is given there."""
    wanted: dict[int, AddedToken] = {}
    for token_id, entry in config.get("added_tokens_decoder", {}).items():
        wanted[int(token_id)] = AddedToken(**{key: entry[key] for key in _ADDED_KEYS if key in entry})
    special = set(filter(None, (_token_text(config.get(role)) for role in _SPECIAL_NAMES)))
    for text, token_id in _read_json(folder / "added_tokens.json").items():
        looks_special = text in special or (text.startswith("<|") and text.endswith("|>"))
        wanted.setdefault(int(token_id), AddedToken(text, special=looks_special, normalized=False))
    have = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token_id, token in sorted(wanted.items()):
        if token.content not in have:
            add = backend.add_special_tokens if token.special else backend.add_tokens
            add([token])
        if backend.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"token {token.content!r} should have id {token_id}, "
                f"but the vocabulary gives it {backend.token_to_id(token.content)}",
                where=str(folder),
                fix="The tokenizer files do not belong together; copy all of them from one model.",
            )


def _read_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    templates: dict[str, str] = {}
    for found in (_read_json(folder / "chat_template.json").get("chat_template"), config.get("chat_template")):
        if isinstance(found, str):
            templates["default"] = found
        elif isinstance(found, list):
            templates.update({entry["name"]: entry["template"] for entry in found})
        elif isinstance(found, dict):
            templates.update(found)
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = _read_text(folder / "chat_template.jinja")
    for extra in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[extra.stem] = _read_text(extra)
    return templates


def _token_text(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the file cannot be read: {error}", where=str(path)) from error


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
