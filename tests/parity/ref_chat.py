"""Reference ids and masks by transformers, for test_chat_parity. Runs in the reference venv; imports nothing of ours.

    python ref_chat.py TOKENIZER_FOLDER TEMPLATE.jinja|- DATASETS_FOLDER CASES.jsonl OUTPUT.jsonl

Rows are read here independently of the toolkit. The mask comes from transformers' own {% generation %} tracking on a
marked variant of the template, which must render the same text as the template itself.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from transformers import AutoTokenizer

MARKED_QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
TURN = """        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"""
MARKED_TURN = """        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.role == "assistant" %}
            {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
        {%- else %}
            {{- message.content + '<|im_end|>' }}
        {%- endif %}
        {{- '\\n' }}"""
CALL_HEAD = """        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}"""
MARKED_CALL_HEAD = """        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- generation %}
        {%- if message.content %}
            {{- message.content + '\\n' }}
        {%- endif %}"""
CALL = """            {{- '\\n<tool_call>\\n{"name": "' }}"""
MARKED_CALL = """            {%- if not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' }}"""
CALL_END = """        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}"""
MARKED_CALL_END = """        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == "tool" %}"""


def marked(template: str) -> str:
    """The template with {% generation %} around each response."""
    if "tool_calls" not in template:
        return MARKED_QWEN2
    changes = ((TURN, MARKED_TURN), (CALL_HEAD, MARKED_CALL_HEAD), (CALL, MARKED_CALL), (CALL_END, MARKED_CALL_END))
    for old, new in changes:
        if template.count(old) != 1:
            raise SystemExit(f"the template has no single {old!r}")
        template = template.replace(old, new)
    return template


def rows(datasets: Path, cases: Path, knows_tools: bool):
    """(name, messages, tools, how many last messages are trained on or None for all) of everything compared."""
    if (datasets / "alpaca_en_demo.json").is_file():
        yield from alpaca(json.loads((datasets / "alpaca_en_demo.json").read_text()))
        yield from glaive(json.loads((datasets / "glaive_toolcall_en_demo.json").read_text()), knows_tools)
        yield from dpo(json.loads((datasets / "dpo_en_demo.json").read_text()))
    for line in cases.read_text(encoding="utf-8").split("\n"):
        case = json.loads(line)
        yield case["name"], case["messages"], case["tools"], None


def alpaca(data):
    for i, row in enumerate(data, 1):
        asked = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
        yield f"alpaca:{i}", messages, None, None


def glaive(data, knows_tools: bool):
    roles = {"human": "user", "gpt": "assistant", "observation": "tool", "system": "system"}
    for i, row in enumerate(data, 1):
        messages = []
        for turn in row["conversations"]:
            if turn["from"] == "function_call" and knows_tools:
                calls = json.loads(turn["value"])
                calls = calls if isinstance(calls, list) else [calls]
                messages.append(
                    {"role": "assistant", "tool_calls": [{"type": "function", "function": c} for c in calls]}
                )
            else:
                messages.append({"role": roles.get(turn["from"], "assistant"), "content": turn["value"]})
        tools = json.loads(row["tools"]) if row.get("tools") else None
        tools = [{"type": "function", "function": tool} for tool in tools] if tools else None
        yield f"glaive:{i}", messages, tools, None


def dpo(data):
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    for i, row in enumerate(data, 1):
        prompt = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        for side in ("chosen", "rejected"):
            yield f"dpo:{i}:{side}", [*prompt, {"role": "assistant", "content": row[side]["value"]}], None, 1


def main(folder: str, template: str, datasets: str, cases: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if template != "-":
        tokenizer.chat_template = Path(template).read_text()
    with_marks = marked(tokenizer.chat_template)
    seconds = 0.0
    with open(output, "w", encoding="utf-8") as file:
        for name, messages, tools, last in rows(Path(datasets), Path(cases), "tool_calls" in tokenizer.chat_template):
            began = time.perf_counter()
            text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
            ids = tokenizer.apply_chat_template(messages, tools=tools)["input_ids"]
            seconds += time.perf_counter() - began
            out = tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=with_marks, return_assistant_tokens_mask=True
            )
            if tokenizer.apply_chat_template(messages, tools=tools, chat_template=with_marks, tokenize=False) != text:
                raise SystemExit(f"{name}: the marked template renders another text")
            mask = out["assistant_masks"]
            if last:
                before = tokenizer.apply_chat_template(messages[:-last], tools=tools, add_generation_prompt=True)
                mask = [0] * (len(before["input_ids"]) - 1) + mask[len(before["input_ids"]) - 1 :]
            header = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True)["input_ids"]
            file.write(json.dumps({"name": name, "text": text, "ids": ids, "mask": mask, "prompted": header}) + "\n")
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
