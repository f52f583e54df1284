"""Keys that no form reads: those that would change what a row says are errors, the others are told of."""

from __future__ import annotations

import pytest

from finetune.errors import DataError
from finetune.rows.formats import FORMS
from finetune.rows.unread import unread_keys
from tests.chat.cases import said
from tests.rows.test_dataset import build, chat, lines, pair

SAID = said("q", "a")
ROWS = {
    "messages": {"messages": SAID},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "output": "a"},
    "query_response": {"query": "q", "response": "a"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "text": {"text": "a"},
    "preference": pair(),
}


def unread(name: str, **keys) -> str:
    return unread_keys({**ROWS[name], **keys}, FORMS[name], "f:1")


@pytest.mark.parametrize("name", list(FORMS))
def test_every_form_tells_of_the_keys_it_does_not_read(name):
    assert unread(name) == ""
    assert unread(name, id=7, note=None, empty="", none=[], score=0.0) == "id, score"
    assert unread(name, **{f"k{i}": "x" for i in range(9)}) == "k0, k1, k2, k3, k4, k5 and 3 more"
    assert unread(name, images=[], image=None, label=True, kto_tag=True, weight=2) == "label, kto_tag, weight"


@pytest.mark.parametrize("name", list(FORMS))
@pytest.mark.parametrize("key", ["images", "videos", "audios", "image", "video", "audio"])
def test_rows_about_what_is_no_text_are_errors(name, key):
    with pytest.raises(DataError, match=f"f:1, key {key}: the models here see text only"):
        unread(name, **{key: ["a.png"]})


@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize("value", [False, "False", "false"])
def test_answers_that_are_not_wanted_are_errors(key, value):
    for name in ROWS.keys() - {"text", "preference"}:
        with pytest.raises(DataError, match=f"f:1, key {key}: false marks an answer that is not wanted.*pair them up"):
            unread(name, **{key: value})
        assert unread(name, **{key: 0}) == key  # a class of something
    assert unread("text", **{key: value}) == unread("preference", **{key: value}) == key


@pytest.mark.parametrize("key", ["train", "loss", "training", "weight"])
@pytest.mark.parametrize("value", [False, 0, 0.0])
def test_rows_that_say_not_to_train_on_them_are_errors(key, value):
    for name in ROWS:
        with pytest.raises(DataError, match=f"f:1, key {key}: it says that the row is not to be trained on"):
            unread(name, **{key: value})


def test_keys_are_told_of_once_with_their_rows(tokenizer, write):
    rows = [{**chat("q", "a"), "id": i, **({"{x}": 1} if i == 2 else {})} for i in range(8)]
    path = write("a.jsonl", lines(chat("q", "a"), *rows))
    _, report = build(tokenizer, path)
    some = ", ".join(f"{path}:{line}" for line in (2, 3, 5, 6, 7))
    assert report.notes == [
        f"7 rows with keys that nothing reads (id): {some} and 2 more.",
        f"1 row with keys that nothing reads (id, {{x}}): {path}:4.",
    ]


def test_rows_that_each_have_other_keys_are_a_few_lines(tokenizer, write):
    path = write("a.jsonl", lines(*({**chat("q", "a"), f"k{i}": i} for i in range(20))))
    notes = build(tokenizer, path)[1].notes
    assert len(notes) == 5
    assert notes[4].startswith(f"16 rows with other keys that nothing reads: {path}:5, ")


def test_columns_that_are_mapped_are_read(tokenizer, write):
    from tests.chat.conftest import From

    path = write("a.jsonl", lines({"question": "q", "answer": "a", "id": 1}))
    _, report = build(tokenizer, From(path, columns={"instruction": "question", "output": "answer"}))
    assert report.notes == [f"1 row with keys that nothing reads (id): {path}:1."]


def test_an_answer_that_is_not_wanted_stops_a_run_with_its_row(tokenizer, write):
    path = write("a.csv", "prompt,completion,label\nq,a,True\nq,b,False\n")
    with pytest.raises(DataError, match="a.csv:2, key label: false marks"):
        build(tokenizer, path)


def test_empty_answers_are_told_of(tokenizer, write):
    path = write(
        "a.jsonl",
        lines(
            chat("q", ""),
            chat("q", "a", "p", " \n"),
            chat("q", "a"),
            {"messages": [SAID[0], {"role": "assistant", "content": "", "train": False}, *SAID]},
        ),
    )
    assert build(tokenizer, path)[1].notes == [
        f"2 rows with an empty answer, of which the end alone is trained on: {path}:1, {path}:2."
    ]
    plain = write("p.jsonl", lines({"prompt": "q", "completion": ""}, {"prompt": "", "completion": "a"}))
    assert build(tokenizer, plain)[1].notes == [
        f"1 row with an empty answer, of which the end alone is trained on: {plain}:1."
    ]


def test_a_prompt_with_a_picture_is_not_answered_as_if_it_had_none():
    from finetune.infer.prompts import to_conversation

    for row in ({"prompt": "what is it?"}, {"messages": SAID}):
        with pytest.raises(DataError, match="f:1, key images: the models here see text only"):
            to_conversation({**row, "images": ["a.png"]}, "f:1")
    assert to_conversation({"messages": SAID, "label": False}, "f:1").messages == SAID[:1]
