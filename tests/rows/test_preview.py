from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

import finetune.rows.preview
from finetune.rows.preview import preview
from tests.chat.cases import said
from tests.chat.conftest import From, Settings


@pytest.fixture
def recipe(tokenizer, write, tmp_path, monkeypatch):
    """A recipe over a few rows; the model's folder has only a tokenizer."""
    tokenizer.save(tmp_path / "model")
    source = SimpleNamespace(tokenizer_folder=tmp_path / "model", config=SimpleNamespace(vocab_size=len(tokenizer)))
    monkeypatch.setattr(finetune.rows.preview, "resolve_model", lambda name: source)
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def make(*rows: dict, method="sft", **data):
        path = write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        settings = Settings(**data)
        settings.train = [From(path)]
        return SimpleNamespace(method=method, model=SimpleNamespace(path="m"), data=settings), path

    return make


CHAT = {"messages": said("q", "[bold]a[/bold] 你好\x1b[31m")}
PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}


def test_json_rows(recipe, tokenizer, capsys):
    made, path = recipe(CHAT, CHAT)
    preview(made, None, as_json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["source"] for row in rows] == [f"{path}:1", f"{path}:2"]
    assert set(rows[0]) == {"source", "input_ids", "labels"}
    assert rows[0]["input_ids"] == tokenizer.apply_chat_template(CHAT["messages"])
    assert len(rows[0]["labels"]) == len(rows[0]["input_ids"])
    trained = [label for label in rows[0]["labels"] if label != -100]
    assert tokenizer.decode(trained) == CHAT["messages"][1]["content"] + "<|im_end|>"


def test_json_pairs(recipe, tokenizer, capsys):
    made, path = recipe(PAIR, method="dpo")
    preview(made, None, as_json=True)
    row = json.loads(capsys.readouterr().out)
    assert set(row) == {"source", "chosen", "rejected"}
    for side, answer in (("chosen", "good"), ("rejected", "bad")):
        assert set(row[side]) == {"input_ids", "labels"}
        assert tokenizer.decode([x for x in row[side]["labels"] if x != -100]) == f"{answer}<|im_end|>"
        assert len(row[side]["labels"]) == len(row[side]["input_ids"])


def test_notes_of_a_json_preview_go_to_stderr(recipe, capsys):
    made, _ = recipe(CHAT, {"messages": said("q")})
    preview(made, None, as_json=True)
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    assert "no supervised token" in captured.err


def test_text_without_colour_has_brackets(recipe, capsys):
    made, path = recipe(CHAT, CHAT, CHAT)
    preview(made, 1)
    out = capsys.readouterr().out
    assert out.startswith("⟦trained on⟧  seen only\n")
    assert f"── {path}:1 · " in out and "rows.jsonl:2" not in out
    assert "<|im_start|>assistant\n⟦[bold]a[/bold] 你好␛[31m<|im_end|>⟧\n" in out
    assert "\x1b" not in out


def test_text_has_no_control_characters_of_latin_1(recipe, capsys):
    made, _ = recipe({"messages": said("q", "a\x9b31mb\x85c\xa0d")})
    preview(made, 1)
    assert "⟦a\\x9b31mb\\x85c\xa0d<|im_end|>⟧" in capsys.readouterr().out


def test_text_with_colour(recipe, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    made, _ = recipe(CHAT)
    preview(made, 1)
    out = capsys.readouterr().out
    assert "\x1b[" in out and "⟦" not in out and "␛[31m" in out


def test_text_of_a_pair(recipe, capsys):
    made, path = recipe(PAIR, method="dpo")
    preview(made, 1)
    out = capsys.readouterr().out
    assert out.count("You are a helpful assistant.") == 1
    assert "⟦good<|im_end|>⟧" in out and "⟦bad<|im_end|>⟧" in out
    assert "5 trained on" in out and "4 trained on" in out
