"""PaddleNLP's community files over plain HTTP, under the names that its model pages link.

There is no list of files to ask for: each that a model may have is asked for by name. There are no revisions either.
"""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from finetune.errors import CheckpointError
from finetune.model.hubs import store
from finetune.model.hubs.hub import Kind, Listing, RemoteFile, Repo
from finetune.model.runtime import paddle

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NAMES = (
    CONFIG,
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    WEIGHTS,
    INDEX,
)
if TYPE_CHECKING:
    import requests

_MD5 = re.compile(r"[0-9a-f]{32}")


class PaddleNLP:
    """See `hub.Hub`."""

    title = "PaddleNLP's community hub"
    kinds: tuple[Kind, ...] = ("model",)
    token: str | None = None
    cache = "FINETUNE_CACHE"

    def listing(self, repo: Repo) -> Listing:
        """Those of `NAMES` that are there, and the shards that an index names; with MD5 where the server has it.

        Raises:
            CheckpointError: a revision was asked for.
            requests.HTTPError: there is no config.json.
        """
        if repo.revision:
            fix = f"Leave @{repo.revision} out."
            raise CheckpointError(f"{self.title} has no revisions", where=str(repo), fix=fix)
        answers = {name: _ask(repo, name) for name in NAMES}
        answers[CONFIG].raise_for_status()
        if answers[WEIGHTS].status_code == 404 and answers[INDEX].status_code != 404:
            answers |= {name: _ask(repo, name) for name in _shards(repo)}
        else:
            del answers[INDEX]
        optional = [name for name in NAMES if name in answers and answers[name].status_code == 404]
        return Listing(tuple(_remote_file(name, answers[name]) for name in answers if name not in optional))

    def root(self, repo: Repo) -> Path:
        """The repository's folder in this program's cache."""
        return store.Store(repo).base

    def places(self, repo: Repo, file: RemoteFile) -> list[Path]:
        """As `store` has them."""
        return store.Store(repo).places(file)

    def download(self, repo: Repo, listing: Listing) -> Path:
        """Fetch the files one after the other."""
        kept = store.Store(repo)
        for file in listing.files:
            kept.receive(file, _url(repo, file.name), {})
        return kept.snapshot(listing)

    def cached(self, repo: Repo) -> Path | None:
        """None: PaddleNLP's own cache does not say what belongs to a model."""
        return None


def _ask(repo: Repo, name: str) -> requests.Response:
    import requests

    headers = {"Accept-Encoding": "identity"}  # the size of the file, not of its compression
    return requests.head(_url(repo, name), headers=headers, timeout=store.TIMEOUT, allow_redirects=True)


def _remote_file(name: str, answer: requests.Response) -> RemoteFile:
    """A file's size, version and digest, from the headers of its answer."""
    answer.raise_for_status()
    size = int(answer.headers["Content-Length"])
    tag = answer.headers.get("ETag", "").strip('"')
    version = f"{name} {size} {tag or answer.headers.get('Last-Modified', '')}"
    return RemoteFile(name, size, version, _digest(answer.headers.get("Content-MD5"), tag))


def _digest(md5: str | None, tag: str) -> str | None:
    """The MD5 of the content: its own header, or the ETag, which is one unless the file was uploaded in parts."""
    if md5:
        return f"md5:{base64.b64decode(md5).hex()}"
    return f"md5:{tag.lower()}" if _MD5.fullmatch(tag.lower()) else None


def _shards(repo: Repo) -> list[str]:
    """The files that the index names.

    Raises:
        CheckpointError: it is no index.
    """
    import requests

    answer = requests.get(_url(repo, INDEX), timeout=store.TIMEOUT)
    answer.raise_for_status()
    try:
        names = sorted(set(json.loads(answer.content)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"its {INDEX} is no index of weights", where=str(repo)) from error
    return names


def _url(repo: Repo, name: str) -> str:
    return f"{_prefix()}/{quote(repo.id)}/{quote(name)}"


def _prefix() -> str:
    """Where the community files are: as PaddleNLP has it, which is loaded only to be asked."""
    if prefix := os.environ.get("COMMUNITY_MODEL_PREFIX"):
        return prefix
    paddle()
    from paddlenlp.utils.downloader import COMMUNITY_MODEL_PREFIX

    return COMMUNITY_MODEL_PREFIX
