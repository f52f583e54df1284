"""Files, folders, globs and hub ids to rows, each with the name people find it by: "file.jsonl:12".

json and jsonl are read here, line by line. Arrow readers (`datasets` among them) give every row the keys of all rows
and fill the missing ones with null, so a tool call's {"city": "Rome"} becomes {"city": "Rome", "date": null} because
another row has a date; they also stop at the first bad row without saying which. csv is read by the standard library,
since Arrow turns the answer "42" into a number. parquet and arrow files, and the hub, come through pyarrow and
`datasets`; the nulls that Arrow put in are taken out again there.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from finetune.errors import DataError, Fault

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrow")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Written beside the rows by `datasets.save_to_disk`; they describe the rows and are none.
_NOT_ROWS = ("dataset_info.json", "dataset_dict.json", "state.json", "dataset_infos.json")
# csv knows only text; these columns hold lists or objects as JSON.
_JSON_COLUMNS = ("messages", "conversations", "tools", "history", "prompt", "chosen", "rejected")

Row = tuple[dict | Fault, str]


class Source(Protocol):
    """Where rows come from; `finetune.recipe.schema.Source` is one."""

    path: str
    format: str
    split: str
    samples: int | None


@dataclass(frozen=True)
class DataFile:
    """A file of rows, or a split on the hub.

    Attributes:
        name: How its rows are named, the path as the user gave it.
        path: Where it is; None for the hub.
        split: The hub split; None for a file.
    """

    name: str
    path: Path | None
    split: str | None = None

    def sha256(self) -> str | None:
        """Hash of the file's bytes, hex; None for the hub, whose own cache keys the data."""
        if self.path is None:
            return None
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()


def find_files(source: Source, base: Path | None = None) -> list[DataFile]:
    """The files a source names, in order of name.

    Args:
        source: Its path is a file, a folder (all data files below it), a glob, or a hub id `owner/name`.
        base: Where a relative path is looked for if the current folder does not have it: the recipe's folder.

    Raises:
        DataError: nothing is there, or a file is of no known kind; names the nearest existing file.
    """
    given = Path(source.path).expanduser()
    for place in [given] if base is None or given.is_absolute() else [given, base / given]:
        if place.is_file():
            _check_suffix(place)
            return [DataFile(str(place), place)]
        if place.is_dir():
            return _files_of_folder(place, source.split)
        if any(sign in source.path for sign in "*?["):
            matches = [Path(match) for match in sorted(glob.glob(str(place), recursive=True))]
            files = [match for match in matches if match.is_file() and _is_data(match)]
            if files:
                return [DataFile(str(path), path) for path in files]
    if _HUB_ID.fullmatch(source.path) and _suffix(given) is None and not given.parent.is_dir():
        return [DataFile(source.path, None, source.split)]
    raise DataError(f"there is no file {source.path}", where="data", fix=_nearest(given, base))


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
    rows = _read_hub(file) if file.path is None else _READERS[_check_suffix(file.path)](file)
    empty = True
    try:
        for row in rows:
            empty = False
            yield row
    except (OSError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"the file cannot be read: {error}", where=file.name) from error
    if empty:
        raise DataError("the file has no rows", where=file.name, fix="Give at least one row.")


# -- finding ---------------------------------------------------------------------------------------------------


def _suffix(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _check_suffix(path: Path) -> str:
    suffix = _suffix(path)
    if suffix is None:
        raise DataError(
            f"a file of kind {path.suffix or 'without suffix'!r}",
            where=str(path),
            fix=f"Known are {', '.join(SUFFIXES)} (and these with .gz).",
        )
    return suffix


def _is_data(path: Path) -> bool:
    return _suffix(path) is not None and path.name not in _NOT_ROWS and not path.name.startswith(".")


def _files_of_folder(folder: Path, split: str) -> list[DataFile]:
    # A `datasets` folder of several splits holds one folder for each.
    if (folder / "dataset_dict.json").is_file():
        if not (folder / split).is_dir():
            splits = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
            raise DataError(f"there is no split {split!r}", where=str(folder), fix=f"It has {', '.join(splits)}.")
        folder = folder / split
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _is_data(path))
    if not files:
        raise DataError("no data file in this folder", where=str(folder), fix=f"Known are {', '.join(SUFFIXES)}.")
    return [DataFile(str(path), path) for path in files]


def _nearest(given: Path, base: Path | None) -> str:
    """The fix for a path that is not there: files of a similar name, or what the folder holds."""
    for folder in filter(None, (given.parent, base / given.parent if base else None)):
        if folder.is_dir():
            names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() or _is_data(entry))
            near = get_close_matches(given.name, names, n=3, cutoff=0.5)
            if near:
                return f"Did you mean {' or '.join(str(folder / name) for name in near)}?"
            if names:
                return f"{folder} has {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}."
            return f"{folder} has no data files."
    return f"The folder {given.parent} is not there either (current folder: {Path.cwd()})."


# -- reading ---------------------------------------------------------------------------------------------------


def _open(file: DataFile) -> BinaryIO:
    return gzip.open(file.path, "rb") if file.path.name.lower().endswith(".gz") else file.path.open("rb")


def _read_jsonl(file: DataFile) -> Iterator[Row]:
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = _without_mark(line, file)
            if line.strip():
                name = f"{file.name}:{number}"
                yield _object(line.rstrip(b"\r\n"), name), name


def _read_json(file: DataFile) -> Iterator[Row]:
    with _open(file) as stream:
        content = _without_mark(stream.read(), file)
    if not content.strip():
        return
    value = _parse(content, file.name)
    if isinstance(value, Fault):
        # Many files of lines are called .json.
        first = content.strip().split(b"\n", 1)[0]
        if first.startswith(b"{") and isinstance(_parse(first, file.name), dict):
            yield from _read_jsonl(file)
            return
        raise DataError.of([value])
    if isinstance(value, dict):
        value = value["data"] if isinstance(value.get("data"), list) else [value]
    if not isinstance(value, list):
        raise DataError(
            f"the file holds a {type(value).__name__}", where=file.name, fix="It must be a list of rows (objects)."
        )
    for number, row in enumerate(value, 1):
        name = f"{file.name}:{number}"
        yield (row if isinstance(row, dict) else _not_an_object(row, name)), name


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
        return Fault(
            f"byte 0x{content[error.start]:02x} at position {error.start} is not UTF-8", name, "Save the file as UTF-8."
        )
    except json.JSONDecodeError as error:
        if b"\0" in content:
            return Fault("a NUL byte, so this is not text", name, "Save the file as UTF-8 text.")
        at = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        return Fault(f"not valid JSON at {at}: {error.msg}", name, "Correct it there.")
    except RecursionError:
        return Fault("JSON nested too deeply", name, "A row has a few levels at most.")
    except ValueError as error:  # a number of more than 4,300 digits
        return Fault(f"not valid JSON: {error}", name, "Correct it there.")


def _read_csv(file: DataFile) -> Iterator[Row]:
    with _open(file) as stream:
        text = io.StringIO(_decoded(stream.read(), file), newline="")
    limit = csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.DictReader(text, strict=True)
        for number, row in enumerate(reader, 1):
            name = f"{file.name}:{number}"
            yield _csv_row(row, reader.fieldnames, name), name
    except csv.Error as error:
        raise DataError(f"not valid csv: {error}", where=f"{file.name}, line {reader.reader.line_num}") from error
    finally:
        csv.field_size_limit(limit)


def _decoded(content: bytes, file: DataFile) -> str:
    try:
        return _without_mark(content, file).decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"byte 0x{content[error.start]:02x} is not UTF-8",
            where=f"{file.name}, line {line}",
            fix="Save it as UTF-8.",
        ) from error


def _csv_row(row: dict, columns: Any, name: str) -> dict | Fault:
    if None in row or None in row.values():
        count = sum(value is not None for key, value in row.items() if key) + len(row.get(None) or [])
        return Fault(f"{count} fields where the header has {len(columns)}", name, "Quote fields that contain commas.")
    return {key: _csv_value(key, value) for key, value in row.items()}


def _csv_value(column: str, value: str) -> Any:
    if column in _JSON_COLUMNS and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value  # a text that begins with a bracket; where a list is needed, the row check says so
    return value


def _read_parquet(file: DataFile) -> Iterator[Row]:
    import pyarrow.parquet

    with _arrow_faults(file), pyarrow.parquet.ParquetFile(file.path) as table:
        yield from _from_batches(table.iter_batches(batch_size=1024), file)


def _read_arrow(file: DataFile) -> Iterator[Row]:
    import pyarrow

    with _arrow_faults(file), pyarrow.memory_map(str(file.path)) as stream:
        try:
            reader = pyarrow.ipc.open_stream(stream)  # as `datasets` writes
            batches = iter(reader)
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(stream)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        yield from _from_batches(batches, file)


class _arrow_faults:
    """Turns pyarrow's errors about a damaged file into one that names it."""

    def __init__(self, file: DataFile):
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        import pyarrow

        if isinstance(error, pyarrow.ArrowException):
            raise DataError(
                f"the file is damaged or of another kind: {error}", where=self.file.name, fix="Write it again."
            ) from error


def _from_batches(batches: Iterator[Any], file: DataFile) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield _without_nulls(row), f"{file.name}:{number}"


def _read_hub(file: DataFile) -> Iterator[Row]:
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
    for number, row in enumerate(rows, 1):
        yield _without_nulls(row), f"{file.name}:{number}"


def _without_nulls(value: Any) -> Any:
    """Drop null keys: in Arrow a null key and a key that was never there are the same."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


_READERS: dict[str, Callable[[DataFile], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
