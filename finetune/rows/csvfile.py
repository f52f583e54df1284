"""csv files to blocks, and records to rows, by the standard library: Arrow turns the answer "42" into a number."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import IO, Any

from finetune.errors import DataError, Fault
from finetune.rows.block import Block
from finetune.rows.datafiles import DataFile
from finetune.rows.jsonfile import without_mark

# csv knows only text; these columns hold lists or objects as JSON, and those of answers a text or messages.
_JSON_COLUMNS = ("messages", "conversations", "rejected_messages", "tools", "history")
_ANSWER_COLUMNS = ("prompt", "completion", "chosen", "rejected", "rejected_response")


def read_csv(file: DataFile, size: int) -> Iterator[Block]:
    limit = csv.field_size_limit(2**31 - 1)
    with file.open() as stream:
        lines = _CsvLines(stream, file)
        reader = csv.reader(lines, strict=True)
        try:
            header = _columns(next(reader, []), file)
            number, rows = 1, []
            for row in reader:
                if row:
                    rows.append(row)
                if lines.characters >= size:
                    yield Block(number, len(rows), "csv", (header, rows), lines.characters)
                    number, rows = number + len(rows), []
                    lines.characters = 0
            yield Block(number, len(rows), "csv", (header, rows), lines.characters)
        except csv.Error as error:
            raise DataError(f"not valid csv: {error}", where=f"{file.name}, line {reader.line_num}") from error
        finally:
            csv.field_size_limit(limit)


def _columns(header: list[str], file: DataFile) -> list[str]:
    """The names of columns, without the space that stands before some."""
    columns = [name.strip() for name in header]
    where = f"{file.name}, line 1"
    sign = next((sign for sign in (";", "\t") if len(columns) == 1 and sign in columns[0]), None)
    if sign:
        what = f"the header is one column, {columns[0][:60]!r}"
        raise DataError(what, where=where, fix=f"Part the columns by commas, not by {sign!r}.")
    for i, name in enumerate(columns):
        if name and name in columns[:i]:
            raise DataError(f"the header has the column {name} twice", where=where, fix="Keep one of the two.")
    return columns


class _CsvLines:
    """Lines for the csv reader, which wants their ends as they are."""

    def __init__(self, stream: IO[bytes], file: DataFile):
        self._stream, self._file = stream, file
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(self._stream, 1):
            if number == 1:
                line = without_mark(line, self._file)
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"byte 0x{line[error.start]:02x} is not UTF-8",
                    where=f"{self._file.name}, line {number}",
                    fix="Save it as UTF-8.",
                ) from error
            self.characters += len(text)
            yield from io.StringIO(text, newline="")


def csv_row(row: list[str], columns: list[str], name: str) -> dict[str, Any] | Fault:
    if len(row) != len(columns):
        return Fault(
            f"{len(row)} fields where the header has {len(columns)}", name, "Quote fields that contain commas."
        )
    return dict(zip(columns, row))


def decoded(row: dict[str, Any]) -> dict[str, Any]:
    """A row of texts with what its cells hold as JSON, where the key wants more than a text."""
    # A cell cannot be left out as a key can: where it would hold a list or an object, an empty one is none.
    return {key: _csv_value(key, value) for key, value in row.items() if value or key not in _JSON_COLUMNS}


def _csv_value(column: str, text: str) -> Any:
    if column not in _JSON_COLUMNS + _ANSWER_COLUMNS or text[:1] not in ("[", "{"):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text  # it begins with a bracket; where a list is needed, the row check says so
    # An answer may be JSON itself.
    return text if column in _ANSWER_COLUMNS and not _is_said(value) else value


def _is_said(value: Any) -> bool:
    """Whether a value is a message, or a list of messages that is not empty."""
    messages = value if isinstance(value, list) else [value]
    return bool(messages) and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in messages)
