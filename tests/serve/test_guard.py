"""Names, origins and framing, as a browser, a page that forges its name, and a proxy would send them."""

from __future__ import annotations

import http.client
import json
import socket

import httpx
import pytest

from finetune.errors import ArgumentError
from finetune.infer.open import open_model
from finetune.serve.guard import Access
from tests.infer.scripted import serving, wait_for

ORIGIN = "http://my.page:3000"


@pytest.fixture(scope="module")
def server(tiny_untied_folder):
    access = Access.of("127.0.0.1", hosts=["my.server"], origins=[ORIGIN], api_key=None)
    with serving(open_model(str(tiny_untied_folder)), access=access, verbose=True) as running:
        yield running


def ask(server, **headers) -> httpx.Response:
    return httpx.get(f"{server.url}/v1/models", headers=headers)


@pytest.mark.parametrize(
    "host", ["localhost:8000", "127.0.0.1", "127.1.2.3:1", "[::1]:8000", "My.Server:80", "my.server"]
)
def test_names_of_the_server_are_answered(server, host):
    assert ask(server, host=host).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "192.168.0.1", "", "[::2]:80"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics", "/nothing"])
def test_another_name_is_refused_everywhere(server, host, path):
    """A page whose own name resolves to 127.0.0.1 sends that name."""
    answer = httpx.get(server.url + path, headers={"host": host})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed"


def test_a_page_of_another_origin_is_refused_and_an_allowed_one_may_read(server):
    for origin in (
        "http://evil.example",
        "null",
        "http://localhost:9",
        "http://my.page",
        ORIGIN.replace("http:", "https:"),
    ):
        answer = ask(server, origin=origin)
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in answer.headers
    assert ask(server, origin=ORIGIN).headers["access-control-allow-origin"] == ORIGIN
    assert ask(server, origin=server.url).status_code == 200, "the server's own page"
    asked = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    assert httpx.options(f"{server.url}/v1/chat/completions", headers=asked).status_code == 200
    asked["origin"] = "http://evil.example"
    assert httpx.options(f"{server.url}/v1/chat/completions", headers=asked).status_code == 403


def test_any_name_is_taken_beyond_loopback_unless_some_are_given():
    anywhere = Access.of("0.0.0.0", hosts=[], origins=[], api_key="k")
    assert anywhere.knows_host("any.name:80")
    named = Access.of("0.0.0.0", hosts=["my.server"], origins=["*"], api_key="k")
    assert named.knows_host("my.server:80") and named.knows_host("localhost") and not named.knows_host("any.name")
    assert named.knows_origin("http://any.page", "my.server")


@pytest.mark.parametrize(
    ("hosts", "origins"), [(["http://a.b"], []), (["a.b:80"], []), ([""], []), ([], ["a.b"]), ([], ["http://a.b/"])]
)
def test_an_option_that_is_no_host_or_origin_is_refused(hosts, origins):
    with pytest.raises(ArgumentError, match="--allowed-"):
        Access.of("127.0.0.1", hosts=hosts, origins=origins, api_key=None)


def test_two_lengths_are_refused_and_the_connection_closed(server):
    """Content-Length and Transfer-Encoding: what follows must not be taken for a request."""
    host, port = server.url.removeprefix("http://").split(":")
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    assert received.startswith(b"HTTP/1.1 400 ") and received.count(b"HTTP/1.1") == 1
    assert "Transfer-Encoding" in json.loads(received.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_control_characters_of_a_path_do_not_reach_the_log(server, capsys):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    connection.request("GET", "/v1/%1b%5b2J%0d%0aforged%c2%9b%e2%80%ae" + "x" * 3000)
    assert connection.getresponse().status == 404
    said = ""

    def is_logged() -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return "\\x1b[2J" in said

    wait_for(is_logged)
    assert len(said) < 1000
    assert not {"\x1b", "\r", "\x9b", "\u202e"} & set(said)


def test_what_is_no_http_is_refused_in_json(server, capsys):
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(20):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
            received = connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 400 ") and b'{"error"' in received
    assert capsys.readouterr().err == ""
