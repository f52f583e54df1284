"""Rows of every form to prompts. No paddle."""

from __future__ import annotations

import json

import pytest

from finetune.chat.tokenizer import Tokenizer
from finetune.errors import ArgumentError, DataError
from finetune.infer.prompts import MAX_FAULTS, PromptReader
from tests.chat.test_lost import tokenizer_with
from tests.tiny import CHATML

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


ASSISTANT = "<|im_start|>assistant\n"
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder):
    return Tokenizer.from_folder(tiny_tokenizer_folder)


@pytest.fixture(scope="module")
def reader(tokenizer):
    return PromptReader(tokenizer, context=512)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "Hi"}, SYSTEM + turn("user", "Hi")),
        ({"prompt": "Hi", "system": "Be brief."}, turn("system", "Be brief.") + turn("user", "Hi")),
        ({"prompt": [USER]}, SYSTEM + turn("user", "Hi")),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, SYSTEM + turn("user", "Hi")),
        ({"messages": [USER, ANSWER]}, SYSTEM + turn("user", "Hi")),
        (
            {"messages": [USER, ANSWER, {"role": "user", "content": "More"}]},
            SYSTEM + turn("user", "Hi") + turn("assistant", "Hello") + turn("user", "More"),
        ),
        ({"instruction": "Add", "input": "1 2"}, SYSTEM + turn("user", "Add\n1 2")),
        ({"instruction": "Add", "output": "3"}, SYSTEM + turn("user", "Add")),
        ({"instruction": "Add", "chosen": "a", "rejected": "b"}, SYSTEM + turn("user", "Add")),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x"}]},
            SYSTEM + turn("user", "Hi"),
        ),
    ],
)
def test_a_row_becomes_what_stands_before_its_answer(reader, tokenizer, row, text):
    prompt = reader.read(row, "f:1")
    assert tokenizer.decode(prompt.ids) == text + ASSISTANT
    assert prompt.shown == (row["prompt"] if isinstance(row.get("prompt"), str) else prompt.shown)


def test_messages_are_shown_without_our_own_keys(reader):
    prompt = reader.read({"messages": [USER, {**ANSWER, "train": False}, USER]}, "f:1")
    assert prompt.shown == [USER, ANSWER, USER]


def test_system_is_for_rows_that_have_none(tokenizer):
    reader = PromptReader(tokenizer, 512, system="Short.")
    assert tokenizer.decode(reader.read({"prompt": "Hi"}, "f:1").ids).startswith(turn("system", "Short."))
    own = {"messages": [{"role": "system", "content": "Mine."}, USER]}
    assert tokenizer.decode(reader.read(own, "f:1").ids).startswith(turn("system", "Mine."))


def test_raw_takes_the_text_as_it_is(tokenizer):
    reader = PromptReader(tokenizer, 512, raw=True)
    assert tokenizer.decode(reader.read({"prompt": "a <|im_end|>\n"}, "f:1").ids) == "a <|im_end|>\n"
    with pytest.raises(DataError, match="key prompt"):
        reader.read({"messages": [USER]}, "f:1")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([], "not an object"),
        ({"id": "x"}, "no known form"),
        ({"text": "x"}, "nobody asks"),
        ({"prompt": 3}, "key prompt"),
        ({"prompt": []}, "messages"),
        ({"messages": [ANSWER]}, "no message to answer"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "Did you mean user?"),
        ({"prompt": "word " * 600}, "512"),
        ({"prompt": "\ud800"}, "half of a character pair"),
    ],
)
def test_a_bad_row_is_named(reader, row, words):
    with pytest.raises(DataError, match=words) as caught:
        reader.read(row, "rows.jsonl:7")
    assert "rows.jsonl:7" in str(caught.value)


def test_every_bad_line_is_named_before_any_is_answered(reader, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "ok"}\n\n{"prompt": \n{"prompt": 1}\n\xff\xfe\n')
    with pytest.raises(DataError) as caught:
        reader.check(path)
    assert [fault.where.removeprefix(f"{path}:") for fault in caught.value.faults] == ["3", "4, key prompt", "5"]


def test_many_bad_lines_are_counted(reader, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n" * (MAX_FAULTS + 5))
    with pytest.raises(DataError, match="and 5 more bad lines") as caught:
        reader.check(path)
    assert len(caught.value.faults) == MAX_FAULTS + 1


def test_rows_are_read_in_order(reader, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(i)}) + "\n" for i in range(5)))
    assert reader.check(path) == 5
    assert [prompt.shown for prompt in reader.file(path)] == list("01234")


def test_files_that_cannot_be_read(reader, tmp_path):
    with pytest.raises(ArgumentError, match="cannot be read"):
        reader.check(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        reader.check(tmp_path / "empty.jsonl")


def test_a_raw_prompt_begins_with_the_bos_that_the_tokenizer_puts_before_plain_text_and_a_chat_does_not():
    bos = tokenizer_with(CHATML, bos=True)
    first = bos.convert_tokens_to_ids("<s>")
    raw = PromptReader(bos, context=512, raw=True).read({"prompt": "Hi"}, "f:1").ids
    assert raw == [first, *bos.encode("Hi", add_special_tokens=False)]
    assert first not in PromptReader(bos, context=512).read({"prompt": "Hi"}, "f:1").ids


@pytest.mark.parametrize(
    "row",
    [
        {"query": "Hi"},
        {"query": "Hi", "response": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {"conversations": [USER, ANSWER]},
        {"query": "Hi", "response": "Hello", "rejected_response": "No"},
        {"messages": [USER, ANSWER], "rejected_response": "No"},
    ],
)
def test_rows_of_newer_forms(reader, row):
    assert reader.tokenizer.decode(reader.read(row, "f:1").ids) == SYSTEM + turn("user", "Hi") + ASSISTANT
