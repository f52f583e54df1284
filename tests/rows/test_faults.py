"""Faults of rows: a mistake that many rows share is one line with their number, wherever the rows are done."""

from __future__ import annotations

import json

import pytest

from finetune.errors import DataError, Fault
from finetune.rows.encode import MAX_FAULTS, Faults
from tests.runs import finetune, write_recipe


def fault(row: int, what: str = "no such key") -> Fault:
    return Fault(what, f"rows.jsonl:{row}", "Add it.")


def lines(faults: Faults) -> list[str]:
    return str(faults.error()).splitlines()


def test_few_alike_are_named_each():
    faults = Faults()
    for row in (1, 2, 3):
        faults.add([fault(row)])
    assert lines(faults) == [f"rows.jsonl:{row}: no such key. Add it." for row in (1, 2, 3)]


def test_many_alike_are_one_line():
    faults = Faults()
    for row in range(1, 1000):
        faults.add([fault(row)])
    faults.add([fault(1000, "not JSON")])
    assert lines(faults) == [
        "rows.jsonl:1 and 998 more: no such key. Add it.",
        "rows.jsonl:1000: not JSON. Add it.",
    ]


def test_many_of_different_kinds_are_counted():
    faults = Faults()
    for row in range(30):
        faults.add([fault(row, f"kind {row}")])
    assert len(lines(faults)) == MAX_FAULTS + 1
    assert lines(faults)[-1] == "30 faults in all; these are the first."


@pytest.mark.parametrize("cut", [1, 2, 4, 50, 99])
def test_blocks_joined_say_the_same_as_rows_in_a_row(cut):
    said = [fault(row, f"kind {row % 7}" if row % 2 else "alike") for row in range(100)]
    whole, first, second = Faults(), Faults(), Faults()
    whole.add(said)
    first.add(said[:cut])
    second.add(said[cut:])
    first.join(second)
    assert first == whole


def test_a_file_of_the_wrong_kind_is_one_fault(tmp_path, tiny_folder, capfd):
    recipe = write_recipe(tmp_path, tiny_folder)
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(999)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert finetune("train", recipe) == 2
    said = capfd.readouterr().err
    assert "train.jsonl:1 and 998 more: a preference row, but method sft trains on conversations" in said
    assert "things are wrong" not in said and "faults in all" not in said
    assert isinstance(Faults(1, [fault(1)]).error(), DataError)
