"""Reading tool calls out of text. Nothing may depend on how the text is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.serve.tool_calls import ToolCall, ToolCallReader

ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
CALL = ToolCall("add", '{"a": 1, "b": [2]}')


def read(text: str, cuts: list[int] = ()) -> list:
    reader, found = ToolCallReader(), []
    for start, end in zip([0, *cuts], [*cuts, len(text)]):
        found += reader.push(text[start:end])
    joined: list = []
    for part in found + reader.finish():
        if joined and isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("plain ", ["plain "]),
        ("", []),
        (ADD, [CALL]),
        (f"\n\n{ADD}\n", [CALL]),
        (f"Let me see.\n{ADD}", ["Let me see.", CALL]),
        (f"{ADD}\n{ADD}", [CALL, CALL]),
        (f"{ADD}\nDone. ", [CALL, "Done. "]),
        (ADD.removesuffix("\n</tool_call>"), [CALL]),
        ("a <tool_call>not json</tool_call> b", ["a <tool_call>not json</tool_call> b"]),
        ('<tool_call>{"name": 3}</tool_call>', ['<tool_call>{"name": 3}</tool_call>']),
        ("a < b <tool_", ["a < b <tool_"]),
        ("a\n<tool_call>\n{", ["a\n<tool_call>\n{"]),
        ('<tool_call>{"name": "now"}</tool_call>', [ToolCall("now", "{}")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', [ToolCall("f", '{"x": 1}')]),
    ],
)
def test_text_and_calls(text, parts):
    assert read(text) == parts
    assert read(text, list(range(1, len(text)))) == parts


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([ADD, " ", "\n", "x", "<", "<tool_call>", "</tool_call>", "{}"]), max_size=8), st.data()
)
def test_pieces_do_not_matter(parts, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    assert read(text, cuts) == read(text)
