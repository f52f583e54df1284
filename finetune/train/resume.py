"""Where a run starts: anew, from its newest good checkpoint, or not at all because it is finished."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.chat.tokenizer import TOKENIZER_FILES
from finetune.errors import ArgumentError, Fault, RecipeError
from finetune.report import console
from finetune.train.checkpoint import Checkpoint, list_steps, newest_good, open_checkpoint, sweep

if TYPE_CHECKING:
    from finetune.model.resolve import ModelSource
    from finetune.train.parallel import World
    from finetune.train.prepare import Prepared

# Keys that may change between a run and its resumption: they leave the remaining steps as they were.
_FREE = {
    "training.output_dir",
    "training.logging_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.eval_steps",
    "training.load_best_model_at_end",
    "training.early_stopping_patience",
    "training.per_device_eval_batch_size",
    "training.recompute",
    "training.resume_from_checkpoint",
    "data.eval",
}
_CONTENTS = {"data.train": "the training data", "model": "the base model or its tokenizer"}
_BLOCKS, _BLOCK_BYTES = 64, 4096


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        fingerprint: Of this run, for its checkpoints.
        checkpoint: What to resume from; None: a new run.
        finished: Nothing is left to do.
    """

    fingerprint: dict[str, Any]
    checkpoint: Checkpoint | None = None
    finished: bool = False

    @property
    def step(self) -> int:
        """Steps done."""
        return self.checkpoint.step if self.checkpoint else 0


def fingerprint(prepared: Prepared) -> dict[str, Any]:
    """All that the remaining steps of a run depend on, flat: dotted recipe keys, data and model by hash, processes."""
    recipe = prepared.recipe
    flat = _flatten(recipe.model_dump(mode="json"))
    if recipe.training.lr_scheduler_type in ("constant", "constant_with_warmup") and not recipe.training.warmup_ratio:
        for key in ("training.max_steps", "training.num_train_epochs"):
            flat.pop(key, None)
    kept = {k: v for k, v in flat.items() if k not in _FREE}
    kept["data.train"] = [{k: v for k, v in source.items() if k != "path"} for source in flat["data.train"]]
    # A stream's files have no hash: what of them was used is compared as it is read again (finetune/chat/stream.py).
    kept["data.train"] += [file.sha256 or file.path for file in prepared.train_report.files]
    kept["model"] = _model_digest(prepared.source)
    kept["processes"] = prepared.world_size
    return json.loads(json.dumps(kept))


def _model_digest(source: ModelSource) -> str:
    """SHA-256 over a model's config, adapter settings and tokenizer, and over size and some blocks of its weights:
    all of them would take a minute for a large model, and training changes every block."""
    digest = hashlib.sha256()
    for folder in dict.fromkeys((source.folder, source.tokenizer_folder)):
        for name in ("config.json", "adapter_config.json", "lora_config.json", *TOKENIZER_FILES):
            if (folder / name).is_file():
                digest.update(name.encode() + (folder / name).read_bytes())
    for path in sorted(source.folder.glob("*.safetensors")):
        digest.update(f"{path.name} {_sample(path)}".encode())
    if source.base is not None:
        digest.update(_model_digest(source.base).encode())
    return digest.hexdigest()


def _sample(path: Path) -> str:
    """SHA-256 over size and some blocks of a file, all of them where it is small; the name of what is no file."""
    if not path.is_file():
        return str(path)
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(_BLOCKS):
            file.seek(size * number // _BLOCKS)
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def find_start(prepared: Prepared, world: World) -> Start:
    """Decide where to start, as training.resume_from_checkpoint says: auto, never, or a checkpoint folder.

    Raises:
        RecipeError: the recipe or the data changed in a way that would make the resumed run another run.
        CheckpointError: the folder asked for is no good checkpoint.
    """
    training = prepared.recipe.training
    output = Path(training.output_dir)
    root = output / "checkpoints"
    wanted = training.resume_from_checkpoint
    _refuse_to_replace(output, wanted)
    identity = fingerprint(prepared)
    if wanted == "never":
        return Start(identity)
    if wanted != "auto":
        checkpoint = open_checkpoint(Path(wanted))
    else:
        if world.is_main:
            sweep(root)
        world.barrier()
        checkpoint = newest_good(root, console.warn)
        if checkpoint is None:
            return Start(identity)
    _refuse_changes(checkpoint.state["fingerprint"], identity, checkpoint)
    done = checkpoint.step >= prepared.plan.total_steps
    return Start(identity, checkpoint, finished=done and wanted == "auto" and _has_final(output))


def _refuse_to_replace(output: Path, wanted: str) -> None:
    """A run that starts anew deletes what an earlier one left. Make sure that it is that, and that it may go."""
    parts = [name for name in ("final", "checkpoints") if (output / name).exists()]
    if parts and not (output / "manifest.json").exists():
        raise ArgumentError(
            f"has {parts[0]}/ but is not the folder of a run (there is no manifest.json)",
            where=str(output),
            fix="Choose another training.output_dir.",
        )
    if wanted == "auto" and _has_final(output) and not list_steps(output / "checkpoints"):
        raise ArgumentError(
            "holds a finished run, but no checkpoints to tell whether it is this one",
            where=str(output),
            fix="Choose another training.output_dir, or pass training.resume_from_checkpoint=never to replace it.",
        )


def _has_final(output: Path) -> bool:
    try:
        manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return manifest.get("status") == "finished" and (output / "final").is_dir()


def _refuse_changes(then: dict[str, Any], now: dict[str, Any], checkpoint: Checkpoint) -> None:
    changed = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    if not changed:
        return
    faults = []
    for key in changed:
        if key in _CONTENTS:
            what = f"{_CONTENTS[key]} changed since the checkpoint was written"
        else:
            what = f"is {now.get(key)!r}, but the checkpoint was written with {then.get(key)!r}"
        faults.append(Fault(what, key))
    faults.append(
        Fault(
            f"{checkpoint.folder} cannot be resumed with these changes",
            fix="Undo them, choose another training.output_dir, or start over with "
            "training.resume_from_checkpoint=never. To train the weights further as a new run, set model.path to the "
            "checkpoint.",
        )
    )
    raise RecipeError.of(faults)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= _flatten(item, f"{prefix}.{key}" if prefix else key)
    return out
