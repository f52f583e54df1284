"""Checkpoint folders: safetensors and JSON only, complete or invisible.

checkpoints/step-N/
  model/                 what `finetune generate` opens: Hugging Face layout, or a PEFT adapter
  optimizer.safetensors  AdamW moments (and float32 masters) by parameter name
  extra.safetensors      present where the method needs more (PiSSA's starting factors)
  state.json             step, token counts, best evaluation, recipe
  complete.json          size and SHA-256 of every other file; written last

A folder is built as `.step-N.partial`, synced, and renamed; whatever does not check out against its complete.json is
named and passed over. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from finetune.errors import CheckpointError

COMPLETE = "complete.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
EXTRA = "extra.safetensors"
MODEL = "model"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int

    def state(self) -> dict:
        """The content of state.json."""
        return json.loads((self.folder / STATE).read_text(encoding="utf-8"))

    def optimizer(self) -> dict[str, np.ndarray]:
        """Optimizer state by parameter name and slot."""
        return load_file(self.folder / OPTIMIZER)

    def extra(self) -> dict[str, np.ndarray]:
        """Method-specific tensors; empty where there are none."""
        path = self.folder / EXTRA
        return load_file(path) if path.exists() else {}

    @property
    def model(self) -> Path:
        """The folder that `load_model` opens."""
        return self.folder / MODEL


def write_checkpoint(
    root: Path,
    step: int,
    *,
    write_model: Callable[[Path], None],
    optimizer: dict[str, np.ndarray],
    extra: dict[str, np.ndarray],
    state: dict,
) -> Checkpoint:
    """Write `root/step-N`, atomically.

    Args:
        root: The run's `checkpoints` folder.
        step: Optimizer steps done.
        write_model: Writes the model's files into the folder it is given.
        optimizer, extra: Tensors by name.
        state: JSON values.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are as they were.
    """
    final = root / f"step-{step}"
    partial = root / f".step-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_model(partial / MODEL)
        save_file(optimizer, partial / OPTIMIZER)
        if extra:
            save_file(extra, partial / EXTRA)
        (partial / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        files = {str(p.relative_to(partial)): _digest(p) for p in sorted(partial.rglob("*")) if p.is_file()}
        (partial / COMPLETE).write_text(json.dumps({"step": step, "files": files}, indent=2), encoding="utf-8")
        _sync_tree(partial)
        if final.exists():
            shutil.rmtree(final)
        os.rename(partial, final)
        _sync(root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Checkpoint(final, step)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Check a checkpoint folder against its own record.

    Raises:
        CheckpointError: incomplete or damaged; the message names the file.
    """
    complete = folder / COMPLETE
    try:
        record = json.loads(complete.read_text(encoding="utf-8"))
        step, files = int(record["step"]), dict(record["files"])
    except FileNotFoundError:
        raise CheckpointError(f"{COMPLETE} is missing, so the folder was never finished", where=str(folder)) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"cannot be read ({error})", where=str(complete)) from None
    named = _NAME.fullmatch(folder.name)
    if named and int(named[1]) != step:
        raise CheckpointError(f"says step {step}, unlike its folder", where=str(complete))
    for name, (size, sha) in sorted(files.items()):
        path = folder / name
        if not path.is_file():
            raise CheckpointError("the file is missing", where=str(path))
        if path.stat().st_size != size:
            raise CheckpointError(f"holds {path.stat().st_size} bytes instead of {size}", where=str(path))
        if _digest(path)[1] != sha:
            raise CheckpointError("the content differs from its recorded SHA-256", where=str(path))
    for name in (STATE, OPTIMIZER):
        if name not in files:
            raise CheckpointError(f"{name} is not listed, so this is no checkpoint to resume from", where=str(complete))
    return Checkpoint(folder, step)


def list_steps(root: Path) -> list[int]:
    """Steps that have a folder, complete or not, ascending."""
    if not root.is_dir():
        return []
    return sorted(int(m[1]) for p in root.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir())


def newest_good(root: Path, on_damage: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that checks out; each damaged one that is passed over is reported in one line."""
    for step in reversed(list_steps(root)):
        try:
            return open_checkpoint(root / f"step-{step}")
        except (CheckpointError, SafetensorError) as error:
            on_damage(f"checkpoint step-{step} is damaged and was passed over: {error}")
    return None


def rotate(root: Path, *, limit: int | None, keep: set[int]) -> None:
    """Delete the oldest checkpoints beyond `limit`, never those of `keep` and never the newest."""
    if limit is None:
        return
    steps = list_steps(root)
    excess = len(steps) - max(1, limit)
    for step in steps[:-1]:
        if excess <= 0:
            return
        if step in keep:
            continue
        # Renamed first: a deletion that is cut short must not leave a folder that looks like a checkpoint.
        doomed = root / f".step-{step}.deleted"
        os.rename(root / f"step-{step}", doomed)
        shutil.rmtree(doomed)
        excess -= 1


def sweep(root: Path) -> None:
    """Remove what killed runs left half-written or half-deleted."""
    if root.is_dir():
        for path in root.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)


def _digest(path: Path) -> tuple[int, str]:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return path.stat().st_size, sha.hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)
