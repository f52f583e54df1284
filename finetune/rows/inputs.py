"""The files of all sources, found once, and their blocks as tasks: where a row's journey begins on all three paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from finetune.errors import DataError
from finetune.rows.block import BLOCK_BYTES
from finetune.rows.datafiles import DataFile, Source, find_files
from finetune.rows.encode import Task
from finetune.rows.sources import read_blocks

LARGE_BYTES = 8 * 2**20
"""Bytes of data files (`Inputs.size`) from which on the work of tokenizing goes to other processes.

Starting those takes about a second, in which this process tokenizes some 2 MB.
"""


class Inputs:
    """The files of sources.

    Attributes:
        found: The files of each source, or why there are none: the other sources are still checked.
        files: In the order read, over all sources.
        names: Of the files.
        sources_of_files: The number of the source of each file.
        size: Bytes of text in all of them, guessed where they are compressed.

    Args:
        base: The recipe's folder, see `find_files`.
        section: The recipe key of the sources, for messages.
    """

    def __init__(self, sources: Sequence[Source], base: Path | None, section: str):
        self.sources = sources
        self.found: list[list[DataFile] | DataError] = []
        for number, source in enumerate(sources):
            try:
                self.found.append(find_files(source, base, f"{section}[{number}].path"))
            except DataError as error:
                self.found.append(error)
        files = [(number, file) for number, found in enumerate(self.found) for file in files_of(found)]
        self.sources_of_files = [number for number, _ in files]
        self.files = [file for _, file in files]
        self.names = [file.name for file in self.files]
        self.size = sum(map(_size, self.files))

    def check_found(self) -> None:
        """Raise what is wrong with the first source that has no files."""
        for found in self.found:
            if isinstance(found, DataError):
                raise found

    def tasks(
        self,
        block_bytes: int = BLOCK_BYTES,
        share: tuple[int, int] = (0, 1),
        check: Callable[[DataFile], None] = lambda file: None,
    ) -> Iterator[Task | DataError]:
        """All blocks in order; in their places, errors of files that cannot be found or read.

        Args:
            block_bytes: See `read_blocks`.
            share: See `Task`.
            check: Called before and after each block is read.
        """
        first = 0
        for number, found in enumerate(self.found):
            if isinstance(found, DataError):
                yield found
                continue
            try:
                yield from self._of_source(number, found, first, block_bytes, share, check)
            except DataError as error:
                yield error
            first += len(found)

    def _of_source(
        self,
        number: int,
        files: list[DataFile],
        first: int,
        block_bytes: int,
        share: tuple[int, int],
        check: Callable[[DataFile], None],
    ) -> Iterator[Task]:
        source = self.sources[number]
        left = source.samples
        for index, file in enumerate(files, first):
            if left == 0:
                return
            check(file)
            for block in read_blocks(file, block_bytes):
                check(file)
                yield Task(
                    block, number, index, file.name, source.format, dict(source.columns), limit=left, share=share
                )
                left = None if left is None else left - min(left, block.count)
                if left == 0:
                    break
            check(file)


def files_of(found: list[DataFile] | DataError) -> list[DataFile]:
    return [] if isinstance(found, DataError) else found


def _size(file: DataFile) -> int:
    size = file.text_bytes()
    return LARGE_BYTES if size is None else size  # that of the hub is not known before it is loaded
