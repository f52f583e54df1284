"""ModelScope (MODELSCOPE_ENDPOINT), through its hub client and into its own cache; the extra `modelscope`.

`modelscope.hub` itself hands everything to that client, which resumes, retries and checks the SHA-256 of every file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from finetune.model.hubs.hub import Kind, Listing, RemoteFile, Repo, WrongHash, user_error

_REVISION = "master"


class ModelScope:
    """See `hub.Hub`."""

    title = "ModelScope"
    kinds: tuple[Kind, ...] = ("model", "dataset")
    token: str | None = "MODELSCOPE_API_TOKEN"
    cache = "MODELSCOPE_CACHE"

    def listing(self, repo: Repo) -> Listing:
        """The files, each with its SHA-256."""
        client = _client(repo)
        with _quiet():
            found = client.list_repo_files(repo.id, repo.kind, revision=repo.revision or _REVISION)
        files = [
            RemoteFile(file.path, file.size, file.sha256 or "", f"sha256:{file.sha256}" if file.sha256 else None)
            for file in found
            if not file.is_dir
        ]
        return Listing(tuple(files))

    def root(self, repo: Repo) -> Path:
        """The repository's folder in ModelScope's cache."""
        from modelscope_hub.config import get_default_config

        return Path(get_default_config().cache_dir) / f"{repo.kind}s" / repo.id.replace("/", "--")

    def places(self, repo: Repo, file: RemoteFile) -> list[Path]:
        """Large files come in numbered parts."""
        path = self._snapshot(repo) / file.name
        parts = path.parent.glob(f"{escape(path.name)}_[0-9]*_[0-9]*")
        return [path, *(path.with_name(path.name + end) for end in (".incomplete", ".parallel_tmp")), *parts]

    def download(self, repo: Repo, listing: Listing) -> Path:
        """Fetch what the listing has; the client checks each file before it gets its name."""
        entries = [
            {"Path": file.name, "Size": file.size, "Sha256": file.version or None, "Type": "blob"}
            for file in listing.files
        ]
        client, revision = _client(repo), repo.revision or _REVISION
        with _quiet():
            try:
                return Path(client.download_repo(repo.id, repo.kind, revision=revision, file_list=entries))
            except Exception as error:
                if damaged := _damaged(error, listing):
                    raise damaged from error
                raise

    def cached(self, repo: Repo) -> Path | None:
        """None: the client's cache does not tell a whole snapshot from a part of one."""
        return None

    def _snapshot(self, repo: Repo) -> Path:
        return self.root(repo) / "snapshots" / (repo.revision or _REVISION)


def _client(repo: Repo) -> Any:
    try:
        from modelscope_hub import HubApi
    except ImportError as error:
        fix = "Install it: pip install 'paddle-finetune[modelscope]'."
        raise user_error(repo.kind)("ModelScope's library is not installed", where=str(repo), fix=fix) from error
    return HubApi()


def _damaged(error: Exception, listing: Listing) -> WrongHash | None:
    """The file that the client refused, and removed, for its content."""
    from modelscope_hub.errors import FileIntegrityError

    failed = getattr(error, "failed_files", {})
    for file in listing.files:
        if isinstance(failed.get(file.name), FileIntegrityError):
            return WrongHash(file, str(failed[file.name]))
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the client's own bars, which no argument turns off, and its log lines: its errors say the same."""
    from modelscope_hub import _download as bars

    logger = logging.getLogger("modelscope_hub")
    level, tqdm = logger.level, bars.tqdm
    logger.setLevel(logging.CRITICAL)
    bars.tqdm = partial(tqdm, disable=True)
    try:
        yield
    finally:
        bars.tqdm = tqdm
        logger.setLevel(level)
