"""The rows of sources and files, one by one with their names, as tests ask for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune.errors import Fault
from finetune.rows.datafiles import DataFile, Source, find_files
from finetune.rows.sources import read_blocks, rows_of

Row = tuple[dict[str, Any] | Fault, str]


def read_rows(source: Source) -> Iterator[Row]:
    """The rows of a source."""
    for file in find_files(source):
        yield from read_file(file)


def read_file(file: DataFile) -> Iterator[Row]:
    """The rows of one file."""
    for block in read_blocks(file):
        for number, row in rows_of(block, file.name):
            yield row, f"{file.name}:{number}"
