"""Hugging Face's hub and its mirrors (HF_ENDPOINT), through huggingface_hub and into its own cache.

The library checks sizes; the hashes that the hub lists are checked here, and a damaged file leaves the cache again.
`snapshot_download` is not used: where the hub fails half-way it gives the folder as it is, incomplete.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.model.hubs.hub import Kind, Listing, RemoteFile, Repo, WrongHash, check_content

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_TIMEOUT = 30.0  # seconds for the list of files
TRIES = 5
"""Connections for a file that break off, before it is an error."""

WAIT = 1.0
"""Seconds between two of them."""

_TOGETHER = 4  # files fetched at a time


class HuggingFace:
    """See `hub.Hub`. Datasets go through the `datasets` library, which fetches them by itself."""

    title = "Hugging Face"
    kinds: tuple[Kind, ...] = ("model",)
    token: str | None = "HF_TOKEN"
    cache = "HF_HOME"

    def listing(self, repo: Repo) -> Listing:
        """The files with the commit; large ones have a SHA-256, the others the SHA-1 of their git blob."""
        from huggingface_hub import HfApi

        info = HfApi().repo_info(repo.id, revision=repo.revision, files_metadata=True, timeout=_TIMEOUT)
        return Listing(tuple(map(_remote_file, info.siblings or [])), info.sha)

    def root(self, repo: Repo) -> Path:
        """The repository's folder in the hub cache, shared with transformers."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"{repo.kind}s--{repo.id.replace('/', '--')}"

    def places(self, repo: Repo, file: RemoteFile) -> list[Path]:
        """Blobs are named by what the hub calls their version."""
        blobs = self.root(repo) / "blobs"
        return [blobs / file.version, blobs / f"{file.version}.incomplete"]

    def download(self, repo: Repo, listing: Listing) -> Path:
        """Fetch the files of the listed commit; then note the branch or tag, so that others find it offline too."""
        from huggingface_hub import hf_hub_download

        with _quiet(), ThreadPoolExecutor(_TOGETHER) as pool:
            paths = list(pool.map(lambda file: _get(repo, file, listing.commit), listing.files))
            hf_hub_download(repo.id, listing.files[0].name, revision=repo.revision)
        return paths[0].parent

    def cached(self, repo: Repo) -> Path | None:
        """The snapshot that transformers or this program fetched."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(repo.id, revision=repo.revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None


def _get(repo: Repo, file: RemoteFile, commit: str | None) -> Path:
    """One file, checked. The library takes up a connection that is silent, not one that broke off."""
    import requests
    from huggingface_hub import hf_hub_download

    for attempt in range(1, TRIES + 1):
        try:
            path = Path(hf_hub_download(repo.id, file.name, revision=commit))
            break
        except requests.exceptions.ChunkedEncodingError:
            if attempt == TRIES:
                raise
            time.sleep(WAIT)
    try:
        check_content(path, file)
    except WrongHash:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise
    return path


def _remote_file(file: RepoSibling) -> RemoteFile:
    if file.lfs:
        return RemoteFile(file.rfilename, file.lfs.size, file.lfs.sha256, f"sha256:{file.lfs.sha256}")
    return RemoteFile(file.rfilename, file.size or 0, file.blob_id or "", f"git:{file.blob_id}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own progress bars, and without a warning for each of its new tries."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    shown, level = not are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            enable_progress_bars()
