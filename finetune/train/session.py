"""A run in memory: model, optimizer and task, and what its checkpoints hold."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from finetune.errors import Fault, RecipeError
from finetune.model.adapters import LoraSettings
from finetune.model.load import load_model
from finetune.model.lora import add_lora, lora_layers, merge_lora, save_peft, training_state
from finetune.model.runtime import device
from finetune.model.write import save_hf, write_companions
from finetune.train.checkpoint import rotate, write_checkpoint
from finetune.train.loop import RunState, train_loop
from finetune.train.optimizer import NamedAdamW, trainable_parameters
from finetune.train.parallel import World
from finetune.train.prepare import Prepared
from finetune.train.resume import Start, fingerprint
from finetune.train.schedule import learning_rate
from finetune.train.sft import SftTask


class Session:
    """Built anew, or from a checkpoint; then `train` and `write_final`."""

    def __init__(self, prepared: Prepared, world: World, start: Start):
        self.prepared, self.world = prepared, world
        self.resumed = start.checkpoint is not None
        self.model, self.dtype = _build_model(prepared, start)
        self.device = device()
        parameters = trainable_parameters(self.model)
        self.trainable = sum(int(p.size) for p in parameters.values())
        self.optimizer = NamedAdamW(parameters, prepared.recipe.training)
        self.state = RunState()
        self.task, self.eval_task = self._tasks()
        if start.checkpoint is not None:
            self.optimizer.load(start.checkpoint.optimizer())
            self.state = RunState(**start.checkpoint.state()["run"])

    def _tasks(self):
        p = self.prepared
        if p.recipe.method == "dpo":
            from finetune.train.dpo import make_tasks

            return make_tasks(self)
        held_out = SftTask(self.model, p.eval, p.eval_packs) if p.eval is not None else None
        return SftTask(self.model, p.train, p.packs), held_out

    def train(self, log: Callable[[dict], None]) -> str:
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

        return train_loop(
            task=self.task,
            eval_task=self.eval_task,
            plan=self.prepared.plan,
            optimizer=self.optimizer,
            learning_rate=rate,
            training=training,
            world=self.world,
            state=self.state,
            log=log,
            save=self.save,
        )

    @property
    def _root(self) -> Path:
        return Path(self.prepared.recipe.training.output_dir) / "checkpoints"

    def save(self) -> None:
        """Write a checkpoint of the current step and delete what is over the limit."""
        if self.world.is_main:
            lora = self.prepared.recipe.lora is not None
            write_checkpoint(
                self._root,
                self.state.step,
                write_model=self.write_model,
                optimizer=self.optimizer.state(),
                extra=training_state(self.model) if lora else {},
                state={"run": asdict(self.state), "fingerprint": fingerprint(self.prepared)},
            )
            best = self.state.best_step
            keep = {best} if best is not None and self.prepared.recipe.training.load_best_model_at_end else set()
            rotate(self._root, limit=self.prepared.recipe.training.save_total_limit, keep=keep)
        self.world.barrier()

    def write_model(self, folder: Path) -> None:
        """Write what `finetune generate` opens: a Hugging Face model, or a PEFT adapter, with its tokenizer."""
        source = self.prepared.source
        if self.prepared.recipe.lora is None:
            save_hf(self.model, folder, tokenizer=source.tokenizer_folder)
            return
        folder.mkdir(parents=True)
        save_peft(self.model, folder, base=(source.base or source).hub_or_folder)
        write_companions(folder, source.config, source.tokenizer_folder)

    def write_final(self, folder: Path) -> None:
        """Write final/: the model as it is now, or the best checkpoint's where that was asked for."""
        if self.world.is_main:
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            best = self.state.best_step
            if best is not None and self.prepared.recipe.training.load_best_model_at_end:
                shutil.copytree(self._root / f"step-{best}" / "model", partial)
            else:
                self.write_model(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        self.world.barrier()


def _build_model(prepared: Prepared, start: Start):
    """The model with what is to be trained switched on, from the base or from a checkpoint."""
    recipe, source = prepared.recipe, prepared.source
    checkpoint = start.checkpoint
    if recipe.lora is None:
        loaded = load_model(checkpoint.model if checkpoint else source, dtype=recipe.model.dtype, training=True)
        model = merge_lora(loaded.model) if loaded.lora is not None else loaded.model
    else:
        settings = lora_settings(recipe.lora)
        if source.kind == "adapter":
            settings = _continued(settings, source.lora)
        if source.kind == "adapter" and checkpoint is None:
            loaded = load_model(source, dtype=recipe.model.dtype, training=True)
            model = loaded.model
            _apply(model, settings)
        else:
            loaded = load_model(source.base or source, dtype=recipe.model.dtype, training=True)
            state = checkpoint.extra() if checkpoint else None
            model = add_lora(loaded.model, settings, seed=recipe.training.seed, state=state)
    if recipe.training.recompute:
        (model.model if recipe.lora else model).recompute_enable()
    return model, loaded.dtype


def lora_settings(section) -> LoraSettings:
    """The recipe's lora section as the model package takes it."""
    values = section.model_dump()
    ratio = values.pop("loraplus_lr_ratio")
    return LoraSettings(**values, lora_plus_ratio=ratio or 1.0)


def _continued(wanted: LoraSettings, found: LoraSettings) -> LoraSettings:
    """Settings for training an adapter further: its shape is given, the recipe may change dropout and learning rates.

    Raises:
        RecipeError: the recipe asks for another adapter than model.path holds.
    """
    faults = []
    for name in ("rank", "alpha"):
        if getattr(wanted, name) != getattr(found, name):
            faults.append(
                Fault(f"is {getattr(wanted, name):g}, the adapter has {getattr(found, name):g}", f"lora.{name}")
            )
    if (wanted.variant == "rslora") != (found.variant == "rslora") or wanted.variant == "pissa":
        faults.append(Fault(f"is {wanted.variant}, the adapter is a {found.variant}", "lora.variant"))
    if faults:
        fix = "Match the adapter, or export it merged with `finetune export` and train a new one on the result."
        faults.append(Fault("model.path is an adapter, which can only be trained further as it is", fix=fix))
        raise RecipeError.of(faults)
    return replace(found, dropout=wanted.dropout, variant=wanted.variant, lora_plus_ratio=wanted.lora_plus_ratio)


def _apply(model, settings: LoraSettings) -> None:
    """Give a loaded adapter the training-time settings that its folder does not hold."""
    import paddle

    model.settings = settings
    for layer in lora_layers(model).values():
        layer.lora_dropout = paddle.nn.Dropout(settings.dropout) if settings.dropout else (lambda x: x)
        layer.lora_B.optimize_attr["learning_rate"] = settings.lora_plus_ratio
