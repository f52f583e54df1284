"""Data files to rows, each with the name people find it by: "file.jsonl:12".

Files come as blocks of about a megabyte, cut between rows and not yet parsed into objects, so that memory does not grow
with the file and blocks can be worked on by other processes. Each kind of file has its reader; the hub comes through
`datasets`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import DataError, Fault
from finetune.model.hubs.faults import explain
from finetune.model.hubs.fetch import HUBS
from finetune.model.hubs.hub import Repo
from finetune.rows.arrowfile import arrow_rows, read_arrow, read_parquet, without_nulls
from finetune.rows.block import BLOCK_BYTES, BLOCK_ROWS, Block
from finetune.rows.csvfile import csv_row, decoded, read_csv
from finetune.rows.datafiles import DataFile, check_suffix, unreadable
from finetune.rows.jsonfile import not_an_object, parse_object, read_json, read_jsonl


def read_blocks(file: DataFile, size: int = BLOCK_BYTES) -> Iterator[Block]:
    """One file in blocks; the same file is always cut at the same places.

    Args:
        size: Bytes (of csv and json: characters) after which a block ends, once its last row is whole.

    Raises:
        DataError: the file cannot be read at all, or is empty.
    """
    if file.repo is not None:
        blocks = _read_hub(file, file.repo)
    else:
        blocks = _READERS[check_suffix(Path(file.name) if file.path is None else file.path)](file, size)
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


def rows_of(
    block: Block, name: str, columns: Mapping[str, str] | None = None
) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    """The rows of a block with their numbers; one that cannot be read is a `Fault` that names `name:number`.

    Args:
        columns: What the keys of the rows' form are called in the file, key: column; other columns of a key's name are
            left out.
    """
    for number, row in _parsed(block, name):
        if columns and isinstance(row, dict):
            others = {key: value for key, value in row.items() if key not in columns and key not in columns.values()}
            row = {**{key: row[column] for key, column in columns.items() if column in row}, **others}
        yield number, decoded(row) if block.kind == "csv" and isinstance(row, dict) else row


def _parsed(block: Block, name: str) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    numbered = enumerate(_PARSERS[block.kind](block.content), block.first)
    if block.kind == "lines":
        yield from ((n, parse_object(line.rstrip(b"\r"), f"{name}:{n}")) for n, line in numbered if line.strip())
    elif block.kind == "csv":
        yield from ((n, csv_row(row, block.content[0], f"{name}:{n}")) for n, row in numbered)
    else:
        yield from ((n, r if isinstance(r, dict) else not_an_object(r, f"{name}:{n}")) for n, r in numbered)


def _read_hub(file: DataFile, repo: Repo) -> Iterator[Block]:
    import datasets

    try:
        rows = datasets.load_dataset(repo.id, revision=repo.revision, split=file.split)
    except Exception as error:  # `datasets` passes on whatever its readers and the network raise
        about_files = type(error) is FileNotFoundError  # in the repository, which is there
        if not about_files and (fault := explain(error, repo, HUBS[repo.hub])):
            raise fault from error
        reason = (str(error) or repr(error)).splitlines()[0]
        raise DataError(
            f"split {file.split!r} cannot be loaded from the hub: {reason}",
            where=file.name,
            fix="Check the id, the split and the network; or give the path of a file.",
        ) from error
    number, block = 1, []
    for row in rows:
        block.append(without_nulls(row))
        if len(block) == BLOCK_ROWS:
            yield Block(number, len(block), "rows", block)
            number, block = number + len(block), []
    yield Block(number, len(block), "rows", block)


_READERS: dict[str, Callable[[DataFile, int], Iterator[Block]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
_PARSERS: dict[str, Callable[[Any], Any]] = {
    "lines": lambda content: content.split(b"\n"),
    "array": json.loads,
    "csv": lambda content: content[1],
    "arrow": arrow_rows,
    "rows": lambda content: content,
}
