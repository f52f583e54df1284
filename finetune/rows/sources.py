"""Data files to rows, each with the name people find it by: "file.jsonl:12".

json and jsonl are read here, line by line. Arrow readers (`datasets` among them) give every row the keys of all rows
and fill the missing ones with null, so a tool call's {"city": "Rome"} becomes {"city": "Rome", "date": null} because
another row has a date; they also stop at the first bad row without saying which. csv is read by the standard library,
since Arrow turns the answer "42" into a number. parquet and arrow files, and the hub, come through pyarrow and
`datasets`; the nulls that Arrow put in are taken out again there.

Files come as blocks of about a megabyte, cut between rows and not yet parsed into objects, so that memory does not grow
with the file and blocks can be worked on by other processes.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from finetune.errors import DataError, Fault
from finetune.rows.datafiles import DataFile, Source, check_suffix, find_files, unreadable

# csv knows only text; these columns hold lists or objects as JSON, and those of answers a text or messages.
_JSON_COLUMNS = ("messages", "conversations", "tools", "history")
_ANSWER_COLUMNS = ("prompt", "chosen", "rejected")
# Bytes of text in a block, as read; rows in a block of an Arrow file.
BLOCK_BYTES = 1 << 20
BLOCK_ROWS = 1024
# An error of the JSON reader that is nearer to the end of what was read than this may be a value that was cut in two.
_JSON_MARGIN = 16

Row = tuple[dict | Fault, str]


@dataclass(frozen=True)
class Block:
    """Rows of one file that follow each other, not yet parsed.

    Attributes:
        first: Number of the first row: its line in jsonl, its 1-based number elsewhere.
        count: Rows, blank lines left out.
        kind: What `content` is: "lines" of JSON (bytes), the text of a JSON "array", "csv" (the header and the rows as
            lists), an "arrow" stream (bytes), or "rows" as they are.
        content: As `kind` says.
        size: About how many of its file's `text_bytes` it is; 0 where that cannot be told.
    """

    first: int
    count: int
    kind: Literal["lines", "array", "csv", "arrow", "rows"]
    content: Any
    size: int = 0

    def sha256(self) -> bytes:
        """Hash of the content."""
        content = self.content
        if not isinstance(content, bytes):
            content = json.dumps(content, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
        return hashlib.sha256(content).digest()

    def rows(self, name: str) -> Iterator[tuple[int, dict | Fault]]:
        """The rows with their numbers; one that cannot be read is a `Fault` that names `name:number`."""
        numbered = enumerate(_PARSERS[self.kind](self.content), self.first)
        if self.kind == "lines":
            yield from ((n, _object(line.rstrip(b"\r"), f"{name}:{n}")) for n, line in numbered if line.strip())
        elif self.kind == "csv":
            yield from ((n, _csv_row(row, self.content[0], f"{name}:{n}")) for n, row in numbered)
        else:
            yield from ((n, r if isinstance(r, dict) else _not_an_object(r, f"{name}:{n}")) for n, r in numbered)


def read_rows(source: Source, base: Path | None = None) -> Iterator[Row]:
    """The rows of a source with their names. A row that cannot be read comes as a `Fault`, and reading goes on.

    Raises:
        DataError: no such file, or a file that cannot be read at all.
    """
    for file in find_files(source, base):
        yield from read_file(file)


def read_file(file: DataFile) -> Iterator[Row]:
    """The rows of one file; jsonl rows are named by line, all others by their 1-based number.

    Raises:
        DataError: the file cannot be read at all, or is empty.
    """
    for block in read_blocks(file):
        for number, row in block.rows(file.name):
            yield row, f"{file.name}:{number}"


def read_blocks(file: DataFile, size: int = BLOCK_BYTES) -> Iterator[Block]:
    """One file in blocks; the same file is always cut at the same places.

    Args:
        size: Bytes (of csv and json: characters) after which a block ends, once its last row is whole.

    Raises:
        DataError: the file cannot be read at all, or is empty.
    """
    blocks = _read_hub(file) if file.path is None else _READERS[check_suffix(file.path)](file, size)
    empty = True
    try:
        for block in blocks:
            if block.count:
                empty = False
                yield block
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(error, file.name) from error
    if empty:
        raise DataError("the file has no rows", where=file.name, fix="Give at least one row.")


# -- reading ---------------------------------------------------------------------------------------------------


def _open(file: DataFile) -> BinaryIO:
    return gzip.open(file.path, "rb") if file.path.name.lower().endswith(".gz") else file.path.open("rb")


def _read_jsonl(file: DataFile, size: int) -> Iterator[Block]:
    with _open(file) as stream:
        yield from _line_blocks(stream, file, size)


def _line_blocks(stream: BinaryIO, file: DataFile, size: int) -> Iterator[Block]:
    number, rest = 1, bytearray()
    while chunk := stream.read(size):
        end = chunk.rfind(b"\n") + 1
        if not end:
            rest += chunk
            continue
        block = _lines(bytes(rest) + chunk[:end], number, file)
        yield block
        number += block.content.count(b"\n")
        rest = bytearray(chunk[end:])
    if rest:
        yield _lines(bytes(rest), number, file)


def _lines(content: bytes, number: int, file: DataFile) -> Block:
    if number == 1:
        content = _without_mark(content, file)
    count = sum(1 for line in content.split(b"\n") if line.strip())
    return Block(number, count, "lines", content, len(content))


def _read_json(file: DataFile, size: int) -> Iterator[Block]:
    with _open(file) as stream:
        head = stream.read(min(size, 1 << 16))
        while head and not head.removeprefix(b"\xef\xbb\xbf").strip() and (more := stream.read(size)):
            head += more
        if _without_mark(head, file).lstrip()[:1] == b"[":
            yield from _JsonArray(_Rest(head, stream), file, size).blocks()
            return
        # Many files of lines are called .json: the first line is an object of its own, and another follows.
        line, newline, rest = _without_mark(head, file).lstrip().partition(b"\n")
        if newline and rest.strip() and line.startswith(b"{") and isinstance(_parse(line, file.name), dict):
            yield from _line_blocks(_Rest(head, stream), file, size)
            return
        yield from _read_whole_json(head + stream.read(), file, size)


def _read_whole_json(content: bytes, file: DataFile, size: int) -> Iterator[Block]:
    """An object that holds all rows under `data`, one that is a row, or what is no data at all."""
    content = _without_mark(content, file)
    if not content.strip():
        return
    value = _parse(content, file.name)
    if isinstance(value, Fault):
        first = content.strip().split(b"\n", 1)[0]
        if first.startswith(b"{") and isinstance(_parse(first, file.name), dict):
            yield from _line_blocks(io.BytesIO(content), file, size)
            return
        raise DataError.of([value])
    if isinstance(value, dict):
        value = value["data"] if isinstance(value.get("data"), list) else [value]
    if not isinstance(value, list):
        raise DataError(
            f"the file holds a {type(value).__name__}", where=file.name, fix="It must be a list of rows (objects)."
        )
    for start in range(0, len(value), BLOCK_ROWS):
        rows = value[start : start + BLOCK_ROWS]
        yield Block(start + 1, len(rows), "rows", rows, len(content) * len(rows) // len(value))


class _Rest(io.RawIOBase):
    """A stream with what was read of it put back in front."""

    def __init__(self, head: bytes, stream: BinaryIO):
        self._head, self._stream = head, stream

    def read(self, size: int = -1) -> bytes:
        if self._head:
            head, self._head = (self._head, b"") if size < 0 else (self._head[:size], self._head[size:])
            return head
        return self._stream.read(size)


class _JsonArray:
    """The rows of a JSON array, read bit by bit: only what was not yet given out is in memory."""

    def __init__(self, stream: BinaryIO, file: DataFile, size: int):
        self.stream, self.file, self.size = stream, file, size
        self.decoder, self.utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
        self.text, self.done = "", False
        self.bytes_read = 0
        # Lines and characters of the last line before `text`, for messages.
        self.lines, self.column = 0, 0

    def blocks(self) -> Iterator[Block]:
        """All rows, in blocks of about `size` characters."""
        at = self._next(0) + 1  # behind the bracket
        number, count, start, at = 1, 0, at, self._next(at)
        if self.text[at : at + 1] != "]":
            while True:
                end = self._value(at)
                count += 1
                after = self._next(end)
                sign = self.text[after : after + 1]
                if sign == "]":
                    at = after
                    break
                if sign != ",":
                    self._fail("Expecting ',' delimiter", after)
                if end - start >= self.size:
                    yield Block(number, count, "array", f"[{self.text[start:end]}]", end - start)
                    number, count = number + count, 0
                    self._forget(after + 1)
                    start, after = 0, -1
                at = self._next(after + 1)
        if count:
            yield Block(number, count, "array", f"[{self.text[start:at]}]", at - start)
        self._forget(at + 1)
        while not self.text.strip() and not self.done:
            self._forget(len(self.text))
            self._more()
        if self.text.strip():
            self._fail("Extra data", self._next(0))

    def _next(self, at: int) -> int:
        """The place of the next character that is no space; the end where there is none."""
        while True:
            while self.text[at : at + 1] in (" ", "\n", "\r", "\t"):
                at += 1
            if at < len(self.text) or self.done:
                return at
            self._more()

    def _value(self, at: int) -> int:
        """The end of the value that begins at a place."""
        grow = 1
        while True:
            try:
                end = self.decoder.raw_decode(self.text, at)[1]
                if end < len(self.text) or self.done:  # a number may go on
                    return end
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _JSON_MARGIN
                if self.done or not cut:
                    self._fail(error.msg, error.pos)
            except RecursionError:
                raise DataError.of([_too_deep(self.file.name)]) from None
            except ValueError as error:
                raise DataError.of([_wrong_number(error, self.file.name)]) from error
            # The value is read again from its beginning: by ever larger steps, so that this stays linear in its length.
            for _ in range(grow):
                self._more()
            grow *= 2

    def _more(self) -> None:
        chunk = self.stream.read(self.size)
        pending = len(self.utf8.getstate()[0])
        try:
            text = self.utf8.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            at = self.bytes_read - pending + error.start
            raise DataError.of([_not_utf8(error.object[error.start], at, self.file.name)]) from error
        if not self.bytes_read:
            text = text.removeprefix("\ufeff")
        self.bytes_read += len(chunk)
        self.text += text
        self.done = not chunk

    def _forget(self, at: int) -> None:
        self.lines, self.column = self._place(at)
        self.text = self.text[at:]

    def _place(self, at: int) -> tuple[int, int]:
        """Lines before a place, and characters before it in its line."""
        newlines = self.text.count("\n", 0, at)
        if newlines:
            return self.lines + newlines, at - self.text.rfind("\n", 0, at) - 1
        return self.lines, self.column + at

    def _fail(self, what: str, at: int) -> None:
        if "\0" in self.text:
            raise DataError.of([_nul_byte(self.file.name)])
        line, column = self._place(at)
        raise DataError.of([_not_json(what, line + 1, column + 1, self.file.name)])


def _without_mark(content: bytes, file: DataFile) -> bytes:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("the file is UTF-16", where=file.name, fix="Save it as UTF-8.")
    return content.removeprefix(b"\xef\xbb\xbf")


def _object(line: bytes, name: str) -> dict | Fault:
    value = _parse(line, name)
    return value if isinstance(value, (dict, Fault)) else _not_an_object(value, name)


def _not_an_object(value: Any, name: str) -> Fault:
    shown = json.dumps(value, ensure_ascii=False)[:60]
    return Fault(f"found {shown}, which is not an object", name, 'A row is an object: {"key": ...}.')


def _parse(content: bytes, name: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _not_utf8(content[error.start], error.start, name)
    except json.JSONDecodeError as error:
        if b"\0" in content:
            return _nul_byte(name)
        return _not_json(error.msg, error.lineno, error.colno, name)
    except RecursionError:
        return _too_deep(name)
    except ValueError as error:
        return _wrong_number(error, name)


def _not_utf8(byte: int, position: int, name: str) -> Fault:
    return Fault(f"byte 0x{byte:02x} at position {position} is not UTF-8", name, "Save the file as UTF-8.")


def _nul_byte(name: str) -> Fault:
    return Fault("a NUL byte, so this is not text", name, "Save the file as UTF-8 text.")


def _not_json(what: str, line: int, column: int, name: str) -> Fault:
    at = f"line {line} column {column}" if line > 1 else f"column {column}"
    return Fault(f"not valid JSON at {at}: {what}", name, "Correct it there.")


def _too_deep(name: str) -> Fault:
    return Fault("JSON nested too deeply", name, "A row has a few levels at most.")


def _wrong_number(error: ValueError, name: str) -> Fault:
    # A number of more than 4,300 digits
    return Fault(f"not valid JSON: {error}", name, "Correct it there.")


def _read_csv(file: DataFile, size: int) -> Iterator[Block]:
    limit = csv.field_size_limit(2**31 - 1)
    with _open(file) as stream:
        lines = _CsvLines(stream, file)
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, None)
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


class _CsvLines:
    """Lines for the csv reader, which wants their ends as they are."""

    def __init__(self, stream: BinaryIO, file: DataFile):
        self._stream, self._file = stream, file
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(self._stream, 1):
            if number == 1:
                line = _without_mark(line, self._file)
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


def _csv_row(row: list[str], columns: list[str], name: str) -> dict | Fault:
    if len(row) != len(columns):
        return Fault(
            f"{len(row)} fields where the header has {len(columns)}", name, "Quote fields that contain commas."
        )
    # A cell cannot be left out as a key can: where it would hold a list or an object, an empty one is none.
    cells = [(key, value) for key, value in zip(columns, row) if value or key not in _JSON_COLUMNS]
    return {key: _csv_value(key, value) for key, value in cells}


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


def _read_parquet(file: DataFile, size: int) -> Iterator[Block]:
    import pyarrow.parquet

    with _arrow_faults(file), pyarrow.parquet.ParquetFile(file.path) as table:
        yield from _arrow_blocks(table.iter_batches(batch_size=BLOCK_ROWS), file, table.metadata.num_rows)


def _read_arrow(file: DataFile, size: int) -> Iterator[Block]:
    import pyarrow

    with _arrow_faults(file), pyarrow.memory_map(str(file.path)) as stream:
        rows = sum(batch.num_rows for batch in _record_batches(stream))
        yield from _arrow_blocks(_record_batches(stream), file, rows)


def _record_batches(stream: Any) -> Iterator[Any]:
    import pyarrow

    stream.seek(0)
    try:
        return iter(pyarrow.ipc.open_stream(stream))  # as `datasets` writes
    except pyarrow.ArrowInvalid:
        reader = pyarrow.ipc.open_file(stream)
        return (reader.get_batch(i) for i in range(reader.num_record_batches))


def _arrow_blocks(batches: Iterator[Any], file: DataFile, rows: int) -> Iterator[Block]:
    import pyarrow

    number, size = 1, file.text_bytes()
    for batch in batches:
        # What is taken on trust otherwise: lengths and offsets, and that names are UTF-8.
        batch.validate(full=True)
        list(_names(batch.schema))
        for start in range(0, batch.num_rows, BLOCK_ROWS):
            part = batch.slice(start, BLOCK_ROWS)
            sink = pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(sink, part.schema) as writer:
                writer.write_batch(part)
            share = size * part.num_rows // rows
            yield Block(number, part.num_rows, "arrow", sink.getvalue().to_pybytes(), share)
            number += part.num_rows


def _names(fields: Iterable[Any]) -> Iterator[str]:
    """The names of Arrow's fields, at any depth. UnicodeDecodeError: one is not UTF-8."""
    for field in fields:
        yield field.name
        yield from _names(field.type.field(i) for i in range(field.type.num_fields))


def _arrow_rows(content: bytes) -> Iterator[Any]:
    import pyarrow

    for batch in pyarrow.ipc.open_stream(content):
        yield from map(_without_nulls, batch.to_pylist())


class _arrow_faults:
    """Turns pyarrow's errors about a damaged file into one that names it."""

    def __init__(self, file: DataFile):
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        import pyarrow

        if isinstance(error, (pyarrow.ArrowException, UnicodeDecodeError)):  # the latter for names of columns
            raise DataError(
                f"the file is damaged or of another kind: {error}", where=self.file.name, fix="Write it again."
            ) from error


def _read_hub(file: DataFile) -> Iterator[Block]:
    import datasets

    try:
        rows = datasets.load_dataset(file.name, split=file.split)
    except Exception as error:  # `datasets` passes on whatever its readers and the network raise
        reason = (str(error) or repr(error)).splitlines()[0]
        raise DataError(
            f"split {file.split!r} cannot be loaded from the hub: {reason}",
            where=file.name,
            fix="Check the id, the split and the network; or give the path of a file.",
        ) from error
    number, block = 1, []
    for row in rows:
        block.append(_without_nulls(row))
        if len(block) == BLOCK_ROWS:
            yield Block(number, len(block), "rows", block)
            number, block = number + len(block), []
    yield Block(number, len(block), "rows", block)


def _without_nulls(value: Any) -> Any:
    """Drop null keys: in Arrow a null key and a key that was never there are the same."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


_READERS: dict[str, Callable[[DataFile, int], Iterator[Block]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
_PARSERS: dict[str, Callable[[Any], Any]] = {
    "lines": lambda content: content.split(b"\n"),
    "array": json.loads,
    "csv": lambda content: content[1],
    "arrow": _arrow_rows,
    "rows": lambda content: content,
}
