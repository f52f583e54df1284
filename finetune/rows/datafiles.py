"""Which files a source names: one file, those of a folder and split, of a glob, or a split on the hub."""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Protocol, cast

from finetune.errors import DataError, nearest
from finetune.files import hash_file
from finetune.model.hubs.fetch import fetch
from finetune.model.hubs.hub import Repo, parse_repo

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrow")
HUB_PATTERNS = tuple(f"*{suffix}{end}" for suffix in SUFFIXES for end in ("", ".gz"))
# Written beside the rows by `datasets.save_to_disk`; they describe the rows and are none.
_NOT_ROWS = ("dataset_info.json", "dataset_dict.json", "state.json", "dataset_infos.json")
# What a file or folder is named after, and the split it is then of, as `datasets` has it.
_SPLIT_WORDS = {word: "train" for word in ("train", "training")}
_SPLIT_WORDS |= {word: "test" for word in ("test", "testing", "eval", "evaluation")}
_SPLIT_WORDS |= {word: "validation" for word in ("validation", "valid", "val", "dev")}
_SPLIT_WORD = re.compile(rf"({'|'.join(_SPLIT_WORDS)})(?![A-Za-z])")
# The hub's own file names hold the whole name of a split: train_prefs-00000-of-00001.parquet.
_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}")
# Bytes of text in a byte of a compressed file, about.
_PACKED = 4


class Source(Protocol):
    """Where rows come from; `finetune.recipe.schema.Source` is one, and says what the keys mean."""

    @property
    def path(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def columns(self) -> Mapping[str, str]: ...
    @property
    def split(self) -> str: ...
    @property
    def samples(self) -> int | None: ...
    @property
    def weight(self) -> float | None: ...


@dataclass(frozen=True)
class PlainSource:
    """A source for another process, which need not know recipes."""

    path: str
    format: str
    columns: Mapping[str, str]
    split: str
    samples: int | None
    weight: float | None

    @classmethod
    def of(cls, source: Source) -> PlainSource:
        """The same source."""
        return cls(**{field.name: getattr(source, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class DataFile:
    """A file of rows, or a split on the hub.

    Attributes:
        name: How its rows are named, the path as the user gave it.
        path: Where it is; None for the hub.
        split: The hub split; None for a file.
        repo: The repository on the hub; None for a file.
    """

    name: str
    path: Path | None
    split: str | None = None
    repo: Repo | None = None

    def open(self) -> IO[bytes]:
        """The file's bytes, unpacked.

        Raises:
            OSError: it cannot be read.
            ValueError: it is on the hub.
        """
        if self.path is None:
            raise ValueError(f"{self.name} is on the hub")
        if self.path.name.lower().endswith(".gz"):
            return cast(IO[bytes], gzip.open(self.path, "rb"))
        return self.path.open("rb")

    def sha256(self) -> str | None:
        """Hash of the file's bytes, hex; None for the hub, whose own cache keys the data.

        Raises:
            DataError: it cannot be read.
        """
        if self.path is None:
            return None
        try:
            return hash_file(self.path)
        except OSError as error:
            raise unreadable(error, self.name) from error

    def state(self) -> tuple[int, int] | None:
        """(bytes, time of the last change in ns), which tell whether a file is as it was; None for the hub.

        Raises:
            DataError: it is no longer there.
        """
        if self.path is None:
            return None
        try:
            found = self.path.stat()
        except OSError as error:
            raise unreadable(error, self.name) from error
        return found.st_size, found.st_mtime_ns

    def text_bytes(self) -> int | None:
        """Bytes of text in the file, guessed where it is compressed; None for the hub.

        Raises:
            DataError: it is no longer there.
        """
        if self.path is None:
            return None
        packed = self.path.name.lower().endswith((".gz", ".parquet"))
        state = self.state()
        return None if state is None else state[0] * (_PACKED if packed else 1)


def unreadable(error: Exception, name: str) -> DataError:
    return DataError(f"the file cannot be read: {error}", where=name)


def find_files(source: Source, base: Path | None = None, key: str = "data") -> list[DataFile]:
    """The files a source names, in order of name.

    Args:
        source: Its path is a file, a folder (the data files below it, of its split), a glob, or a hub id
            `PREFIX:OWNER/NAME@REVISION`, where prefix and revision may be absent.
        base: Where a relative path is looked for if the current folder does not have it: the recipe's folder.
        key: The recipe key that holds the path, for messages.

    Raises:
        DataError: nothing is there, or a file is of no known kind; names the nearest existing file.
    """
    try:
        return _find(source, base, key)
    except OSError as error:  # a name that is too long, a folder that must not be looked into
        raise DataError(f"{source.path} cannot be read: {error.strerror}", where=key) from error


def _find(source: Source, base: Path | None, key: str) -> list[DataFile]:
    given = Path(os.path.expanduser(source.path))
    for place in [given] if base is None or given.is_absolute() else [given, base / given]:
        files: list[Path] = []
        if place.is_file():
            check_suffix(place)
            files = _named_after([place], source.split, place)
        elif place.is_dir():
            files = _files_of_folder(place, source.split)
        elif any(sign in source.path for sign in "*?["):
            matches = [Path(match) for match in sorted(glob.glob(str(place), recursive=True))]
            files = [match for match in matches if match.is_file() and _is_data(match)]
            files = _named_after(files, source.split, place) if files else []
        if files:
            return [DataFile(str(path), path) for path in files]
    repo = parse_repo(source.path, "dataset")
    if repo and "/" in repo.id and (":" in source.path or (_suffix(given) is None and not given.parent.is_dir())):
        return _files_of_hub(repo, source)
    raise DataError(f"there is no file {source.path}", where=key, fix=_nearest(given, base))


def _files_of_hub(repo: Repo, source: Source) -> list[DataFile]:
    """The rows of Hugging Face's datasets come by way of `datasets`; of other hubs, as files."""
    if repo.hub == "hf":
        return [DataFile(source.path, None, source.split, repo)]
    folder = fetch(repo, HUB_PATTERNS)
    files = _files_of_folder(folder, source.split)
    return [DataFile(f"{source.path}/{path.relative_to(folder)}", path) for path in files]


def _suffix(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def check_suffix(path: Path) -> str:
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


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    # A `datasets` folder of several splits holds one folder for each.
    if (folder / "dataset_dict.json").is_file():
        if not (folder / split).is_dir():
            splits = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
            raise DataError(f"there is no split {split!r}", where=str(folder), fix=f"It has {', '.join(splits)}.")
        return _files_below(folder / split)
    return _of_split(_files_below(folder), folder, split)


def _files_below(folder: Path) -> list[Path]:
    """All data files but hidden ones, those in hidden folders, and what `datasets` caches beside the rows it saved."""
    below = [(path, path.relative_to(folder).parts) for path in sorted(folder.rglob("*"))]
    files = [path for path, parts in below if _is_data(path) and not any(part.startswith(".") for part in parts)]
    saved = {parent: _saved_files(parent) for parent in {path.parent for path in files}}
    files = [path for path in files if path.is_file() and ((own := saved[path.parent]) is None or path.name in own)]
    if not files:
        raise DataError("no data file in this folder", where=str(folder), fix=f"Known are {', '.join(SUFFIXES)}.")
    return files


def _saved_files(folder: Path) -> list[str] | None:
    """The names of the files that `datasets.save_to_disk` wrote into a folder; None where it did not.

    Raises:
        DataError: one of them is missing.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [Path(file["filename"]).name for file in state["_data_files"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None  # nothing there, or a state of something else
    for name in names:
        if not (folder / name).is_file():
            raise DataError(
                f"{name}, which state.json names, is missing", where=str(folder), fix="Save the rows again."
            )
    return names


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """The files of a folder that are named after a split, themselves or by a folder on the way.

    Where they are not named after `train` and another split, all are of `train`.
    """
    names = {path: path.relative_to(folder) for path in files}
    splits = {name for name in map(_split_of, names.values()) if name}
    if split == "train" and len({name.startswith("train") for name in splits}) < 2:
        return files
    chosen = [path for path, name in names.items() if _is_of(name, split)]
    if not chosen:
        fix = "Its files are not named after splits: leave split out."
        if splits:
            fix = f"Its files are named after {', '.join(sorted(splits))}: give one of these as split, or give a glob."
        raise DataError(f"there is no split {split!r}", where=str(folder), fix=fix)
    return chosen


def _named_after(files: list[Path], split: str, place: Path) -> list[Path]:
    """Files that were named one by one or by a glob: all for `train`, else those whose own names have the split."""
    chosen = [path for path in files if split == "train" or _is_of(Path(path.name), split)]
    if not chosen:
        raise DataError(f"no file of split {split!r}: files have no splits", where=str(place), fix="Leave split out.")
    return chosen


def _split_of(path: Path) -> str | None:
    """The split that a file is named after, or else the nearest of its folders.

    >>> [_split_of(Path(name)) for name in ("train_a.csv", "dev/1.csv", "test_sft-00000-of-00001.parquet", "tests.csv")]
    ['train', 'validation', 'test_sft', None]
    """
    return next(filter(None, map(_split_in, reversed(path.parts))), None)


def _split_in(name: str) -> str | None:
    word, shard = _SPLIT_WORD.match(name), _SHARD.match(name)
    if word is None:
        return None
    return _SPLIT_WORDS.get(shard[1], shard[1]) if shard else _SPLIT_WORDS[word[1]]


def _is_of(path: Path, split: str) -> bool:
    for part in reversed(path.parts):
        if part == split or part.startswith((f"{split}-", f"{split}.")):
            return True
        if named := _split_in(part):
            return named == split
    return False


def _nearest(given: Path, base: Path | None) -> str:
    """The fix for a path that is not there: the file of the nearest name, or what the folder holds."""
    for folder in filter(None, (given.parent, base / given.parent if base else None)):
        if folder.is_dir():
            names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() or _is_data(entry))
            if near := nearest(given.name, names):
                return f"Did you mean {folder / near}?"
            if names:
                return f"{folder} has {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}."
            return f"{folder} has no data files."
    return f"The folder {given.parent} is not there either (current folder: {Path.cwd()})."
