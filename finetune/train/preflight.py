"""What a run refuses before it reads any data, all of it at once: the same for a dry run, for the run, and for the
process that starts others. No paddle here."""

from __future__ import annotations

import errno
import importlib.util
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from finetune.chat.tokenizer import Tokenizer
from finetune.errors import ArgumentError, Fault, RecipeError, UserError
from finetune.model.adapters import LoraSettings, target_names
from finetune.model.resolve import ModelSource, resolve_model
from finetune.model.runtime import dtype_on, gpu_count
from finetune.recipe.schema import LoraSection, Recipe
from finetune.train.checkpoint import check_there
from finetune.train.resume import refuse_to_replace

T = TypeVar("T")


@dataclass(frozen=True)
class Settled:
    """A recipe that this machine and the model that it names can do.

    Attributes:
        recipe: What to do; of an adapter that is trained further it holds what its `lora` section left open.
        source: The base model.
        tokenizer: Its tokenizer and chat template.
        reference: `dpo.reference`, where it names a model.
        world_size: Processes, on all machines.
    """

    recipe: Recipe
    source: ModelSource
    tokenizer: Tokenizer
    reference: ModelSource | None
    world_size: int


def settle(recipe: Recipe, world_size: int = 1, nproc: int = 1) -> Settled:
    """Find the model, and check what can be known without data and weights.

    Args:
        recipe: Checked by itself.
        world_size: Processes, on all machines.
        nproc: Processes on this machine.

    Raises:
        UserError: the machine, the folder of the run or the model does not go with the recipe; holds all faults.
        ModuleNotFoundError: paddle or paddlenlp is not installed.
    """
    for package in ("paddle", "paddlenlp"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    found = _Found()
    found.of(lambda: dtype_on(recipe.model.dtype, on_cpu=gpu_count() == 0))
    found.of(lambda: _check_distributed(recipe, nproc))
    found.of(lambda: _check_output(recipe))
    reference = found.of(lambda: _reference(recipe))
    source = found.of(lambda: resolve_model(recipe.model.path))
    tokenizer = None
    if source is not None:
        tokenizer = found.of(lambda: Tokenizer.from_folder(source.tokenizer_folder))
        found.of(lambda: _check_lengths(recipe, source))
        recipe = found.of(lambda: _with_adapter(recipe, source)) or recipe
    if tokenizer is not None and reference is not None:
        found.of(lambda: _check_vocabulary(tokenizer, reference))
    if found.faults or source is None or tokenizer is None:
        raise found.error()
    return Settled(recipe, source, tokenizer, reference, world_size)


class _Found:
    """What several checks find wrong, in their order.

    Attributes:
        faults: All of them.
        kind: The class of the first error.
    """

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.kind: type[UserError] = UserError
        self._advice: list[str] = []

    def of(self, check: Callable[[], T]) -> T | None:
        """What a check returns; None where it finds something wrong, which is kept."""
        try:
            return check()
        except UserError as error:
            self.kind = self.kind if self.faults else type(error)
            self.faults += error.faults
            self._advice += [error.advice] if error.advice else []
        return None

    def error(self) -> UserError:
        """All of it as one error."""
        return self.kind.of(self.faults, "\n".join(self._advice) or None)


# -- the machine -----------------------------------------------------------------------------------------------


def _check_distributed(recipe: Recipe, nproc: int) -> None:
    """Refuse what this version does not do, instead of training something else, and more processes than GPUs."""
    wanted, gpus, faults = recipe.distributed, gpu_count(), []
    instead = "and use LoRA, training.recompute and bfloat16 to fit a larger model."
    for name in ("tensor_parallel_degree", "pipeline_parallel_degree"):
        if getattr(wanted, name) > 1:
            what = f"{getattr(wanted, name)} was asked for, but this version trains with data parallelism only"
            faults.append(Fault(what, f"distributed.{name}", f"Set it to 1, {instead}"))
    if wanted.sharding not in ("", "stage1"):
        what = f"{wanted.sharding!r} was asked for, but this version splits the optimizer's state only"
        faults.append(Fault(what, "distributed.sharding", f"Set it to stage1, {instead}"))
    if gpus and nproc > gpus:
        what = f"{nproc} processes were asked for, but there {'is 1 GPU' if gpus == 1 else f'are {gpus} GPUs'}"
        faults.append(Fault(what, "--nproc", f"Use one process for each GPU: at most --nproc {gpus}."))
    if faults:
        raise ArgumentError.of(faults)


def _check_output(recipe: Recipe) -> None:
    """Refuse a folder that cannot be written, or that holds what a run would delete; nothing is made there.

    Raises:
        ArgumentError: so it is.
        CheckpointError: training.resume_from_checkpoint names no checkpoint.
    """
    output, wanted = Path(recipe.training.output_dir), recipe.training.resume_from_checkpoint
    there = next(path for path in (output, *output.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        what = "is a file" if there == output else f"cannot be made: {there} is a file"
        raise ArgumentError(what, where=str(output), fix="Choose another training.output_dir.")
    denied = None if os.access(there, os.W_OK | os.X_OK) else errno.EACCES
    denied = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else denied
    if denied:
        what = f"cannot be written ({os.strerror(denied)})"
        raise ArgumentError(what, where=str(output), fix="Choose another training.output_dir.")
    refuse_to_replace(output, wanted)
    if wanted not in ("auto", "never"):
        check_there(Path(wanted))


# -- the model -------------------------------------------------------------------------------------------------


def _check_lengths(recipe: Recipe, source: ModelSource) -> None:
    longest = source.config.max_position_embeddings
    if recipe.data.max_length > longest:
        raise ArgumentError(
            f"is {recipe.data.max_length:,}, but the model knows {longest:,} positions",
            where="data.max_length",
            fix=f"Set it to at most {longest}.",
        )


def _reference(recipe: Recipe) -> ModelSource | None:
    """The reference of preference training that is a model of its own."""
    if recipe.dpo is None or recipe.dpo.reference is None:
        return None
    return resolve_model(recipe.dpo.reference)


def _check_vocabulary(tokenizer: Tokenizer, reference: ModelSource) -> None:
    theirs = Tokenizer.from_folder(reference.tokenizer_folder)
    if theirs.backend.get_vocab() != tokenizer.backend.get_vocab():
        raise RecipeError(
            f"{reference.name} has another vocabulary than the model that is trained",
            where="dpo.reference",
            fix="The reference scores the same tokens, so it must be a model of the same family.",
        )


def _with_adapter(recipe: Recipe, source: ModelSource) -> Recipe:
    """The recipe with its `lora` section checked against the model, and completed from an adapter trained further.

    Raises:
        ArgumentError: it names modules that the model does not have, or a rank that it cannot have.
        RecipeError: it asks for another adapter than model.path holds.
    """
    section, adapter, config = recipe.lora, source.lora, source.config
    if section is None:
        return recipe
    target_names(section.target_modules, config)
    if section.variant == "pissa" and section.rank > config.hidden_size:
        what = f"is {section.rank}, but the model's hidden size is {config.hidden_size}"
        raise ArgumentError(what, where="lora.rank", fix="With pissa, use at most the hidden size.")
    if adapter is None:
        return recipe
    section = inherited(section, adapter)
    _check_continued(section, adapter, {name.rpartition(".")[2] for name in config.linears})
    return recipe.model_copy(update={"lora": section})


def inherited(section: LoraSection, adapter: LoraSettings) -> LoraSection:
    """A `lora` section whose keys that were not given are those of an adapter that is trained further."""
    found: dict[str, object] = {"rank": adapter.rank, "alpha": adapter.alpha, "variant": adapter.variant}
    if adapter.target_modules:
        named = adapter.target_modules
        found["target_modules"] = named if isinstance(named, str) else _last_parts(named)
    found["modules_to_save"] = _last_parts(adapter.modules_to_save)
    return section.model_copy(update={key: v for key, v in found.items() if key not in section.model_fields_set})


def _last_parts(modules: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in modules))


def _check_continued(wanted: LoraSection, found: LoraSettings, linears: set[str]) -> None:
    """Refuse another shape than the adapter has: the recipe may change dropout and learning rates."""
    faults = []
    for name in ("rank", "alpha"):
        if getattr(wanted, name) != getattr(found, name):
            what = f"is {getattr(wanted, name):g}, the adapter has {getattr(found, name):g}"
            faults.append(Fault(what, f"lora.{name}"))
    if wanted.variant != found.variant and (wanted.variant, found.variant) != ("lora_plus", "lora"):
        faults.append(Fault(f"is {wanted.variant}, the adapter is a {found.variant}", "lora.variant"))
    whole, kept = (", ".join(sorted(_last_parts(side.modules_to_save))) or "empty" for side in (wanted, found))
    if whole != kept:
        faults.append(Fault(f"is {whole}, the adapter's is {kept}", "lora.modules_to_save"))
    ours, theirs = (
        linears if targets == "all-linear" else set(_last_parts(targets))
        for targets in (wanted.target_modules, found.target_modules)
    )
    if theirs and ours != theirs:
        faults.append(
            Fault(f"are {', '.join(sorted(ours))}, the adapter has {', '.join(sorted(theirs))}", "lora.target_modules")
        )
    if faults:
        raise RecipeError.of(
            faults,
            "model.path is an adapter, which can only be trained further as it is. Leave these keys out, or export it "
            "merged with `finetune export` and train a new one on the result.",
        )
