"""`finetune train`: from a recipe to a run's folder.

output_dir/ holds recipe.yaml, manifest.json, metrics.jsonl, report.html, checkpoints/ and final/ (docs/recipe.md).
"""

from __future__ import annotations

import shutil
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import console
from finetune.errors import FinetuneError, Interrupted, StorageError, TrainingError, UserError
from finetune.files import replace_file, write_fault
from finetune.model.runtime import device, device_bytes
from finetune.recipe.load import dump_recipe
from finetune.report.manifest import build_manifest, write_manifest
from finetune.report.metrics import MetricsWriter
from finetune.report.page import write_report
from finetune.train.cards import change_after, least_change
from finetune.train.checkpoint import list_steps
from finetune.train.lock import check_unlocked, locked
from finetune.train.preflight import Settled, settle
from finetune.train.prepare import Prepared, describe, prepare
from finetune.train.processes.parallel import World, join, world_from_environment
from finetune.train.resume import Start, find_start
from finetune.train.samples import Answer, write_samples

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe
    from finetune.train.session import Session


def train(
    recipe: Recipe,
    *,
    dry_run: bool = False,
    nproc: int = 1,
    nnodes: int = 1,
    master: str | None = None,
    answer: Answer | None = None,
) -> None:
    """Run a recipe, or (dry run) say what it would do.

    Args:
        recipe: What to do.
        dry_run: Read and tokenize the data and print steps, tokens, dropped and truncated rows, trainable parameters
            and an estimate of memory; nothing is written and no weights are loaded.
        nproc: Processes on this machine.
        nnodes: Machines.
        master: HOST:PORT of the first machine, when there are several.
        answer: Makes the report's samples, see `write_samples`; None leaves them out.

    Raises:
        UserError: the recipe, the data or the model folder is wrong.
        TrainingError: the run cannot go on.
    """
    world = world_from_environment()
    many = world.size == 1 and nproc * nnodes > 1
    settled = settle(recipe, nproc * nnodes if many else world.size, nproc)
    output = Path(recipe.training.output_dir)
    if dry_run:
        check_unlocked(output)
        prepared = prepare(settled)
        start = find_start(prepared, World(), look_only=True)
        describe(prepared, resumed_at=start.step, cards=True)
        _say_start(start, prepared)
    elif many:
        from finetune.train.processes.launch import launch

        launch(settled.recipe, nproc=nproc, nnodes=nnodes, master=master)
    elif world.is_main:
        with locked(output):
            _run(settled, world, answer)
    else:
        console.mute()
        _run(settled, world, answer)


def _run(settled: Settled, world: World, answer: Answer | None) -> None:
    output = Path(settled.recipe.training.output_dir)
    started = datetime.now(timezone.utc)
    prepared = prepare(settled, world.rank)
    join(world)
    start = find_start(prepared, world)
    if start.finished:
        if world.is_main and _report_is_old(output):
            write_report(output)
        _say_start(start, prepared)
        return
    if world.is_main:
        describe(prepared, resumed_at=start.step)
        _warn_of_memory(prepared, world)
        _say_start(start, prepared)
    _guard(prepared, world, start, started, answer)


def _say_start(start: Start, prepared: Prepared) -> None:
    """Say that nothing is left to do, or what is other than in the run that is gone on with."""
    training, total = prepared.recipe.training, prepared.plan.total_steps
    if start.finished:
        console.say(
            f"{Path(training.output_dir)} holds this run, finished: {start.step} of {total} steps. To go on, raise "
            f"training.{'num_train_epochs' if training.max_steps is None else 'max_steps'}; to train again, change "
            "training.output_dir or pass training.resume_from_checkpoint=never."
        )
    elif start.changes is not None:
        for line in start.changes.lines(prepared.recipe, total):
            console.say(line)


def _guard(prepared: Prepared, world: World, start: Start, started: datetime, answer: Answer | None) -> None:
    """Run, and turn the machine's faults into messages that say what to lower or make room for."""
    from finetune.train.session import Session

    recipe = prepared.recipe
    output, again = Path(recipe.training.output_dir), _again(recipe)
    session = None
    try:
        if world.is_main:
            _open_folder(output, recipe, fresh=start.checkpoint is None)
        session = Session(prepared, world, start)
        manifest = _Manifest(prepared, session, start.history, started)
        if world.is_main:
            manifest.write("running")
            if answer is not None and start.checkpoint is None:
                _answer_before(output / "samples.json", prepared, session, answer)
        with MetricsWriter(output / "metrics.jsonl", start.step) if world.is_main else _NoMetrics() as metrics:
            reason = session.train(metrics.write)
        if reason != "interrupted":
            session.write_final(output / "final")
            if world.is_main and answer is not None:
                write_samples(output / "samples.json", prepared, session.model, answer, "after")
        if world.is_main:
            for note in [] if prepared.stream is None else prepared.stream.report.notes:
                console.warn(note)
            manifest.write("stopped" if reason == "interrupted" else "finished")
            write_report(output)
    except OSError as error:
        fix = f"Earlier checkpoints are intact: make room, then {again}."
        fault = write_fault(error, Path(error.filename2 or error.filename or output), fix=fix)
        if not isinstance(fault, StorageError):
            raise
        raise fault from error
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or "ResourceExhausted" in str(error) or "Out of memory" in str(error)):
            raise
        raise TrainingError(
            "memory ran out",
            where=f"step {session.state.step + 1}" if session else "loading the model",
            fix=_less_memory(prepared, world, bool(start.checkpoint or list_steps(output / "checkpoints"))),
        ) from error
    finally:
        if prepared.stream is not None:
            prepared.stream.close()
    if reason == "interrupted":
        world.barrier()  # the first process to end has the others ended, and rank 0 may still be writing
        if prepared.stream is not None and prepared.stream.fault is not None:
            raise _stopped_by(prepared.stream.fault, session.state.step, prepared.plan.total_steps, again)
        raise Interrupted(
            f"stopped at step {session.state.step} of {prepared.plan.total_steps}; a checkpoint is saved",
            fix=f"{again.capitalize()} to go on.",
        )
    if world.is_main:
        ending = "" if reason == "done" else " (stopped early: eval_loss no longer fell)"
        console.say(f"Finished{ending}. Model: {output / 'final'}  Report: {output / 'report.html'}")


def _answer_before(path: Path, prepared: Prepared, session: Session, answer: Answer) -> None:
    """Answer a few rows for the report. A model that cannot is no reason to stop here: its first step says why."""
    try:
        write_samples(path, prepared, session.model, answer, "before")
    except FinetuneError as error:
        console.warn(f"the report will have no answers from before training: {error}")


def _again(recipe: Recipe) -> str:
    """How to go on with a run; another value of the key would start over, or from an earlier step."""
    if recipe.training.resume_from_checkpoint == "auto":
        return "run the same command again"
    return "run it again with training.resume_from_checkpoint=auto"


def _gigabytes(world: World) -> float:
    """Memory of the device in use, of 10^9 bytes; processes on a CPU share it."""
    return device_bytes() / (world.size if device() == "cpu" else 1) / 10**9


def _warn_of_memory(prepared: Prepared, world: World) -> None:
    """Say before weights load that the run will not fit: a system that kills it leaves nobody to say it."""
    gigabytes = _gigabytes(world)
    if not prepared.load.fits(gigabytes):
        change = least_change(prepared.load, gigabytes)
        advice = f"the cheapest change: {change}" if change else "no change makes it fit; take a smaller model"
        console.warn(f"by the estimate this is too large for the {gigabytes:.1f} GB here; {advice}")


def _less_memory(prepared: Prepared, world: World, going_on: bool) -> str:
    """What to change when memory ran out; a run that goes on from a checkpoint keeps all but recompute."""
    recipe, gigabytes = prepared.recipe, _gigabytes(world)
    change = change_after(prepared.load, gigabytes)
    if change is None:
        return f"By the estimate no change makes it fit the {gigabytes:.1f} GB here: take a smaller model."
    if not going_on:
        return f"The cheapest change by the estimate: run the same command with {change}"
    anew = f"start a new run in another training.output_dir with {change}"
    if recipe.training.recompute:
        return f"The cheapest change by the estimate: {anew}"
    return f"To go on, set training.recompute: true and {_again(recipe)}. Or {anew}"


def _stopped_by(fault: FinetuneError, step: int, total: int, again: str) -> FinetuneError:
    """What ended a stream of rows, with where the run stands."""
    if not step or not isinstance(fault, UserError):
        return fault
    return type(fault).of(
        fault.faults, f"stopped at step {step} of {total}; a checkpoint is saved. Correct this, then {again} to go on."
    )


def _open_folder(output: Path, recipe: Recipe, *, fresh: bool) -> None:
    """Make the run's folder; a run that starts anew leaves nothing of an earlier one behind."""
    output.mkdir(parents=True, exist_ok=True)
    if fresh:
        for name in ("checkpoints", "final"):
            shutil.rmtree(output / name, ignore_errors=True)
        for name in ("metrics.jsonl", "report.html", "manifest.json", "samples.json"):
            (output / name).unlink(missing_ok=True)
    _write_recipe(output / "recipe.yaml", recipe)


def _write_recipe(path: Path, recipe: Recipe) -> None:
    """Write the recipe that goes on with this run, whole: a reader sees the old file or the new one."""
    training = recipe.training.model_copy(update={"resume_from_checkpoint": "auto", "allow_changes": []})
    replace_file(path, dump_recipe(recipe.model_copy(update={"training": training})))


def _report_is_old(output: Path) -> bool:
    """Whether the run was ended by force after its manifest was written and before its report was."""
    report, manifest = output / "report.html", output / "manifest.json"
    return not report.exists() or report.stat().st_mtime_ns < manifest.stat().st_mtime_ns


class _NoMetrics:
    """Ranks other than the first log nothing."""

    def __enter__(self) -> _NoMetrics:
        return self

    def __exit__(self, *error) -> None:
        pass

    def write(self, row: dict) -> None:
        pass


class _Manifest:
    """manifest.json, written at the start and again at the end."""

    def __init__(self, prepared: Prepared, session: Session, history: list[dict[str, Any]], started: datetime):
        self.prepared, self.session, self.history, self.started = prepared, session, history, started

    def write(self, status: str) -> None:
        prepared, session = self.prepared, self.session
        data = {"train": prepared.train.report.to_dict()}
        if prepared.eval is not None:
            data["eval"] = prepared.eval.report.to_dict()
        manifest = build_manifest(
            method=prepared.recipe.method,
            base_model={
                "path": prepared.recipe.model.path,
                "parameters": prepared.estimate.parameters,
                "trainable_parameters": session.trainable,
                "dtype": session.dtype,
            },
            data=data,
            seed=prepared.recipe.training.seed,
            device=session.device,
            command=["finetune", *sys.argv[1:]],
            started=self.started,
            finished=None if status == "running" else datetime.now(timezone.utc),
            status=status,
            steps={"done": session.state.step, "planned": prepared.plan.total_steps},
            tokens={"seen": session.state.num_tokens},
            extra={
                "world_size": session.world.size,
                "history": self.history,
                "best": _best(session.state),
                "load_best_model_at_end": prepared.recipe.training.load_best_model_at_end,
            },
        )
        write_manifest(Path(prepared.recipe.training.output_dir) / "manifest.json", manifest)


def _best(state) -> dict | None:
    if state.best_step is None:
        return None
    return {"step": state.best_step, "eval_loss": state.best_loss}
