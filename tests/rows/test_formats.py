from __future__ import annotations

import json
import re

import pytest
import yaml

from finetune.chat.messages import Conversation, PlainText, Preference
from finetune.errors import DataError
from finetune.rows.formats import FORMS, detect_format, parse_row
from finetune.rows.turns import MASK_KEYS
from tests.chat.cases import WEATHER, said

SAID = said("q", "a")


def messages(row: dict, format: str = "auto") -> list[dict]:
    return parse_row(row, format, "f:1").messages


def turns(*pairs: tuple[str, str]) -> list[dict]:
    return [{"from": who, "value": value} for who, value in pairs]


QA = turns(("human", "q"), ("gpt", "a"))


# -- every form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"messages": SAID}, SAID),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, SAID[1]]}, SAID),
        ({"messages": [SAID[0], {**SAID[1], "tool_calls": None, "refusal": None}]}, SAID),
        ({"messages": [SAID[0], {**SAID[1], "tool_calls": []}]}, SAID),
        ({"messages": [SAID[0], {**SAID[1], "train": False}]}, [SAID[0], {**SAID[1], "train": False}]),
        ({"messages": [SAID[0], {**SAID[1], "weight": 0}]}, [SAID[0], {**SAID[1], "train": False}]),
        ({"messages": [SAID[0], {**SAID[1], "weight": 1}]}, [SAID[0], {**SAID[1], "train": True}]),
        ({"instruction": "q", "output": "a"}, SAID),
        ({"instruction": "q", "input": "", "output": "a", "system": "", "history": []}, SAID),
        ({"instruction": "q", "input": None, "output": "a", "system": None, "history": None, "id": 7}, SAID),
        ({"instruction": "q", "input": "i", "output": "a", "system": "S"}, said("q\ni", "a", system="S")),
        ({"instruction": "", "input": "i", "output": ""}, said("i", "")),
        ({"instruction": "q2", "output": "a2", "history": [["q", "a"]]}, said("q", "a", "q2", "a2")),
        ({"conversations": QA}, SAID),
        ({"conversations": QA, "system": "S", "tools": ""}, said("q", "a", system="S")),
        ({"conversations": turns(("system", "S"), ("user", "q"), ("assistant", "a"))}, said("q", "a", system="S")),
    ],
)
def test_conversations(row, expected):
    assert messages(row) == expected


def test_sharegpt_tools():
    call = '{"name": "f", "arguments": {"x": 1}}'
    row = {
        "conversations": turns(("human", "q"), ("function_call", call), ("observation", "r"), ("gpt", "a")),
        "tools": json.dumps([{"name": "f", "parameters": {}}]),
    }
    parsed = parse_row(row, "auto", "f:1")
    assert parsed.tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert parsed.messages[1:3] == [
        {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
            "raw": call,
        },
        {"role": "tool", "content": "r"},
    ]


@pytest.mark.parametrize(
    "who, said_key", [("from", "value"), ("role", "content"), ("from", "content"), ("role", "value")]
)
def test_a_turn_may_mix_the_keys_and_roles_of_both_kinds(who, said_key):
    def chat(*pairs: tuple[str, str]) -> list[dict]:
        return messages({"messages": [{who: role, said_key: text} for role, text in pairs]})

    assert chat(("human", "q"), ("gpt", "a")) == chat(("user", "q"), ("assistant", "a")) == SAID
    for role in ("chatgpt", "bing", "bard"):  # as the exports of ShareGPT have them
        assert chat(("human", "q"), (role, "a")) == SAID
    call = '{"name": "f", "arguments": {"x": 1}}'
    swift = chat(("user", "q"), ("tool_call", call), ("tool_response", "r"), ("assistant", "a"))  # ms-swift's roles
    assert swift == chat(("human", "q"), ("function_call", call), ("observation", "r"), ("gpt", "a"))
    assert swift[1]["tool_calls"][0]["function"]["name"] == "f" and swift[2] == {"role": "tool", "content": "r"}
    with pytest.raises(DataError, match=rf"key messages.0..{who}: unknown role 'Human'"):
        chat(("Human", "q"), ("gpt", "a"))


def test_several_sharegpt_calls_and_arguments_as_text():
    value = '[{"name": "f", "arguments": "{\\"x\\": 1}"}, {"name": "g", "arguments": {}}]'
    calls = messages({"conversations": turns(("human", "q"), ("function_call", value))})[1]["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == [{"x": 1}, {}]


def test_openai_tool_calls():
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": null}'}}]
    row = {"messages": [SAID[0], {"role": "assistant", "content": None, "tool_calls": calls}], "tools": [WEATHER]}
    parsed = parse_row(row, "messages", "f:1")
    assert parsed.tools == [WEATHER]
    assert parsed.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": None}
    assert "content" not in parsed.messages[1]
    assert calls[0]["function"]["arguments"] == '{"x": null}'  # the row itself is not touched


USER, GOOD, BAD = SAID[0], {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {"prompt": [USER], "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"conversations": QA[:1], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
    ],
)
def test_preferences(row):
    assert detect_format(row) == "preference"
    pair = parse_row(row, "auto", "f:1")
    assert pair == Preference(Conversation([USER], None, "f:1"), [GOOD], [BAD], "f:1")


def test_preference_prompts_of_many_turns():
    prompt = said("q1", "a1", "q2", system="S")
    pair = parse_row({"chosen": [*prompt, GOOD], "rejected": [*prompt, BAD]}, "preference", "f:1")
    assert (pair.prompt.messages, pair.chosen, pair.rejected) == (prompt, [GOOD], [BAD])
    pair = parse_row({"prompt": "q", "system": "S", "chosen": "a", "rejected": "b"}, "preference", "f:1")
    assert pair.prompt.messages == said("q", system="S")


def test_equal_answers_still_have_a_prompt():
    pair = parse_row({"chosen": SAID, "rejected": SAID}, "preference", "f:1")
    assert (pair.prompt.messages, pair.chosen, pair.rejected) == (SAID[:1], SAID[1:], SAID[1:])


# -- forms of other tools ----------------------------------------------------------------------------------------

HH = "\n\nHuman: q\n\nAssistant: {}"


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "response": "a"},  # ms-swift
        {"query": "q", "response": "a", "system": "", "history": []},
        {"conversations": SAID},
        {"conversations": [SAID[0], QA[1]]},
        {"messages": QA},
        {"messages": [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a"}]},
    ],
)
def test_conversations_of_other_tools(row):
    assert messages(row) == SAID


def test_histories_and_system_messages():
    row = {"query": "q2", "response": "a2", "system": "S", "history": [["q", "a"]]}
    assert messages(row) == said("q", "a", "q2", "a2", system="S")
    assert messages({"messages": SAID, "system": "S"}) == said("q", "a", system="S")
    assert messages({"messages": said("q", "a", system="S"), "system": "S"}) == said("q", "a", system="S")
    developer = [{"role": "developer", "content": "S"}, *SAID]
    assert messages({"messages": developer}) == developer


def test_prompt_and_completion():
    assert parse_row({"prompt": "q", "completion": "a"}, "auto", "f:1") == PlainText("q", "a", "f:1")
    expected = Conversation(SAID, None, "f:1", given=1)
    for prompt in ("q", SAID[:1]):
        for completion in ("a", SAID[1:], SAID[1]):
            if not (isinstance(prompt, str) and isinstance(completion, str)):
                assert parse_row({"prompt": prompt, "completion": completion}, "auto", "f:1") == expected
    many = said("q1", "a1", "q2", "a2")
    parsed = parse_row({"prompt": many[:3], "completion": many[3:], "tools": [WEATHER]}, "auto", "f:1")
    assert parsed == Conversation(many, [WEATHER], "f:1", given=3)


def test_plain_text():
    assert parse_row({"text": "t"}, "auto", "f:1") == PlainText(None, "t", "f:1")
    # A column of this name beside another form's keys is that form's rendering (Stanford's alpaca).
    assert detect_format({"instruction": "q", "input": "", "output": "a", "text": "Below is"}) == "alpaca"


@pytest.mark.parametrize(
    "row",
    [
        # TRL, implicit prompt; UltraFeedback and Argilla, text and whole conversations, and messages beside
        {"chosen": SAID, "rejected": said("q", "b")},
        {"prompt": "q", "chosen": SAID, "rejected": said("q", "b"), "messages": SAID, "score_chosen": 8.0},
        # LLaMA-Factory
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {"conversations": QA[:1], "chosen": QA[1], "rejected": {"from": "gpt", "value": "b"}},
        # ms-swift
        {"messages": SAID, "rejected_response": "b"},
        {"messages": SAID, "rejected_messages": said("q", "b")},
        {"query": "q", "response": "a", "rejected_response": "b"},
        {"query": "q", "response": "a", "rejected_response": "b", "system": "", "history": []},
        # Anthropic's HH
        {"chosen": HH.format("a"), "rejected": HH.format("b")},
        {"prompt": "q", "chosen": SAID[1:], "rejected": [said("q", "b")[1]]},
        {"query": "q", "chosen": "a", "rejected": "b"},
        # OpenAI
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
    ],
)
def test_preferences_of_other_tools(row):
    assert detect_format(row) == "preference"
    assert parse_row(row, "auto", "f:1") == Preference(Conversation([USER], None, "f:1"), [GOOD], [BAD], "f:1")


def test_longer_preferences_of_other_tools():
    hh = "\n\nHuman: q1\n\nAssistant: a1\nsecond line\n\nHuman: q2\n\nAssistant: {}"
    pair = parse_row({"chosen": hh.format("a"), "rejected": hh.format("b")}, "auto", "f:1")
    assert pair.prompt.messages == said("q1", "a1\nsecond line", "q2")
    whole = said("q1", "a1", "q2", "a", system="S")
    pair = parse_row({"messages": whole, "rejected_response": "b"}, "auto", "f:1")
    assert (pair.prompt.messages, pair.chosen, pair.rejected) == (whole[:-1], [GOOD], [BAD])
    pair = parse_row({"messages": whole, "rejected_messages": [*whole[:-1], BAD]}, "auto", "f:1")
    assert (pair.prompt.messages, pair.chosen, pair.rejected) == (whole[:-1], [GOOD], [BAD])
    pair = parse_row({"system": "S", "chosen": SAID, "rejected": [USER, BAD]}, "auto", "f:1")
    assert pair.prompt.messages == said("q", system="S")


@pytest.mark.parametrize("name", list(FORMS))
def test_every_form_is_told_by_its_keys_and_nothing_else_is_in_its_way(name):
    for keys in FORMS[name].told_by:
        assert detect_format(dict.fromkeys(keys)) == name


# -- masks -------------------------------------------------------------------------------------------------------

NO, YES = {**GOOD, "train": False}, {**GOOD, "train": True}


@pytest.mark.parametrize("key, off, on", [(key, *v) for key in MASK_KEYS for v in ((False, True), (0, 1), (0.0, 1.0))])
def test_a_mask_means_the_same_by_every_name_in_every_form(key, off, on):
    for value, expected in ((off, NO), (on, YES), (None, GOOD)):
        openai, sharegpt = {**GOOD, key: value}, {**QA[1], key: value}
        for row in (
            {"messages": [USER, openai]},
            {"conversations": [USER, openai]},
            {"conversations": [QA[0], sharegpt]},
            {"prompt": [USER], "completion": [openai]},
            {"prompt": "q", "completion": [sharegpt]},
        ):
            assert messages(row) == [USER, expected], row
        for answer in (openai, [openai], sharegpt):
            pair = parse_row({"prompt": "q", "chosen": answer, "rejected": "b"}, "auto", "f:1")
            assert (pair.chosen, pair.rejected) == ([expected], [BAD])
        pair = parse_row({"chosen": [USER, openai], "rejected": [USER, BAD]}, "auto", "f:1")
        assert pair.chosen == [expected]
    with pytest.raises(DataError, match=rf"key messages\[0\].{key}: true on a message of role user"):
        messages({"messages": [{**USER, key: on}, GOOD]})
    assert messages({"messages": [{**USER, key: off}, GOOD]}) == [{**USER, "train": False}, GOOD]


@pytest.mark.parametrize(
    "key",
    "mask masked trainable ignore learn no_loss loss_mask is_masked noLoss train_on_turn Loss weights skip".split(),
)
def test_a_key_that_looks_like_a_mask_is_an_error(key):
    for row in ({"messages": [USER, {**GOOD, key: True}]}, {"conversations": [QA[0], {**QA[1], key: 0}]}):
        with pytest.raises(DataError, match=rf"\[1\].{key}: the key looks like a mask.*weight \(1 or 0\)"):
            parse_row(row, "auto", "f:1")


@pytest.mark.parametrize("key", ["id", "name", "weather", "trainer", "lossless", "blossom", "refusal", "timestamp"])
def test_other_keys_of_turns_are_kept(key):
    assert messages({"messages": [USER, {**GOOD, key: "x"}]})[1] == {**GOOD, key: "x"}
    assert messages({"conversations": [QA[0], {**QA[1], key: "x"}]})[1] == {**GOOD, key: "x"}


def test_masks_that_contradict_each_other():
    with pytest.raises(DataError, match="key messages.1..weight: it says true, but train says false. Keep one"):
        messages({"messages": [USER, {**GOOD, "train": False, "weight": 1}]})
    with pytest.raises(DataError, match="key prompt: a turn of the prompt is marked"):
        parse_row({"prompt": [USER, {**GOOD, "loss": True}, USER], "chosen": "a", "rejected": "b"}, "auto", "f:1")


# -- rows of no form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, mend",
    [
        (
            "question answer",
            "The nearest form is alpaca: {instruction, output}; add `columns: {instruction: question, output: answer}`",
        ),
        ("instruction response", "alpaca: {instruction, output}; add `columns: {output: response}`"),
        ("prompt response", "query_response: {query, response}; add `columns: {query: prompt}`"),
        ("prompt target", "prompt_completion: {prompt, completion}; add `columns: {completion: target}`"),
        ("dialogue", "messages: {messages}; add `columns: {messages: dialogue}`"),
        ("content", "text: {text}; add `columns: {text: content}`"),
        ("mesages", "messages: {messages}; add `columns: {messages: mesages}`"),
        ("prompt chosen worse", "preference: {chosen, rejected}; add `columns: {rejected: worse}`"),
        ("prompt", "prompt_completion: {prompt, completion}; it needs completion too"),
        ("id", "Known are preference: {chosen, rejected}; messages: {messages};"),
        ("article summary", "alpaca: {instruction, output}; add `columns: {instruction: article, output: summary}`"),
        (
            "instruction context response",
            "alpaca: {instruction, output}; add `columns: {output: response, input: context}`",
        ),
        ("system_prompt question response", "add `columns: {query: question, system: system_prompt}`"),
        ("prompt? completion#", 'add `columns: {prompt: "prompt?", completion: "completion#"}`'),
        ("inputs targets", "add `columns: {instruction: inputs, output: targets}`"),
        ("items", "messages: {messages}; add `columns: {messages: items}`"),
    ],
)
def test_a_row_of_no_form_is_told_the_nearest_one_and_what_mends_it(keys, mend):
    row = dict.fromkeys(keys.split(), "x")
    with pytest.raises(DataError, match="no known form") as caught:
        detect_format(row, "f:1")
    fix = caught.value.faults[0].fix
    assert mend in fix
    # The line does mend it.
    if line := re.search(r"`columns: {(.*?)}`", fix):
        columns = yaml.safe_load(f"{{{line[1]}}}")
        mapped = {key: value for key, value in row.items() if key not in columns.values()} | dict.fromkeys(columns)
        assert detect_format(mapped, "f:1", columns)


def test_columns_of_more_than_the_form_reads_are_told_which():
    columns = {"prompt": "instruction", "query": "input", "response": "output"}  # as LLaMA-Factory calls them
    with pytest.raises(DataError, match="form query_response does not read prompt. Give `columns` keys of one form"):
        detect_format(dict.fromkeys(columns, "x"), "f:1", columns)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]},
        {"prompt": "q", "answer": 2},
        {"train": [{"messages": SAID}], "test": []},
    ],
)
def test_a_column_of_another_kind_is_not_what_would_mend_a_row(row):
    with pytest.raises(DataError) as caught:
        detect_format(row, "f:1")
    assert "columns" not in caught.value.faults[0].fix


def test_a_preference_without_prompt_is_told_which_column_it_may_be():
    with pytest.raises(DataError, match="there is no prompt.*columns: {prompt: question}"):
        parse_row({"question": "q", "chosen": "a", "rejected": "b"}, "auto", "f:1")


# -- every wrong row ---------------------------------------------------------------------------------------------


def wrong(index: int, **changes) -> dict:
    """`messages` with one message changed; ... takes a key out."""
    changed = [dict(message) for message in SAID]
    changed[index] = {k: v for k, v in {**changed[index], **changes}.items() if v is not ...}
    return {"messages": changed}


@pytest.mark.parametrize(
    "row, place, message",
    [
        ({"txet_": 1, "id": 7}, "f:1", "the row has no known form; its keys are: txet_, id"),
        ({}, "f:1", "its keys are: none"),
        ({"messages": []}, "key messages", "the list is empty"),
        ({"messages": "hi"}, "key messages", 'found a text ("hi")'),
        ({"messages": None}, "key messages", "found null"),
        ({"messages": ["hi"]}, "key messages[0]", 'found a text ("hi")'),
        (wrong(1, role="asistant"), "key messages[1].role", "unknown role 'asistant'. Did you mean assistant?"),
        (wrong(1, role=["user"]), "key messages[1].role", "unknown role ['user']"),
        (wrong(1, role=...), "key messages[1].role", "the key is missing; the turn has content"),
        (wrong(1, content=...), "key messages[1].content", "the key is missing; the turn has role"),
        (wrong(1, content=None), "key messages[1].content", "found null"),
        (wrong(1, content=5), "key messages[1].content", "found a number (5)"),
        (wrong(0, content=[{"type": "image_url"}]), "key messages[0].content[0]", "a part of type 'image_url'"),
        (wrong(1, train="yes"), "key messages[1].train", 'found a text ("yes")'),
        (wrong(1, train=2), "key messages[1].train", "found a number (2)"),
        (wrong(0, train=True), "key messages[0].train", "true on a message of role user"),
        (wrong(1, weight=0.5), "key messages[1].weight", "found 0.5, a share of the loss"),
        (wrong(0, tool_calls=[{}]), "key messages[0].tool_calls", "found on a message of role user"),
        (wrong(1, tool_calls={}), "key messages[1].tool_calls", "found an object ({})"),
        (wrong(1, tool_calls=[{}]), "key messages[1].tool_calls[0]", "A call is"),
        (wrong(1, tool_calls=[{"name": "f", "arguments": "{"}]), "tool_calls[0].arguments", "is not JSON"),
        (wrong(1, tool_calls=[{"name": "f", "arguments": "[]"}]), "tool_calls[0].arguments", "found a list ([])"),
        (wrong(1, tool_calls=[{"name": "f"}]), "tool_calls[0].arguments", "found null"),
        (wrong(1, function_call={"name": "f"}), "key messages[1].function_call", "Use tool_calls"),
        ({**wrong(1), "tools": "{"}, "key tools", "is not JSON"),
        ({**wrong(1), "tools": {"a": 1}}, "key tools", "found an object"),
        ({**wrong(1), "tools": ["f"]}, "key tools", "found a list"),
        ({"instruction": "q"}, "f:1", "The nearest form is alpaca: {instruction, output}; it needs output too"),
        ({"instruction": None, "output": "a"}, "key instruction", "found null"),
        ({"instruction": "q", "output": ["a"]}, "key output", "found a list"),
        ({"instruction": "q", "input": 3, "output": "a"}, "key input", "found a number (3)"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "key history[0]", "a pair of texts"),
        ({"instruction": "q", "output": "a", "history": "q"}, "key history", "a list of [prompt, response] pairs"),
        ({"conversations": [{"from": "human"}]}, "key conversations[0].value", "the key is missing; the turn has from"),
        ({"conversations": [{"value": "q"}]}, "key conversations[0].role", "the key is missing"),
        ({"conversations": turns(("gtp", "a"))}, "key conversations[0].from", "Did you mean gpt?"),
        ({"conversations": turns(("human", None))}, "key conversations[0].value", "found null"),
        (
            {"conversations": turns(("function_call", "f()"))},
            "key conversations[0].value",
            "found 'f()', which is not JSON",
        ),
        ({"conversations": turns(("function_call", "3"))}, "key conversations[0].value", "found a number (3)"),
        ({"conversations": turns(("system", "S")), "system": "T"}, "key system", "Keep one of the two"),
        ({"conversations": [{**QA[0], "train": True}]}, "conversations[0].train", "role user"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "key rejected", "found null"),
        ({"input": {}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}, "key input.messages", "found null"),
        ({"prompt": 1, "chosen": "a", "rejected": "b"}, "key prompt", "found a number (1)"),
        ({"prompt": "q", "chosen": 1, "rejected": "b"}, "key chosen", "found a number (1)"),
        ({"prompt": SAID, "chosen": "a", "rejected": "b"}, "key prompt", "ends with a message of role assistant"),
        ({"prompt": [USER], "chosen": [USER], "rejected": "b"}, "key chosen", "behind the prompt stands user"),
        ({"chosen": "a", "rejected": "b"}, "key chosen", "there is no prompt"),
        ({"messages": SAID[1:], "rejected_response": "b"}, "key messages", "ends with a message of role nobody"),
        ({"prompt": "q", "completion": "a", "tools": [WEATHER]}, "key tools", "Write messages instead of texts"),
        ({"prompt": SAID, "completion": "a"}, "key prompt", "ends with a message of role assistant"),
        ({"prompt": SAID[:1], "completion": SAID[:1]}, "key completion", "behind the prompt stands user"),
        ({"query": 1, "response": "a"}, "key query", "found a number (1)"),
        ({"text": None}, "key text", "found null"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "other"}, BAD]}, "key chosen", "there is no prompt"),
    ],
)
def test_wrong_rows_name_row_key_and_fix(row, place, message):
    with pytest.raises(DataError) as caught:
        parse_row(row, "auto", "f:1")
    fault = caught.value.faults[0]
    assert fault.where.startswith("f:1") and place in fault.where
    assert message in str(fault)
    assert fault.fix


@pytest.mark.parametrize(
    "format, key", [("messages", "messages"), ("alpaca", "instruction"), ("sharegpt", "conversations")]
)
def test_named_format_wants_its_keys(format, key):
    with pytest.raises(DataError, match=f"key {key}: the key is missing; the row has text"):
        parse_row({"text": "x"}, format, "f:1")


@pytest.mark.parametrize("key", ["trian", "traning", "wieght", "los"])
def test_a_mistyped_mask_is_an_error(key):
    with pytest.raises(DataError, match=rf"\[1\].{key}: the key looks like a mask"):
        parse_row({"messages": [USER, {**GOOD, key: False}]}, "auto", "f:1")
    assert messages({"messages": [USER, {**GOOD, "rating": 5}]})[1] == {**GOOD, "rating": 5}
