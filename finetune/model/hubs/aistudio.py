"""AI Studio, through aistudio-sdk (below 0.3): the SDK asks and authorizes, the files come by `store`.

The SDK's own download writes into its cache under the final name and never looks again, so that a half file is taken
for whole; and it starts anew each time.
"""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from finetune.model.hubs.hub import Kind, Listing, Refused, RemoteFile, Repo
from finetune.model.hubs.store import Store

_REVISION = "master"
_POINTER = re.compile(rb"version https://git-lfs.+\noid sha256:([0-9a-f]{64})\nsize (\d+)\s*", re.DOTALL)


class AIStudio:
    """See `hub.Hub`."""

    title = "AI Studio"
    kinds: tuple[Kind, ...] = ("model", "dataset")
    token: str | None = "AISTUDIO_ACCESS_TOKEN"
    cache = "FINETUNE_CACHE"

    def listing(self, repo: Repo) -> Listing:
        """The files of the repository's folders, with the SHA-256 of those in LFS."""
        if repo.kind == "model":
            _check_permit(repo)
        return Listing(tuple(_files(repo, "")))

    def root(self, repo: Repo) -> Path:
        """The repository's folder in this program's cache."""
        return Store(repo).base

    def places(self, repo: Repo, file: RemoteFile) -> list[Path]:
        """As `store` has them."""
        return Store(repo).places(file)

    def download(self, repo: Repo, listing: Listing) -> Path:
        """Fetch the files one after the other."""
        from aistudio_sdk.requests.hub import _header_fill

        store = Store(repo)
        for file in listing.files:
            url = f"{_host()}/api/v1/repos/{_owner_and_name(repo)}/media/{quote(file.name, safe='')}"
            if repo.revision:
                url += f"?ref={quote(repo.revision, safe='')}"
            store.receive(file, url, _header_fill(token=_token()))
        return store.snapshot(listing)

    def cached(self, repo: Repo) -> Path | None:
        """None: the SDK's cache does not tell a whole file from a part of one."""
        return None


def _files(repo: Repo, folder: str) -> list[RemoteFile]:
    """The files of one folder and, for a dataset, of those in it."""
    files = []
    for entry in _info(repo, folder):
        if entry.get("type") == "dir":
            files += _files(repo, entry["path"]) if repo.kind == "dataset" else []
        else:
            files.append(_remote_file(_info(repo, entry["path"])))
    return files


def _remote_file(info: dict[str, Any]) -> RemoteFile:
    """What the hub says of one file. A file in LFS has a pointer for its content, with its true size and hash."""
    name, version, size = info["path"], info["sha"], int(info["size"])
    content = base64.b64decode(info.get("content") or "")
    if pointer := _POINTER.fullmatch(content):
        return RemoteFile(name, int(pointer[2]), version, f"sha256:{pointer[1].decode()}")
    # `sha` is that of the git blob; without the content nobody knows whether the blob is the file or a pointer to it.
    return RemoteFile(name, size, version, f"git:{version}" if len(content) == size else None)


def _check_permit(repo: Repo) -> None:
    from aistudio_sdk.requests.hub import request_aistudio_repo_visible

    answer = request_aistudio_repo_visible(repoId=repo.id, token=_token())
    if answer.get("error_code"):  # no JSON: the status of the answer stands in biz_code
        raise Refused(int(answer["biz_code"]), str(answer.get("error_msg"))[:200])
    if answer.get("errorCode"):
        raise Refused(403, str(answer.get("errorMsg"))[:200])


def _info(repo: Repo, path: str) -> Any:
    """A folder's entries, or one file's entry."""
    from aistudio_sdk.requests.hub import request_aistudio_git_file_info

    owner, _, name = repo.id.partition("/")
    answer = request_aistudio_git_file_info(_host(), owner, name, path, repo.revision or _REVISION, _token())
    if isinstance(answer, dict) and answer.get("error_code"):
        raise Refused(int(answer["biz_code"]), str(answer.get("error_msg"))[:200])
    return answer


def _host() -> str:
    from aistudio_sdk import config

    return os.environ.get("STUDIO_GIT_HOST", config.STUDIO_GIT_HOST_DEFAULT)


def _token() -> str:
    """AISTUDIO_ACCESS_TOKEN, which the SDK fills from where its login keeps it."""
    from aistudio_sdk.hub import Hub

    Hub()
    return os.environ.get("AISTUDIO_ACCESS_TOKEN", "")


def _owner_and_name(repo: Repo) -> str:
    return "/".join(quote(part, safe="") for part in repo.id.split("/"))
