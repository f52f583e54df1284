"""What both sides are given: model folders, adapters and rows, made on the spot. No paddle, no torch."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from safetensors.numpy import save_file

from finetune.chat.messages import Conversation
from finetune.chat.tokenizer import Tokenizer
from finetune.model.adapter_config import peft_config
from finetune.model.adapters import LoraSettings
from finetune.recipe.schema import Source
from finetune.rows.datafiles import find_files
from finetune.rows.dataset import build_dataset
from finetune.rows.formats import detect_format, parse_row
from finetune.rows.sources import read_blocks, rows_of
from tests.tiny import Shape, tiny_config, tiny_tokenizer, tiny_weights, write_json

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
DATA = {
    "sft": (SHARED / "datasets" / "alpaca_en_demo.json", ROOT / "data" / "quickstart" / "train.jsonl"),
    "dpo": (SHARED / "datasets" / "dpo_en_demo.json", ROOT / "data" / "quickstart" / "preferences.jsonl"),
}
QWEN2_05B = Shape(
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=32_768,
)
SHAPES = {
    "tiny": Shape(hidden_size=64, intermediate_size=128, num_hidden_layers=2, max_position_embeddings=32_768),
    "6l": replace(QWEN2_05B, num_hidden_layers=6),
    "24l": QWEN2_05B,
}
# For the preparation of rows, where only the tokenizer counts.
SMALLEST = replace(SHAPES["tiny"], vocab_size=QWEN2_05B.vocab_size)
LORA = LoraSettings(rank=16, alpha=32.0)
MAX_LENGTH = 1024
_EMBEDDING_SCALE = 0.05  # tiny_weights spreads logits for tests; a base model's first loss is near ln(vocabulary)


# -- models ----------------------------------------------------------------------------------------------------


def linear_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each projection of a layer."""
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    kv = hidden // shape.num_attention_heads * shape.num_key_value_heads
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, ffn),
        "mlp.up_proj": (hidden, ffn),
        "mlp.down_proj": (ffn, hidden),
    }


def make_model(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """A Hugging Face folder of this shape with random float32 weights, tied, and a tokenizer.

    The tokenizer is Qwen2's if the vocabulary has room for it and it is at hand, else the tests' tiny one.
    """

    def fill(partial: Path) -> None:
        write_json(partial / "config.json", tiny_config(shape) | {"bos_token_id": None, "eos_token_id": None})
        weights = tiny_weights(shape, seed=seed)
        weights["model.embed_tokens.weight"] *= np.float32(_EMBEDDING_SCALE)
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        _write_tokenizer(partial, shape)

    return _whole(folder, fill)


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    found = SHARED / "qwen2-tokenizer"
    if shape.vocab_size < QWEN2_05B.vocab_size or not found.is_dir():
        tiny_tokenizer(folder)
        return
    for path in found.iterdir():
        shutil.copyfile(path, folder / path.name)


def make_adapter(folder: Path, base: Path, shape: Shape, settings: LoraSettings = LORA, seed: int = 1) -> Path:
    """A fresh PEFT adapter on every projection: A random, B zero, so that both sides start from the same numbers."""

    def fill(partial: Path) -> None:
        chance = np.random.default_rng(seed)
        tensors = {}
        for layer in range(shape.num_hidden_layers):
            for name, (inputs, outputs) in linear_sizes(shape).items():
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                a = chance.uniform(-1, 1, (settings.rank, inputs)) * inputs**-0.5
                tensors[f"{prefix}.lora_A.weight"] = a.astype(np.float32)
                tensors[f"{prefix}.lora_B.weight"] = np.zeros((outputs, settings.rank), np.float32)
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        targets = [name.rpartition(".")[2] for name in linear_sizes(shape)]
        write_json(partial / "adapter_config.json", peft_config(settings, str(base), targets))

    return _whole(folder, fill)


def _whole(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Make a folder once; one that was only half made is made again."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        partial.rename(folder)
    return folder


# -- rows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Whole steps of `batch_size` rows.

    Attributes:
        source: The data file they come from.
        path: JSONL file with rows of like length in one batch and the batches in random order, which is what
            transformers' `group_by_length` is for: who pads, pads least so.
        tokens: Tokens of each row that are not padding, up to the last one trained on; of a pair, the prompt once and
            both responses.
        targets: Supervised tokens of each row.
        lengths: Token counts of the sequences of each row: [length], or [prompt, chosen, rejected].
    """

    source: str
    path: Path
    tokens: list[int]
    targets: list[int]
    lengths: list[list[int]]


def data_file(method: str) -> Path:
    """The shared data set if it is at hand, else the project's own."""
    return next(path for path in DATA[method] if path.exists())


def load_rows(method: str) -> list[dict]:
    """All rows in the forms that both sides read: {"messages"}, or {"prompt", "chosen", "rejected"} with one answer."""
    rows, path = [], data_file(method)
    files = find_files(Source(path=str(path)))
    blocks = [(file.name, block) for file in files for block in read_blocks(file)]
    named = [(f"{file}:{number}", row) for file, block in blocks for number, row in rows_of(block, file)]
    for name, row in named:
        parsed = parse_row(row, detect_format(row, name), name)
        if isinstance(parsed, Conversation):
            rows.append({"messages": parsed.messages})
        elif len(parsed.chosen) == len(parsed.rejected) == 1:
            answers = {"chosen": parsed.chosen[0]["content"], "rejected": parsed.rejected[0]["content"]}
            rows.append({"prompt": parsed.prompt.messages, **answers})
    return rows


def make_rows(folder: Path, method: str, tokenizer: Tokenizer, *, steps: int, batch_size: int, seed: int = 0) -> Rows:
    """Draw rows that fit into MAX_LENGTH, so that nothing is cut, and write them."""
    rows = load_rows(method)
    random.Random(seed).shuffle(rows)
    lengths = _lengths(write_jsonl(folder / "all.jsonl", rows), method, tokenizer)
    fitting = [i for i, parts in enumerate(lengths) if parts and _longest(parts) < MAX_LENGTH]
    count = steps * batch_size
    if not fitting:
        raise ValueError(f"{data_file(method)} has no row of fewer than {MAX_LENGTH} tokens")
    chosen = [fitting[i % len(fitting)] for i in range(count)]
    order = grouped_by_length(chosen, [sum(parts[:-1]) for parts in lengths], batch_size, seed)
    return Rows(
        source=data_file(method).name,
        path=write_jsonl(folder / "rows.jsonl", [rows[i] for i in order]),
        tokens=[sum(lengths[i][:-1]) for i in order],
        targets=[lengths[i][-1] for i in order],
        lengths=[lengths[i][:-1] for i in order],
    )


def grouped_by_length(rows: list[int], lengths: list[int], batch_size: int, seed: int) -> list[int]:
    """Put rows of like length into one batch, and the batches in random order."""
    ordered = sorted(rows, key=lambda i: lengths[i])
    batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    random.Random(seed).shuffle(batches)
    return [i for batch in batches for i in batch]


def _longest(parts: list[int]) -> int:
    sequences = parts[:-1]
    return sequences[0] + max(sequences[1:], default=0)


def _lengths(path: Path, method: str, tokenizer: Tokenizer) -> list[list[int]]:
    """Of each row the tokens of its sequences, then its supervised tokens; empty where nothing is trained on."""
    data = SimpleNamespace(max_length=2**20, overlong="truncate", train_on="last_response")
    dataset, _ = build_dataset([Source(path=str(path))], tokenizer, data=data, method=method)
    found: dict[int, list[int]] = {}
    for example in dataset:
        row = int(example.source.rpartition(":")[2]) - 1
        if method == "sft":
            found[row] = [_end(example.labels), int((example.labels != -100).sum())]
        else:
            prompt = len(example.prompt_ids)
            sides = [_end(side.labels) - prompt for side in (example.chosen, example.rejected)]
            found[row] = [prompt, *sides, sum(sides)]
    return [found.get(i, []) for i in range(max(found, default=-1) + 1)]


def _end(labels: np.ndarray) -> int:
    """Tokens up to the last one trained on. Behind it the template writes a newline, which TRL leaves out."""
    return int(np.flatnonzero(labels != -100)[-1]) + 1


def write_jsonl(path: Path, rows: Iterable[dict]) -> Path:
    """One JSON object a line; the file appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(partial, path)
    return path


def numbered_rows(path: Path, count: int) -> Path:
    """`count` different conversations: the SFT rows over and over, each with its number in the question."""
    rows = load_rows("sft")

    def numbered() -> Iterable[dict]:
        for number in range(count):
            first, *others = rows[number % len(rows)]["messages"]
            yield {"messages": [first | {"content": f"{number}. {first['content']}"}, *others]}

    return write_jsonl(path, numbered())
