"""CONTRIBUTING.md says which files to touch to add something: done here in a scratch copy of the package, and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What a contributor writes: by file, what stands there and what it becomes.
Patch = Mapping[str, tuple[str, str]]

LAYOUT: Patch = {
    "finetune/export/formats.py": ('    "hf": NUMBERS,\n', '    "hf": NUMBERS,\n    "halves": ("float16",),\n'),
    "finetune/export/export.py": ('_WRITERS = {"hf": write_hf,', '_WRITERS = {"halves": write_hf, "hf": write_hf,'),
}


class Scratch:
    """A copy of the package with patches, and its command."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(ROOT / "finetune", folder / "finetune", ignore=shutil.ignore_patterns("__pycache__"))

    def apply(self, patch: Patch) -> None:
        for file, (old, new) in patch.items():
            text = (self.folder / file).read_text(encoding="utf-8")
            assert text.count(old) == 1, f"{file} has not one {old!r}"
            (self.folder / file).write_text(text.replace(old, new), encoding="utf-8")

    def finetune(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "finetune", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(self.folder)},
        )


@pytest.fixture()
def scratch(tmp_path) -> Scratch:
    return Scratch(tmp_path)


# What may be touched at most, and where it is shown to be enough.
LIMITS = {
    "a loss over pairs": (1, "tests/compute/test_losses.py", "test_a_new_loss_is_one_entry_in_one_file"),
    "a layout of `export`": (2, "tests/test_contributing.py", "test_a_layout"),
}


@pytest.mark.parametrize("what", LIMITS)
def test_the_page_names_few_files_and_a_test_shows_them(what):
    most, file, name = LIMITS[what]
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    ((touch, _),) = re.findall(rf"^\| {re.escape(what)} \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    assert 0 < len(re.findall(r"`finetune/.*?`", touch)) <= most
    assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")
    assert file in page


def test_a_layout(scratch, tiny_folder):
    scratch.apply(LAYOUT)
    run = scratch.finetune("export", tiny_folder, "out", "--format", "halves", "--dtype", "float16", "--verify")
    assert run.returncode == 0 and "Verified" in run.stdout, run.stderr
    run = scratch.finetune("export", tiny_folder, "out", "--format", "halves", "--dtype", "float32")
    assert run.returncode == 2 and "--dtype" in run.stderr
