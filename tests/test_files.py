"""JSON files of strangers: read and written back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.files import json_text, read_json, replace_file, replacing, write_json

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("text", ["é", "中", "\ud800", "\ud83d and \ude00 apart", "\\ud800", "\0", "😀"])
def test_what_was_read_is_written_and_read_again(tmp_path, text):
    value = {text: [text, {"z": 1, "a": None}]}
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "a.json") == value
    write_json(tmp_path / "b.json", value, sort_keys=False)
    assert read_json(tmp_path / "b.json") == value


def test_characters_stay_readable_and_halves_of_pairs_stay_escapes():
    assert json_text(["é", "\ud800"], indent=None) == '["é", "\\ud800"]\n'


def test_keys_are_sorted_unless_asked_not_to():
    assert json_text({"b": 1, "a": 2}, indent=None) == '{"a": 2, "b": 1}\n'
    assert json_text({"b": 1, "a": 2}, indent=None, sort_keys=False) == '{"b": 1, "a": 2}\n'
    with pytest.raises(ValueError):
        json_text([float("nan")], allow_nan=False)


KILLED = """
import os, signal, sys
from pathlib import Path
from finetune import files

def killed_before(module, name):
    def kill(*args):
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(module, name, kill)

killed_before(*{"fsync": (files.os, "fsync"), "replace": (files.os, "replace"), "sync": (files, "sync")}[sys.argv[2]])
files.replace_file(Path(sys.argv[1]), "new" * 100_000)
"""


@pytest.mark.parametrize(("moment", "found"), [("fsync", "old"), ("replace", "old"), ("sync", "new" * 100_000)])
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one_whole(tmp_path, moment, found):
    path = tmp_path / "[a] b.json"
    path.write_text("old")
    run = subprocess.run([sys.executable, "-c", KILLED, str(path), moment], cwd=ROOT, timeout=60)
    assert run.returncode == -signal.SIGKILL
    assert path.read_text() == found
    replace_file(path, b"next")
    assert path.read_bytes() == b"next"
    assert list(tmp_path.iterdir()) == [path]  # what the killed one left is gone


def test_what_is_written_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    replace_file(tmp_path / "a", "text")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_a_write_that_fails_leaves_everything_as_it_was(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_half_a_surrogate_pair_is_written_as_its_escape(tmp_path):
    replace_file(tmp_path / "a", "\u4e2d\ud800")
    assert (tmp_path / "a").read_bytes() == "\u4e2d".encode() + b"\\ud800"
