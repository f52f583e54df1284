"""Where a run starts: anew, from its newest good checkpoint, or not at all because it is finished."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import console
from finetune.errors import ArgumentError
from finetune.train.changes import Changes, contents, find_changes, fingerprint, without_defaults
from finetune.train.checkpoint import Checkpoint, list_steps, newest_good, open_checkpoint, sweep

if TYPE_CHECKING:
    from finetune.train.prepare import Prepared
    from finetune.train.processes.parallel import World


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        fingerprint: Of this run, for its checkpoints.
        checkpoint: What to resume from; None: a new run.
        finished: Nothing is left to do.
        evaluation: The evaluation rows, by hash, for its checkpoints.
        best_is_void: The best evaluation that the checkpoint knows is not one of this run's.
        changes: What is other than in the run that the checkpoint is of.
        history: Of such changes, the last ones included, for its checkpoints and its manifest.
    """

    fingerprint: dict[str, Any]
    checkpoint: Checkpoint | None = None
    finished: bool = False
    evaluation: list[Any] | None = None
    best_is_void: bool = False
    changes: Changes | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.checkpoint.step if self.checkpoint else 0


def _evaluation(prepared: Prepared) -> list[Any] | None:
    """The evaluation rows as `contents` has them; None where there are none, or a share of the training rows."""
    named = prepared.recipe.data.eval
    if prepared.eval is None or not named:
        return None
    sources = [source.model_dump(mode="json") for source in named]
    return json.loads(json.dumps(contents(sources, prepared.eval.report)))


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
        changes = find_changes(checkpoint, identity, prepared.recipe, prepared.plan.total_steps)
        void = _best_is_void(checkpoint, evaluation, output / "checkpoints", training.load_best_model_at_end)
        void = void or (changes.rows and prepared.recipe.data.eval_fraction > 0)  # a share of other rows
        finished = wanted == "auto" and _is_finished(checkpoint, prepared, void)
        history = checkpoint.state.get("history", []) + ([changes.record()] if changes.values else [])
        start = Start(identity, checkpoint, finished, evaluation, void, changes, history)
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


def _best_is_void(checkpoint: Checkpoint, evaluation: list[Any] | None, root: Path, load_best: bool) -> bool:
    """Whether the best loss is of other evaluation rows, or its model is asked for and not among this run's.

    A best checkpoint that is there but damaged is not void: a copy of it may exist, see `Session.write_final`.
    """
    run = checkpoint.state["run"]
    best = run.get("best_step")
    if without_defaults(checkpoint.state.get("evaluation", evaluation)) != without_defaults(evaluation):
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


def _finished_manifest(output: Path) -> dict[str, Any] | None:
    """The manifest of a run that wrote its final model; None where there is none."""
    try:
        manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if manifest.get("status") == "finished" and (output / "final").is_dir() else None
