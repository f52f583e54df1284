"""Bodies of requests drawn over what the server takes: right values, wrong ones, and any JSON, for hypothesis."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from finetune.serve.protocol import ChatBody, CompletionBody

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_CONTENT = st.text(max_size=60) | st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=9)})
)
_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "developer", "tool"]), "content": _CONTENT}
)
_TOOL = st.builds(
    lambda name, parameters: {"type": "function", "function": {"name": name, "parameters": parameters}},
    st.text(max_size=8),
    JSON,
)
_SCHEMA = st.sampled_from([{"type": "integer"}, {"enum": [1, "a"]}, {"type": "strin"}, {}, {"not": {}}]) | JSON
RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "model": st.just("tiny"),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "max_tokens": st.integers(1, 6),
    "max_completion_tokens": st.integers(1, 6),
    "min_tokens": st.integers(0, 6),
    "temperature": st.floats(0, 3),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(0, 50),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.5, 2),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "seed": st.integers(-(2**63), 2**63),
    "n": st.integers(1, 3),
    "stop": st.text(min_size=1, max_size=4) | st.lists(st.text(min_size=1, max_size=4), max_size=4),
    "stop_token_ids": st.lists(st.integers(0, 300), max_size=4),
    "ignore_eos": st.booleans(),
    "logit_bias": st.dictionaries(st.integers(0, 300).map(str), st.integers(-100, 100), max_size=4),
    "messages": st.lists(_MESSAGE, min_size=1, max_size=4),
    "tools": st.lists(_TOOL, max_size=2),
    "tool_choice": st.sampled_from(["auto", "none", "required"]),
    "parallel_tool_calls": st.booleans(),
    "logprobs": st.booleans() | st.integers(0, 20),
    "top_logprobs": st.integers(0, 20),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}])
    | st.builds(lambda schema: {"type": "json_schema", "json_schema": {"schema": schema}}, _SCHEMA),
    "chat_template_kwargs": st.dictionaries(st.text(max_size=8), JSON, max_size=2),
    "prompt": st.text(max_size=60)
    | st.lists(st.text(max_size=20), max_size=4)
    | st.lists(st.integers(0, 300), max_size=20)
    | st.lists(st.lists(st.integers(0, 300), max_size=9), max_size=4),
    "echo": st.booleans(),
    "user": st.text(max_size=9),
}
PATHS = {"/v1/chat/completions": ChatBody, "/v1/completions": CompletionBody}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A path and a body for it: mostly right values, now and then any JSON, a key too many or one too few."""
    path = draw(st.sampled_from(list(PATHS)))
    names = [name for name in RIGHT if name in PATHS[path].model_fields or name == "user"]
    needed = {"model", "messages" if "chat" in path else "prompt"}
    chosen = set(draw(st.lists(st.sampled_from(names), max_size=6))) | needed
    body = {name: draw(RIGHT[name]) for name in sorted(chosen)}
    if draw(st.booleans()):
        body[draw(st.sampled_from(names))] = draw(JSON)
    if draw(st.integers(0, 9)) == 0:
        body[draw(st.text(max_size=9))] = draw(JSON)
    if draw(st.integers(0, 19)) == 0:
        del body[draw(st.sampled_from(sorted(body)))]
    return path, body


def swollen(body: dict[str, Any], name: str, size: int) -> bytes:
    """The body with one value repeated until the whole has about `size` bytes."""
    value = body[name]
    one = len(json.dumps(value)) + 2
    times = max(1, size // one)
    if isinstance(value, str):
        grown: Any = value * times or "x" * size
    elif isinstance(value, list):
        grown = value * times or [value] * times
    elif isinstance(value, dict):
        grown = {f"{i}": value for i in range(size // (one + 10))}
    else:
        grown = [value] * times
    return json.dumps({**body, name: grown}).encode()[: 8 * 1024 * 1024]


def check(path: str, status: int, text: str, documented: dict[str, Any]) -> None:
    """The answer is one that /openapi.json has for the path, in its form."""
    assert str(status) in documented["paths"][path]["post"]["responses"] and status < 500, (status, text[:500])
    if status != 200:
        error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 1000
    elif text.startswith("data: "):
        assert text.endswith("data: [DONE]\n\n") and '"error"' not in text[:20]
    else:
        assert json.loads(text)["choices"]
