"""Bodies at their worst: each is answered in a time that its size bounds, and memory comes back."""

from __future__ import annotations

import json
import resource
import threading
import time
from pathlib import Path

import httpx
import pytest

from finetune.infer.open import open_model
from finetune.serve.app import Limits
from finetune.serve.body import MAX_BODY, parse
from finetune.serve.errors import ApiError
from tests.infer.scripted import serving

MEGABYTE = 1024 * 1024


@pytest.fixture(scope="module")
def server(tiny_untied_folder):
    with serving(open_model(str(tiny_untied_folder)), Limits(max_batch=4, max_queue=8)) as running:
        yield running


def filled(head: str, item: str, tail: str, size: int = MAX_BODY) -> bytes:
    """A body of about `size` bytes, of many items."""
    items = ",".join([item] * ((size - len(head) - len(tail)) // (len(item) + 1)))
    return (head + items + tail).encode()


CHAT, TEXT = '{"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], ', '{"model": "tiny", '
ATTACKS = {
    "prompt of objects": ("completions", filled(f'{TEXT}"prompt": [', "{}", "]}"), "prompt|lists, objects"),
    "prompt of lists": ("completions", filled(f'{TEXT}"prompt": [', "[]", "]}"), "lists, objects"),
    "prompt of nulls": ("completions", filled(f'{TEXT}"prompt": [', "null", "]}"), "prompt"),
    "prompt of texts": ("completions", filled(f'{TEXT}"prompt": [', '"a"', "]}"), "12"),
    "prompt of ids": ("completions", filled(f'{TEXT}"prompt": [', "1", "]}"), "maximum context length"),
    "ids, the last a text": ("completions", b'{"model": "tiny", "prompt": [1, 2, "3"]}', r"prompt\[2\] is a text"),
    "long list of long lists": ("completions", filled(f'{TEXT}"prompt": [[', "1", "]]}"), "maximum context length"),
    "stop of objects": ("completions", filled(f'{TEXT}"prompt": "a", "stop": [', "{}", "]}", MEGABYTE // 2), "stop"),
    "stop of texts": ("chat/completions", filled(f'{CHAT}"stop": [', '"x"', "]}"), "stop holds"),
    "stop tokens": ("chat/completions", filled(f'{CHAT}"stop_token_ids": [', "1", "]}"), "stop_token_ids"),
    "messages of nulls": ("chat/completions", filled(f'{TEXT}"messages": [', "null", "]}"), "maximum context length"),
    "parts of a content": (
        "chat/completions",
        filled(f'{TEXT}"messages": [{{"role": "user", "content": [', "{}", "]}]}", MEGABYTE // 2),
        r"messages\[0\].content\[0\]",
    ),
    "tools": ("chat/completions", filled(f'{CHAT}"tools": [', "{}", "]}", MEGABYTE // 2), "tools"),
    "biases": (
        "completions",
        (TEXT + '"prompt": "a", "logit_bias": {' + ",".join(f'"{i}": 1' for i in range(150_000)) + "}}").encode(),
        "logit_bias",
    ),
    "a long name": (
        "completions",
        (TEXT + '"prompt": "a", "' + "top_k" * 1_600_000 + '": 1}').encode(),
        "does not know",
    ),
    "a long model": ("completions", b'{"prompt": "a", "model": "' + b"m" * 8_000_000 + b'"}', "does not exist"),
    "a long role": (
        "chat/completions",
        (TEXT + '"messages": [{"content": "a", "role": "' + "user" * 2_000_000 + '"}]}').encode(),
        "Known are",
    ),
    "brackets": ("completions", b"[" * MAX_BODY, "lists, objects"),
    "a deep value": ("completions", (TEXT + '"metadata": ' + "[" * 999 + "]" * 999 + "}").encode(), "nests more"),
    "a text without end": ("completions", b'\\"[' * (MAX_BODY // 3), "not JSON|lists, objects"),
    "keys": ("completions", ("{" + ",".join(f'"{i}":1' for i in range(600_000)) + "}").encode(), "lists, objects"),
    "a long text": ("completions", (TEXT + '"prompt": "' + "a word " * 1_190_000 + '"}').encode(), "at least"),
    "a long message": (
        "chat/completions",
        (TEXT + '"messages": [{"role": "user", "content": "' + "a word " * 1_190_000 + '"}]}').encode(),
        "at least",
    ),
    "a long number": ("completions", (TEXT + '"prompt": "a", "seed": ' + "9" * 4000 + "}").encode(), None),
    "a longer number": ("completions", b'{"seed": ' + b"9" * 8_000_000 + b"}", "not JSON"),
}


def post(server, path: str, body: bytes) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return httpx.post(f"{server.url}/v1/{path}", content=body, headers=headers, timeout=120)


def test_bodies_at_their_worst_cost_little_memory(server):
    """One of them cost 11 GB. Runs first, so that the peak is theirs."""
    resident = Path("/proc/self/statm")

    def megabytes() -> int:
        return int(resident.read_text().split()[1]) * resource.getpagesize() // MEGABYTE

    post(server, "completions", b'{"model": "tiny", "prompt": "a"}')
    before = megabytes()
    for path, body, _ in ATTACKS.values():
        post(server, path, body)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 - before < 500
    assert megabytes() - before < 100


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_at_once_and_by_name(server, name):
    path, body, said = ATTACKS[name]
    assert len(body) <= MAX_BODY
    answer = post(server, path, body)
    if said is None:
        assert answer.status_code == 200
        return
    assert answer.status_code in (400, 404)
    message = answer.json()["error"]["message"]
    assert len(message) < 1000
    assert any(part in message for part in said.replace("\\", "").split("|")), message


def test_a_long_text_is_not_tokenized_whole(server, monkeypatch):
    from finetune.chat.tokenizer import Tokenizer

    monkeypatch.setattr(Tokenizer, "encode", lambda *_, **__: pytest.fail("it was tokenized whole"))
    body = {"model": "tiny", "prompt": "a word " * 1000}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "text",
    ["a word " * 40, "word" * 2000, " " * 9000, "é" * 5000, "x\n\n\n" * 900, "<|im_end|>" * 600, "1234567890" * 500],
)
def test_the_least_number_of_tokens_is_never_above_the_true_one(server, text):
    tokenizer = server.scheduler.engine.tokenizer
    for enough in (1, 50, 512):
        least = tokenizer.least_tokens(text, enough)
        assert least == 0 or enough <= least <= len(tokenizer.encode(text))


def test_long_texts_hold_no_other_thread_up(server):
    """A thread that only counts gets its turns while a text is tokenized; it got two or three before."""
    tokenizer = server.scheduler.engine.tokenizer
    text = "The quick brown fox, number 12345, jumps. " * 25_000
    counted, ended = [], threading.Event()

    def count() -> None:
        while not ended.is_set():
            counted.append(None)
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    tokenizer.encode(text)
    ended.set()
    thread.join()
    assert len(counted) > 20


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'{"a": "{[\\"{[", "b": [1, {"c": "\\\\"}]}', {"a": '{["{[', "b": [1, {"c": "\\"}]}),
        (b'"\\\\"', "\\"),
        (json.dumps("a:" * 300_000).encode(), "a:" * 300_000),
        (b'{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
    ],
)
def test_brackets_in_texts_do_not_count(body, value):
    assert parse(body) == value


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b'{"a": "\\ud800"}', b"[" * 201 + b"]" * 201, "{}".encode("utf-16")]
)
def test_what_is_no_body_is_refused(body):
    with pytest.raises(ApiError) as caught:
        parse(body)
    assert caught.value.status == 400
