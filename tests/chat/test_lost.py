"""Whatever text a row holds is in what is trained on, or the row is named; thoughts and generation prompts."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from tokenizers import AddedToken, models, pre_tokenizers, processors

from finetune.chat.folder import qwen2_backend
from finetune.chat.messages import REASONING_KEYS, Conversation
from finetune.chat.tokenizer import Tokenizer
from finetune.errors import DataError
from finetune.rows.block import Block
from finetune.rows.encode import Encoder, Settings, Task
from finetune.rows.formats import parse_row
from tests.chat.cases import WEATHER, said
from tests.chat.conftest import QWEN25, marked
from tests.chat.encoding import encode_conversation
from tests.tiny import CHATML

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜eos｜>",
)
# DeepSeek-R1-Distill-Qwen: cuts the thoughts of every answer; its generation prompt opens them.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% endif %}"
    "{% if m.role == 'assistant' and m.content %}{% set content = m.content %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}<｜Assistant｜>{{ content }}<｜eos｜>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
# QwQ-32B: cuts the thoughts of all answers but the last.
QWQ = (
    "{% for m in messages %}{% set content = m.content %}{% if m.role == 'assistant' and not loop.last %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Qwen3: reads reasoning_content or cuts it out of the content, and keeps it behind the last question only.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set content = m.content %}{% set thoughts = m.reasoning_content or '' %}"
    "{% if not thoughts and '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and thoughts %}<think>\n{{ thoughts.strip('\n') }}\n</think>\n\n"
    "{{ content.lstrip('\n') }}{% else %}{{ content }}{% endif %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
# Leaves out what it does not know: other roles, and the text beside a call.
NARROW = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content.strip() }}<|im_end|>\n"
    "{% elif m.role == 'assistant' and m.tool_calls %}<|im_start|>assistant\n{% for call in m.tool_calls %}"
    "{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>tool\n{{ m.content | tojson }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"qwen2": CHATML, "qwen2.5": QWEN25, "r1": R1, "qwq": QWQ, "llama": LLAMA, "narrow": NARROW}


def tokenizer_with(template: str, bos: bool = False) -> Tokenizer:
    """A token a byte, the special tokens of all templates; with `bos` one that puts <s> before plain text."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = qwen2_backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.normalizer = None
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if bos:
        token = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", token)])
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": "<s>"}
    return Tokenizer(backend, special_tokens=special, templates={"default": template})


# -- the property ------------------------------------------------------------------------------------------------

WORDS = 'a the user system assistant tool Hi \n\n <b> \\ " 天气 é think 12 {} ok'.split(" ") + ["long words of text"]


def some_text(draw: random.Random) -> str:
    space = draw.choice(["", " ", "\n", "  \n"])
    return space + " ".join(draw.choices(WORDS, k=draw.randint(1, 5))) + draw.choice(["", " ", "\n\n"])


def some_row(draw: random.Random) -> tuple[dict[str, Any], list[str]]:
    """A row, and every text that it says."""
    said_texts: list[str] = []

    def text() -> str:
        said_texts.append(some_text(draw))
        return said_texts[-1]

    messages = [{"role": draw.choice(["system", "developer"]), "content": text()}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 3)):
        messages.append({"role": "user", "content": text()})
        answer: dict[str, Any] = {"role": "assistant", "content": text()}
        if draw.random() < 0.2:
            answer["content"] = f"<think>\n{text()}\n</think>\n\n{text()}"
        if draw.random() < 0.1:
            answer[draw.choice(REASONING_KEYS)] = text()
        if draw.random() < 0.15:
            arguments = {"city": text(), "list": [text()]}
            answer["tool_calls"] = [{"type": "function", "function": {"name": "look", "arguments": arguments}}]
            answer["content"] = draw.choice([answer["content"], ""])
            messages += [answer, {"role": "tool", "content": text()}]
            answer = {"role": "assistant", "content": text()}
        messages.append(answer)
    return {"messages": messages}, said_texts


def texts_of(row: dict[str, Any]) -> list[str]:
    """Every text that a row says, thoughts by themselves; independently of the code under test."""
    found: list[str] = []
    for message in row["messages"]:
        for key in ("content", *REASONING_KEYS):
            for part in (message.get(key) or "").replace("</think>", "<think>").split("<think>"):
                found.append(part)
        for call in message.get("tool_calls", ()):
            found += [call["function"]["arguments"]["city"], *call["function"]["arguments"]["list"]]
    return [text.strip() for text in found if text.strip()]


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_whatever_text_a_row_holds_is_in_its_ids_or_the_row_is_named(name):
    draw, count = random.Random(7), 2000
    rows = [some_row(draw)[0] for _ in range(count)]
    tokenizer = tokenizer_with(TEMPLATES[name], bos=name == "llama")
    settings = Settings("sft", max_length=100_000, overlong="error", train_on="all")
    named, kept = 0, 0
    for number, row in enumerate(rows, 1):
        block = Block(number, 1, "rows", [row])
        result = Encoder(tokenizer, settings).encode(Task(block, 0, 0, "f", "messages"))
        if result.faults.count:
            assert result.faults.first[0].where == f"f:{number}", result.faults.first
            named += 1
            continue
        assert result.part is not None
        kept += 1
        text = tokenizer.decode(result.part.sides[0].ids)
        counted: dict[str, int] = {}
        for said_text in texts_of(row):
            forms = {said_text, json.dumps(said_text, ensure_ascii=False)[1:-1]}
            counted[said_text] = counted.get(said_text, 0) + 1
            assert max(text.count(form) for form in forms) >= counted[said_text], (row, text)
    assert kept > 200 and named > 50 and kept + named == count


@pytest.mark.parametrize("text", ["a", "system", "assistant", "user\n", "You are", "im_start"])
def test_a_lost_text_is_found_missing_though_the_template_has_the_same_word(text):
    narrow = tokenizer_with(NARROW)
    with pytest.raises(DataError, match="f:1: the chat template leaves out text of message 1, the system's"):
        encode_conversation(narrow, of(said("q", "a long answer", system=text)))


def of(messages: list[dict], tools: list[dict] | None = None) -> Conversation:
    """A row of OpenAI's form."""
    return parse_row({"messages": messages, "tools": tools}, "messages", "f:1")


# -- thoughts ----------------------------------------------------------------------------------------------------

THOUGHT = "<think>\nhm\n</think>\n\nyes"


@pytest.mark.parametrize(
    "template, messages",
    [
        (R1, said("q", THOUGHT)),
        (R1, said("q", THOUGHT, "p", "b")),
        (QWQ, said("q", THOUGHT, "p", "b")),
        (QWEN3, said("q", THOUGHT, "p", "b")),
        (CHATML, [*said("q"), {"role": "assistant", "content": "yes", "reasoning_content": "hm"}]),
        (QWQ, [*said("q"), {"role": "assistant", "content": "yes", "thinking": "hm"}]),
        (QWEN3, [*said("q"), {"role": "assistant", "content": "yes", "reasoning_content": "hm"}, *said("p", "b")]),
    ],
)
def test_thoughts_that_a_template_cuts_are_an_error(template, messages):
    with pytest.raises(DataError, match="f:1: the chat template leaves out thoughts of message 2, .*: 'hm'"):
        encode_conversation(tokenizer_with(template), of(messages))


@pytest.mark.parametrize(
    "template, messages, end",
    [
        (CHATML, said("q", THOUGHT), "assistant\n⟦<think>\nhm\n</think>\n\nyes<|im_end|>⟧\n"),
        # What the generation prompt ends in is given to the model, and is not trained on.
        (QWQ, said("q", THOUGHT), "assistant\n<think>\n⟦hm\n</think>\n\nyes<|im_end|>⟧\n"),
        (QWEN3, said("q", THOUGHT), "assistant\n⟦<think>\nhm\n</think>\n\nyes<|im_end|>⟧\n"),
        (
            QWEN3,
            [*said("q"), {"role": "assistant", "content": "yes", "reasoning_content": "hm"}],
            "assistant\n⟦<think>\nhm\n</think>\n\nyes<|im_end|>⟧\n",
        ),
        (QWQ, said("q", "no", "p", THOUGHT), "assistant\n<think>\n⟦hm\n</think>\n\nyes<|im_end|>⟧\n"),
    ],
)
def test_thoughts_that_a_template_keeps_are_trained_on(template, messages, end):
    tokenizer = tokenizer_with(template)
    assert marked(tokenizer, encode_conversation(tokenizer, of(messages), "last_response")).endswith(end)


def test_text_beside_a_call_and_unshown_roles():
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    beside = [*said("q"), {"role": "assistant", "content": "I look.", "tool_calls": [call]}, *said("p", "b")]
    with pytest.raises(DataError, match="leaves out text of message 2, the assistant's: 'I look.'"):
        encode_conversation(tokenizer_with(NARROW), of(beside))
    beside[1]["content"] = ""
    assert "get_weather" in marked(tokenizer_with(NARROW), encode_conversation(tokenizer_with(NARROW), of(beside)))
    halved = NARROW.replace("{{ call.function.arguments | tojson }}", "")
    with pytest.raises(DataError, match="leaves out a tool call of message 2, the assistant's: 'Rome'"):
        encode_conversation(tokenizer_with(halved), of(beside, [WEATHER]))


def test_developer_is_the_system_where_the_template_does_not_know_it():
    messages = [{"role": "developer", "content": "S"}, *said("q", "a")]
    for template in (CHATML, QWEN25):
        tokenizer = tokenizer_with(template)
        ours = encode_conversation(tokenizer, of(messages)).input_ids.tolist()
        assert ours == tokenizer.apply_chat_template(said("q", "a", system="S"))
    knows = tokenizer_with(CHATML + "{# developer #}")
    assert "<|im_start|>developer\nS<|im_end|>" in marked(knows, encode_conversation(knows, of(messages)))


# -- generation prompts that end in more than the row has --------------------------------------------------------


@pytest.mark.parametrize(
    "template, answers, expected",
    [
        (R1, ("q", "a"), "<s><｜User｜>q<｜Assistant｜>⟦a<｜eos｜>⟧"),
        (R1, ("q", "<b>"), "<s><｜User｜>q<｜Assistant｜>⟦<b><｜eos｜>⟧"),
        (
            R1,
            ("q", "a", "p", "b"),
            "<s><｜User｜>q<｜Assistant｜>⟦a<｜eos｜>⟧<｜User｜>p<｜Assistant｜>⟦b<｜eos｜>⟧",
        ),
        (QWQ, ("q", "a"), "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n"),
        (QWQ, ("q", "<t"), "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦<t<|im_end|>⟧\n"),
        (QWQ, ("q", "<thanks"), "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦<thanks<|im_end|>⟧\n"),
    ],
)
def test_what_prompt_and_row_begin_with_is_the_prompt(template, answers, expected):
    tokenizer = tokenizer_with(template)
    assert marked(tokenizer, encode_conversation(tokenizer, of(said(*answers)))) == expected


@pytest.mark.parametrize("template", [R1, QWQ])
def test_a_conversation_that_begins_with_an_answer_too(template):
    tokenizer = tokenizer_with(template)
    messages = [{"role": "assistant", "content": "Welcome"}, *said("q", "a")]
    text = marked(tokenizer, encode_conversation(tokenizer, of(messages)))
    assert text.count("⟦Welcome<") == 1 and text.count("⟦a<") == 1


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_surplus_is_said_once(method):
    rows = [{"messages": said(f"q{i}", "a")} for i in range(30)]
    if method == "dpo":
        rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(30)]
    settings = Settings(method, max_length=100, overlong="error", train_on="responses")
    result = Encoder(tokenizer_with(R1), settings).encode(Task(Block(1, 30, "rows", rows), 0, 0, "f", "auto"))
    assert not result.faults.count and result.part is not None and len(result.part) == 30
    ((heading, rows_named),) = result.named.items()
    assert rows_named.count == 30 and heading.startswith("without the '<think>\\n' in which the chat template ends")


# -- keys of turns -----------------------------------------------------------------------------------------------


def test_keys_that_nothing_reads_are_counted_and_said_once():
    rows = [{"messages": [*said("q"), {"role": "assistant", "content": "a", "mood": "m", "id": i}]} for i in range(9)]
    settings = Settings("sft", max_length=100, overlong="error", train_on="responses")
    task = Task(Block(1, 9, "rows", rows), 0, 0, "f", "auto")
    named = Encoder(tokenizer_with(CHATML), settings).encode(task).named
    assert {heading: rows.count for heading, rows in named.items()} == {
        "with a key 'id' in turns, which nothing reads: {rows}.": 9,
        "with a key 'mood' in turns, which nothing reads: {rows}.": 9,
    }
    reads = tokenizer_with(CHATML.replace("{% if add", "{{ messages[1].mood }}{% if add"))
    assert len(Encoder(reads, settings).encode(task).named) == 1


# -- plain text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
def test_plain_text_ends_with_the_end_of_text(bos):
    tokenizer = tokenizer_with(CHATML, bos)

    def shown(row: dict, train_on: str = "responses") -> str:
        own = Settings("sft", 100, "error", train_on)
        part = Encoder(tokenizer, own).encode(Task(Block(1, 1, "rows", [row]), 0, 0, "f", "auto")).part
        assert part is not None
        return marked(tokenizer, part.sides[0].example(0, "f:1"))

    start = "<s>" if bos else ""
    assert shown({"text": "abc"}) == f"⟦{start}abc<|im_end|>⟧"
    assert shown({"text": "abc<|im_end|>"}) == f"⟦{start}abc<|im_end|>⟧"
    assert shown({"prompt": "ab", "completion": "c"}) == f"{start}ab⟦c<|im_end|>⟧"
    assert shown({"prompt": "ab", "completion": "c"}, "all") == f"⟦{start}abc<|im_end|>⟧"
    assert shown({"prompt": "", "completion": "c"}) == f"{start}⟦c<|im_end|>⟧"


def test_what_the_post_processor_adds_stands_around_plain_text_and_not_around_a_chat():
    tokenizer = tokenizer_with(LLAMA, bos=True)
    bos = tokenizer.convert_tokens_to_ids("<s>")
    plain = [byte for byte in tokenizer.encode("hi", add_special_tokens=False)]
    assert len(plain) == 2
    assert tokenizer.encode("hi") == tokenizer("hi").input_ids == [bos, *plain]
    assert tokenizer(["hi", "h"], padding=True).attention_mask == [[1, 1, 1], [0, 1, 1]]
    assert tokenizer("hi", add_special_tokens=False).input_ids == plain
    assert tokenizer.apply_chat_template(said("q")).count(bos) == 1
    again = Tokenizer.of_content(tokenizer.content())
    assert again.encode("hi") == [bos, *plain] and again.around == ([bos], [])
