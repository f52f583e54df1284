"""What a hub is: a place that lists the files of a repository and brings them to this machine whole."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from finetune.errors import CheckpointError, DataError, UserError, did_you_mean

Kind = Literal["model", "dataset"]

PREFIXES = ("hf", "modelscope", "aistudio", "paddlenlp")

_WORD = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_NAME = re.compile(rf"(?:(?P<hub>[A-Za-z]+):)?(?P<id>{_WORD}(?:/{_WORD})?)(?:@(?P<at>[\w./+-]+))?", re.ASCII)
_LONGEST = 96  # a name on Hugging Face's hub, which has neither -- nor .. in it
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Repo:
    """A repository on a hub.

    Attributes:
        hub: One of `PREFIXES`.
        id: `owner/name`, or a name alone.
        revision: Branch, tag or commit; None for the hub's default.
        kind: What it holds.
    """

    hub: str
    id: str
    revision: str | None
    kind: Kind

    def __str__(self) -> str:
        return f"{self.hub}:{self.id}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, as the hub lists it.

    Attributes:
        name: Its path in the repository.
        size: Bytes.
        version: What changes with the content, as the hub has it; names the file in a cache.
        digest: `sha256:`, `md5:` or `git:` (the SHA-1 of a git blob) and hex digits; None where the hub gives none.
    """

    name: str
    size: int
    version: str
    digest: str | None


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one revision; `commit` where the hub says which one it is."""

    files: tuple[RemoteFile, ...]
    commit: str | None = None


class Hub(Protocol):
    """One hub. Its methods pass on what its library raises; `faults.explain` makes one message of that.

    Attributes:
        title: As people call it.
        kinds: What can be fetched from it.
        token: The environment variable with the access token; None where there is none.
        cache: The environment variable that moves its files to another disk.
    """

    title: str
    kinds: tuple[Kind, ...]
    token: str | None
    cache: str

    def listing(self, repo: Repo) -> Listing:
        """Ask the hub for the files of a repository."""

    def root(self, repo: Repo) -> Path:
        """The folder below which the files of a repository are kept; it need not be there."""

    def places(self, repo: Repo, file: RemoteFile) -> list[Path]:
        """Where the bytes of a file lie, whole or in part; most of the paths are not there."""

    def download(self, repo: Repo, listing: Listing) -> Path:
        """Bring the files here and give the folder with all of them, each equal to its digest.

        What an earlier try left is gone on with, and files that are whole are left as they are.

        Raises:
            WrongHash: a file is not what the hub said; it is gone again.
        """

    def cached(self, repo: Repo) -> Path | None:
        """The folder that another program fetched through the same library, without asking the hub."""


class WrongHash(Exception):
    """A file arrived with another content than its digest says. Its place in the cache is empty again."""

    def __init__(self, file: RemoteFile, found: str):
        self.file = file
        self.found = found
        super().__init__(f"{file.name}: {found}, not {file.digest}")


class Refused(Exception):
    """A hub's answer in a status code, where its library raises nothing."""

    def __init__(self, status: int, reason: str):
        self.status_code = status
        super().__init__(f"{status}: {reason}")


def parse_repo(name: str, kind: Kind) -> Repo | None:
    """`modelscope:Qwen/Qwen2-0.5B@v1` in its parts; None for what can only be a path.

    >>> parse_repo("paddlenlp:Qwen/Qwen2-0.5B", "model")
    Repo(hub='paddlenlp', id='Qwen/Qwen2-0.5B', revision=None, kind='model')

    Raises:
        CheckpointError, DataError: a prefix that is no hub's, or FINETUNE_HUB names none.
    """
    found = _NAME.fullmatch(name)
    if found is None or len(found["id"]) > _LONGEST or "--" in found["id"] or ".." in found["id"]:
        return None
    hub, where = found["hub"] or os.environ.get("FINETUNE_HUB") or PREFIXES[0], name if found["hub"] else "FINETUNE_HUB"
    if hub not in PREFIXES:
        fix = did_you_mean(hub, PREFIXES, f"Known are {', '.join(PREFIXES)}.")
        raise user_error(kind)(f"there is no hub {hub!r}", where=where, fix=fix)
    return Repo(hub, found["id"], found["at"], kind)


def user_error(kind: Kind) -> type[UserError]:
    """The class of an error about the name of a model or dataset."""
    return CheckpointError if kind == "model" else DataError


def is_offline() -> bool:
    """Whether no hub may be asked: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, which users of any hub know."""
    values = [os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")]
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


def check_content(path: Path, file: RemoteFile) -> None:
    """Compare a file with what the hub says of it.

    Raises:
        WrongHash: size or digest differ.
    """
    size = path.stat().st_size
    if size != file.size:
        raise WrongHash(file, f"{size} bytes of {file.size}")
    if file.digest is None:
        return
    algorithm, _, expected = file.digest.partition(":")
    total = hashlib.new("sha1" if algorithm == "git" else algorithm, usedforsecurity=False)
    if algorithm == "git":
        total.update(f"blob {size}\0".encode())
    with path.open("rb") as content:
        while block := content.read(_BLOCK):
            total.update(block)
    if total.hexdigest() != expected.lower():
        raise WrongHash(file, f"{algorithm}:{total.hexdigest()}")
