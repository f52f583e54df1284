"""Answers under a grammar: a model that says anything at random, and the jsonschema library as the judge."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import openai
import pytest

from finetune.chat.tokenizer import Tokenizer
from finetune.infer.open import open_model
from finetune.serve.app import Limits
from tests.infer.scripted import scripted, serving
from tests.serve.schemas import PUBLIC, drawn
from tests.serve.test_app import HELLO, TOOL_TEMPLATE
from tests.tiny import Shape, tiny_model

SCHEMAS = PUBLIC + [drawn(random.Random(seed)) for seed in range(200 - len(PUBLIC))]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"at": {"$ref": "#/$defs/place"}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
                "required": ["at"],
                "additionalProperties": False,
                "$defs": {"place": {"enum": ["here", 'the "house"', "ü"]}},
            },
        },
    }
    for name in ("look", 'say "it"')
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A model of random weights with room for long answers, whose template shows tools."""
    folder = tiny_model(tmp_path_factory.mktemp("grammar") / "m", shape=Shape(max_position_embeddings=4096), seed=5)
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    return open_model(str(folder), pack=True)


@pytest.fixture(scope="module")
def client(opened):
    with serving(opened, Limits(max_batch=32)) as running:
        yield running.client(timeout=300)


@pytest.fixture(scope="module")
def closing(opened) -> dict[str, float]:
    """A bias to what ends texts, lists and numbers, so that random answers end at all."""
    return {str(token): 4.0 for token in map(opened.tokenizer.backend.token_to_id, '"]},') if token is not None}


def ask(client, **settings):
    return client.chat.completions.create(
        **{"model": "tiny", "messages": HELLO, "max_tokens": 3000, "temperature": 1.0, **settings}
    )


def test_every_answer_is_valid_under_its_schema(client, closing):
    def one(number: int) -> str:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[number]}}
        return ask(client, seed=number, response_format=form, logit_bias=closing).choices[0]

    with ThreadPoolExecutor(32) as pool:
        choices = list(pool.map(one, range(len(SCHEMAS))))
    assert len(choices) == 200
    for schema, choice in zip(SCHEMAS, choices):
        assert choice.finish_reason == "stop", (schema, choice.message.content[:500])
        jsonschema.validate(json.loads(choice.message.content), schema, jsonschema.Draft202012Validator)
    assert len({choice.message.content for choice in choices}) > 100


def test_a_json_object_is_one_streamed_or_not(client, closing):
    for seed in range(5):
        settings = {"seed": seed, "response_format": {"type": "json_object"}, "logit_bias": closing}
        whole = ask(client, **settings).choices[0].message.content
        assert isinstance(json.loads(whole), dict)
        pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True, **settings)]
        assert "".join(pieces) == whole


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": 'say "it"'}}])
def test_tools_that_must_be_called_are(client, choice):
    names = set()
    for seed in range(16):
        settings = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
        answer = ask(client, seed=seed, temperature=5, **settings).choices[0]
        (call,) = answer.message.tool_calls
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
        parameters = TOOLS[0]["function"]["parameters"]
        jsonschema.validate(json.loads(call.function.arguments), parameters, jsonschema.Draft202012Validator)
        names.add(call.function.name)
    assert names == ({"look", 'say "it"'} if choice == "required" else {'say "it"'})


def test_an_answer_ends_where_its_grammar_does_though_no_end_token_may_come(client):
    form = {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes", "no"]}}}
    for extra in ({"ignore_eos": True}, {"min_tokens": 50}, {"stop_token_ids": []}):
        choice = ask(client, response_format=form, extra_body=extra).choices[0]
        assert (json.loads(choice.message.content) in ("yes", "no"), choice.finish_reason) == (True, "stop")


def test_greedy_and_sampled_answers_keep_to_it_with_logprobs(client):
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "boolean"}}}
    for temperature in (0, 2):
        choice = ask(client, response_format=form, temperature=temperature, n=2, logprobs=True).choices[0]
        text = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode()
        assert choice.message.content in ("true", "false") and text == choice.message.content


def test_tags_that_are_tokens_of_their_own_are_written_as_such(opened, tmp_path):
    from finetune.serve.grammar import Grammars

    opened.tokenizer.save(tmp_path)
    backend = json.loads((tmp_path / "tokenizer.json").read_text())
    size = len(opened.tokenizer)
    for i, text in enumerate(("<tool_call>", "</tool_call>")):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        backend["added_tokens"].append({"id": size + i, "content": text, **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    tokenizer = Tokenizer.from_folder(tmp_path)
    progress = Grammars(tokenizer, size + 2, tokenizer.stop_token_ids).tool_calls(TOOLS[:1], several=False).start()
    text = '<tool_call>\n{"name": "look", "arguments": {"at": "here"}}\n</tool_call>'
    ids = tokenizer.encode(text)
    assert (ids[0], ids[-1]) == (size, size + 1)
    assert [progress.accept(token) for token in ids] == [False] * (len(ids) - 1) + [True]


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"oneOf": [{}, {}]}}}},
            "response_format",
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, "response_format"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "strin"}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
def test_what_cannot_be_kept_to_is_refused(client, settings, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **settings)
    assert caught.value.param == param


def test_a_scripted_model_cannot_leave_the_grammar(opened):
    with serving(scripted(opened, "I would rather say this.")) as running:
        form = {"type": "json_schema", "json_schema": {"schema": {"type": "array", "items": {"type": "null"}}}}
        choice = ask(running.client(), temperature=0, response_format=form).choices[0]
        assert json.loads(choice.message.content) == []
