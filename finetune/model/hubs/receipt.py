"""What was fetched, written down when all of it had arrived: a repository without a receipt is not taken for whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from finetune.files import cache_home, json_text, replace_file
from finetune.model.hubs.hub import Listing, Repo


class Receipt:
    """The receipt of one repository at one revision, a JSON file below `cache_home()`.

    It names the folder and each file with size, version and time of the last change. A file that has changed since then
    is not trusted, so that nothing needs to be hashed twice.
    """

    def __init__(self, repo: Repo):
        name = quote(f"{repo.kind}s--{repo.id}@{repo.revision or ''}", safe="@")
        self.path = cache_home() / "hubs" / "receipts" / repo.hub / f"{name}.json"

    def folder(self) -> Path | None:
        """The folder, where all files are there as they arrived."""
        record = self._read()
        return Path(record["folder"]) if record else None

    def folder_of(self, listing: Listing) -> Path | None:
        """The folder, where it holds just what the hub lists now."""
        record = self._read()
        if record is None:
            return None
        found = {(file["name"], file["size"], file["version"]) for file in record["files"]}
        listed = {(file.name, file.size, file.version) for file in listing.files}
        return Path(record["folder"]) if found == listed else None

    def write(self, folder: Path, listing: Listing) -> None:
        """Write down that all of the files are in `folder` and checked."""
        files = [
            {"name": file.name, "size": file.size, "version": file.version, "changed": _changed(folder / file.name)}
            for file in listing.files
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, json_text({"folder": str(folder), "commit": listing.commit, "files": files}))

    def _read(self) -> dict[str, Any] | None:
        """The record, where the files are still as it says."""
        try:
            record: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            folder = Path(record["folder"])
            for file in record["files"]:
                path = folder / file["name"]
                if path.stat().st_size != file["size"] or _changed(path) != file["changed"]:
                    return None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # not there, written by another version, or files were removed: fetch again
        return record


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns
