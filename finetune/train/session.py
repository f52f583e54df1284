"""A run in memory: model, optimizer and task, and what its checkpoints hold."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from finetune import console
from finetune.compute.noise import set_noise
from finetune.errors import CheckpointError
from finetune.files import sync, sync_tree
from finetune.methods import METHODS
from finetune.model.adapters import unties
from finetune.model.build import causal_lm
from finetune.model.load import load_model
from finetune.model.lora import add_lora, merge_lora, retune, training_state
from finetune.model.runtime import device
from finetune.model.save import save_hf, save_peft
from finetune.model.tensors import as_numpy
from finetune.model.write import read_companions
from finetune.train.checkpoint import Checkpoint, check_finite, list_steps, open_checkpoint, rotate, write_checkpoint
from finetune.train.estimate import quantization_of, settings_of
from finetune.train.loop import Interval, RunState, train_loop
from finetune.train.optimizer import Optimizer, trainable_parameters
from finetune.train.prepare import Prepared
from finetune.train.processes.parallel import World
from finetune.train.processes.sharding import Shards
from finetune.train.resume import Start
from finetune.train.schedule import learning_rate
from finetune.train.task import Ready, TaskMaker


class Session:
    """Built anew, or from a checkpoint; then `train` and `write_final`."""

    def __init__(self, prepared: Prepared, world: World, start: Start):
        self.prepared, self.world = prepared, world
        self._identity = {"fingerprint": start.fingerprint, "evaluation": start.evaluation, "history": start.history}
        self._rotation_due = False
        if prepared.stream is not None:  # so that rows are there when the model is
            prepared.stream.start(_position(start, world))
        # Read now: the model's folder may be gone before the run ends.
        source = prepared.source
        self._companions = read_companions(source.config, source.tokenizer_folder, source.generation_file)
        self.model, self.dtype = _build_model(prepared, start)
        self.device = device()
        parameters = trainable_parameters(self.model)
        self.trainable = sum(int(p.size) for p in parameters.values())
        shards = None
        if prepared.sharding_degree > 1:
            shards = Shards(world, prepared.sharding_degree, {name: int(p.size) for name, p in parameters.items()})
        self.optimizer = Optimizer(parameters, prepared.recipe.training, shards)
        self.state = RunState()
        make_tasks: TaskMaker = import_module(METHODS[prepared.recipe.method].tasks).make_tasks
        ready = Ready(prepared, self.model, self.dtype, world, resumed=start.checkpoint is not None)
        self.task, self.evaluation = make_tasks(ready)
        if start.checkpoint is not None:
            self.optimizer.load(start.checkpoint.optimizer())
            self.state = _restored(start.checkpoint, start.best_is_void)

    def train(self, log: Callable[[dict[str, Any]], None]) -> str:
        """Run to the end of the plan; see `train_loop`."""
        training = self.prepared.recipe.training

        def rate(step: int) -> float:
            return learning_rate(
                step,
                name=training.lr_scheduler_type,
                base=training.learning_rate,
                warmup_steps=self.prepared.warmup_steps,
                total_steps=self.prepared.plan.total_steps,
                min_lr_ratio=training.min_lr_ratio or 0.0,
            )

        reason = train_loop(
            task=self.task,
            evaluation=self.evaluation,
            plan=self.prepared.plan,
            optimizer=self.optimizer,
            learning_rate=rate,
            training=training,
            world=self.world,
            state=self.state,
            log=log,
            save=self.save,
            rotate=self.rotate,
        )
        if reason != "interrupted":
            self.rotate()
        return reason

    @property
    def _root(self) -> Path:
        return Path(self.prepared.recipe.training.output_dir) / "checkpoints"

    def save(self) -> None:
        """Write a checkpoint of the current step; `rotate` comes later."""
        stream = self.prepared.stream
        # Where each rank stands in its share of the rows
        positions = {} if stream is None else {"stream": self.world.gather(asdict(stream.position))}
        # Sharded, it comes from all processes.
        optimizer = self.optimizer.state() if self.world.is_main or self.optimizer.shards is not None else {}
        if self.world.is_main:
            parameters = self.optimizer.parameters
            check_finite(self.state.step, ((name, as_numpy(p)) for name, p in parameters.items()))
            lora = self.prepared.recipe.lora is not None
            write_checkpoint(
                self._root,
                self.state.step,
                write_model=self.write_model,
                model_bytes=sum(p.size * p.element_size() for p in parameters.values()),
                optimizer=optimizer,
                extra=training_state(self.model) if lora else {},
                state={"run": asdict(self.state)} | self._identity | positions,
            )
            self._rotation_due = True
        self.world.barrier()

    def rotate(self) -> None:
        """Delete checkpoints over the limit, once a step from the newest one has given a finite loss: where weights
        have run away, the next step shows it, and the one before must still be there."""
        if not self._rotation_due:
            return
        self._rotation_due = False
        limit = self.prepared.recipe.training.save_total_limit
        newest = max(step for step in list_steps(self._root) if step <= self.state.step)
        rotate(self._root, newest, limit=limit, keep=set() if self._best is None else {self._best})

    @property
    def _best(self) -> int | None:
        """The step whose model becomes the final one, where that is not the last."""
        return self.state.best_step if self.prepared.recipe.training.load_best_model_at_end else None

    def write_model(self, folder: Path) -> None:
        """Write what `finetune generate` opens: a Hugging Face model, or a PEFT adapter, with its tokenizer."""
        source = self.prepared.source
        if self.prepared.recipe.lora is None:
            save_hf(self.model, folder, tokenizer=self._companions)
        else:
            save_peft(self.model, folder, base=(source.base or source).hub_or_folder, tokenizer=self._companions)

    def write_final(self, folder: Path) -> None:
        """Write final/: the model as it is now, or the best checkpoint's where that was asked for.

        Raises:
            CheckpointError: the best checkpoint is damaged.
        """
        if self.world.is_main:
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                # One level down, so that what a killed run leaves is under one name, which the next one removes.
                if self._best is None:
                    self.write_model(partial / folder.name)
                else:
                    _copy(self._good_best().model, partial / folder.name)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)  # before the free space is told
                raise
            shutil.rmtree(folder, ignore_errors=True)
            (partial / folder.name).rename(folder)
            partial.rmdir()
            sync(folder.parent)
        self.world.barrier()

    def _good_best(self) -> Checkpoint:
        try:
            return open_checkpoint(self._root / f"step-{self._best}")
        except CheckpointError as error:
            raise CheckpointError(
                f"the best checkpoint cannot become the final model: {error}",
                fix="Bring it back from a copy, or pass training.load_best_model_at_end=false to take the last step's.",
            ) from error


def _copy(source: Path, target: Path) -> None:
    """Copy the files of a folder. Unlike shutil.copytree it ends with the first fault, an OSError that has a number."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
    sync_tree(target)


def _position(start: Start, world: World) -> dict[str, Any] | None:
    """Where this rank goes on in a stream; None at its beginning, as with other rows than before."""
    if start.checkpoint is None or (start.changes is not None and start.changes.rows):
        return None
    position: dict[str, Any] = start.checkpoint.state["stream"][world.rank]
    return position


def _build_model(prepared: Prepared, start: Start):
    """The model with what is to be trained switched on, from the base or from a checkpoint."""
    recipe, source = prepared.recipe, prepared.source
    checkpoint, quantization = start.checkpoint, quantization_of(recipe)
    if recipe.lora is None:
        loaded = load_model(checkpoint.model if checkpoint else source, dtype=recipe.model.dtype, training=True)
        model = merge_lora(loaded.model) if loaded.lora is not None else loaded.model
    else:
        settings = settings_of(recipe.lora, source.lora)
        if source.lora is not None and checkpoint is None:
            loaded = load_model(source, dtype=recipe.model.dtype, training=True, quantization=quantization)
            model = loaded.model
            retune(model, settings)
        else:
            base = source.base or source
            untied = unties(settings, base.config)
            loaded = load_model(base, dtype=recipe.model.dtype, training=True, quantization=quantization, untied=untied)
            state = checkpoint.extra() if checkpoint else None
            model = add_lora(loaded.model, settings, seed=recipe.training.seed, state=state)
    set_noise(model, recipe.training.neftune_noise_alpha)
    if recipe.training.recompute:
        causal_lm(model).recompute_enable()
    return model, loaded.dtype


def _restored(checkpoint: Checkpoint, best_is_void: bool) -> RunState:
    run = checkpoint.state["run"]
    try:
        state = RunState(**run | {"interval": Interval(**run.get("interval", {}))})
    except TypeError as error:
        raise CheckpointError(f"is not the state of a run: {error}", where=str(checkpoint.folder)) from error
    if best_is_void:
        console.warn(
            "the best evaluation so far does not count: the evaluation rows changed, or its checkpoint is not among "
            "this run's"
        )
        state.forget_best()
    return state
