"""The terminal chat, driven through a pipe."""

from __future__ import annotations

import io
import json

import pytest

from finetune.errors import DataError
from finetune.infer.chat import COMMANDS, Talk, chat
from finetune.infer.open import open_model
from finetune.infer.sampling import Sampling


@pytest.fixture(scope="module")
def opened(tiny_untied_folder):
    return open_model(str(tiny_untied_folder))


@pytest.fixture
def talk(opened, monkeypatch, capsys):
    """Feed lines to the chat; returns what went to stdout and stderr."""
    monkeypatch.setattr("finetune.infer.chat.open_model", lambda model, *_, **__: opened)

    def run(*lines: str, **settings):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        chat("tiny", max_new_tokens=8, **settings)
        return capsys.readouterr()

    return run


def test_answers_go_to_stdout_and_the_rest_to_stderr(talk):
    said = talk("Hello", "/nonsense", "/exit", "not read")
    assert said.out.count("\n") >= 1
    assert "/nonsense" in said.err and "/nonsense" not in said.out


def test_save_appends_training_rows(talk, tmp_path):
    path = tmp_path / "talk.jsonl"
    talk("One", "Two", f"/save {path}", "/reset", "Three", f"/save {path}", "/undo", f"/save {path}", system="Be kind.")
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert [[message["role"] for message in row] for row in rows] == [
        ["system", "user", "assistant", "user", "assistant"],
        ["system", "user", "assistant"],
    ]
    assert rows[0][0]["content"] == "Be kind."
    from finetune.rows.formats import parse_row

    assert len(parse_row({"messages": rows[0]}, "auto", "f:1").messages) == 5


def test_undo_and_system(talk, tmp_path):
    path = tmp_path / "talk.jsonl"
    talk("One", "/system New one.", "Two", "Three", "/undo", f"/save {path}", "/system", "Four", f"/save {path}")
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert [message["content"] for message in rows[0] if message["role"] != "assistant"] == ["New one.", "Two"]
    assert [message["content"] for message in rows[1] if message["role"] != "assistant"] == ["Four"]


def test_retry_with_a_seed_draws_again_but_repeatably(talk):
    first = talk("Hello", "/retry", temperature=1.5, seed=1).out
    assert talk("Hello", "/retry", temperature=1.5, seed=1).out == first
    answer, again = talk("Hello", temperature=1.5, seed=1).out, first
    assert again.startswith(answer.rstrip("\n")) and again != answer * 2


def test_a_chat_draws_unless_it_is_told_otherwise(talk, opened, monkeypatch):
    def settings(*lines: str, **flags) -> str:
        return talk(*lines, "/temperature", **flags).err.splitlines()[-1]

    assert settings() == "Answers are drawn at temperature 0.7."
    assert settings(temperature=1.5, top_k=40) == "Answers are drawn at temperature 1.5, top-k 40."
    assert settings(top_p=0.9) == "Answers are drawn at temperature 0.7, top-p 0.9."
    assert settings(temperature=0) == "Answers are drawn at temperature 0 (always the likeliest token)."
    monkeypatch.setitem(opened.generation_config, "do_sample", True)
    for name, value in {"temperature": 0.2, "top_k": 20, "top_p": 0.8}.items():
        monkeypatch.setitem(opened.generation_config, name, value)
    assert settings() == "Answers are drawn at temperature 0.2, top-p 0.8, top-k 20."
    assert settings(temperature=0.4) == "Answers are drawn at temperature 0.4, top-p 0.8, top-k 20."


def test_temperature_and_seed_are_set_in_the_chat(talk):
    likeliest = talk("Hello", temperature=0).out
    assert talk("/temperature 0", "Hello").out == likeliest
    assert (
        talk("/temperature 0", "/temperature 1.5", "/seed 1", "Hello").out == talk("Hello", temperature=1.5, seed=1).out
    )
    # A seed holds from where it is set, whatever was said before.
    said = talk("/temperature 1.5", "/seed 1", "Hello", "/reset", "/seed 1", "Hello").out
    assert said == talk("Hello", temperature=1.5, seed=1).out * 2
    assert "seed" not in talk("/seed 4", "/seed", "/temperature").err.splitlines()[-1]


def test_retry_is_another_answer(talk):
    once = talk("/seed 3", "Hello").out
    twice = talk("/seed 3", "Hello", "/retry").out
    assert twice.startswith(once) and twice != once * 2
    said = talk("/temperature 0", "Hello", "/retry")
    assert "the same again" in said.err and said.out == talk("Hello", temperature=0).out * 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/temperature hot", "/temperature: 'hot' is not a number"),
        ("/temperature -1", "temperature is -1"),
        ("/seed 1.5", "/seed: '1.5' is not a whole number"),
        ("/temprature 1", "There is no /temprature. Did you mean /temperature?"),
    ],
)
def test_a_slip_is_said_and_changes_nothing(talk, line, words):
    said = talk(line, "/temperature").err
    assert words in said and said.endswith("Answers are drawn at temperature 0.7.\n")


def test_help_lists_every_command(talk):
    said = talk("/help").err
    listed = [line.split()[0] for line in said.splitlines()]
    assert listed == [*COMMANDS, "/exit"] and all(len(line) <= 79 for line in said.splitlines())


def test_what_cannot_be_done_is_said(talk):
    said = talk("/undo", "/retry", "/save", "/save x.jsonl", "/help")
    assert said.out == ""
    for words in ("nothing to take back", "nothing to answer again", "Name a file", "no answer to save", "/retry  "):
        assert words in said.err


def test_oldest_turns_make_room_and_the_system_message_stays(opened):
    turns = [
        message
        for i in range(40)
        for message in ({"role": "user", "content": f"q{i} word"}, {"role": "assistant", "content": f"a{i} word"})
    ]
    talk = Talk(opened, Sampling(max_new_tokens=64), "", [{"role": "system", "content": "Sys."}, *turns[:-1]])
    ids, dropped = talk.prompt()
    text = opened.tokenizer.decode(ids)
    assert len(ids) <= 512 - 64 and dropped > 0
    assert "Sys." in text and "q39" in text and "q0 " not in text
    assert f"q{dropped} " in text and f"q{dropped - 1} " not in text
    with pytest.raises(DataError, match="too long"):
        Talk(opened, Sampling(max_new_tokens=64), "", [{"role": "user", "content": "word " * 600}]).prompt()


def test_a_message_that_does_not_fit_is_taken_back(talk, tmp_path):
    said = talk("word " * 600, "Hello", f"/save {tmp_path / 't.jsonl'}")
    assert "too long" in said.err
    assert len(json.loads((tmp_path / "t.jsonl").read_text())["messages"]) == 2


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(talk, tmp_path, monkeypatch):
    from finetune.infer.engine import Delta, Engine

    def interrupted(self, prompt, sampling):
        yield Delta("Half an")
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "stream", interrupted)
    said = talk("Hello", f"/save {tmp_path / 't.jsonl'}")
    assert said.out == "Half an\n" and "stopped" in said.err
    assert json.loads((tmp_path / "t.jsonl").read_text())["messages"][1]["content"] == "Half an"


@pytest.fixture(scope="module")
def base(tiny_folder):
    return open_model(str(tiny_folder))


@pytest.fixture
def compare(opened, base, monkeypatch, capsys):
    models = {"tuned": opened, "base": base}
    monkeypatch.setattr("finetune.infer.chat.open_model", lambda model, *_, **__: models[model])

    def run(*lines: str, **settings):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        chat("tuned", compare="base", max_new_tokens=8, **settings)
        return capsys.readouterr()

    return run


def test_compare_shows_both_answers_under_their_names(compare, talk, tmp_path):
    path = tmp_path / "t.jsonl"
    out = compare("Hello", "/undo", "Hi", "/retry", f"/save {path}", temperature=0).out
    assert out.count("[base]\n") == out.count("[tuned]\n") == 3
    assert out.index("[base]") < out.index("[tuned]")
    messages = json.loads(path.read_text())["messages"]
    assert [message["content"] for message in messages if message["role"] == "user"] == ["Hi"]
    assert out.endswith(f"[tuned]\n{messages[-1]['content']}\n")
    assert talk("Hi", temperature=0).out == f"{messages[-1]['content']}\n"


def test_compare_keeps_the_talks_together_when_one_cannot_answer(compare, base, opened, monkeypatch, tmp_path):
    monkeypatch.setattr(opened.engine.decoder, "context", 150)
    said = compare("word " * 160, "Hello", f"/save {tmp_path / 't.jsonl'}")
    assert "too long" in said.err
    assert len(json.loads((tmp_path / "t.jsonl").read_text())["messages"]) == 2


def test_compare_side_by_side(opened, base, monkeypatch):
    from finetune.infer import chat as module

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr(module.console, "width", 140)
    monkeypatch.setenv("COLUMNS", "140")
    talks = [Talk(base, Sampling(max_new_tokens=4), "base"), Talk(opened, Sampling(max_new_tokens=6), "tuned")]
    module._ask(talks, "Hello")
    header = next(line for line in screen.getvalue().splitlines() if "base" in line)
    assert header.index("base") < header.index("tuned")
    assert [len(talk.messages) for talk in talks] == [2, 2]
