from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.chat.example import IGNORE
from finetune.chat.messages import Conversation
from finetune.chat.render import prompt_ids, render_conversation
from finetune.chat.template import TemplateFault
from finetune.chat.view import _MARKS, View
from finetune.errors import CheckpointError, DataError
from finetune.rows.formats import parse_row
from tests.chat.cases import PLAIN, TOOLS, WEATHER, said
from tests.chat.conftest import SHARED, byte_tokenizer, marked
from tests.chat.encoding import encode_conversation, encode_conversations, encode_preference
from tests.tiny import CHATML

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def conversation(messages: list[dict], tools: list | None = None) -> Conversation:
    return parse_row({"messages": messages, "tools": tools}, "messages", "f:1")


def shown(tokenizer, messages, train_on="responses", tools=None) -> str:
    return marked(tokenizer, encode_conversation(tokenizer, conversation(messages, tools), train_on))


# -- what is supervised ------------------------------------------------------------------------------------------


def test_content_and_end_token_without_header_and_newline(tokenizer):
    assert shown(tokenizer, said("q", "a")) == (
        SYSTEM + "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n"
    )


def test_labels_are_the_ids_not_shifted(tokenizer):
    example = encode_conversation(tokenizer, conversation(said("q", "a")))
    assert example.input_ids.dtype == example.labels.dtype == np.int32
    supervised = example.labels != IGNORE
    assert example.labels[supervised].tolist() == tokenizer.encode("a<|im_end|>")
    assert example.num_supervised == 2
    assert example.source == "f:1"


TWO = (
    "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n{}<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n{}"
)


@pytest.mark.parametrize(
    "train_on, flags, first, second",
    [
        ("responses", (None, None), "⟦a1<|im_end|>⟧\n", "⟦a2<|im_end|>⟧\n"),
        ("last_response", (None, None), "a1<|im_end|>\n", "⟦a2<|im_end|>⟧\n"),
        ("responses", (False, None), "a1<|im_end|>\n", "⟦a2<|im_end|>⟧\n"),
        ("responses", (None, False), "⟦a1<|im_end|>⟧\n", "a2<|im_end|>\n"),
        ("last_response", (True, None), "⟦a1<|im_end|>⟧\n", "⟦a2<|im_end|>⟧\n"),
        ("last_response", (True, False), "⟦a1<|im_end|>⟧\n", "a2<|im_end|>\n"),
        ("responses", (False, False), "a1<|im_end|>\n", "a2<|im_end|>\n"),
    ],
)
def test_turns_and_flags(tokenizer, train_on, flags, first, second):
    messages = said("q1", "a1", "q2", "a2")
    for message, flag in zip(messages[1::2], flags, strict=True):
        if flag is not None:
            message["train"] = flag
    assert shown(tokenizer, messages, train_on) == SYSTEM + TWO.format(first, second)


def test_all_is_every_token_but_messages_kept_out(tokenizer):
    messages = said("q1", "a1", "q2", "a2")
    whole = SYSTEM + TWO.format("a1<|im_end|>\n", "a2<|im_end|>\n")
    assert shown(tokenizer, messages, "all") == f"⟦{whole}⟧"
    messages[1]["train"] = False
    assert shown(tokenizer, messages, "all") == "⟦" + SYSTEM + TWO.format("⟧a1<|im_end|>⟦\n", "a2<|im_end|>\n⟧")
    messages = said("q1", "a1", "q2", "a2")
    messages[2]["train"] = False
    assert "⟦<|im_start|>assistant\na2<|im_end|>\n⟧" in shown(tokenizer, messages, "all")


@pytest.mark.parametrize(
    "answer", ["", " a ", "\na\n", "\n\n", "你好 😊", "<|im_end|>", "<|im_start|>assistant\nx<|im_end|>\n", "a\u0000b"]
)
def test_any_content_is_trained_on_whole(tokenizer, answer):
    assert shown(tokenizer, said("q", answer)).endswith(f"<|im_start|>assistant\n⟦{answer}<|im_end|>⟧\n")


def test_decomposed_characters_are_composed_once(tokenizer):
    assert shown(tokenizer, said("e\u0301", "cafe\u0301")).endswith("assistant\n⟦caf\u00e9<|im_end|>⟧\n")
    assert shown(tokenizer, said("q", "\u0301a")).endswith("assistant\n⟦\u0301a<|im_end|>⟧\n")


def test_a_token_across_the_border_is_supervised():
    # "\n\n" is one token: half header, half content. The model must produce its content half, so it is trained on.
    merged = byte_tokenizer(merges=[("Ċ", "Ċ")])
    assert shown(merged, said("q", "\na")).endswith("<|im_start|>assistant⟦\n\na<|im_end|>⟧\n")


def test_a_token_across_the_end_of_a_response_is_supervised():
    merged = byte_tokenizer(
        "{% for m in messages %}{{ '[' if m.role == 'user' }}{{ m.content }}{% endfor %}", [("!", "[")]
    )
    assert shown(merged, said("q", "a!", "r", "b")) == "[q⟦a![⟧r⟦b⟧"


def test_no_assistant_message_means_nothing_supervised(tokenizer):
    assert encode_conversation(tokenizer, conversation(said("q"))).num_supervised == 0


def test_conversation_that_begins_with_the_assistant(tokenizer, tooled):
    messages = [{"role": "assistant", "content": "Hello"}, *said("q", "a")]
    assert "<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n" in shown(tokenizer, messages)
    assert "<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n" in shown(tooled, messages)


def test_tool_calls_are_responses_and_results_are_not(tooled):
    messages, tools = TOOLS["parallel calls with content"]
    text = shown(tooled, messages, tools=tools)
    assert (
        "<|im_start|>assistant\n⟦I look.\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rom"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "n": 1.5}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\n20\n</tool_response>\n<tool_response>\n-3\n\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦\nDone<|im_end|>⟧\n"
    ) in text
    assert text.endswith(
        '<|im_start|>assistant\n⟦<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call><|im_end|>⟧\n'
    )


def sharegpt_call() -> Conversation:
    turns = [("human", "q"), ("function_call", '{"name":"f","arguments":{}}'), ("observation", "r"), ("gpt", "a")]
    row = {"conversations": [{"from": who, "value": value} for who, value in turns], "tools": json.dumps([WEATHER])}
    return parse_row(row, "sharegpt", "f:1")


def test_sharegpt_calls_follow_what_the_template_knows(tokenizer, tooled):
    plain = marked(tokenizer, encode_conversation(tokenizer, sharegpt_call()))
    assert '<|im_start|>assistant\n⟦{"name":"f","arguments":{}}<|im_end|>⟧\n<|im_start|>tool\nr<|im_end|>\n' in plain
    known = marked(tooled, encode_conversation(tooled, sharegpt_call()))
    assert '⟦<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>⟧' in known
    assert "get_weather" in known and "get_weather" not in plain


def test_openai_calls_need_a_template_that_knows_them(tokenizer):
    messages, tools = TOOLS["call"]
    with pytest.raises(DataError, match="f:1: the row has tool_calls, which .* does not render. Use a model whose"):
        encode_conversation(tokenizer, conversation(messages, tools))


# -- one tokenization --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_ids_are_those_of_the_whole_text(tokenizer, name):
    example = encode_conversation(tokenizer, conversation(PLAIN[name]))
    assert example.input_ids.tolist() == tokenizer.apply_chat_template(PLAIN[name])


def overlapping(tokenizer, rendered) -> list[bool]:
    """The definition, spelt out: a token is supervised when its characters overlap a response."""
    offsets = tokenizer.backend.encode(rendered.text, add_special_tokens=False).offsets
    return [any(start < b and end > a for a, b in rendered.spans) for start, end in offsets]


@given(
    st.lists(
        st.text(
            st.one_of(st.sampled_from("\n \u0301e😊\u00e9ab\u1161\u1112"), st.characters(exclude_categories=["Cs"]))
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(["responses", "last_response", "all"]),
)
@settings(max_examples=150, deadline=None)
def test_supervised_tokens_are_those_that_overlap_a_response(texts, train_on):
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ"), ("a", "b"), ("Ġ", "a"), ("e", "Ċ")])
    rendered = render_conversation(tokenizer, conversation(said(*texts)), train_on)
    example = encode_conversation(tokenizer, conversation(said(*texts)), train_on)
    assert (example.labels != IGNORE).tolist() == overlapping(tokenizer, rendered)


def view_of(tokenizer, messages) -> View:
    return View(tokenizer, messages, None, "f:1")


@given(st.lists(st.text(st.sampled_from("a \n\uf8c0é")), min_size=4, max_size=9))
@settings(max_examples=100, deadline=None)
def test_marks_find_what_prefixes_find(texts):
    tokenizer, messages = byte_tokenizer(), said(*texts)
    answers = list(range(1, len(messages), 2))
    by_prefixes = [view_of(tokenizer, messages).response(i) for i in answers]
    assert view_of(tokenizer, messages)._by_marks(answers) == by_prefixes
    assert view_of(tokenizer, messages).responses(answers) == by_prefixes


def test_marks_give_up_where_content_is_not_shown_as_it_is(tokenizer, tooled):
    trimming = byte_tokenizer(CHATML.replace("message['content']", "message['content'] | trim"))
    assert view_of(trimming, said("q", " a ", "r", "b"))._by_marks([1, 3]) is None
    assert shown(trimming, said("q", " a ", "r", "b")).count("⟦") == 2
    thinking = byte_tokenizer(CHATML.replace("+ message['content']", "+ (message['content'] or 'nothing')"))
    assert view_of(thinking, said("q", "a", "r", ""))._by_marks([1, 3]) is None
    assert "⟦nothing<|im_end|>⟧" in shown(thinking, said("q", "a", "r", ""))
    messages, _ = TOOLS["parallel calls with content"]
    assert view_of(tooled, messages)._by_marks([1, 4, 6]) is None
    every_mark = "".join(_MARKS)
    assert view_of(tokenizer, said("q", every_mark, "r", "b"))._by_marks([1, 3]) is None


def test_long_conversations_take_linear_time(tokenizer):
    began = time.monotonic()
    example = encode_conversation(tokenizer, conversation(said(*["x"] * 2000)))
    assert example.num_supervised == 2000
    assert time.monotonic() - began < 20  # half a second here; by prefixes alone it is more than half a minute


def test_batches_equal_single_rows(tokenizer):
    rows = [conversation(messages) for messages in PLAIN.values()]
    singles = [encode_conversation(tokenizer, row) for row in rows]
    for single, batched in zip(singles, encode_conversations(tokenizer, rows), strict=True):
        assert single.input_ids.tolist() == batched.input_ids.tolist()
        assert single.labels.tolist() == batched.labels.tolist()


def test_prompt_is_what_training_sees(tokenizer):
    messages = said("q1", "a1", "q2", "a2")
    ids = encode_conversation(tokenizer, conversation(messages)).input_ids.tolist()
    asked = prompt_ids(tokenizer, conversation(messages[:-1]))
    assert ids[: len(asked)] == asked
    assert tokenizer.decode(ids[len(asked) :]) == "a2<|im_end|>\n"
    with pytest.raises(DataError, match="f:1: the model's chat template refused"):
        prompt_ids(byte_tokenizer("{{ raise_exception('no') }}"), conversation(messages))


# -- templates and rows that do not work -------------------------------------------------------------------------


def test_template_that_refuses_names_the_row():
    picky = byte_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="f:1: the model's chat template refused the messages: roles must alternate"):
        encode_conversation(picky, conversation(said("q", "a")))


def test_template_that_rewrites_earlier_turns():
    rewriting = byte_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}{{ '' if loop.last else ' (earlier)' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(
        DataError, match="f:1: the chat template writes the .* differently once others follow.*last_response"
    ):
        encode_conversation(rewriting, conversation(said("q", "a", "q", "b")))


def test_template_without_generation_prompt():
    plain = byte_tokenizer(CHATML.split("{% if add_generation_prompt")[0])
    with pytest.raises(CheckpointError, match="ignores add_generation_prompt"):
        encode_conversation(plain, conversation(said("q", "a")))


def test_template_without_header_or_end_token():
    spaced = byte_tokenizer(
        "{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else m.content }}{% endfor %}"
    )
    assert shown(spaced, said("q", " a ", "r", "b")) == "[q]⟦ a ⟧[r]⟦b⟧"


def test_half_a_character_pair_is_named(tokenizer):
    with pytest.raises(DataError, match=r"f:1: the text holds half of a character pair \(\\ud83d alone\)"):
        encode_conversation(tokenizer, conversation(said("q", "\ud83d")))


def test_tokenizer_render_passes_the_template_fault_on(tokenizer):
    with pytest.raises(TemplateFault):
        tokenizer.render([{"role": "user"}])


# -- preferences -------------------------------------------------------------------------------------------------


def pair_of(tokenizer, **row):
    return encode_preference(tokenizer, parse_row(row, "preference", "f:1"))


def test_pair_shares_the_prompt_with_its_header(tokenizer):
    pair = pair_of(tokenizer, prompt=said("q1", "a1", "q2"), chosen="good", rejected="bad")
    prompt = SYSTEM + TWO.format("a1<|im_end|>\n", "")
    assert tokenizer.decode(pair.prompt_ids) == prompt
    assert tokenizer.decode(pair.prompt_ids[-pair.header_length :]) == "<|im_start|>assistant\n"
    assert marked(tokenizer, pair.chosen) == prompt + "⟦good<|im_end|>⟧\n"
    assert marked(tokenizer, pair.rejected) == prompt + "⟦bad<|im_end|>⟧\n"


def test_pair_side_equals_the_conversation_with_its_last_response(tokenizer):
    pair = pair_of(tokenizer, prompt=said("q1", "a1", "q2"), chosen="good", rejected="bad")
    whole = encode_conversation(tokenizer, conversation(said("q1", "a1", "q2", "good")), "last_response")
    assert pair.chosen.input_ids.tolist() == whole.input_ids.tolist()
    assert pair.chosen.labels.tolist() == whole.labels.tolist()


def test_shared_prompt_ends_before_a_token_across_the_border():
    merged = byte_tokenizer(merges=[("Ċ", "Ċ")])
    pair = pair_of(merged, prompt="q", chosen="\na", rejected="b")
    assert merged.decode(pair.prompt_ids).endswith("<|im_start|>assistant")
    shared = len(pair.prompt_ids)
    assert marked(merged, pair.chosen).endswith("assistant⟦\n\na<|im_end|>⟧\n")
    assert marked(merged, pair.rejected).endswith("assistant\n⟦b<|im_end|>⟧\n")
    assert pair.chosen.input_ids[:shared].tolist() == pair.rejected.input_ids[:shared].tolist()
    assert (pair.chosen.labels[:shared] == IGNORE).all() and (pair.rejected.labels[:shared] == IGNORE).all()


def test_answers_that_begin_alike_share_only_the_prompt(tokenizer):
    pair = pair_of(tokenizer, prompt="q", chosen="same and a", rejected="same and b")
    assert tokenizer.decode(pair.prompt_ids).endswith("<|im_start|>assistant\n")


def test_answers_of_several_messages(tooled):
    messages, tools = TOOLS["call"]
    pair = pair_of(tooled, prompt=messages[:1], chosen=messages[1:], rejected="I do not know.", tools=tools)
    text = marked(tooled, pair.chosen)
    assert text.count("⟦") == 2 and "⟦<tool_call>" in text and text.endswith("⟦20 °C<|im_end|>⟧\n")


@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "glaive_toolcall_en_demo.json", "dpo_en_demo.json"])
def test_real_rows_supervise_what_they_answer(real, name):
    path = SHARED / "datasets" / name
    if not path.is_file():
        pytest.skip("../shared is not there")
    for number, row in enumerate(json.loads(path.read_text(encoding="utf-8"))[:100]):
        parsed = parse_row(row, "auto", f"{name}:{number}")
        if name.startswith("dpo"):
            pair = encode_preference(real, parsed)
            sides = [(pair.chosen, [row["chosen"]["value"]]), (pair.rejected, [row["rejected"]["value"]])]
        else:
            turns = row.get("conversations") or [{"from": "gpt", "value": row["output"]}]
            answers = [turn["value"] for turn in turns if turn["from"] in ("gpt", "function_call")]
            sides = [(encode_conversation(real, parsed), answers)]
        for example, answers in sides:
            supervised = example.input_ids[example.labels != IGNORE]
            assert real.decode(supervised) == "".join(f"{answer}<|im_end|>" for answer in answers), parsed.source
