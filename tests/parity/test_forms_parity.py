"""Rows of every form and masks by every name against transformers and TRL: ids and labels."""

from __future__ import annotations

import json
import random
import shutil

import pytest

from finetune.chat.tokenizer import Tokenizer
from finetune.rows.block import Block
from finetune.rows.encode import Encoder, Settings, Task
from tests.parity.bench import SHAPE, conversations, needs_reference, preferences, run_reference, write_rows
from tests.tiny import CHATML, tiny_model

pytestmark = [needs_reference, pytest.mark.timeout(900)]

# Qwen2's template with transformers' markers around what is trained on: content and <|im_end|>, unless a turn says not
MARKED = CHATML.replace(
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' and message.train != false %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}",
)
TEXTS = ["hi", "What is the sum of 12 and 30?", "天气很好 naïve 🙂", " two  spaces ", "", "ends<|im_end|>", "a\nb\n"]
MASKS = ("train", "loss", "training", "weight")
SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system"}


def reference_rows() -> list[dict]:
    """Rows as the peers have them."""
    rows = [{"form": "text", "text": text} for text in TEXTS if text]
    # Ends of prompts where a token may join them with the completion
    ends = [("The sum is", " 42"), ("the s", "um of"), ("a  ", " b"), ("", "all of it"), ("q", ""), ("ab\n", "\ncd")]
    rows += [{"form": "prompt_completion", "prompt": prompt, "completion": answer} for prompt, answer in ends]
    draw = random.Random(5)
    for row in conversations(60, seed=2):
        turns = [
            {**turn, "train": draw.random() < 0.6} if turn["role"] == "assistant" else turn for turn in row["messages"]
        ]
        rows.append({"form": "messages", "messages": turns})
    for row in preferences(40, seed=3):
        sides = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        rows.append(
            {"form": "pair", "chosen": row["prompt"] + sides["chosen"], "rejected": row["prompt"] + sides["rejected"]}
        )
    return rows


def as_ours(row: dict, number: int) -> list[tuple[str, dict]]:
    """(method, row) in each form of ours that says the same."""
    if row["form"] in ("text", "prompt_completion"):
        return [("sft", {key: value for key, value in row.items() if key != "form"})]
    if row["form"] == "pair":
        prompt, (good, bad) = row["chosen"][:-1], (row[side][-1:] for side in ("chosen", "rejected"))
        return [
            ("dpo", {"chosen": row["chosen"], "rejected": row["rejected"]}),
            ("dpo", {"prompt": prompt, "chosen": good, "rejected": bad}),
            ("dpo", {"messages": row["chosen"], "rejected_response": bad[0]["content"]}),
            ("dpo", {"messages": row["chosen"], "rejected_messages": row["rejected"]}),
            ("dpo", {"conversations": sharegpt(prompt), "chosen": sharegpt(good)[0], "rejected": sharegpt(bad)[0]}),
        ]
    mask = MASKS[number % len(MASKS)]
    turns = [{mask if key == "train" else key: value for key, value in turn.items()} for turn in row["messages"]]
    if mask == "weight":
        turns = [{**turn, "weight": int(turn["weight"])} if "weight" in turn else turn for turn in turns]
    split = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    return [
        ("sft", {"messages": turns}),
        ("sft", {"conversations": turns}),
        ("sft", {"conversations": sharegpt(turns)}),
        ("sft", {"prompt": turns[:split], "completion": turns[split:]}),
    ]


def sharegpt(turns: list[dict]) -> list[dict]:
    """The same turns as ShareGPT has them."""
    return [
        {"from": SHAREGPT[t["role"]], "value": t["content"], **{k: v for k, v in t.items() if k in MASKS}}
        for t in turns
    ]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(tokenizer, answer) of a folder as it is, and of one whose post-processor puts a BOS before plain text."""
    work = tmp_path_factory.mktemp("forms")
    plain = tiny_model(work / "plain", shape=SHAPE)
    with_bos = work / "bos"
    shutil.copytree(plain, with_bos)
    written = json.loads((with_bos / "tokenizer.json").read_text(encoding="utf-8"))
    bos = next(token for token in written["added_tokens"] if token["content"] == "<|endoftext|>")["id"]
    written["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [bos], "tokens": ["<|endoftext|>"]}},
    }
    (with_bos / "tokenizer.json").write_text(json.dumps(written), encoding="utf-8")
    config = json.loads((with_bos / "tokenizer_config.json").read_text(encoding="utf-8"))
    (with_bos / "tokenizer_config.json").write_text(
        json.dumps(config | {"bos_token": "<|endoftext|>"}), encoding="utf-8"
    )
    rows = write_rows(work / "rows.jsonl", reference_rows())
    jobs = {
        folder.name: {"model": str(folder), "rows": str(rows), "plain": TEXTS, "template": MARKED}
        for folder in (plain, with_bos)
    }
    answers = run_reference("ref_forms.py", jobs, work)
    return {name: (Tokenizer.from_folder(work / name), answer) for name, answer in answers.items()}


@pytest.mark.parametrize("name", ["plain", "bos"])
def test_plain_text_has_the_ids_of_transformers(compared, name):
    tokenizer, answer = compared[name]
    assert [tokenizer(text).input_ids for text in TEXTS] == answer["plain"]
    assert [tokenizer.encode(text) for text in TEXTS] == answer["plain"]
    assert (len(answer["plain"][0]) > len(tokenizer.encode("hi", add_special_tokens=False))) == (name == "bos")


@pytest.mark.parametrize("name", ["plain", "bos"])
def test_ids_and_labels_of_every_form(compared, name):
    tokenizer, answer = compared[name]
    wrong, count = [], 0
    for number, (row, theirs) in enumerate(zip(reference_rows(), answer["rows"], strict=True)):
        for method, ours in as_ours(row, number):
            settings = Settings(method, max_length=10_000, overlong="error", train_on="responses")
            task = Task(Block(1, 1, "rows", [ours]), 0, 0, "f", "auto")
            result = Encoder(tokenizer, settings).encode(task)
            assert not result.faults.count, result.faults.first
            count += 1
            if result.part is None:  # nothing of it is trained on
                assert method == "sft" and set(theirs["labels"][1:]) == {-100}
                continue
            found = [
                {"input_ids": example.input_ids.tolist(), "labels": example.labels.tolist()}
                for example in (side.example(0, "f:1") for side in result.part.sides)
            ]
            if found != ([theirs] if method == "sft" else [theirs["chosen"], theirs["rejected"]]):
                wrong.append((row, ours, found, theirs))
    print(f"\n{count} rows compared, {len(wrong)} differ")
    assert not wrong, wrong[0]
