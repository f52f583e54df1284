"""Answers on their way into an output file: kept as they come, so that an interrupted run goes on where it stopped.

They stand in `.<name>.partial` beside the output, in the order in which they finished; the first line says what they
answer. The output appears whole, in the order of the input, when the last answer is there. A device or a pipe as output
is written to as it is, and nothing is kept beside it.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from finetune.console import say
from finetune.errors import ArgumentError
from finetune.files import replacing
from finetune.model.resolve import HUB_PATTERNS, ModelSource


class PartialAnswers:
    """The answers that are there.

    Attributes:
        done: Whether row i is answered, bool [rows].
        kept: How many answers an earlier run left.
    """

    def __init__(self, file: IO[bytes], rows: int):
        self._file = file
        self._places = np.full(rows, -1, dtype=np.int64)
        self.kept = 0

    @property
    def done(self) -> np.ndarray:
        return self._places >= 0

    def add(self, row: int, answer: dict[str, Any]) -> None:
        """Keep the answer of row `row`: at once, whatever happens to the process afterwards."""
        self._places[row] = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps({"row": row, "answer": answer}, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def read_back(self) -> None:
        """Find the answers behind the first line. A last line that was cut off while it was written goes."""
        place = self._file.tell()
        for line in self._file:
            row = _whole_row(line)
            if row is None or not 0 <= row < len(self._places):
                break
            self._places[row] = place
            place += len(line)
        self._file.truncate(place)
        self.kept = int(self.done.sum())

    def in_order(self) -> Iterator[str]:
        """The lines of the output."""
        for place in self._places.tolist():
            self._file.seek(place)
            yield json.dumps(json.loads(self._file.readline())["answer"], ensure_ascii=False) + "\n"


def _whole_row(line: bytes) -> int | None:
    try:
        return json.loads(line)["row"] if line.endswith(b"\n") else None
    except ValueError:
        return None


@contextmanager
def resuming(output: Path, rows: int, identity: dict[str, Any]) -> Iterator[PartialAnswers]:
    """Collect answers for `output`, going on with those of an interrupted run for the same `identity`.

    Args:
        identity: What decides the answers, by names that a message can use. When one differs from that of the kept
            answers, these are thrown away, and that is said.

    Raises:
        ArgumentError: the folder cannot be written, or another process answers into the same output.
    """
    sidecar = None if _is_special(output) else output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with sidecar.open("a+b") if sidecar else tempfile.TemporaryFile() as file:
            _lock(file, output)
            partial = _begin(file, rows, identity)
            try:
                yield partial
            except BaseException:
                if sidecar:
                    _say_kept(sidecar, partial, rows)
                raise
            _write_output(output, partial)
            if sidecar:
                sidecar.unlink()
    except OSError as error:
        raise ArgumentError(
            f"the file cannot be written: {error.strerror or error}",
            where=f"--output {output}",
            fix="Choose another place, or free some space.",
        ) from error


def _lock(file: IO[bytes], output: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ArgumentError(
            "another process is writing this output", where=f"--output {output}", fix="Wait for it, or give another."
        ) from error


def _begin(file: IO[bytes], rows: int, identity: dict[str, Any]) -> PartialAnswers:
    file.seek(0)
    partial = PartialAnswers(file, rows)
    try:
        found = json.loads(file.readline() or b"{}")
    except ValueError:
        found = {}
    if found == identity:
        partial.read_back()
        if partial.kept:
            say(f"Going on with an interrupted run: {partial.kept:,} of {rows:,} answers are there.")
        return partial
    if found:
        changed = [name for name, value in identity.items() if found.get(name) != value] or list(found)
        say(f"The unfinished answers here are of another run ({', '.join(changed)} changed): starting over.")
    file.truncate(0)
    file.write(json.dumps(identity).encode() + b"\n")
    file.flush()
    return partial


def _say_kept(sidecar: Path, partial: PartialAnswers, rows: int) -> None:
    done = int(partial.done.sum())
    if done:
        say(f"{done:,} of {rows:,} answers are kept in {sidecar}; the same command goes on with the rest.")
    else:
        sidecar.unlink()


def _write_output(output: Path, partial: PartialAnswers) -> None:
    with output_file(output) as file:
        file.writelines(partial.in_order())


@contextmanager
def output_file(path: Path) -> Iterator[IO[str]]:
    """A text file that takes the place of `path` when it is complete: of what a link points to, not of the link.

    A device or a pipe, such as /dev/stdout, is written to as it is: replaced, it would be gone for everyone.
    """
    try:
        if _is_special(path):
            with path.open("w", encoding="utf-8") as file:
                yield file
            return
        place = Path(os.path.realpath(path))  # unlike Path.resolve, takes links in a circle too
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as binary:
            file = io.TextIOWrapper(binary, encoding="utf-8")
            yield file
            file.detach()  # flushed, and left open for the one that syncs it
    except OSError as error:
        raise ArgumentError(
            f"the file cannot be written: {error.strerror or error}",
            where=f"--output {path}",
            fix="Choose another place, or free some space.",
        ) from error


def _is_special(path: Path) -> bool:
    """Whether it is there and cannot be replaced: a device, a pipe, a folder."""
    return path.exists() and not path.is_file()


def hash_model(source: ModelSource, output: Path) -> str:
    """Tells apart the files of a model and its base: names, sizes and times of change, not their whole content.

    Only files that a model is made of: `output`, and what is kept beside it, may lie in the same folder.
    """
    files = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for model in filter(None, (source, source.base))
        for file in [*sorted(model.folder.iterdir()), *(model.weight_files if model.gguf else ())]
        if any(file.match(pattern) for pattern in (*HUB_PATTERNS, "*.gguf")) and not file.name.startswith(".")
        if file.is_file() and file.resolve() != output.resolve()
    ]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
