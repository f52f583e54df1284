"""Rows of all sources to one tokenized dataset, with a report of what was read, cut and left out.

Little data is done in this process and kept in memory. From `LARGE_BYTES` on it is done in several, written to the
cache, and mapped from there, so that memory does not grow with the tokens and a second run opens it at once. Rows,
order, report and messages are the same either way.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tokenizers

from finetune import console
from finetune.chat.tokenizer import Tokenizer
from finetune.errors import DataError
from finetune.rows import cache
from finetune.rows.datafiles import Source
from finetune.rows.encode import COUNTS, MAX_NAMED, DataSettings, Encoder, Faults, Named, Result, Settings, Task
from finetune.rows.inputs import LARGE_BYTES, Inputs, files_of
from finetune.rows.mix import Mix
from finetune.rows.table import (
    CUT,
    PROMPT_CUT,
    RESPONSE_CUT,
    Dataset,
    PairDataset,
    Part,
    Table,
    dataset_of,
)
from finetune.rows.workers import encode_all, worker_count

# Room that an entry takes, over the bytes of its files: 4 bytes a token, about as many characters.
_ROOM = 1.5
Progress = Callable[[int, "int | None"], None]


# -- report ----------------------------------------------------------------------------------------------------


@dataclass
class FileReport:
    """A data file as the manifest names it.

    Attributes:
        rows: Those read; None for a stream.
        sha256: Hex; None for the hub, for a stream, and where only the first rows were looked at.
    """

    path: str
    rows: int | None
    sha256: str | None


@dataclass
class DataReport:
    """What became of the rows.

    Attributes:
        read, kept: Rows before and after.
        truncated: Rows that were cut to max_length. For preferences `prompts_cut` and `responses_cut` say what.
        dropped: Rows left out because they are longer than max_length (overlong: drop).
        unsupervised: Rows left out because no token is trained on, from the start or after cutting.
        tokens, supervised_tokens: Of the kept rows. A pair's shared prompt counts once.
        longest: Tokens of the longest row before cutting.
        files: In the order read.
        notes: Sentences for the user: counts with the rows they concern and what to do.
    """

    read: int = 0
    kept: int = 0
    truncated: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    dropped: int = 0
    unsupervised: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    files: list[FileReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, rows: Dataset | PairDataset) -> None:
        """Count rows that were kept."""
        self.kept += len(rows)
        self.tokens += int(rows.lengths.sum())
        self.supervised_tokens += int(rows.num_supervised.sum())
        cuts, prompts, responses = (int(np.count_nonzero(rows.cut & flag)) for flag in (CUT, PROMPT_CUT, RESPONSE_CUT))
        self.truncated += cuts
        self.prompts_cut += prompts
        self.responses_cut += responses

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


def _counted(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def add_named(total: dict[str, Named], more: dict[str, Named]) -> None:
    """Add rows to be told of to those of earlier blocks."""
    for heading, rows in more.items():
        total.setdefault(heading, Named()).add(rows.first, rows.count)


def named_notes(named: dict[str, Named], names: Sequence[str]) -> list[str]:
    """Sentences on rows to be told of; names: of the files."""
    notes = []
    for heading, rows in named.items():
        some = ", ".join(f"{names[file]}:{number}" for file, number in rows.first)
        some += f" and {rows.count - MAX_NAMED:,} more" if rows.count > MAX_NAMED else ""
        notes.append(f"{_counted(rows.count)} {heading.format(rows=some)}")
    return notes


def split_report(
    report: DataReport, train: Dataset | PairDataset, held_out: Dataset | PairDataset, max_length: int
) -> tuple[DataReport, DataReport]:
    """What became of the rows of either part. Rows that were left out belong to none, and stay with the first.

    Args:
        report: Of all rows.
        train, held_out: The parts of those that were kept.
        max_length: Tokens, as the rows were cut to.
    """
    others = report.notes[len(length_notes(report, max_length)) :]
    parts = []
    for rows, read, dropped, unsupervised in (
        (train, report.read - len(held_out), report.dropped, report.unsupervised),
        (held_out, len(held_out), 0, 0),
    ):
        part = DataReport(
            read=read, dropped=dropped, unsupervised=unsupervised, longest=report.longest, files=report.files
        )
        part.add(rows)
        part.notes = length_notes(part, max_length)
        parts.append(part)
    parts[0].notes += others
    return parts[0], parts[1]


def length_notes(report: DataReport, max_length: int) -> list[str]:
    """What is said of rows that are too long."""
    limit = f"data.max_length ({max_length:,} tokens; the longest row has {report.longest:,})"
    notes = []
    if report.truncated:
        pairs = report.prompts_cut or report.responses_cut
        what = f": {report.prompts_cut:,} in the prompt, {report.responses_cut:,} in a response" if pairs else ""
        notes.append(f"{_counted(report.truncated)} cut to {limit}{what}.")
    if report.dropped:
        notes.append(f"{_counted(report.dropped)} dropped for being longer than {limit}.")
    return notes


def mixed(dataset: Dataset | PairDataset, sources: Sequence[Source], report: DataReport) -> Mix | None:
    """The mix that the sources' weights ask for, told in a note; None where they have none.

    Raises:
        DataError: a source has no row that can be trained on.
    """
    weights = [source.weight for source in sources if source.weight is not None]
    if len(weights) < len(sources):
        return None
    mix = Mix.of(weights, dataset.sources)
    for source, rows in zip(sources, mix.rows):
        if not len(rows):
            raise DataError("it has a weight, but no row that can be trained on", where=source.path)
    parts = [
        f"{100 * share:.1f} % from {source.path} ({_counted(len(rows))}, {count / len(rows):.2f} times)"
        for source, share, rows, count in zip(sources, mix.shares, mix.rows, mix.counts)
    ]
    report.notes.append(f"An epoch is {_counted(len(mix))}: {', '.join(parts)}.")
    return mix


# -- building --------------------------------------------------------------------------------------------------


def build_dataset(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    data: DataSettings,
    method: str,
    progress: Progress | None = None,
    base: Path | None = None,
    limit: int | None = None,
    vocab_size: int | None = None,
) -> tuple[Dataset | PairDataset, DataReport]:
    """Read, check, render, tokenize and cut all rows, source after source in the order given.

    Args:
        data: max_length (tokens), overlong ("truncate", "drop", "error") and train_on.
        method: One of METHODS, which says what kind of rows there must be.
        progress: Called with the number of rows done since the last call and, where it can be guessed, of all rows.
        base: The recipe's folder, see `find_files`.
        limit: Stop once this many rows are kept, for a look at the first ones.
        vocab_size: Tokens that the model has embeddings for; a row with another one is wrong.

    Returns:
        The rows that can be trained on, and what happened to the others.

    Raises:
        DataError: rows are wrong; names up to 10 of them, in order, and says how many there are. Rows that are too long
            for `overlong: error` are named where nothing else is wrong. Or no row is left.
    """
    settings, progress = Settings.of(data, method, vocab_size), progress or (lambda rows, total: None)
    # By what the list is: equal sources may stand in both.
    inputs = Inputs(sources, base, "data.eval" if sources is getattr(data, "eval", None) else "data.train")
    if limit is None and inputs.size >= LARGE_BYTES:
        return _Large(inputs, tokenizer, settings, progress).build()
    merged, encoder = _Merger(inputs, settings), Encoder(tokenizer, settings)
    parts: list[Part] = []
    for item in inputs.tasks():
        left = None if limit is None else limit - sum(map(len, parts))
        if left == 0:
            break
        if isinstance(item, DataError):
            merged.add_error(item)
            continue
        task = merged.ready(replace(item, keep=left))
        result = encoder.encode(task)
        parts += merged.add(task, result)
        progress(result.read, None)
    dataset = dataset_of(Table(parts, inputs.names, inputs.sources_of_files), settings.kind)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
        # A look at a few rows does not read the whole files.
        return dataset, merged.report(dataset, [None] * len(inputs.files))
    return dataset, merged.report(dataset)


class _Merger:
    """Takes results in the order of the rows, and keeps count."""

    def __init__(self, inputs: Inputs, settings: Settings):
        self.inputs, self.settings = inputs, settings
        self.forms: dict[int, str] = {}
        self.rows: dict[int, int] = {}
        self.counts = dict.fromkeys(("longest", *COUNTS), 0)
        self.named: dict[str, Named] = {}
        self.faults, self.too_long = Faults(), Faults()

    def ready(self, task: Task) -> Task:
        """The task with what is known by now of the rows before it."""
        form = self.forms.get(task.source, task.format)
        return replace(task, form=form, check_only=self.faults.count > 0)

    def fits(self, task: Task, result: Result) -> bool:
        """Whether the result is that of the task with the form of the rows before it, which may have come up since."""
        form = self.forms.get(task.source, task.format)
        return task.form == form or result.form in (form, "auto")

    def add(self, task: Task, result: Result) -> list[Part]:
        """Take in the next result; returns its part, if any."""
        if result.form != "auto":
            self.forms[task.source] = result.form
        self.rows[task.file] = self.rows.get(task.file, 0) + result.read
        self.counts["longest"] = max(self.counts["longest"], result.longest)
        for name, count in result.counts.items():
            self.counts[name] += count
        add_named(self.named, result.named)
        self.faults.join(result.faults)
        self.too_long.join(result.too_long)
        return [] if result.part is None else [result.part]

    def add_error(self, error: DataError) -> None:
        """Note a file that cannot be read."""
        self.faults.add(error.faults)

    def check(self) -> None:
        """Raise what is wrong."""
        # Whether tokens were made behind a fault depends on where the work is done; what is said must not.
        faults = self.faults if self.faults.count else self.too_long
        if not faults.count:
            return
        raise faults.error()

    def content(self) -> dict[str, Any]:
        """All of it as JSON values, without the names of files."""
        named = [[heading, rows.count, rows.first] for heading, rows in self.named.items()]
        return {"rows": sorted(self.rows.items()), "counts": self.counts, "named": named}

    def load(self, content: dict[str, Any]) -> _Merger:
        """Take over what another `_Merger` gave."""
        self.rows = dict(map(tuple, content["rows"]))
        self.counts = content["counts"]
        self.named = {heading: Named(count, list(map(tuple, rows))) for heading, count, rows in content["named"]}
        return self

    def report(self, dataset: Dataset | PairDataset, hashes: Sequence[str | None] | None = None) -> DataReport:
        """What happened to the rows.

        Args:
            hashes: SHA-256 of all files of the inputs; None: compute those of the files that were read.

        Raises:
            DataError: rows are wrong, or none is left.
        """
        self.check()
        files = self.inputs.files
        read = [(files[i], rows, files[i].sha256() if hashes is None else hashes[i]) for i, rows in self.rows.items()]
        report = DataReport(
            read=sum(self.rows.values()),
            files=[FileReport(file.name, rows, sha256) for file, rows, sha256 in read],
        )
        report.add(dataset)
        for name, count in self.counts.items():
            setattr(report, name, count)
        report.notes = length_notes(report, self.settings.max_length)
        report.notes += named_notes(self.named, self.inputs.names)
        if not report.kept:
            raise DataError(
                f"of {_counted(report.read)} none can be trained on",
                where=", ".join(file.path for file in report.files[:3]),
                fix=" ".join(report.notes),
            )
        return report


# -- large data ------------------------------------------------------------------------------------------------


class _Large:
    """Data that is done in several processes and kept in a file."""

    def __init__(self, inputs: Inputs, tokenizer: Tokenizer, settings: Settings, progress: Progress):
        self.inputs, self.tokenizer, self.settings, self.progress = inputs, tokenizer, settings, progress
        self.states = [file.state() for file in inputs.files]
        self.hashes = [file.sha256() for file in inputs.files]

    def build(self) -> tuple[Dataset | PairDataset, DataReport]:
        """Open the cache's entry, or make it."""
        if any(isinstance(found, DataError) for found in self.inputs.found):
            return self._make(None)  # only to say all that is wrong
        if None in self.hashes:
            return self._make_in_temporary_folder()
        root, key = cache.cache_folder(), self._key()
        try:
            with cache.locked(root, key, lambda: console.say("Waiting for a run that prepares the same rows.")):
                found = cache.open_entry(root / key)
                if found is not None:
                    return self._opened(*found, root / key)
                if (root / key).exists():
                    console.warn(f"{root / key} is damaged; its rows are prepared again")
                self._check_room(root)
                made = self._make(cache.Store(root, key))
        except OSError as error:
            console.warn(
                f"prepared rows cannot be kept in {root} ({error.strerror or error}), so the next run prepares them "
                "again; FINETUNE_CACHE names another folder"
            )
            return self._make_in_temporary_folder()
        cache.sweep(root, key)
        return made

    def _key(self) -> str:
        content = self.tokenizer.content()
        del content["where"]
        files = iter(self.hashes)
        sources = [
            [source.format, source.samples, sorted(source.columns.items()), [next(files) for _ in files_of(found)]]
            for source, found in zip(self.inputs.sources, self.inputs.found)
        ]
        # A template that asks for the date renders other texts tomorrow.
        dated = any("strftime_now" in template for template in content["templates"].values())
        return cache.digest(
            {
                "sources": sources,
                "settings": asdict(self.settings),
                "tokenizer": content,
                "date": date.today().isoformat() if dated else None,
                "code": cache.code_digest(),
                "libraries": [tokenizers.__version__, jinja2.__version__],
            }
        )

    def _opened(
        self, parts: list[Part], content: dict[str, Any], where: Path
    ) -> tuple[Dataset | PairDataset, DataReport]:
        dataset = dataset_of(Table(parts, self.inputs.names, self.inputs.sources_of_files), self.settings.kind)
        report = _Merger(self.inputs, self.settings).load(content).report(dataset, self.hashes)
        console.say(f"Opened {_counted(report.kept)} that were prepared before: {where}")
        return dataset, report

    def _make_in_temporary_folder(self) -> tuple[Dataset | PairDataset, DataReport]:
        try:
            with cache.temporary_folder() as folder:
                self._check_room(folder)
                return self._make(cache.Store(folder, "rows"))
        except OSError as error:
            console.warn(f"no temporary folder can hold the rows ({error.strerror or error}), so memory must")
            return self._make(None)

    def _check_room(self, folder: Path) -> None:
        free, needed = shutil.disk_usage(folder).free, int(_ROOM * self.inputs.size)
        if free < needed:
            raise OSError(errno.ENOSPC, f"{free / 2**30:.1f} GiB are free, about {needed / 2**30:.1f} are needed")

    def _make(self, store: cache.Store | None) -> tuple[Dataset | PairDataset, DataReport]:
        """Tokenize all rows into a store, or (None) into memory.

        Raises:
            OSError: the store cannot be written.
        """
        merged, parts = _Merger(self.inputs, self.settings), []
        try:
            for part in self._parts(merged):
                if store is None:
                    parts.append(part)
                else:
                    store.add(part)
            merged.check()
            self._check_unchanged()
            if store is not None:
                parts = store.finish(merged.content())
        except BaseException:
            if store is not None:
                store.discard()
            raise
        dataset = dataset_of(Table(parts, self.inputs.names, self.inputs.sources_of_files), self.settings.kind)
        return dataset, merged.report(dataset, self.hashes)

    def _parts(self, merged: _Merger) -> Iterator[Part]:
        here, rows, done = None, 0, 0
        for item in encode_all(
            self.inputs.tasks(), self.tokenizer, self.settings, prepare=merged.ready, count=worker_count()
        ):
            if isinstance(item, DataError):
                merged.add_error(item)
                continue
            task, result = item
            if not merged.fits(task, result):
                here = here or Encoder(self.tokenizer, self.settings)
                task = merged.ready(task)
                result = here.encode(task)
            yield from merged.add(task, result)
            rows, done = rows + result.read, done + task.block.size
            # At least what is done, or a bar would run over its end
            self.progress(result.read, max(rows, int(rows * self.inputs.size / done)) if done else None)
        self.progress(0, rows)

    def _check_unchanged(self) -> None:
        for file, before in zip(self.inputs.files, self.states):
            if file.state() != before:
                raise DataError(
                    "the file changed while it was being read",
                    where=file.name,
                    fix="Wait until it is whole, then run the same command again.",
                )
