"""metrics.jsonl: what is written is read back, and a resumed run reads as one."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from finetune.errors import DataError
from finetune.report.metrics import MetricsWriter, read_metrics


def write(path, rows, resume_at_step=None):
    with MetricsWriter(path, resume_at_step) as writer:
        for row in rows:
            writer.write(row)


def test_rows_are_on_disk_as_they_are_written(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write({"step": 1, "loss": 0.1 + 0.2})
    assert path.read_text() == '{"step": 1, "loss": 0.30000000000000004}\n'
    writer.close()


def test_numpy_numbers_and_full_precision(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"step": np.int64(3), "loss": np.float32(0.1), "grad_norm": np.float64(1 / 3)}])
    assert read_metrics(path) == [{"step": 3, "loss": float(np.float32(0.1)), "grad_norm": 1 / 3}]


def test_values_that_are_not_finite_survive_in_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"step": 1, "loss": math.nan, "grad_norm": math.inf, "x": -math.inf}])

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["loss"] == "NaN"
    row = read_metrics(path)[0]
    assert math.isnan(row["loss"]) and row["grad_norm"] == math.inf and row["x"] == -math.inf


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"step": 1}])
    write(path, [{"step": 2}])
    assert read_metrics(path) == [{"step": 2}]


def test_a_resumed_run_reads_as_an_uninterrupted_one(tmp_path):
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 11)]
    rows.insert(5, {"step": 5, "eval_loss": 0.5})
    write(tmp_path / "whole.jsonl", rows)
    write(tmp_path / "killed.jsonl", rows[:9])
    write(tmp_path / "killed.jsonl", rows[6:], resume_at_step=5)
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["killed.jsonl", "whole.jsonl"]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"\0\0\0\0", b'{"step": 3, "name": "\xc3'])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    write(path, [{"step": 3}], resume_at_step=2)
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    write(path, [{"step": 3}], resume_at_step=2)
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: .*not a JSON object"):
        read_metrics(path)
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        MetricsWriter(path, resume_at_step=3)
    assert path.read_bytes() == b'{"step": 1}\n[2]\n{"step": 3}\n'


def test_resuming_without_a_file_and_reading_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    write(path, [{"step": 6}], resume_at_step=5)
    assert read_metrics(path) == [{"step": 6}]


@pytest.mark.parametrize("row", [{"loss": 1.0}, {"step": "3"}, {"step": 1.5}])
def test_a_row_without_a_step_is_refused(tmp_path, row):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer, pytest.raises(ValueError, match="integer step"):
        writer.write(row)
    assert read_metrics(tmp_path / "metrics.jsonl") == []
