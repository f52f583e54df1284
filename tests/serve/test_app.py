"""The server, spoken to by OpenAI's own client."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from finetune.chat.tokenizer import Tokenizer
from finetune.infer.open import open_model
from finetune.infer.sampling import Sampling
from finetune.serve.app import Limits
from finetune.serve.guard import Access
from tests.infer.scripted import scripted, serving, wait_for

ROOT = Path(__file__).resolve().parents[2]
HELLO = [{"role": "user", "content": "Hello"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
TOOL_TEMPLATE = (
    "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def opened(tiny_untied_folder):
    return open_model(str(tiny_untied_folder))


@pytest.fixture(scope="module")
def server(opened):
    with serving(opened, Limits(max_batch=8, max_queue=64)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def chat(client, **settings):
    return client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "max_tokens": 12, **settings})


def completion(client, **settings):
    return client.completions.create(**{"model": "tiny", "prompt": "What is", **settings})


def metric(server, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))


# -- answers -------------------------------------------------------------------------------------------------------


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_chat_equals_the_engine(client, opened):
    ids = opened.tokenizer.apply_chat_template(HELLO, add_generation_prompt=True)
    expected = opened.engine.generate([ids], Sampling(max_new_tokens=12))[0]
    answer = chat(client)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(expected.tokens))
    assert answer.usage.total_tokens == len(ids) + len(expected.tokens)
    assert (answer.object, answer.choices[0].message.role) == ("chat.completion", "assistant")


def test_completions_take_texts_and_token_ids(client, opened):
    ids = [opened.tokenizer.encode(text) for text in ("What is", "Please")]
    expected = [output.text for output in opened.engine.generate(ids, Sampling(max_new_tokens=16))]
    for prompt in (["What is", "Please"], ids):
        assert [choice.text for choice in completion(client, prompt=prompt).choices] == expected
    for prompt in ("Please", ids[1]):
        assert completion(client, prompt=prompt).choices[0].text == expected[1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.3, "seed": 7, "n": 3},
        {"temperature": 1.3, "seed": -1, "top_p": 0.9, "extra_body": {"top_k": 20, "min_p": 0.01}},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"logprobs": True, "top_logprobs": 2},
    ],
)
def test_streaming_equals_not_streaming(client, settings):
    whole = chat(client, **settings)
    texts, logprobs, reasons, usage = {}, {}, {}, None
    for chunk in chat(client, stream=True, stream_options={"include_usage": True}, **settings):
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
            if choice.logprobs:
                logprobs.setdefault(choice.index, []).extend(choice.logprobs.content)
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage
    assert logprobs == {choice.index: choice.logprobs.content for choice in whole.choices if choice.logprobs}


def test_completions_stream_too(client):
    settings = {"prompt": ["What is", "Please"], "logprobs": 2, "max_tokens": 10}
    whole = completion(client, **settings)
    texts, tokens = {}, {}
    for chunk in completion(client, stream=True, **settings):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens if choice.logprobs else [])
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert tokens == {choice.index: choice.logprobs.tokens for choice in whole.choices}
    lengths = whole.choices[0].logprobs
    assert len(lengths.tokens) == len(lengths.token_logprobs) == len(lengths.text_offset) == 10


def test_a_stop_text_cuts_the_answer(client):
    text = completion(client, max_tokens=16).choices[0].text
    stop = text[2:4]
    choice = completion(client, max_tokens=16, stop=["never said", stop], logprobs=1).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
    assert all(offset <= len(choice.text) for offset in choice.logprobs.text_offset)
    streamed = completion(client, max_tokens=16, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text


def test_seeds_and_samples(client):
    draw = {"temperature": 1.5, "n": 3}
    first, again, other = (
        [choice.message.content for choice in chat(client, seed=seed, **draw).choices] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(set(first)) == 3


def test_logprobs_follow_openais_schema(client, opened):
    content = chat(client, max_tokens=4, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    ids = opened.tokenizer.apply_chat_template(HELLO, add_generation_prompt=True)
    expected = opened.engine.generate([ids], Sampling(max_new_tokens=4, logprobs=3))[0].logprobs
    assert [entry.logprob for entry in content] == pytest.approx([entry.logprob for entry in expected], abs=1e-4)
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob == entry.logprob
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_bytes_of_logprobs_join_to_the_text(opened):
    text = "naïve 😀 一个人<b>"
    with serving(scripted(opened, text)) as running:
        choice = chat(running.client(), max_tokens=100, logprobs=True).choices[0]
        assert choice.message.content == text and choice.finish_reason == "stop"
        assert bytes(b for entry in choice.logprobs.content for b in entry.bytes).decode() == text
        cut = chat(running.client(), max_tokens=100, logprobs=True, stop="😀").choices[0]
        assert cut.message.content == text[: text.index("😀")]
        assert bytes(b for entry in cut.logprobs.content for b in entry.bytes).decode() == cut.message.content


def test_many_at_once_are_each_answered_as_alone(client, server):
    prompts = [f"{'word ' * (i % 7)}number {i}" for i in range(32)]

    def ask(text: str) -> str:
        return chat(client, messages=[{"role": "user", "content": text}], max_tokens=10 + len(text) % 9, temperature=0)

    alone = [ask(text) for text in prompts]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, prompts))
    assert [a.choices for a in together] == [a.choices for a in alone]
    assert [a.usage for a in together] == [a.usage for a in alone]
    assert server.scheduler.running == server.scheduler.queued == 0


# -- tools ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool_opened(opened, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    opened.tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    return Tokenizer.from_folder(folder)


def test_tool_calls_are_read_back(opened, tool_opened):
    says = 'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n{"name": "now"}\n'
    with serving(scripted(opened, says, tokenizer=tool_opened)) as running:
        client = running.client()
        choice = chat(client, tools=TOOLS, max_tokens=200).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I add.")
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
        assert calls == [("add", {"a": 1}), ("now", {})]
        assert len({call.id for call in choice.message.tool_calls}) == 2
        content, streamed = "", []
        for chunk in chat(client, tools=TOOLS, max_tokens=200, stream=True):
            content += chunk.choices[0].delta.content or ""
            streamed += [(c.index, c.function.name) for c in chunk.choices[0].delta.tool_calls or []]
            reason = chunk.choices[0].finish_reason
        assert (content, streamed, reason) == ("I add.", [(0, "add"), (1, "now")], "tool_calls")
        for plain in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            choice = chat(client, max_tokens=200, **plain).choices[0]
            assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (says, None, "stop")
        follow_up = [
            *HELLO,
            {"role": "assistant", "content": None, "tool_calls": [call.model_dump() for call in _calls(client)]},
            {"role": "tool", "tool_call_id": "x", "content": "3"},
        ]
        assert chat(client, messages=follow_up, tools=TOOLS).usage.prompt_tokens > 60


def _calls(client):
    return chat(client, tools=TOOLS, max_tokens=200).choices[0].message.tool_calls


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None, "max_completion_tokens": -3}, "max_completion_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": 3}, "stop"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format"),
        ({"tools": TOOLS}, "tools"),
        ({"tools": [{"name": "add"}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "messages"),
        ({"extra_body": {"top_kk": 3}}, "top_kk"),
        ({"extra_body": {"top_k": -1}}, "top_k"),
        ({"extra_body": {"min_p": 7}}, "min_p"),
    ],
)
def test_a_wrong_value_is_named(client, settings, param):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **settings)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert len(caught.value.body["message"]) > 10


def test_a_prompt_that_does_not_fit_says_so(client):
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512") as caught:
        completion(client, prompt="word " * 600)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("prompt", [[], [9999], [-1], [10**20], [[1], [-(10**20)]], "", [[]]])
def test_a_wrong_prompt_is_named(client, prompt):
    with pytest.raises(openai.BadRequestError) as caught:
        completion(client, prompt=prompt)
    assert caught.value.param == "prompt"


def test_another_model_is_not_there(client):
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt-4")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "content", "kind", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", "application/json", 400),
        ("POST", "/v1/chat/completions", b"[]", "application/json", 400),
        ("POST", "/v1/chat/completions", b'{"model": "tiny", "messages": ["\\ud800"]}', "application/json", 400),
        ("POST", "/v1/chat/completions", b"{}", "text/plain", 415),
        ("POST", "/v1/chat/completions", b" " * (8 * 1024 * 1024 + 1), "application/json", 413),
        ("GET", "/v1/chat/completions", None, "application/json", 405),
        ("GET", "/v1/nothing", None, "application/json", 404),
    ],
)
def test_bad_http_gets_an_error_object(server, method, path, content, kind, status):
    answer = httpx.request(method, server.url + path, content=content, headers={"content-type": kind})
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_api_key_is_asked_for(opened):
    with serving(opened, access=Access(api_key="secret")) as running:
        assert chat(running.client(api_key="secret"), max_tokens=1).choices
        for call in (chat, lambda client: client.models.list()):
            with pytest.raises(openai.AuthenticationError):
                call(running.client(api_key="guess"))
        assert httpx.post(f"{running.url}/v1/completions", json={}).status_code == 401
        assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}


# -- load ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow(opened):
    """Two places, one waiting; rows that go on for seconds."""
    with serving(scripted(opened, "word " * 80, pause=0.02), Limits(max_batch=2, max_queue=1)) as running:
        yield running


def test_a_client_that_leaves_frees_its_place(slow):
    client = slow.client()
    stream = chat(client, stream=True, max_tokens=400)
    next(iter(stream))
    wait_for(lambda: slow.scheduler.running == 1)
    stream.close()
    wait_for(lambda: slow.scheduler.running == 0, seconds=2)
    with pytest.raises(openai.APITimeoutError):
        chat(client, max_tokens=400, n=2, timeout=0.3)
    wait_for(lambda: slow.scheduler.running == 0, seconds=2)
    wait_for(lambda: metric(slow, "finetune_cancelled_total") == 2)
    assert slow.app.state.scheduler.engine.decoder.largest == 2


def test_a_client_that_leaves_while_it_sends_ends_quietly(opened, capsys, caplog):
    with serving(opened) as running:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + b'{"model": ')
            time.sleep(0.2)
        text = 'finetune_requests_total{endpoint="/v1/completions",status="499"} 1.0'
        wait_for(lambda: text in httpx.get(f"{running.url}/metrics").text)
    assert "Traceback" not in capsys.readouterr().err and not caplog.records


def test_others_are_answered_while_a_long_text_is_tokenized(server, client, monkeypatch):
    reading, go_on = threading.Event(), threading.Event()

    def slow(tokenizer, text, add_special_tokens):
        reading.set()
        assert go_on.wait(20)
        return [1, 2]

    monkeypatch.setattr(Tokenizer, "encode", slow)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(chat, client, max_tokens=1)
        assert reading.wait(20)
        assert httpx.get(f"{server.url}/health").status_code == 200
        go_on.set()
        assert answer.result(20).usage.prompt_tokens == 2


def test_a_full_queue_refuses(slow):
    client = slow.client()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(chat, client, max_tokens=40) for _ in range(3)]
        wait_for(lambda: slow.scheduler.running == 2 and slow.scheduler.queued == 1)
        assert metric(slow, "finetune_running") == 2 and metric(slow, "finetune_queue_length") == 1
        with pytest.raises(openai.RateLimitError) as caught:
            chat(client)
        assert caught.value.code == "queue_full" and caught.value.response.headers["retry-after"]
        answers = [future.result() for future in waiting]
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    assert slow.scheduler.engine.decoder.largest == 2


def test_a_request_joins_while_another_is_answered(slow):
    client = slow.client()
    stream = iter(chat(client, stream=True, max_tokens=100))
    next(stream)
    chat(client, max_tokens=3)
    assert slow.scheduler.running == 1, "the short request ended while the long one ran"
    assert slow.scheduler.engine.decoder.largest == 2


def test_a_failing_engine_is_said_and_the_server_goes_on(slow, capsys):
    client, script = slow.client(), slow.scheduler.engine.decoder
    script.fails = True
    with pytest.raises(openai.InternalServerError, match="engine failed"):
        chat(client)
    with pytest.raises(openai.APIError, match="engine failed"):
        list(chat(client, stream=True))
    script.fails = False
    assert chat(client, max_tokens=2).choices[0].message.content == "word"


def test_a_row_that_fails_takes_no_other_request_with_it(opened, monkeypatch, capsys):
    """One of a request's two samples fails: that request ends, the one beside it is answered."""
    calls = []

    def fail(scores, sampling, rng):
        calls.append(sampling)
        if len(calls) == 6:
            raise IndexError("no token is left")
        return int(scores.argmax())

    monkeypatch.setattr("finetune.infer.row.choose", fail)
    with serving(scripted(opened, "word " * 80, pause=0.02), Limits(max_batch=3)) as running:
        other = iter(chat(running.client(), stream=True, max_tokens=60))
        next(other)
        with pytest.raises(openai.InternalServerError, match="IndexError"):
            chat(running.client(), temperature=1.0, n=2)
        assert running.scheduler.running >= 1, "the other is still being answered"
        assert [chunk.choices[0].finish_reason for chunk in other][-1] == "length"
        assert running.scheduler.engine.decoder.largest == 3
        wait_for(lambda: running.scheduler.running == 0)
    assert "no token is left" in capsys.readouterr().err
    assert len(calls) <= 8


def test_rows_that_outgrow_the_cache_are_put_back_and_finish_alike(opened, monkeypatch):
    """Four rows that grow to 64 positions, in a cache of 160: at first all run, later some wait."""
    monkeypatch.setattr("finetune.compute.cache._BLOCK", 16)
    monkeypatch.setattr("finetune.serve.scheduler._HEADROOM", 8)
    settings = {"max_tokens": 60, "temperature": 1.0, "extra_body": {"stop_token_ids": []}}
    with serving(opened, Limits(max_batch=4)) as running:
        client, scheduler = running.client(), running.scheduler
        alone = [completion(client, seed=i, **settings).choices[0].text for i in range(4)]
        scheduler.max_positions = 160
        waiting, make_room = [], scheduler._make_room
        scheduler._make_room = lambda: (make_room(), waiting.append(len(scheduler._paused)))
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda i: completion(client, seed=i, **settings).choices[0].text, range(4)))
    assert together == alone
    assert max(waiting) > 0


def test_metrics_count(server, client):
    before = metric(server, "finetune_generated_tokens_total"), metric(server, "finetune_prompt_tokens_total")
    usage = chat(client).usage
    assert metric(server, "finetune_generated_tokens_total") == before[0] + usage.completion_tokens
    assert metric(server, "finetune_prompt_tokens_total") == before[1] + usage.prompt_tokens
    text = httpx.get(f"{server.url}/metrics").text
    assert 'finetune_requests_total{endpoint="/v1/chat/completions",status="400"}' in text
    assert "finetune_request_seconds_bucket" in text and "finetune_first_token_seconds_count" in text
