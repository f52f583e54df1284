"""Checkpoint folders are complete or invisible, and damage never goes unseen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from finetune.errors import CheckpointError
from finetune.train import checkpoint as c


def write(root: Path, step: int, **changes) -> c.Checkpoint:
    def model(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    values = {
        "write_model": model,
        "optimizer": {"w/moment1": np.ones(3, np.float32)},
        "extra": {},
        "state": {"step": step},
    }
    return c.write_checkpoint(root, step, **(values | changes))


def test_what_is_written_reads_back(tmp_path):
    write(tmp_path, 3, extra={"a": np.arange(2)})
    found = c.open_checkpoint(tmp_path / "step-3")
    assert found.step == 3
    assert found.state() == {"step": 3}
    assert found.optimizer()["w/moment1"].tolist() == [1, 1, 1]
    assert found.extra()["a"].tolist() == [0, 1]
    assert (found.model / "config.json").exists()


FILES = ["model/config.json", "optimizer.safetensors", "state.json", "complete.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "delete"])
def test_every_damage_is_seen_and_the_one_before_is_used(tmp_path, name, damage):
    write(tmp_path, 1)
    write(tmp_path, 2)
    path = tmp_path / "step-2" / name
    data = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        flipped = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        path.write_bytes({"truncate": data[:-1], "empty": b"", "flip": flipped}[damage])
    said = []
    found = c.newest_good(tmp_path, said.append)
    if found.step == 2:
        # A flipped bit may leave complete.json's meaning as it was (a space, say); then nothing is lost.
        assert (name, damage) == ("complete.json", "flip")
        json.loads(path.read_text())
        return
    assert found.step == 1
    assert len(said) == 1 and "step-2" in said[0]


def test_a_write_that_fails_leaves_the_earlier_checkpoint_and_no_debris(tmp_path):
    write(tmp_path, 1)

    def full(folder: Path) -> None:
        folder.mkdir()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        write(tmp_path, 2, write_model=full)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert c.newest_good(tmp_path, pytest.fail).step == 1


def test_rotation_keeps_the_best_and_the_newest(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step)
    c.rotate(tmp_path, limit=2, keep={1})
    assert c.list_steps(tmp_path) == [1, 5]
    c.rotate(tmp_path, limit=None, keep=set())
    assert c.list_steps(tmp_path) == [1, 5]


def test_half_written_folders_are_swept_and_never_listed(tmp_path):
    write(tmp_path, 1)
    (tmp_path / ".step-2.partial").mkdir()
    assert c.list_steps(tmp_path) == [1]
    c.sweep(tmp_path)
    assert not (tmp_path / ".step-2.partial").exists()


def test_a_folder_that_is_no_checkpoint_says_so(tmp_path):
    (tmp_path / "step-9").mkdir()
    with pytest.raises(CheckpointError, match="never finished"):
        c.open_checkpoint(tmp_path / "step-9")
