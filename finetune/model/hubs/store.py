"""Files over plain HTTP, kept as Hugging Face's cache keeps them: each content once, snapshots that link to it.

BASE/blobs/<version>              a file that has arrived whole and was checked
BASE/blobs/<version>.incomplete   one that has not; the next try goes on at its end
BASE/snapshots/<key>/<name>       links to the blobs of one listing; the folder comes by a rename, complete
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from finetune.files import cache_home, sync
from finetune.model.hubs.hub import Listing, RemoteFile, Repo, WrongHash, check_content

TIMEOUT = (10.0, 30.0)
"""Seconds for a connection, and for the next bytes."""

TRIES = 5
"""Tries in a row that bring no new byte, before it is an error."""

WAIT = 1.0
"""Seconds between two of them."""

_CHUNK = 1 << 16
_RANGE = re.compile(r"bytes (\d+)-")
_PLAIN = re.compile(r"[\w.-]{1,100}")


class Store:
    """The cache of one repository.

    Args:
        repo: Whose files it keeps.
    """

    def __init__(self, repo: Repo):
        self.base = cache_home() / "hubs" / repo.hub / f"{repo.kind}s--{repo.id.replace('/', '--')}"

    def blob(self, file: RemoteFile) -> Path:
        """Where a file lies once it is whole."""
        plain = file.version if _PLAIN.fullmatch(file.version) else hashlib.sha256(file.version.encode()).hexdigest()
        return self.base / "blobs" / plain

    def places(self, file: RemoteFile) -> list[Path]:
        """Where its bytes lie, whole or in part."""
        return [self.blob(file), _partial(self.blob(file))]

    def receive(self, file: RemoteFile, url: str, headers: Mapping[str, str]) -> None:
        """Bring one file here, from where an earlier try stopped; one process at a time, others wait.

        Raises:
            requests.RequestException: the server refuses, breaks off or stays silent, several times in a row.
            WrongHash: the content is not what the listing says; nothing is kept of it.
            OSError: it cannot be written.
        """
        blob = self.blob(file)
        blob.parent.mkdir(parents=True, exist_ok=True)
        while not blob.exists():
            with _partial(blob).open("ab") as content:
                fcntl.flock(content, fcntl.LOCK_EX)
                if os.fstat(content.fileno()).st_nlink == 0 or blob.exists():
                    continue  # another process renamed or removed it while this one waited
                try:
                    _fill(content, file, url, headers)
                    check_content(_partial(blob), file)
                except WrongHash:
                    _partial(blob).unlink()
                    raise
                sync(_partial(blob))
                _partial(blob).replace(blob)

    def snapshot(self, listing: Listing) -> Path:
        """The folder in which all files of a listing have their names."""
        key = hashlib.sha256(repr([(file.name, file.version) for file in listing.files]).encode()).hexdigest()[:16]
        folder = self.base / "snapshots" / key
        if folder.exists():
            return folder
        partial = folder.with_name(f".{key}.{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        for file in listing.files:
            link = partial / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(self.blob(file), link.parent))
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # another process was first
                raise
            shutil.rmtree(partial)
        return folder


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _fill(content: BinaryIO, file: RemoteFile, url: str, headers: Mapping[str, str]) -> None:
    """Append what is missing, over as many connections as it takes while each brings something."""
    import requests

    idle = 0
    while (here := content.seek(0, os.SEEK_END)) != file.size:
        if here > file.size:
            here = content.truncate(0)
        try:
            _stream(content, here, file, url, headers)
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
            idle = 0 if content.seek(0, os.SEEK_END) > here else idle + 1
            if idle == TRIES:
                raise
            time.sleep(WAIT)


def _stream(content: BinaryIO, here: int, file: RemoteFile, url: str, headers: Mapping[str, str]) -> None:
    """One connection's worth, from byte `here` on; from the first where the server knows no ranges."""
    import requests

    wanted = {**headers, "Accept-Encoding": "identity"} | ({"Range": f"bytes={here}-"} if here else {})
    with requests.get(url, headers=wanted, stream=True, timeout=TIMEOUT) as response:
        response.raise_for_status()
        start = _RANGE.match(response.headers.get("Content-Range", ""))
        if here and not (response.status_code == 206 and start and int(start[1]) == here):
            content.truncate(0)
            here = 0
        for chunk in response.iter_content(_CHUNK):
            content.write(chunk)
            here += len(chunk)
            if here > file.size:
                raise WrongHash(file, f"more than {file.size} bytes")
    content.flush()
    if here < file.size:
        raise requests.ConnectionError(f"the connection ended after {here} of {file.size} bytes")
