"""parquet and arrow files to blocks, and blocks to rows, by pyarrow; the nulls that it put in are taken out again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from finetune.errors import DataError
from finetune.rows.block import BLOCK_ROWS, Block
from finetune.rows.datafiles import DataFile


def read_parquet(file: DataFile, size: int) -> Iterator[Block]:
    import pyarrow.parquet

    with _arrow_faults(file), pyarrow.parquet.ParquetFile(file.path) as table:
        yield from _arrow_blocks(table.iter_batches(batch_size=BLOCK_ROWS), file, table.metadata.num_rows)


def read_arrow(file: DataFile, size: int) -> Iterator[Block]:
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
        _check_names(batch.schema, file)
        for start in range(0, batch.num_rows, BLOCK_ROWS):
            part = batch.slice(start, BLOCK_ROWS)
            sink = pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(sink, part.schema) as writer:
                writer.write_batch(part)
            share = size * part.num_rows // rows
            yield Block(number, part.num_rows, "arrow", sink.getvalue().to_pybytes(), share)
            number += part.num_rows


def _check_names(fields: Iterable[Any], file: DataFile) -> None:
    """Look at the names of Arrow's fields, at any depth: of two alike a row would keep the last.

    Raises:
        UnicodeDecodeError: one is not UTF-8.
        DataError: one stands twice beside another.
    """
    seen = set()
    for field in fields:
        if field.name in seen:
            raise DataError(f"the column {field.name} stands twice", where=file.name, fix="Keep one of the two.")
        seen.add(field.name)
        _check_names((field.type.field(i) for i in range(field.type.num_fields)), file)


def arrow_rows(content: bytes) -> Iterator[Any]:
    import pyarrow

    for batch in pyarrow.ipc.open_stream(content):
        yield from map(without_nulls, batch.to_pylist())


@contextmanager
def _arrow_faults(file: DataFile) -> Iterator[None]:
    """Turns pyarrow's errors about a damaged file into one that names it."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter for names of columns
        raise DataError(
            f"the file is damaged or of another kind: {error}", where=file.name, fix="Write it again."
        ) from error


def without_nulls(value: Any) -> Any:
    """Drop null keys: in Arrow a null key and a key that was never there are the same."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
