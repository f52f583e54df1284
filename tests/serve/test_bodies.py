"""Any body gets an answer that the server's own description has, and no other: drawn bodies, small ones here.

Bodies of up to 8 MB, thousands of them, are in tests/soak/test_bodies.py.
"""

from __future__ import annotations

import json

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from finetune.infer.open import open_model
from finetune.serve.app import Limits
from tests.infer.scripted import serving
from tests.serve import drawn

HELLO = [{"role": "user", "content": "Hello"}]
HEADERS = {"content-type": "application/json"}


def answered(form: dict, **others) -> dict:
    """A right body with a response_format: few are drawn."""
    return {"model": "tiny", "messages": HELLO, "max_tokens": 8, "response_format": form, **others}


@pytest.fixture(scope="module")
def client(tiny_untied_folder):
    with serving(open_model(str(tiny_untied_folder), pack=True), Limits(max_batch=8, max_queue=16)) as running:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            yield client


@pytest.fixture(scope="module")
def documented(client):
    return client.get("/openapi.json").json()


def test_the_description_names_every_path_and_its_errors(documented):
    assert set(documented["paths"]) == {*drawn.PATHS, "/v1/models", "/v1/models/{model}", "/health", "/metrics"}
    for path in drawn.PATHS:
        post = documented["paths"][path]["post"]
        held = post["requestBody"]["content"]["application/json"]["schema"]
        assert set(held["properties"]) >= {*drawn.PATHS[path].model_fields, "user"}
        assert held["additionalProperties"] is False
        assert set(post["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
        assert {"200", "400", "401", "403", "404", "408", "413", "415", "429", "500", "503"} == set(post["responses"])


def test_the_description_has_the_bounds_of_numbers(client, documented):
    """At a bound a value is right, and beyond it wrong."""
    bounds = 0
    for path, needed in (("/v1/chat/completions", {"messages": HELLO}), ("/v1/completions", {"prompt": "a"})):
        schema = documented["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for name, held in schema["properties"].items():
            for bound, beyond in (("minimum", -1), ("maximum", 1)):
                if bound not in held or name == "max_tokens":  # 0 of them only beside echo
                    continue
                bounds += 1
                limit = int(held[bound]) if held[bound] == int(held[bound]) else held[bound]
                for value, status in ((limit, 200), (limit + beyond, 400)):
                    body = {"model": "tiny", "max_tokens": 1, "logprobs": True, **needed, name: value}
                    if path == "/v1/completions" and name != "logprobs":
                        del body["logprobs"]
                    answer = client.post(path, json=body)
                    assert answer.status_code == status, (name, value, answer.text)
    assert bounds == 2 * 15 + 5


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(drawn.requests())
@example(("/v1/chat/completions", answered({"type": "json_object"})))
@example(("/v1/chat/completions", answered({"type": "json_schema", "json_schema": {"schema": {"enum": [1, "a"]}}})))
@example(("/v1/chat/completions", answered({"type": "text"}, stream=True)))
def test_any_body_gets_a_documented_answer(client, documented, request_):
    path, body = request_
    answer = client.post(path, content=json.dumps(body), headers=HEADERS)
    drawn.check(path, answer.status_code, answer.text, documented)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(drawn.requests(), st.data())
def test_a_body_with_one_value_swollen_gets_one_too(client, documented, request_, data):
    path, body = request_
    name = data.draw(st.sampled_from(sorted(body)))
    answer = client.post(path, content=drawn.swollen(body, name, 50_000), headers=HEADERS)
    drawn.check(path, answer.status_code, answer.text, documented)
    assert client.get("/health").status_code == 200
