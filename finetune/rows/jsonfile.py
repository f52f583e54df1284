"""json and jsonl files to blocks, and lines to objects.

Arrow readers (`datasets` among them) give every row the keys of all rows and fill the missing ones with null, so a tool
call's {"city": "Rome"} becomes {"city": "Rome", "date": null} because another row has a date; they also stop at the
first bad row without saying which. So both are read here.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from typing import Any, Protocol

from finetune.errors import DataError, Fault
from finetune.rows.block import BLOCK_ROWS, Block
from finetune.rows.datafiles import DataFile

# An error of the JSON reader that is nearer to the end of what was read than this may be a value that was cut in two.
_JSON_MARGIN = 16


class _Stream(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


def read_jsonl(file: DataFile, size: int) -> Iterator[Block]:
    """Lines of JSON; or a JSON array, which some tools call jsonl too."""
    with file.open() as stream:
        head = _head(stream, size, size)
        whole = _without_space(head, file)
        rest = _Rest(head, stream)
        # Of lines that are arrays themselves, each is a row that is none.
        if whole[:1] == b"[" and whole[1:].lstrip()[:1] in (b"{", b""):
            yield from _JsonArray(rest, file, size).blocks()
        else:
            yield from _line_blocks(rest, file, size)


def _head(stream: _Stream, first: int, size: int) -> bytes:
    """The beginning of a file, with more than space in it: `first` bytes, and more by `size`."""
    head = stream.read(first)
    while head and not head.removeprefix(b"\xef\xbb\xbf").strip() and (more := stream.read(size)):
        head += more
    return head


def _without_space(head: bytes, file: DataFile) -> bytes:
    return without_mark(head, file).lstrip()


def _line_blocks(stream: _Stream, file: DataFile, size: int) -> Iterator[Block]:
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
        content = without_mark(content, file)
        if content.split(b"\n", 1)[0].strip() == b"{":
            fix = "Write each row on a line of its own; a file of one object or one list may be called .json."
            raise DataError("an object that goes over several lines", where=f"{file.name}:1", fix=fix)
    count = sum(1 for line in content.split(b"\n") if line.strip())
    return Block(number, count, "lines", content, len(content))


def read_json(file: DataFile, size: int) -> Iterator[Block]:
    """A JSON array, an object that holds one, or lines."""
    with file.open() as stream:
        head = _head(stream, min(size, 1 << 16), size)
        if _without_space(head, file)[:1] == b"[":
            yield from _JsonArray(_Rest(head, stream), file, size).blocks()
            return
        # Many files of lines are called .json: the first line is an object of its own, and another follows.
        line, newline, rest = _without_space(head, file).partition(b"\n")
        if newline and rest.strip() and line.startswith(b"{") and isinstance(_parse(line, file.name), dict):
            yield from _line_blocks(_Rest(head, stream), file, size)
            return
        yield from _read_whole_json(head + stream.read(), file, size)


def _read_whole_json(content: bytes, file: DataFile, size: int) -> Iterator[Block]:
    """An object that holds all rows under `data`, one that is a row, or what is no data at all."""
    content = without_mark(content, file)
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


class _Rest:
    """A stream with what was read of it put back in front."""

    def __init__(self, head: bytes, stream: _Stream):
        self._head, self._stream = head, stream

    def read(self, size: int = -1) -> bytes:
        if self._head:
            head, self._head = (self._head, b"") if size < 0 else (self._head[:size], self._head[size:])
            return head
        return self._stream.read(size)


class _JsonArray:
    """The rows of a JSON array, read bit by bit: only what was not yet given out is in memory."""

    def __init__(self, stream: _Stream, file: DataFile, size: int):
        self.stream, self.file, self.size = stream, file, size
        self.utf8 = codecs.getincrementaldecoder("utf-8")()
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
                end = _DECODER.raw_decode(self.text, at)[1]
                if end < len(self.text) or self.done:  # a number may go on
                    return end
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _JSON_MARGIN
                if self.done or not cut:
                    self._fail(error.msg, error.pos)
            except RecursionError:
                raise DataError.of([_too_deep(self.file.name)]) from None
            except _TwiceError as error:
                raise DataError.of([error.fault(f"{self.file.name}, line {self._place(at)[0] + 1}")]) from error
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


def without_mark(content: bytes, file: DataFile) -> bytes:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("the file is UTF-16", where=file.name, fix="Save it as UTF-8.")
    return content.removeprefix(b"\xef\xbb\xbf")


def parse_object(line: bytes, name: str) -> dict[str, Any] | Fault:
    value = _parse(line, name)
    return value if isinstance(value, (dict, Fault)) else not_an_object(value, name)


def not_an_object(value: Any, name: str) -> Fault:
    shown = json.dumps(value, ensure_ascii=False)[:60]
    return Fault(f"found {shown}, which is not an object", name, 'A row is an object: {"key": ...}.')


def _parse(content: bytes, name: str) -> Any:
    try:
        return _DECODER.decode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _not_utf8(content[error.start], error.start, name)
    except json.JSONDecodeError as error:
        if b"\0" in content:
            return _nul_byte(name)
        return _not_json(error.msg, error.lineno, error.colno, name)
    except RecursionError:
        return _too_deep(name)
    except _TwiceError as error:
        return error.fault(name)
    except ValueError as error:
        return _wrong_number(error, name)


class _TwiceError(ValueError):
    """An object has a key twice: readers of JSON take the last value, and what the first one says is lost."""

    def fault(self, name: str) -> Fault:
        return Fault(f"the key {self.args[0]!r} stands twice in an object", name, "Keep one of the two.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(next(key for i, key in enumerate(keys) if key in keys[:i]))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


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
