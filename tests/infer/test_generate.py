"""The `generate` command, as a function and as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import ArgumentError, DataError
from finetune.infer.generate import generate

ROWS = [
    {"prompt": "Hello there"},
    {"messages": [{"role": "user", "content": "一个人在路上走。"}]},
    {"instruction": "Add", "input": "1 2"},
    {"prompt": "Why? " * 30},
    {"prompt": "a"},
]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return path


def answers(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def finetune(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "finetune", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_rows_come_in_input_order_and_do_not_depend_on_the_batch(tiny_untied_folder, rows, tmp_path):
    for size in (1, 4):
        generate(
            str(tiny_untied_folder), input=rows, output=tmp_path / f"{size}.jsonl", max_new_tokens=12, batch_size=size
        )
    found = answers(tmp_path / "1.jsonl")
    assert found == answers(tmp_path / "4.jsonl")
    assert [list(row) for row in found] == [["prompt", "response", "tokens", "finish_reason"]] * len(ROWS)
    assert [row["prompt"] for row in found][:2] == ["Hello there", ROWS[1]["messages"]]
    assert {row["finish_reason"] for row in found} <= {"stop", "length"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.jsonl", "4.jsonl", "rows.jsonl"]


def test_windows_do_not_change_the_answers(tiny_untied_folder, rows, tmp_path, monkeypatch):
    draw = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    generate(str(tiny_untied_folder), input=rows, output=tmp_path / "whole.jsonl", **draw)
    monkeypatch.setattr("finetune.infer.generate.WINDOW", 2)
    generate(str(tiny_untied_folder), input=rows, output=tmp_path / "parts.jsonl", **draw)
    assert answers(tmp_path / "whole.jsonl") == answers(tmp_path / "parts.jsonl")


def test_equal_prompts_draw_differently_with_one_seed(tiny_untied_folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n' * 3)
    generate(
        str(tiny_untied_folder),
        input=tmp_path / "rows.jsonl",
        output=tmp_path / "out.jsonl",
        max_new_tokens=10,
        temperature=1.5,
        seed=1,
    )
    assert len({tuple(row["tokens"]) for row in answers(tmp_path / "out.jsonl")}) == 3


def test_nothing_is_written_when_the_work_stops_halfway(tiny_untied_folder, rows, tmp_path, monkeypatch):
    from finetune.infer.engine import Engine

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "generate", fail)
    (tmp_path / "out.jsonl").write_text("old\n")
    with pytest.raises(KeyboardInterrupt):
        generate(str(tiny_untied_folder), input=rows, output=tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "old\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "nothing to answer"),
        ({"prompt": "a", "input": "rows.jsonl"}, "both"),
        ({"prompt": "a", "raw": True, "system": "b"}, "--system"),
        ({"prompt": "a", "batch_size": 0}, "--batch-size"),
        ({"prompt": "a", "top_p": 2.0}, "top_p"),
        ({"input": "missing.jsonl"}, "no such file"),
        ({"prompt": "a", "output": "."}, "folder"),
    ],
)
def test_wrong_arguments_are_named(tiny_folder, arguments, words):
    with pytest.raises(ArgumentError, match=words):
        generate(str(tiny_folder), **arguments)


def test_the_output_must_not_be_the_input(tiny_folder, rows):
    with pytest.raises(ArgumentError, match="same file"):
        generate(str(tiny_folder), input=rows, output=rows)


def test_bad_rows_are_found_before_weights_load(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.infer.generate.open_model", None)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": 1}\n')
    with pytest.raises(DataError, match="rows.jsonl:2"):
        generate(str(tiny_folder), input=tmp_path / "rows.jsonl")


def test_a_process_prints_the_answer_and_nothing_else(tiny_folder):
    done = finetune("generate", tiny_folder, "--prompt", "Hello", "--max-new-tokens", "8", "--raw")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n") and len(done.stdout) > 1


def test_a_process_answers_a_file_and_refuses_a_bad_one(tiny_folder, rows, tmp_path):
    done = finetune(
        "generate", tiny_folder, "--input", rows, "--output", tmp_path / "out.jsonl", "--max-new-tokens", "5"
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert len(answers(tmp_path / "out.jsonl")) == len(ROWS)
    rows.write_text("nonsense\n")
    done = finetune("generate", tiny_folder, "--input", rows)
    assert done.returncode == 2
    assert f"{rows}:1" in done.stderr and "Traceback" not in done.stderr


class Interrupted(Exception):
    """Stands for Ctrl-C, which pytest takes for its own."""


@pytest.fixture
def stop_after(monkeypatch):
    """Let a run end after some answers, as if it were interrupted."""

    def install(answers: int) -> None:
        from finetune.infer.partial import PartialAnswers

        add, left = PartialAnswers.add, [answers]

        def limited(self, row, answer):
            if left[0] == 0:
                raise Interrupted
            left[0] -= 1
            add(self, row, answer)

        monkeypatch.setattr(PartialAnswers, "add", limited)

    yield install


def test_an_interrupted_run_goes_on(tiny_untied_folder, rows, tmp_path, stop_after, monkeypatch, capsys):
    settings = {"input": rows, "max_new_tokens": 8, "temperature": 1.0, "seed": 3, "batch_size": 2}
    generate(str(tiny_untied_folder), output=tmp_path / "whole.jsonl", **settings)
    with monkeypatch.context():
        stop_after(3)
        with pytest.raises(Interrupted):
            generate(str(tiny_untied_folder), output=tmp_path / "out.jsonl", **settings)
    assert not (tmp_path / "out.jsonl").exists()
    assert "3 of 5 answers are kept" in " ".join(capsys.readouterr().err.split())
    sidecar = tmp_path / ".out.jsonl.partial"
    sidecar.write_bytes(sidecar.read_bytes() + b'{"row": 4, "ans')  # cut off while it was written
    monkeypatch.undo()
    stop_after(2)  # the rest and nothing more
    generate(str(tiny_untied_folder), output=tmp_path / "out.jsonl", **{**settings, "batch_size": 4})
    assert "3 of 5 answers are there" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not sidecar.exists()


@pytest.mark.parametrize("changed", ["settings", "input", "model"])
def test_what_changed_starts_over_and_says_so(
    tiny_untied_folder, rows, tmp_path, stop_after, monkeypatch, capsys, changed
):
    import shutil

    model = shutil.copytree(tiny_untied_folder, tmp_path / "model")
    settings = {"input": rows, "output": tmp_path / "out.jsonl", "max_new_tokens": 4}
    stop_after(3)
    with pytest.raises(Interrupted):
        generate(str(model), **settings)
    monkeypatch.undo()
    if changed == "settings":
        settings["max_new_tokens"] = 5
    elif changed == "input":
        rows.write_text(rows.read_text() + '{"prompt": "more"}\n')
    else:
        (model / "generation_config.json").write_text('{"eos_token_id": [402]}')
    generate(str(model), **settings)
    assert f"({changed} changed): starting over" in " ".join(capsys.readouterr().err.split())
    assert len(answers(tmp_path / "out.jsonl")) == (6 if changed == "input" else 5)


def test_answers_beside_the_model_are_gone_on_with(tiny_untied_folder, rows, tmp_path, stop_after, monkeypatch, capsys):
    """The output's own folder may be the model's: what is kept there, and an older output, are no part of the model."""
    import shutil

    model = shutil.copytree(tiny_untied_folder, tmp_path / "model")
    settings = {"input": rows, "output": model / "answers.json", "max_new_tokens": 4}
    stop_after(3)
    with pytest.raises(Interrupted):
        generate(str(model), **settings)
    monkeypatch.undo()
    (model / "answers.json").write_text("of another run")
    (model / ".cache.json").write_text("{}")
    (model / "notes.md").write_text("mine")
    stop_after(2)
    generate(str(model), **settings)
    assert "3 of 5 answers are there" in " ".join(capsys.readouterr().err.split())
    assert len(answers(model / "answers.json")) == 5


@pytest.mark.parametrize("asked", ["prompt", "rows"])
def test_a_pipe_is_written_to_and_stays(tiny_untied_folder, rows, tmp_path, asked):
    """As /dev/null and /dev/stdout."""
    import threading

    place = tmp_path / "place"
    place.mkdir()
    os.mkfifo(place / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((place / "pipe").read_text()), daemon=True)
    reader.start()
    what = {"prompt": "Hello"} if asked == "prompt" else {"input": rows}
    generate(str(tiny_untied_folder), **what, output=place / "pipe", max_new_tokens=2)
    assert (place / "pipe").is_fifo()
    reader.join(10)
    assert len(read[0].splitlines()) == (1 if asked == "prompt" else len(ROWS))
    assert [path.name for path in place.iterdir()] == ["pipe"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_points_to_is_replaced(tiny_untied_folder, rows, tmp_path, there):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "answers.jsonl", tmp_path / "link.jsonl"
    if there:
        target.write_text("old\n")
    link.symlink_to(target)
    generate(str(tiny_untied_folder), input=rows, output=link, max_new_tokens=2)
    assert link.is_symlink() and not target.is_symlink()
    assert len(answers(target)) == len(ROWS)


def test_two_processes_do_not_write_one_output(tiny_untied_folder, rows, tmp_path):
    import fcntl

    with (tmp_path / ".out.jsonl.partial").open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ArgumentError, match="another process"):
            generate(str(tiny_untied_folder), input=rows, output=tmp_path / "out.jsonl", max_new_tokens=2)


def test_bad_rows_are_skipped_and_said(tiny_untied_folder, rows, tmp_path, capsys):
    good = rows.read_text().splitlines()
    rows.write_text("\n".join(["nonsense", *good[:2], '{"prompt": 1}', *good[2:]]))
    generate(str(tiny_untied_folder), input=rows, output=tmp_path / "out.jsonl", max_new_tokens=4, on_bad_row="skip")
    said = " ".join(capsys.readouterr().err.split())
    assert "2 bad rows skipped, 5 are left" in said and f"{rows}:1" in said and f"{rows}:4, key prompt" in said
    assert [row["prompt"] for row in answers(tmp_path / "out.jsonl")][0] == "Hello there"
    assert len(answers(tmp_path / "out.jsonl")) == 5
    rows.write_text("nonsense\n")
    with pytest.raises(DataError, match="not JSON"):
        generate(str(tiny_untied_folder), input=rows, on_bad_row="skip")
