"""manifest.json: what a run was made with, so that its numbers can be traced and the run repeated.

It names no host, holds no environment variable, and leaves out what looks like a password or an access token.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune.files import json_text, replace_file

PACKAGES = (
    "paddle-finetune",
    "paddlepaddle",
    "paddlepaddle-gpu",
    "paddlenlp",
    "numpy",
    "tokenizers",
    "safetensors",
    "datasets",
    "jinja2",
)

HIDDEN = "***"

_SECRET_NAME = (
    r"(?:(?:hf|hub|auth|access|api|bearer)[_-]?token|\btoken|secret|password|passwd|(?:api|access|private)[_-]?key"
    r"|credentials?|\bsignature)"
)
_REDACTIONS = (
    # https://user:password@host, and as a path, which has one slash there
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]*:/{1,2})[^/\s@]+@"), rf"\1{HIDDEN}@"),
    # ?token=..., KEY=VALUE, "password: ..."; a sentence that ends in "token:" goes on with rows, FILE:NUMBER
    (re.compile(rf"(?i)({_SECRET_NAME}(?:=|:(?!\s+\S+\.\w+:\d+\b)\s*))[^\s&;,'\"]+"), rf"\1{HIDDEN}"),
    # tokens that are known by their form: Hugging Face, OpenAI, GitHub, AWS
    (re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|AKIA)[\w-]{12,}"), HIDDEN),
)
_SECRET_OPTION = re.compile(rf"(?i)^--?[\w-]*{_SECRET_NAME}$")


def build_manifest(
    *,
    method: str,
    base_model: Mapping[str, Any],
    data: Mapping[str, Mapping[str, Any]],
    seed: int,
    device: str,
    command: Sequence[str],
    started: datetime,
    finished: datetime | None = None,
    status: str = "running",
    steps: Mapping[str, int] | None = None,
    tokens: Mapping[str, int] | None = None,
    versions: Mapping[str, str] | None = None,
    cpu_count: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Put together what is known of a run. Reads and writes no file.

    Args:
        method: sft or dpo.
        base_model: At least `path`; also parameters, trainable_parameters, or what else is known of it.
        data: For `train` and `eval`: `files`, each with path, rows and sha256, and counts (read, kept, truncated,
            dropped), and `notes`.
        seed: Of the recipe.
        device: `cpu`, or the name of the accelerator.
        command: The command line, word by word.
        started: With time zone; `finished` too.
        finished: When the run ended; None while it goes on.
        status: running, finished, or stopped.
        steps: `done` and `planned`.
        tokens: Counts such as total and supervised.
        versions: Of packages; the installed ones when None.
        cpu_count: Cores that this process may use; counted when None.
        extra: Further keys.

    Returns:
        A dictionary of JSON values, with secrets hidden.
    """
    manifest: dict[str, Any] = {
        "status": status,
        "method": method,
        "started": _iso(started),
        "finished": _iso(finished) if finished else None,
        "seconds": round((finished - started).total_seconds(), 3) if finished else None,
        "command": _redact_words(command),
        "seed": seed,
        "device": device,
        "cpu_count": available_cpus() if cpu_count is None else cpu_count,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": dict(installed_versions() if versions is None else versions),
        "base_model": dict(base_model),
        "data": {split: dict(report) for split, report in data.items()},
        "tokens": dict(tokens or {}),
        "steps": dict(steps or {}),
    }
    manifest.update(extra or {})
    return redact(manifest)


def write_manifest(path: str | Path, manifest: Mapping[str, Any]) -> None:
    """Write manifest.json whole: a reader sees the old file or the new one."""
    replace_file(Path(path), json_text(manifest, sort_keys=False, allow_nan=False))


def installed_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Look up the installed versions; packages that are not installed are left out. Imports none of them."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def available_cpus() -> int:
    """Count the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def redact(value: Any) -> Any:
    """Hide passwords and access tokens in a text, or in all texts of nested lists and dictionaries.

    >>> redact("https://me:pw@host/x?token=abc&split=train")
    'https://***@host/x?token=***&split=train'
    """
    if isinstance(value, str):
        for pattern, replacement in _REDACTIONS:
            value = pattern.sub(replacement, value)
        return value
    if isinstance(value, Mapping):
        return {key: redact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _redact_words(command: Sequence[str]) -> list[str]:
    """Hide the value behind an option such as `--hf-token`."""
    words = [str(word) for word in command]
    return [HIDDEN if index and _SECRET_OPTION.match(words[index - 1]) else word for index, word in enumerate(words)]


def _iso(time: datetime) -> str:
    return time.astimezone(timezone.utc).isoformat(timespec="seconds")
