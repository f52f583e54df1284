"""Clients that are slow, many or half gone, and the server's end."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from finetune.infer.open import open_model
from finetune.serve import network
from finetune.serve.app import Limits, default_name
from tests.infer.scripted import scripted, serving, wait_for

ROOT = Path(__file__).resolve().parents[2]
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = {"model": "tiny", "prompt": "a", "max_tokens": 400}


@pytest.fixture(scope="module")
def opened(tiny_untied_folder):
    return open_model(str(tiny_untied_folder))


def connect(running) -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def received(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nHost: local", HEAD + b'Content-Length: 99\r\n\r\n{"model": ']
)
def test_a_request_that_does_not_come_is_not_waited_for(opened, monkeypatch, sent):
    monkeypatch.setattr(network, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(network, "BODY_SECONDS", 0.5)
    with serving(opened) as running, connect(running) as connection:
        connection.sendall(sent)
        answer = received(connection)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"did not come within" in answer
        assert not running.server.server_state.connections


def test_a_request_that_drips_in_is_not_waited_for(opened, monkeypatch):
    monkeypatch.setattr(network, "BODY_SECONDS", 1)
    with serving(opened) as running, connect(running) as connection:
        connection.sendall(HEAD + b"Content-Length: 999\r\n\r\n")
        try:
            for _ in range(300):
                connection.sendall(b" ")
                time.sleep(0.05)
        except OSError:
            pass
        else:
            pytest.fail("it was let drip for 15 seconds")


def test_a_client_that_takes_nothing_is_let_go(opened, monkeypatch):
    monkeypatch.setattr(network, "UNSENT_SECONDS", 0.5)
    with serving(scripted(opened, "word " * 300)) as running, connect(running) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        body = json.dumps({**BODY, "stream": True, "logprobs": 20, "n": 8}).encode()
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: running.server.server_state.connections)
        for held in list(running.server.server_state.connections):
            held.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        wait_for(lambda: not running.server.server_state.connections)
        wait_for(lambda: running.scheduler.running == 0)


def test_more_connections_than_files_are_turned_away_quietly(opened, monkeypatch, capsys):
    monkeypatch.setattr(network, "MOST_CONNECTIONS", 20)
    with serving(opened) as running:
        connections = [connect(running) for _ in range(20)]
        wait_for(lambda: len(running.server.server_state.connections) == 20)
        for _ in range(50):
            with connect(running) as one_more:
                answer = received(one_more)
            assert answer.startswith(b"HTTP/1.1 503 ") and b"too_many_connections" in answer
        for connection in connections:
            connection.close()
        wait_for(lambda: not running.server.server_state.connections)
        assert httpx.get(f"{running.url}/health").status_code == 200
    assert capsys.readouterr().err == ""


def test_when_files_have_run_out_a_line_says_so(opened, monkeypatch, capsys):
    """As when others have taken them: the limit of connections does not help."""
    left = [OSError(errno.EMFILE, "Too many open files")] * 3
    monkeypatch.setattr(network._Listener, "accept", lambda self: raised(left.pop()) if left else accept(self))
    accept = socket.socket.accept
    with serving(opened) as running:
        assert httpx.get(f"{running.url}/health", timeout=30).status_code == 200
    assert not left
    assert capsys.readouterr().err == "New connections wait until there is room for them (too many open files).\n"


def raised(error: Exception):
    raise error


def test_the_limit_of_connections_is_below_that_of_files(monkeypatch):
    for files, most in ((1_000_000, 1000), (1024, 928), (256, 160), (64, 8)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        assert network.most_connections() == most


# -- the end -------------------------------------------------------------------------------------------------------


def ending(opened, grace: float):
    return serving(scripted(opened, "word " * 80, pause=0.05), Limits(max_batch=4), grace=grace)


def lines_of(running, lines: list[str]) -> threading.Thread:
    """Read a stream into `lines`, beside the caller."""

    def read() -> None:
        url = f"{running.url}/v1/completions"
        with httpx.stream("POST", url, json={**BODY, "stream": True}, timeout=60) as answer:
            lines.extend(line for line in answer.iter_lines() if line)

    thread = threading.Thread(target=read)
    thread.start()
    return thread


@pytest.mark.parametrize("how", ["the grace ends", "a second signal"])
def test_at_the_end_everyone_is_told(opened, how, capsys):
    """The plain request gets 503, the stream an error and [DONE], the half-sent request 503 at once."""
    lines: list[str] = []
    with ending(opened, grace=0.5 if how == "the grace ends" else 60) as running, ThreadPoolExecutor(1) as pool:
        stream = lines_of(running, lines)
        plain = pool.submit(httpx.post, f"{running.url}/v1/completions", json=BODY, timeout=60)
        half = connect(running)
        half.sendall(HEAD + b"Content-Length: 99\r\n\r\n{")
        wait_for(lambda: running.scheduler.running == 2 and len(running.server.server_state.connections) == 3)
        running.server.handle_exit(signal.SIGTERM, None)
        assert received(half).startswith(b"HTTP/1.1 503 ")
        if how == "a second signal":
            running.server.handle_exit(signal.SIGTERM, None)
        answer = plain.result(30)
        stream.join(30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_closed")
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "server_closed"
    assert capsys.readouterr().err == ""


@contextmanager
def process_serving(folder: Path, *options: str):
    """The command in a process of its own; its address, and the process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", "serve", str(folder), "--port", "0", *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128)),
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline()).group()
        process.stderr.readline()
        yield url, process
    finally:
        watchdog.cancel()
        process.kill()


def filled(host: str, port: int) -> list[socket.socket]:
    """Connections to a server that accepts none, until the kernel takes no more."""
    held = []
    with suppress(OSError):
        while len(held) < 1000:
            held.append(socket.create_connection((host, port), timeout=0.2))
    return held


def test_the_process_survives_a_flood_and_ends_without_a_word_too_many(tiny_untied_folder):
    """All connections that the kernel holds against 128 files, then two signals while half a request is there."""
    with process_serving(tiny_untied_folder, "--name", "mine") as (url, process):
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "mine"
        host, port = url.removeprefix("http://").split(":")
        for _ in range(2):
            process.send_signal(signal.SIGSTOP)  # so that all of them come at once
            held = filled(host, int(port))
            process.send_signal(signal.SIGCONT)
            wait_for(lambda: httpx.get(f"{url}/health", timeout=30).status_code == 503)
            for connection in held:
                connection.close()
            wait_for(lambda: httpx.get(f"{url}/health", timeout=30).status_code == 200)
            assert len(held) > 100
        with socket.create_connection((host, int(port))) as half:
            half.sendall(HEAD + b"Content-Length: 99\r\n\r\n{")
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            assert received(half).startswith(b"HTTP/1.1 503 ")
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (0, "", "Stopped.")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("outputs/my-run", "my-run"),
        ("/a/b/c/", "c"),
        ("hf:Qwen/Qwen2-0.5B@main", "Qwen2-0.5B"),
        ("model.gguf", "model.gguf"),
        (".", Path.cwd().name),
        ("/", "model"),
    ],
)
def test_a_model_is_called_by_a_name_never_a_path(model, name):
    assert default_name(model) == name
