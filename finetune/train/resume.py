"""Where a run starts: anew, from its newest good checkpoint, or not at all because it is finished."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import console
from finetune.errors import ArgumentError, Fault, RecipeError
from finetune.model.identity import model_digest
from finetune.recipe.schema import SECTIONS, Source
from finetune.train.checkpoint import Checkpoint, list_steps, newest_good, open_checkpoint, sweep

if TYPE_CHECKING:
    from finetune.rows.dataset import DataReport
    from finetune.train.prepare import Prepared
    from finetune.train.processes.parallel import World

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
    "distributed.sharding",
    "distributed.sharding_parallel_degree",
}
_CONTENTS = {"data.train": "the training data", "model": "the base model or its tokenizer"}


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        fingerprint: Of this run, for its checkpoints.
        checkpoint: What to resume from; None: a new run.
        finished: Nothing is left to do.
        evaluation: The evaluation rows, by hash, for its checkpoints.
        best_is_void: The best evaluation that the checkpoint knows is not one of this run's.
    """

    fingerprint: dict[str, Any]
    checkpoint: Checkpoint | None = None
    finished: bool = False
    evaluation: list | None = None
    best_is_void: bool = False

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
    # A stream's files have no hash: what of them was used is compared as it is read again (finetune/rows/stream.py).
    kept["data.train"] = _contents(flat["data.train"], prepared.train.report)
    kept["model"] = model_digest(prepared.source)
    kept["processes"] = prepared.world_size
    return json.loads(json.dumps(kept))


def _contents(sources: list[dict], report: DataReport) -> list:
    """Rows by hash, and what is taken of them, wherever they lie.

    What a source does not use of `columns` and `weight` is left out: checkpoints from before there were these know
    nothing of them.
    """
    unused = {"columns": {}, "weight": None}
    taken = [{k: v for k, v in source.items() if k != "path" and unused.get(k, ...) != v} for source in sources]
    return taken + [file.sha256 or file.path for file in report.files]


def _evaluation(prepared: Prepared) -> list | None:
    """The evaluation rows as `_contents` has them; None where there are none, or a share of the training rows."""
    named = prepared.recipe.data.eval
    if prepared.eval is None or not named:
        return None
    sources = [source.model_dump(mode="json") for source in named]
    return json.loads(json.dumps(_contents(sources, prepared.eval.report)))


def find_start(prepared: Prepared, world: World, *, look_only: bool = False) -> Start:
    """Decide where to start, as training.resume_from_checkpoint says: auto, never, or a checkpoint folder.

    Args:
        look_only: Leave what killed runs left behind as it is.

    Raises:
        RecipeError: the recipe or the data changed in a way that would make the resumed run another run.
        CheckpointError: the folder asked for is no good checkpoint.
        ArgumentError: the run's folder holds something that would be lost, or the processes would not start alike.
    """
    training = prepared.recipe.training
    output = Path(training.output_dir)
    wanted = training.resume_from_checkpoint
    identity, evaluation = fingerprint(prepared), _evaluation(prepared)
    checkpoint = _find_checkpoint(output / "checkpoints", wanted, world, tidy=world.is_main and not look_only)
    if checkpoint is None:
        _refuse_to_delete_inputs(prepared, output)
        start = Start(identity, evaluation=evaluation)
    else:
        _refuse_changes(checkpoint.state["fingerprint"], identity, checkpoint)
        void = _best_is_void(checkpoint, evaluation, output / "checkpoints", training.load_best_model_at_end)
        finished = wanted == "auto" and _is_finished(checkpoint, prepared, void)
        start = Start(identity, checkpoint, finished, evaluation, void)
    _refuse_to_differ(start, output, world)
    return start


def _find_checkpoint(root: Path, wanted: str, world: World, tidy: bool) -> Checkpoint | None:
    if wanted == "never":
        return None
    if wanted != "auto":
        return open_checkpoint(Path(wanted))
    if tidy:
        sweep(root)
    world.barrier()
    return newest_good(root, console.warn)


def _best_is_void(checkpoint: Checkpoint, evaluation: list | None, root: Path, load_best: bool) -> bool:
    """Whether the best loss is of other evaluation rows, or its model is asked for and not among this run's.

    A best checkpoint that is there but damaged is not void: a copy of it may exist, see `Session.write_final`.
    """
    run = checkpoint.state["run"]
    best = run.get("best_step")
    if checkpoint.state.get("evaluation", evaluation) != evaluation:
        return best is not None or bool(run.get("evals_without_gain"))
    if not load_best or best is None:
        return False
    return checkpoint.folder.resolve().parent != root.resolve() or best not in list_steps(root)


def _is_finished(checkpoint: Checkpoint, prepared: Prepared, best_is_void: bool) -> bool:
    """Whether final/ holds what the run would write there, at its planned end or where early stopping ended it."""
    training = prepared.recipe.training
    load_best, manifest = training.load_best_model_at_end, _finished_manifest(Path(training.output_dir))
    if manifest is None or manifest.get("load_best_model_at_end", load_best) != load_best:
        return False
    patience, without_gain = training.early_stopping_patience, checkpoint.state["run"].get("evals_without_gain", 0)
    stopped_early = bool(patience) and without_gain >= patience and not best_is_void
    return checkpoint.step >= prepared.plan.total_steps or stopped_early


def _refuse_to_differ(start: Start, output: Path, world: World) -> None:
    """Make sure that all processes start at the same step of the same run: each looked on its own machine's disk."""
    said = json.dumps([start.fingerprint, start.evaluation, start.best_is_void, start.finished], sort_keys=True)
    found = world.gather([start.step, hashlib.sha256(said.encode()).hexdigest()[:16]])
    if all(entry == found[0] for entry in found):
        return
    steps = sorted({step for step, _ in found})
    what = f"steps {', '.join(map(str, steps))}" if len(steps) > 1 else "different recipes, data or models"
    raise ArgumentError(
        f"the processes would not start alike: from {what}",
        where=str(output.absolute()),
        fix="All machines must see the same folder there, and the same data and model: put them on a shared disk.",
    )


def _refuse_to_delete_inputs(prepared: Prepared, output: Path) -> None:
    """A run that starts anew deletes final/ and checkpoints/. Make sure that it does not train from them."""
    sources = {"model.path": prepared.source, "the base of model.path": prepared.source.base}
    reference = prepared.reference
    if reference is not None:
        sources |= {"dpo.reference": reference, "the base of dpo.reference": reference.base}
    doomed = [(output / name).resolve() for name in ("final", "checkpoints")]
    for key, source in sources.items():
        folder = None if source is None else source.place.resolve()
        if folder is not None and any(place == folder or place in folder.parents for place in doomed):
            raise ArgumentError(
                f"{key} is {folder}, which a new run in {output} would delete",
                where="training.output_dir",
                fix="Choose another training.output_dir.",
            )


def refuse_to_replace(output: Path, wanted: str) -> None:
    """A run that starts anew deletes what an earlier one left. Make sure that it is that, and that it may go.

    Raises:
        ArgumentError: it is not, or it may not.
    """
    parts = [name for name in ("final", "checkpoints") if (output / name).exists()]
    if parts and not (output / "manifest.json").exists():
        raise ArgumentError(
            f"has {parts[0]}/ but is not the folder of a run (there is no manifest.json)",
            where=str(output),
            fix="Choose another training.output_dir.",
        )
    if wanted == "auto" and _finished_manifest(output) is not None and not list_steps(output / "checkpoints"):
        raise ArgumentError(
            "holds a finished run, but no checkpoints to tell whether it is this one",
            where=str(output),
            fix="Choose another training.output_dir, or pass training.resume_from_checkpoint=never to replace it.",
        )


def _finished_manifest(output: Path) -> dict | None:
    """The manifest of a run that wrote its final model; None where there is none."""
    try:
        manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if manifest.get("status") == "finished" and (output / "final").is_dir() else None


def _refuse_changes(then: dict[str, Any], now: dict[str, Any], checkpoint: Checkpoint) -> None:
    then, now = ({key: _without_defaults(value) for key, value in side.items()} for side in (then, now))
    then |= {key: _default(key) for key in now.keys() - then.keys() if _has_section(then, key)}
    # An older version may have kept a key that is free by now.
    changed = sorted(key for key in (then.keys() | now.keys()) - _FREE if then.get(key) != now.get(key))
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
            "checkpoint and training.output_dir to another folder.",
        )
    )
    raise RecipeError.of(faults)


def _has_section(values: dict[str, Any], key: str) -> bool:
    """Whether a section is there, whose key an older version did not know yet: it did as the default says."""
    section = key.rpartition(".")[0]
    return section in SECTIONS and any(name.startswith(f"{section}.") for name in values)


def _default(key: str) -> Any:
    section, _, name = key.rpartition(".")
    return SECTIONS[section].model_fields[name].default


def _without_defaults(value: Any) -> Any:
    """Sources of rows without what says nothing: a key that an older version did not know is then no change."""
    if not isinstance(value, list):
        return value
    fields = Source.model_fields
    return [
        {k: v for k, v in item.items() if k not in fields or v != fields[k].get_default(call_default_factory=True)}
        if isinstance(item, dict)
        else item
        for item in value
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= _flatten(item, f"{prefix}.{key}" if prefix else key)
    return out
