"""Rendering, tokenization and supervised tokens against transformers, on the real Qwen2 vocabulary.

Needs the reference venv (`make parity` sets FINETUNE_REFERENCE_PYTHON to its python) and ../shared.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from finetune.chat.example import IGNORE
from finetune.chat.render import prompt_ids
from finetune.chat.tokenizer import Tokenizer
from finetune.rows.datafiles import DataFile
from finetune.rows.formats import parse_row
from tests.chat.cases import PLAIN, TOOLS
from tests.chat.encoding import encode_conversation, encode_preference
from tests.rows.reading import read_file

REPO = Path(__file__).resolve().parents[2]
SHARED = REPO.parent / "shared"
PYTHON = os.environ.get("FINETUNE_REFERENCE_PYTHON")
QWEN25 = REPO / "tests/chat/templates/qwen2.5.jinja"

pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="FINETUNE_REFERENCE_PYTHON is not set (see `make parity`)"),
    pytest.mark.skipif(not (SHARED / "qwen2-tokenizer").is_dir(), reason="../shared is not there"),
]


def cases(knows_tools: bool) -> dict[str, tuple[list[dict], list | None]]:
    plain = {name: (messages, None) for name, messages in PLAIN.items()}
    return plain | TOOLS if knows_tools else plain


@pytest.fixture(scope="module", params=["qwen2", "qwen2.5", "qwen2 saved by us"])
def compared(request, tmp_path_factory):
    """(our tokenizer, rows of the reference by name)."""
    work = tmp_path_factory.mktemp("chat")
    folder, template = SHARED / "qwen2-tokenizer", "-"
    tokenizer = Tokenizer.from_folder(folder)
    if request.param == "qwen2 saved by us":
        folder = work / "saved"
        tokenizer.save(folder)
    if request.param == "qwen2.5":
        template = str(QWEN25)
        tokenizer = Tokenizer(
            tokenizer.backend, special_tokens=tokenizer.special_tokens, templates={"default": QWEN25.read_text()}
        )
    lines = [
        json.dumps({"name": name, "messages": messages, "tools": tools})
        for name, (messages, tools) in cases(request.param == "qwen2.5").items()
    ]
    (work / "cases.jsonl").write_text("\n".join(lines), encoding="utf-8")
    script = Path(__file__).with_name("ref_chat.py")
    command = [PYTHON, script, folder, template, SHARED / "datasets", work / "cases.jsonl", work / "out.jsonl"]
    done = subprocess.run([str(part) for part in command], timeout=280, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with (work / "out.jsonl").open(encoding="utf-8") as file:
        reference = {row["name"]: row for row in map(json.loads, file)}
    return tokenizer, reference


def ours(tokenizer: Tokenizer):
    """(name, example, conversation) of every row, through our readers."""
    for name, file in (("alpaca", "alpaca_en_demo.json"), ("glaive", "glaive_toolcall_en_demo.json")):
        for number, (row, source) in enumerate(read_file(DataFile(name, SHARED / "datasets" / file)), 1):
            conversation = parse_row(row, "auto", source)
            yield f"{name}:{number}", encode_conversation(tokenizer, conversation), conversation
    for number, (row, source) in enumerate(read_file(DataFile("dpo", SHARED / "datasets/dpo_en_demo.json")), 1):
        pair = encode_preference(tokenizer, parse_row(row, "auto", source))
        yield f"dpo:{number}:chosen", pair.chosen, None
        yield f"dpo:{number}:rejected", pair.rejected, None
    for name, (messages, tools) in cases("tool_calls" in tokenizer.chat_template).items():
        conversation = parse_row({"messages": messages, "tools": tools}, "messages", name)
        yield name, encode_conversation(tokenizer, conversation), conversation


def test_ids_and_supervised_tokens_equal_transformers(compared, record_property):
    tokenizer, reference = compared
    wrong_ids, wrong_masks, wrong_prompts, names = [], [], [], set()
    for name, example, conversation in ours(tokenizer):
        names.add(name)
        row = reference[name]
        if example.input_ids.tolist() != row["ids"]:
            wrong_ids.append(name)
        elif (example.labels != IGNORE).astype(int).tolist() != row["mask"]:
            wrong_masks.append(name)
        if conversation is not None and prompt_ids(tokenizer, conversation) != row["prompted"]:
            wrong_prompts.append(name)
    record_property("rows", len(names))
    print(f"\n{len(names)} rows compared: {len(wrong_ids)} differ in ids, {len(wrong_masks)} in supervised tokens")
    assert names == set(reference)
    assert (wrong_ids, wrong_masks, wrong_prompts) == ([], [], [])


def test_decoding_equals_transformers_text(compared):
    tokenizer, reference = compared
    for name, row in reference.items():
        if name not in ("decomposed", "compatibility"):  # NFC is not undone
            assert tokenizer.decode(row["ids"]) == row["text"], name
