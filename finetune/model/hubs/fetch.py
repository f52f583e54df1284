"""A repository brought to this machine whole, or the one message that says why it cannot be."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from finetune.console import Bar, progress, warn
from finetune.errors import DataError, StorageError
from finetune.files import format_size
from finetune.model.hubs.aistudio import AIStudio
from finetune.model.hubs.faults import explain, is_refused, unreachable
from finetune.model.hubs.hub import Hub, Listing, Repo, is_offline, user_error
from finetune.model.hubs.huggingface import HuggingFace
from finetune.model.hubs.modelscope import ModelScope
from finetune.model.hubs.paddlenlp import PaddleNLP
from finetune.model.hubs.receipt import Receipt

HUBS: dict[str, Hub] = {
    "hf": HuggingFace(),
    "modelscope": ModelScope(),
    "aistudio": AIStudio(),
    "paddlenlp": PaddleNLP(),
}

_MIB = 2**20
_LOOK_EVERY = 0.2  # seconds between two looks at what has arrived


@cache
def fetch(repo: Repo, patterns: tuple[str, ...]) -> Path:
    """The folder with the files of a repository; fetched, or the cached ones where nothing has changed.

    A process asks the hub once for a repository, so that a run keeps the revision it started with. A hub that cannot be
    reached is no error where the files are cached.

    Args:
        patterns: Which files are needed, as globs; of a model's, only those beside config.json.

    Raises:
        CheckpointError, DataError: there is no such repository, or not for this user; or it is neither cached nor can
            its hub be reached.
        HubError: the hub fails, does not answer in time, or sends something else than it lists.
        StorageError: the disk has no room for it.
    """
    hub, receipt = HUBS[repo.hub], Receipt(repo)
    if repo.kind not in hub.kinds:
        fix = f"Download the files, and give their folder as path; or name another hub, such as hf:{repo.id}."
        raise DataError(f"{hub.title} has no datasets that can be fetched", where=str(repo), fix=fix)
    if is_offline():
        if folder := receipt.folder() or hub.cached(repo):
            return folder
        raise unreachable(repo, hub, "offline, as HF_HUB_OFFLINE says")
    listing = None
    try:
        listing = _needed(hub.listing(repo), repo, patterns)
        return receipt.folder_of(listing) or _download(repo, hub, listing, receipt)
    except Exception as error:
        fault = explain(error, repo, hub, reached=listing is not None)
        if fault is None:
            raise
        if not is_refused(error) and (folder := receipt.folder()):
            warn(f"{fault}\n{repo} is used as it was fetched before.")
            return folder
        raise fault from error


def _needed(listing: Listing, repo: Repo, patterns: tuple[str, ...]) -> Listing:
    """Those files that are asked for.

    Raises:
        CheckpointError, DataError: there is none, or a name would lead out of the folder.
    """
    files = []
    for file in listing.files:
        parts = Path(file.name).parts
        if not any(fnmatch(file.name, pattern) for pattern in patterns) or (repo.kind == "model" and len(parts) > 1):
            continue
        if ".." in parts or file.name.startswith("/"):
            raise user_error(repo.kind)(f"lists a file outside of its folder: {file.name!r}", where=str(repo))
        files.append(file)
    if not files:
        raise user_error(repo.kind)(f"has none of the files that are needed: {', '.join(patterns)}", where=str(repo))
    return Listing(tuple(files), listing.commit)


def _download(repo: Repo, hub: Hub, listing: Listing, receipt: Receipt) -> Path:
    here = _arrived(repo, hub, listing)
    _check_room(repo, hub, sum(file.size for file in listing.files) - here)
    with _shown(repo, hub, listing, here):
        folder = hub.download(repo, listing)
    receipt.write(folder, listing)
    return folder


def _check_room(repo: Repo, hub: Hub, needed: int) -> None:
    """The disk must have room for what is still to come, before the first byte of it."""
    folder = hub.root(repo)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise StorageError(
            f"{format_size(needed)} are still to be fetched, and {format_size(free)} are free in {there}",
            where=str(repo),
            fix=f"Make room, or set {hub.cache} to a folder on another disk.",
        )


def _arrived(repo: Repo, hub: Hub, listing: Listing) -> int:
    """Bytes of the files that are on the disk, those of half files among them."""
    return sum(min(file.size, sum(map(_size, hub.places(repo, file)))) for file in listing.files)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # most of the places are empty, and files are renamed meanwhile
        return 0


@contextmanager
def _shown(repo: Repo, hub: Hub, listing: Listing, here: int) -> Iterator[None]:
    """Show progress, rate and time left, by looking at the files: so it is the same for all libraries."""
    total = sum(file.size for file in listing.files)
    done = threading.Event()
    with progress(_mib(total), f"fetch {repo.id}", unit="MiB", done=here // _MIB) as bar:
        watch = threading.Thread(target=_watch, args=(bar, done, repo, hub, listing), daemon=True)
        watch.start()
        try:
            yield
        finally:
            done.set()
            watch.join()
        bar.advance(_mib(total) - bar.done)


def _watch(bar: Bar, done: threading.Event, repo: Repo, hub: Hub, listing: Listing) -> None:
    while not done.wait(_LOOK_EVERY):
        bar.advance(max(0, _arrived(repo, hub, listing) // _MIB - bar.done))


def _mib(size: int) -> int:
    return -(-size // _MIB)
