"""metrics.jsonl: one JSON object for each logged step, as a run goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from finetune.errors import DataError
from finetune.files import replace_file

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter:
    """Appends rows to metrics.jsonl; each is complete on disk before `write` returns, as far as the process goes.

    Floats are written in full (the shortest text that reads back as the same number). JSON has no NaN, and null would
    lose which of the three it was, so values that are not finite become the strings "NaN", "Infinity" and "-Infinity",
    which `read_metrics` turns back.
    """

    def __init__(self, path: str | Path, resume_at_step: int | None = None):
        """Open the file.

        Args:
            path: The metrics.jsonl to write; its folder is made if need be.
            resume_at_step: None for a new run: what the file held is gone. Else the step of the checkpoint that the run
                goes on from: rows of later steps, which a run logs between its last checkpoint and its end, and a torn
                last line are dropped, so that the file reads as one uninterrupted run.

        Raises:
            DataError: A line other than the last cannot be read.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[dict[str, Any]] = []
        if resume_at_step is not None:
            kept = [row for row in read_metrics(self.path) if row.get("step", 0) <= resume_at_step]
        replace_file(self.path, "".join(_line(row) for row in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row. It must have a `step`; numbers of NumPy are taken as Python's.

        Raises:
            ValueError: The row has no integer `step`.
        """
        line = _line(row)
        if not isinstance(json.loads(line).get("step"), int):
            raise ValueError(f"a row of metrics needs an integer step, found {dict(row)!r}")
        self._file.write(line)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read all rows of a metrics.jsonl; a missing file has none, and a torn last line is left out.

    Raises:
        DataError: A line other than the last is not a JSON object; the message names it.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(
                "the line is not a JSON object", where=f"{path}:{number}", fix="Delete the line, or the file."
            ) from error
        rows.append(
            {name: _NOT_FINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()}
        )
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Turn a NumPy scalar into Python's, and a float that JSON cannot hold into its name."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
