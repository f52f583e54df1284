"""Checkpoint folders are complete or invisible, and damage never goes unseen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from finetune.errors import CheckpointError, StorageError, TrainingError
from finetune.train import checkpoint as c


def write(root: Path, step: int, **changes) -> c.Checkpoint:
    def model(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    values = {
        "write_model": model,
        "model_bytes": 2,
        "optimizer": {"w/moment1": np.ones(3, np.float32)},
        "extra": {},
        "state": {"run": {"step": step}, "fingerprint": {}},
    }
    return c.write_checkpoint(root, step, **(values | changes))


def test_what_is_written_reads_back(tmp_path):
    write(tmp_path, 3, extra={"a": np.arange(2)})
    found = c.open_checkpoint(tmp_path / "step-3")
    assert found.step == 3
    assert found.state == {"run": {"step": 3}, "fingerprint": {}}
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
    assert c.newest_good(tmp_path, said.append).step == 1
    assert len(said) == 1 and "step-2" in said[0] and "\n" not in said[0]


def test_every_byte_of_the_record_counts(tmp_path):
    """complete.json has no checksum of its own."""
    write(tmp_path, 1)
    path = tmp_path / "step-1" / "complete.json"
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        with pytest.raises(CheckpointError):
            c.open_checkpoint(tmp_path / "step-1")


def test_where_all_are_damaged_nothing_is_deleted(tmp_path):
    for step in (1, 2):
        write(tmp_path, step)
        (tmp_path / f"step-{step}" / "state.json").unlink()
    said = []
    with pytest.raises(CheckpointError, match="no good checkpoint is left, 2 damaged.*resume_from_checkpoint=never"):
        c.newest_good(tmp_path, said.append)
    assert len(said) == 2 and c.list_steps(tmp_path) == [1, 2]


def test_a_write_that_fails_leaves_the_earlier_checkpoint_and_no_debris(tmp_path):
    write(tmp_path, 1)

    def full(folder: Path) -> None:
        folder.mkdir()
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="step-2: cannot be written: No space left.*12 bytes.*free.*make room"):
        write(tmp_path, 2, write_model=full, model_bytes=0)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert c.newest_good(tmp_path, pytest.fail).step == 1


def test_rotation_keeps_the_best_and_the_newest(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step)
    c.rotate(tmp_path, 5, limit=2, keep={1})
    assert c.list_steps(tmp_path) == [1, 5]
    c.rotate(tmp_path, 5, limit=None, keep=set())
    assert c.list_steps(tmp_path) == [1, 5]
    c.rotate(tmp_path, 5, limit=1, keep={1})
    assert c.list_steps(tmp_path) == [1, 5]


def test_rotation_takes_later_steps_that_were_passed_over_first(tmp_path):
    for step in (2, 4, 5, 8, 9):  # 8 and 9 damaged; the run went on from 4 and wrote 5
        write(tmp_path, step)
    c.rotate(tmp_path, 5, limit=2, keep=set())
    assert c.list_steps(tmp_path) == [4, 5]
    write(tmp_path, 9)
    c.rotate(tmp_path, 5, limit=1, keep=set())
    assert c.list_steps(tmp_path) == [5]


def test_a_checkpoint_is_replaced_without_a_moment_in_which_it_can_be_lost(tmp_path, monkeypatch):
    write(tmp_path, 2)
    real, calls = c.os.rename, []

    def killed(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(c.os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 2)
    assert c.list_steps(tmp_path) == []
    c.sweep(tmp_path)
    assert c.open_checkpoint(tmp_path / "step-2").step == 2
    write(tmp_path, 2, state={"run": {"new": 1}, "fingerprint": {}})
    assert c.open_checkpoint(tmp_path / "step-2").state["run"] == {"new": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["step-2"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_not_saved(tmp_path, value):
    write(tmp_path, 1)
    with pytest.raises(TrainingError, match="w/moment2 .*after step 2"):
        write(tmp_path, 2, optimizer={"w/moment2": np.array([1, value], np.float32)})
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


HOSTILE = {
    "a file outside of the folder": {"step": 1, "files": {"../x": [0, ""]}},
    "files is a list": {"step": 1, "files": []},
    "a size that is text": {"step": 1, "files": {"a": ["x", ""]}},
    "no step": {"files": {}},
    "a step that is a list": {"step": [], "files": {}},
    "a list": [],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_record_made_by_hand_is_refused(tmp_path, name):
    write(tmp_path, 1)
    (tmp_path / "step-1" / "complete.json").write_text(json.dumps(HOSTILE[name], indent=2))
    with pytest.raises(CheckpointError):
        c.open_checkpoint(tmp_path / "step-1")


def test_a_file_that_is_not_listed_is_not_read(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "step-1" / "extra.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not listed"):
        c.open_checkpoint(tmp_path / "step-1")


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
