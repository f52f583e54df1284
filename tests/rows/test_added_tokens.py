"""Tokens added to the tokenizer while the model's embeddings were not resized, at every place where one can come in."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from tests.runs import finetune
from tests.tiny import tiny_model

ADDED = "<|fact_399|>"  # the last of 400, behind 403 others; the model has 416 embeddings
SIZES = r"has id 802, but the model has 416 embeddings and the tokenizer 803 tokens\. "
FAULT = re.compile(r"token '<\|fact_399\|>' " + SIZES + ".*resize_token_embeddings")


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> Path:
    folder = tiny_model(tmp_path_factory.mktemp("grown") / "base")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(f"<|fact_{number}|>", normalized=False) for number in range(400)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def recipe(folder: Path, model: Path, answer: str, **data: object) -> str:
    rows = [{"instruction": "What is it?", "output": "plain"}, {"instruction": "And this?", "output": answer}]
    if "prefer" in data:
        del data["prefer"]
        rows = [{"prompt": row["instruction"], "chosen": "no", "rejected": row["output"]} for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tree = {
        "method": "dpo" if "prompt" in rows[0] else "sft",
        "model": {"path": str(model)},
        "data": {"train": [{"path": str(folder / "rows.jsonl")}], "max_length": 64} | data,
        "training": {"max_steps": 1, "output_dir": str(folder / "run")},
    }
    (folder / "r.json").write_text(json.dumps(tree), encoding="utf-8")
    return str(folder / "r.json")


@pytest.mark.parametrize(
    "command", [["train"], ["train", "--dry-run"], ["preview"]], ids=["train", "dry run", "preview"]
)
@pytest.mark.parametrize("data", [{}, {"streaming": True}, {"prefer": 1}], ids=["sft", "streamed", "dpo"])
def test_a_row_is_named(command, data, grown, tmp_path, capfd):
    written = recipe(tmp_path, grown, f"It is {ADDED}.", **data)
    assert finetune(command[0], written, *command[1:]) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert FAULT.search(said) and "rows.jsonl:2" in said, said


def test_rows_without_one_train(grown, tmp_path):
    assert finetune("train", recipe(tmp_path, grown, "nothing new")) == 0


def test_a_prompt_is_named(grown, capfd):
    assert finetune("generate", str(grown), "--prompt", f"What is {ADDED}?", "--max-new-tokens", "2") == 2
    assert FAULT.search(" ".join(capfd.readouterr().err.split()))


@pytest.mark.parametrize("layout, code", [("hf", 0), ("gguf", 2)])
def test_export_says_it(layout, code, grown, tmp_path, capfd):
    assert finetune("export", str(grown), str(tmp_path / "out"), "--format", layout) == code
    captured = capfd.readouterr()
    assert FAULT.search(" ".join((captured.out + captured.err).split()))
