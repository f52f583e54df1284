"""Checkpoint folders: safetensors and JSON only, complete or invisible.

checkpoints/step-N/
  model/                 what `finetune generate` opens: Hugging Face layout, or a PEFT adapter
  optimizer.safetensors  AdamW moments (and float32 masters) by parameter name
  extra.safetensors      present where the method needs more (LoRA's factors as trained, PiSSA's starting ones)
  state.json             step, token counts, best evaluation, what the run depends on, place in a stream of rows
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune.errors import CheckpointError, StorageError, TrainingError
from finetune.files import hash_file, read_json, sync, sync_tree, within, write_fault
from finetune.model.tensorfile import Promise, TensorFolder, write_tensors

COMPLETE = "complete.json"
STATE = "state.json"
OPTIMIZER = "optimizer"
EXTRA = "extra"
MODEL = "model"
_NAME = re.compile(r"step-(0|[1-9][0-9]{0,14})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        state: The content of state.json: `run` (see RunState), `fingerprint`, `evaluation` and `history` (see
            resume.py), and with a stream of rows `stream`, where each rank stands in it.
    """

    folder: Path
    step: int
    state: dict

    def optimizer(self) -> dict[str, np.ndarray]:
        """Optimizer state by parameter name and slot."""
        return self._tensors(OPTIMIZER)

    def extra(self) -> dict[str, np.ndarray]:
        """Method-specific tensors; empty where there are none."""
        return self._tensors(EXTRA) if TensorFolder.present(self.folder, EXTRA) else {}

    def _tensors(self, stem: str) -> dict[str, np.ndarray]:
        tensors = TensorFolder(self.folder, stem)
        return {name: tensors.read(name) for name in tensors.entries}

    @property
    def model(self) -> Path:
        """The folder that `load_model` opens."""
        return self.folder / MODEL


def write_checkpoint(
    root: Path,
    step: int,
    *,
    write_model: Callable[[Path], None],
    model_bytes: int,
    optimizer: dict[str, np.ndarray],
    extra: dict[str, np.ndarray],
    state: dict,
) -> Checkpoint:
    """Write `root/step-N`, atomically.

    Args:
        root: The run's `checkpoints` folder.
        step: Optimizer steps done.
        write_model: Writes the model's files into the folder it is given.
        model_bytes: What that takes, for the message when the disk is full.
        optimizer, extra: Tensors by name.
        state: JSON values.

    Raises:
        TrainingError: a number is not finite, so that the checkpoint would be of no use.
        StorageError: the disk is full or not writable; earlier checkpoints are as they were.
    """
    check_finite(step, (optimizer | extra).items())
    final, partial = root / f"step-{step}", root / f".step-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_model(partial / MODEL)
        for stem, tensors in ((OPTIMIZER, optimizer), (EXTRA, extra)):
            if tensors:
                promises = {name: Promise.of(array) for name, array in tensors.items()}
                write_tensors(partial / f"{stem}.safetensors", promises, {})
        (partial / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        files = {
            str(p.relative_to(partial)): (p.stat().st_size, hash_file(p))
            for p in sorted(partial.rglob("*"))
            if p.is_file()
        }
        (partial / COMPLETE).write_text(_record(step, files), encoding="utf-8")
        sync_tree(partial)
        _put_in_place(partial, final)
    except (OSError, StorageError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # before the free space is told
        needed = model_bytes + sum(array.nbytes for array in [*optimizer.values(), *extra.values()])
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        fix = "Earlier checkpoints are intact: make room, or lower training.save_total_limit, then run the same command"
        fix += " again, with training.resume_from_checkpoint=auto (the default)."
        raise write_fault(cause, final, needed=needed, fix=fix) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Checkpoint(final, step, state)


def check_finite(step: int, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Refuse to save what could not be trained further.

    Raises:
        TrainingError: a tensor holds a number that is not finite; names it.
    """
    for name, array in tensors:
        if not np.isfinite(array).all():
            raise TrainingError(
                f"{name} holds numbers that are not finite after step {step}, so no checkpoint was written",
                fix="Lower training.learning_rate or raise training.warmup_steps. Earlier checkpoints are good.",
            )


def _record(step: int, files: dict) -> str:
    """What complete.json says, its own checksum included."""
    said = {"step": step, "files": files}
    return json.dumps(said | {"sha256": hashlib.sha256(json.dumps(said).encode()).hexdigest()}, indent=2)


def _put_in_place(partial: Path, final: Path) -> None:
    """Rename a whole folder to its name. One of that name, damaged or of a run that went on from an earlier step, is
    set aside first, and `sweep` brings it back if the process ends before the second rename."""
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        os.rename(final, replaced)
    os.rename(partial, final)
    sync(final.parent)
    sync(final.parent.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Check a checkpoint folder against its own record.

    Raises:
        CheckpointError: not there, incomplete or damaged; the message names the file.
    """
    check_there(folder)
    complete = folder / COMPLETE
    record = read_json(complete)
    try:
        step, files = record["step"], record["files"]
        written = _record(int(step), {name: [int(size), str(sha)] for name, (size, sha) in files.items()})
        good = written.encode() == complete.read_bytes()
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        good = False
    if not good:
        raise CheckpointError("is damaged", where=str(complete))
    named = _NAME.fullmatch(folder.name)
    if named and int(named[1]) != step:
        raise CheckpointError(f"says step {step}, unlike its folder", where=str(complete))
    for name in (STATE, f"{OPTIMIZER}.safetensors"):
        if name not in files:
            raise CheckpointError(f"{name} is not listed, so this is no checkpoint to resume from", where=str(complete))
    for name, (size, sha) in sorted(files.items()):
        _check_file(within(name, folder), size, sha)
    if f"{EXTRA}.safetensors" not in files and TensorFolder.present(folder, EXTRA):
        raise CheckpointError(f"{EXTRA}.safetensors is there but not listed", where=str(complete))
    state = read_json(folder / STATE)
    if not all(isinstance(state.get(key), dict) for key in ("run", "fingerprint")):
        raise CheckpointError("is not the state of a run", where=str(folder / STATE))
    return Checkpoint(folder, step, state)


def check_there(folder: Path) -> None:
    """Make sure that a folder is meant to be a checkpoint; `open_checkpoint` says whether it is a good one.

    Raises:
        CheckpointError: not there, or never finished.
    """
    if not folder.is_dir():
        raise CheckpointError("there is no such folder", where=str(folder), fix="Name a checkpoints/step-N folder.")
    if not (folder / COMPLETE).exists():
        raise CheckpointError(f"{COMPLETE} is missing, so the folder was never finished", where=str(folder))


def _check_file(path: Path, size: int, sha: str) -> None:
    if not path.is_file():
        raise CheckpointError("the file is missing", where=str(path))
    if path.stat().st_size != size:
        raise CheckpointError(f"holds {path.stat().st_size} bytes instead of {size}", where=str(path))
    try:
        found = hash_file(path)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if found != sha:
        raise CheckpointError("the content differs from its recorded SHA-256", where=str(path))


def list_steps(root: Path) -> list[int]:
    """Steps that have a folder, complete or not, ascending."""
    if not root.is_dir():
        return []
    return sorted(int(m[1]) for p in root.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir())


def newest_good(root: Path, on_damage: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that checks out, None where there is none; each damaged one is reported in one line.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    steps = list_steps(root)
    for step in reversed(steps):
        try:
            return open_checkpoint(root / f"step-{step}")
        except CheckpointError as error:
            on_damage(f"checkpoint step-{step} is damaged and was passed over: {error}")
    if steps:
        raise CheckpointError(
            f"no good checkpoint is left, {len(steps)} damaged",
            where=str(root),
            fix="Bring one back from a copy, or start over with training.resume_from_checkpoint=never, which deletes "
            "them.",
        )
    return None


def rotate(root: Path, newest: int, *, limit: int | None, keep: set[int]) -> None:
    """Delete checkpoints beyond `limit`, the oldest first.

    Args:
        newest: The step written last, which is never deleted. Later ones, which a resumed run has passed over as
            damaged, go before any earlier one.
        keep: Steps that stay whatever the limit, such as the best.
    """
    if limit is None:
        return
    steps = list_steps(root)
    order = [step for step in steps if step > newest] + [step for step in steps if step < newest]
    for step in [step for step in order if step not in keep][: max(0, len(steps) - max(1, limit))]:
        # Renamed first: a deletion that is cut short must not leave a folder that looks like a checkpoint.
        doomed = root / f".step-{step}.deleted"
        os.rename(root / f"step-{step}", doomed)
        shutil.rmtree(doomed)


def sweep(root: Path) -> None:
    """Remove what killed runs left half-written or half-deleted; bring back what one was about to replace."""
    if not root.is_dir():
        return
    for path in root.glob(".step-*.replaced"):
        final = path.with_name(path.name[1:].removesuffix(".replaced"))
        if not final.exists():
            os.rename(path, final)
    for path in root.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
