"""JSON files of strangers: read and written back."""

from __future__ import annotations

import json

import pytest

from finetune.files import json_text, nearest, read_json, write_json


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


def test_a_name_that_is_right_is_not_suggested_instead_of_itself():
    known = ["Qwen/Qwen2-7B", "Qwen/Qwen2-7B-Instruct"]
    assert nearest("Qwen/Qwen2-7B-Instruct", known) == ""
    assert nearest("Qwen/Qwen2-7B-Instrct", known) == "Did you mean 'Qwen/Qwen2-7B-Instruct'?"
    assert nearest("somebody/other", known) == ""
