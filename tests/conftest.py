"""Fixtures shared by all tests. `tests.tiny` makes the models; nothing is downloaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if WORKERS := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # threads that wait for each other spin: half the time, seen
    os.environ.setdefault("MKL_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(WORKERS))))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `from tests.tiny import ...` works anywhere

import pytest

from tests.tiny import tiny_model, tiny_tokenizer


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """tests/soak takes a while: only when it is named on the command line."""
    return True if collection_path.name == "soak" and not any("soak" in name for name in config.args) else None


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tied float32 tiny Qwen2 with its tokenizer. Shared by the session: do not write to it."""
    return tiny_model(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def tiny_untied_folder(tmp_path_factory) -> Path:
    """The same with a head of its own and two shards. Shared by the session: do not write to it."""
    return tiny_model(tmp_path_factory.mktemp("tiny") / "untied", tied=False, seed=1, max_shard_bytes=100_000)


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory) -> Path:
    """Only the tokenizer files. Shared by the session: do not write to it."""
    return tiny_tokenizer(tmp_path_factory.mktemp("tiny") / "tokenizer")
