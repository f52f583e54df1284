"""What a run depends on, and how it may differ from the run whose checkpoint it goes on from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.console import format_value
from finetune.errors import Fault, RecipeError, UserError
from finetune.model.identity import model_digest
from finetune.recipe.names import changeable
from finetune.recipe.schema import SECTIONS, Source
from finetune.train.checkpoint import Checkpoint

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe
    from finetune.rows.dataset import DataReport
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
    "training.allow_changes",
    "data.eval",
    "distributed.sharding",
    "distributed.sharding_parallel_degree",
}
# Keys that may change without being named: the run is as long as they say now.
_LENGTH = ("training.max_steps", "training.num_train_epochs")
_CONTENTS = {"data.train": "the training data", "model": "the base model or its tokenizer"}


def fingerprint(prepared: Prepared) -> dict[str, Any]:
    """All that the remaining steps of a run depend on, flat: dotted recipe keys, data and model by hash, processes."""
    flat = _flatten(prepared.recipe.model_dump(mode="json"))
    kept = {k: v for k, v in flat.items() if k not in _FREE}
    # A stream's files have no hash: what of them was used is compared as it is read again (finetune/rows/stream.py).
    kept["data.train"] = contents(flat["data.train"], prepared.train.report)
    kept["model"] = model_digest(prepared.source)
    kept["processes"] = prepared.world_size
    plain: dict[str, Any] = json.loads(json.dumps(kept))
    return plain


def contents(sources: list[dict[str, Any]], report: DataReport) -> list[Any]:
    """Rows by hash, and what is taken of them, wherever they lie."""
    taken: list[Any] = [{k: v for k, v in source.items() if k != "path"} for source in sources]
    return taken + [file.sha256 or file.path for file in report.files]


@dataclass(frozen=True)
class Changes:
    """What is other than in the run that a checkpoint is of.

    Attributes:
        step: Steps done before.
        values: (then, now) by dotted key; None where a run of an older version did not say.
        rows: Whether the rows that are trained on are others.
    """

    step: int
    values: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    rows: bool = False

    def record(self) -> dict[str, Any]:
        """For the history in checkpoints and in manifest.json."""
        return {"after_step": self.step, "changes": {key: list(pair) for key, pair in self.values.items()}}

    def lines(self, recipe: Recipe, total_steps: int) -> list[str]:
        """What people are told: that the run has another length, and which values are others from here on."""
        said = []
        length = [self._shown(key) for key in _LENGTH if key in self.values]
        if length:
            kind, constant = recipe.training.lr_scheduler_type, not recipe.training.warmup_ratio
            constant = constant and kind in ("constant", "constant_with_warmup")
            schedule = "" if constant else f"; from here on the {kind} schedule is that of {total_steps:,} steps"
            said.append(f"Going on to step {total_steps:,} ({', '.join(length)}){schedule}.")
        others = [self._shown(key) for key in self.values if key not in _LENGTH]
        if others:
            said.append(f"Changed after step {self.step:,}, as training.allow_changes says: {', '.join(others)}.")
        return said

    def _shown(self, key: str) -> str:
        then, now = self.values[key]
        if key in _CONTENTS:
            return key
        if key in _LENGTH and (then is None or now is None):
            return f"{key} {format_value(now)}" if now is not None else f"no {key}"
        return f"{key} {format_value(then)} -> {format_value(now)}"


def find_changes(checkpoint: Checkpoint, now: dict[str, Any], recipe: Recipe, total_steps: int) -> Changes:
    """Compare a run with the one that a checkpoint is of.

    Args:
        checkpoint: Of the run before.
        now: The fingerprint of this run.
        recipe: What it is to do; training.allow_changes names keys that may be others.
        total_steps: Its length.

    Raises:
        RecipeError: a key changed that was not named, or cannot change; or the run would end before the checkpoint.
    """
    kept = checkpoint.state["fingerprint"]
    then, now = ({key: without_defaults(value) for key, value in side.items()} for side in (kept, now))
    then |= {key: _default(key) for key in now.keys() - then.keys() if _has_section(then, key)}
    # An older version may have kept a key that is free by now, and did not keep the length where it does not matter.
    free = _FREE if any(key in kept for key in _LENGTH) else _FREE.union(_LENGTH)
    keys = sorted(key for key in (then.keys() | now.keys()) - free if then.get(key) != now.get(key))
    names = [changeable()[name] for name in recipe.training.allow_changes]
    refused = [key for key in keys if key not in _LENGTH and not any(_covers(name, key) for name in names)]
    if refused:
        raise _refusal(checkpoint, then, now, refused)
    if total_steps < checkpoint.step:
        raise RecipeError(
            f"the run would end at step {total_steps}, but {checkpoint.folder} is of step {checkpoint.step}",
            where="training.max_steps" if recipe.training.max_steps else "training.num_train_epochs",
            fix="Raise it, or choose an earlier checkpoint with training.resume_from_checkpoint.",
        )
    # A stream cannot tell by itself that its files are others, so that it begins anew where they may be.
    rows = any(key.startswith("data.") for key in keys) or (
        recipe.data.streaming and any(_covers(name, "data.train") for name in names)
    )
    return Changes(checkpoint.step, {key: (then.get(key), now.get(key)) for key in keys}, rows)


def _has_section(values: dict[str, Any], key: str) -> bool:
    """Whether a section is there, whose key an older version did not know yet: it did as the default says."""
    section = key.rpartition(".")[0]
    return section in SECTIONS and any(name.startswith(f"{section}.") for name in values)


def _default(key: str) -> Any:
    section, _, name = key.rpartition(".")
    return SECTIONS[section].model_fields[name].default


def without_defaults(value: Any) -> Any:
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


def _covers(name: str, key: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _refusal(checkpoint: Checkpoint, then: dict[str, Any], now: dict[str, Any], keys: list[str]) -> UserError:
    faults = []
    for key in keys:
        if key in _CONTENTS:
            what = f"{_CONTENTS[key]} changed since the checkpoint was written"
        else:
            what = f"is {now.get(key)!r}, but the checkpoint was written with {then.get(key)!r}"
        faults.append(Fault(what, key))
    fix = "Undo it" if len(keys) == 1 else "Undo them"
    if all(any(_covers(name, key) for name in changeable().values()) for key in keys):
        fix += f", go on with {'it' if len(keys) == 1 else 'them'} by training.allow_changes=[{', '.join(keys)}]"
    advice = (
        f"{checkpoint.folder} cannot be resumed with {'this change' if len(faults) == 1 else 'these changes'}. {fix}, "
        "choose another training.output_dir, or start over with training.resume_from_checkpoint=never. To train the "
        "weights further as a new run, set model.path to the checkpoint and training.output_dir to another folder."
    )
    return RecipeError.of(faults, advice)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= _flatten(item, f"{prefix}.{key}" if prefix else key)
    return out
