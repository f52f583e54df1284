"""Rules that look at several keys of a recipe at once: what excludes, needs or makes no use of what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetune.compute.losses import LOSSES, LossOptions
from finetune.errors import ArgumentError, did_you_mean
from finetune.methods import METHODS
from finetune.model.family import ADAPTABLE
from finetune.recipe.names import changeable
from finetune.recipe.schema import DpoSection, Recipe
from finetune.rows.formats import FORMS


@dataclass(frozen=True)
class Clash:
    """Keys that do not go together.

    Attributes:
        keys: Dotted keys; the first is the one to point at. With a fault in any of them the rule is not applied.
    """

    keys: tuple[str, ...]
    what: str
    fix: str


def clashes(recipe: Recipe) -> Iterator[Clash]:
    """All rules that `recipe`, whose single values are right, breaks."""
    yield from _method_rules(recipe)
    yield from _quantization_rules(recipe)
    yield from _lora_rules(recipe)
    yield from _data_rules(recipe)
    yield from _length_rules(recipe)
    yield from _schedule_rules(recipe)
    yield from _evaluation_rules(recipe)
    yield from _resume_rules(recipe)
    if recipe.dpo is not None and METHODS[recipe.method].section == "dpo":
        yield from _loss_rules(recipe.dpo)
        yield from _reference_rules(recipe.dpo)
    yield from _distributed_rules(recipe)


def _method_rules(recipe: Recipe) -> Iterator[Clash]:
    method = METHODS[recipe.method]
    for name, other in METHODS.items():
        if other.section not in (None, method.section) and getattr(recipe, other.section) is not None:
            yield Clash(
                (other.section, "method"),
                f"{other.section} is set, but method is {recipe.method}",
                f"Remove the section or write 'method: {name}'.",
            )
    if recipe.data.train_on not in method.train_on:
        yield Clash(
            ("data.train_on", "method"),
            f"data.train_on is {recipe.data.train_on}, but method {recipe.method} scores the {method.train_on[0]}",
            f"Leave data.train_on out or write {' or '.join(method.train_on)}.",
        )
    right = ("auto", *(form.name for form in FORMS.values() if form.kind == method.rows))
    for name in ("train", "eval"):
        for index, source in enumerate(getattr(recipe.data, name)):
            if source.format not in right:
                yield Clash(
                    (f"data.{name}.{index}.format", "method"),
                    f"data.{name}[{index}].format is {source.format}, but method is {recipe.method}",
                    f"Use one of {', '.join(right)}.",
                )


def _quantization_rules(recipe: Recipe) -> Iterator[Clash]:
    kind = recipe.model.quantization
    if kind != "nf4" and not recipe.model.double_quantization:
        yield Clash(
            ("model.double_quantization", "model.quantization"),
            f"model.double_quantization is false, but model.quantization is {kind}, which does not use it",
            "Remove it or write 'quantization: nf4'.",
        )
    if kind == "none":
        return
    if recipe.lora is None:
        yield Clash(
            ("model.quantization", "lora"),
            f"model.quantization is {kind}, but without a lora section all weights are trained",
            "Add a lora section, or remove model.quantization.",
        )
    elif recipe.lora.variant == "pissa":
        yield Clash(
            ("lora.variant", "model.quantization"),
            f"lora.variant is pissa, which changes the base's weights, but model.quantization is {kind}",
            "Use another lora.variant, or remove model.quantization.",
        )


def _lora_rules(recipe: Recipe) -> Iterator[Clash]:
    lora = recipe.lora
    if lora is None:
        return
    if isinstance(lora.target_modules, list):
        for name in lora.target_modules:
            if name not in ADAPTABLE:
                yield Clash(
                    ("lora.target_modules",),
                    f"lora.target_modules names {name!r}, which Qwen2 has not",
                    did_you_mean(name, ADAPTABLE, f"There are {', '.join(ADAPTABLE)}."),
                )
        if len(set(lora.target_modules)) < len(lora.target_modules):
            yield Clash(("lora.target_modules",), "lora.target_modules names a module twice", "Name each once.")
    if "lm_head" in lora.target_modules and lora.dropout > 0:
        yield Clash(
            ("lora.dropout", "lora.target_modules"),
            f"lora.dropout is {lora.dropout}, which an adapter of lm_head does not take",
            "Set lora.dropout to 0 or leave lm_head out.",
        )
    for name in lora.modules_to_save:
        if lora.modules_to_save.count(name) > 1 or name in lora.target_modules:
            yield Clash(
                ("lora.modules_to_save", "lora.target_modules"),
                f"lora.modules_to_save names {name}, which is named elsewhere too",
                "Name a module once: trained in full, or with an adapter.",
            )
            break
    if lora.variant == "pissa" and lora.dropout > 0:
        yield Clash(
            ("lora.dropout", "lora.variant"),
            f"lora.dropout is {lora.dropout}, but pissa keeps the principal components in the adapter",
            "Set lora.dropout to 0 or use another lora.variant.",
        )
    if lora.loraplus_lr_ratio is not None and lora.variant != "lora_plus":
        yield Clash(
            ("lora.loraplus_lr_ratio", "lora.variant"),
            f"lora.loraplus_lr_ratio is set, but lora.variant is {lora.variant}, which does not use it",
            "Remove it or write 'variant: lora_plus'.",
        )


def _data_rules(recipe: Recipe) -> Iterator[Clash]:
    if recipe.data.eval and recipe.data.eval_fraction > 0:
        yield Clash(
            ("data.eval_fraction", "data.eval"),
            "data.eval and data.eval_fraction are both set",
            "Keep one: rows of their own, or a share of the training rows.",
        )
    yield from _columns_rules(recipe)
    yield from _weight_rules(recipe)
    if recipe.data.streaming:
        yield from _streaming_rules(recipe)


def _columns_rules(recipe: Recipe) -> Iterator[Clash]:
    for name in ("train", "eval"):
        for index, source in enumerate(getattr(recipe.data, name)):
            forms = list(FORMS.values()) if source.format == "auto" else [FORMS[source.format]]
            known = list(dict.fromkeys(key for form in forms for key in form.keys))
            unknown = [key for key in source.columns if key not in known]
            turned = {column: key for key, column in source.columns.items()}
            if unknown and turned.keys() <= set(known):
                yield Clash(
                    (f"data.{name}.{index}.columns", f"data.{name}.{index}.format"),
                    f"data.{name}[{index}].columns has {', '.join(unknown)} first, which no form reads",
                    "The form's key comes first: {" + ", ".join(f"{k}: {v}" for k, v in turned.items()) + "}.",
                )
                continue
            for key in unknown:
                yield Clash(
                    (f"data.{name}.{index}.columns", f"data.{name}.{index}.format"),
                    f"data.{name}[{index}].columns has {key}, which rows of format {source.format} do not have",
                    did_you_mean(key, known, f"The keys are {', '.join(known)}."),
                )
            if source.columns and not unknown and not any(set(source.columns) <= set(form.keys) for form in forms):
                yield Clash(
                    (f"data.{name}.{index}.columns", f"data.{name}.{index}.format"),
                    f"data.{name}[{index}].columns has keys that no form has together",
                    "Forms are " + "; ".join(f"{form.name}: {', '.join(form.keys)}" for form in forms) + ".",
                )


def _weight_rules(recipe: Recipe) -> Iterator[Clash]:
    weights = [source.weight for source in recipe.data.train]
    if any(weights) and not all(weights):
        index = weights.index(None)
        yield Clash(
            (f"data.train.{index}.weight",),
            f"data.train[{index}].weight is not set, but that of another source is",
            "Give each source of data.train a weight, or none of them.",
        )
    for index, source in enumerate(recipe.data.eval):
        if source.weight is not None:
            yield Clash(
                (f"data.eval.{index}.weight",),
                f"data.eval[{index}].weight is set, but evaluation goes through all rows once",
                "Remove it, or take fewer rows with samples.",
            )


def _streaming_rules(recipe: Recipe) -> Iterator[Clash]:
    if recipe.training.max_steps is None:
        yield Clash(
            ("data.streaming", "training.max_steps"),
            "data.streaming is true, but training.max_steps is not set: the length of a stream is not known",
            "Set training.max_steps, or write 'streaming: false' to train for epochs.",
        )
    if recipe.data.eval_fraction > 0:
        yield Clash(
            ("data.eval_fraction", "data.streaming"),
            "data.eval_fraction is above 0, but data.streaming is true: no share of a stream can be set aside",
            "Give rows of their own in data.eval.",
        )
    if recipe.dpo and recipe.dpo.precompute_ref_log_probs:
        yield Clash(
            ("dpo.precompute_ref_log_probs", "data.streaming"),
            "dpo.precompute_ref_log_probs is true, but data.streaming is true: the pairs are not known beforehand",
            "Remove it or write false.",
        )


def _length_rules(recipe: Recipe) -> Iterator[Clash]:
    training = recipe.training
    if training.max_steps is not None and training.num_train_epochs is not None:
        yield Clash(
            ("training.num_train_epochs", "training.max_steps"),
            "training.max_steps and training.num_train_epochs are both set",
            "Keep one; with neither, 3 epochs are trained.",
        )
    if training.warmup_steps > 0 and training.warmup_ratio > 0:
        yield Clash(
            ("training.warmup_ratio", "training.warmup_steps"),
            "training.warmup_steps and training.warmup_ratio are both above 0",
            "Keep one.",
        )


def _schedule_rules(recipe: Recipe) -> Iterator[Clash]:
    training = recipe.training
    kind = training.lr_scheduler_type
    if kind == "constant":
        for name in ("warmup_steps", "warmup_ratio"):
            if getattr(training, name) > 0:
                yield Clash(
                    (f"training.{name}", "training.lr_scheduler_type"),
                    f"training.{name} is above 0, but training.lr_scheduler_type constant has no warm-up",
                    "Use constant_with_warmup, or 0.",
                )
    if kind == "cosine_with_min_lr" and training.min_lr_ratio is None:
        yield Clash(
            ("training.lr_scheduler_type", "training.min_lr_ratio"),
            "training.lr_scheduler_type is cosine_with_min_lr, but training.min_lr_ratio is not set",
            "Set training.min_lr_ratio, for example to 0.1.",
        )
    if kind != "cosine_with_min_lr" and training.min_lr_ratio is not None:
        yield Clash(
            ("training.min_lr_ratio", "training.lr_scheduler_type"),
            f"training.min_lr_ratio is set, but training.lr_scheduler_type is {kind}, which does not use it",
            "Remove it or use cosine_with_min_lr.",
        )


def _evaluation_rules(recipe: Recipe) -> Iterator[Clash]:
    training, data = recipe.training, recipe.data
    if not data.eval and data.eval_fraction == 0:
        for name in ("eval_steps", "early_stopping_patience", "load_best_model_at_end"):
            if getattr(training, name):
                yield Clash(
                    (f"training.{name}", "data.eval", "data.eval_fraction"),
                    f"training.{name} is set, but there is nothing to evaluate on",
                    "Set data.eval or data.eval_fraction.",
                )
    elif training.load_best_model_at_end and training.eval_steps and training.save_steps % training.eval_steps:
        yield Clash(
            ("training.save_steps", "training.eval_steps", "training.load_best_model_at_end"),
            f"training.save_steps is {training.save_steps}, which is not a multiple of training.eval_steps,"
            f" {training.eval_steps}, so the best step might not be saved",
            "Make it a multiple, or set load_best_model_at_end to false.",
        )


def _resume_rules(recipe: Recipe) -> Iterator[Clash]:
    training = recipe.training
    for name in training.allow_changes:
        if name not in changeable():
            yield Clash(
                ("training.allow_changes",),
                f"training.allow_changes names {name!r}, which is no key that may change when a run is resumed",
                did_you_mean(name, changeable(), "Keys of data, training and dpo may, and lora.dropout."),
            )
    if training.allow_changes and training.resume_from_checkpoint == "never":
        yield Clash(
            ("training.allow_changes", "training.resume_from_checkpoint"),
            "training.allow_changes is set, but training.resume_from_checkpoint is never",
            "Remove one: a run that starts anew has nothing to differ from.",
        )


def _loss_rules(dpo: DpoSection) -> Iterator[Clash]:
    loss = LOSSES[dpo.loss_type]
    for name, field in LossOptions.model_fields.items():
        readers = [other for other, kind in LOSSES.items() if name in kind.options]
        if readers and dpo.loss_type not in readers and getattr(dpo, name) != field.default:
            yield Clash(
                (f"dpo.{name}", "dpo.loss_type"),
                f"dpo.{name} is set, but dpo.loss_type {dpo.loss_type} does not use it",
                f"Remove it or write 'loss_type: {' or '.join(readers)}'.",
            )
    if loss.has_sft and dpo.sft_loss_ratio > 0:
        yield Clash(
            ("dpo.sft_loss_ratio", "dpo.loss_type"),
            f"dpo.sft_loss_ratio is above 0, but {dpo.loss_type} already contains the SFT loss; dpo.beta weighs the"
            " other term",
            "Remove it.",
        )


def _reference_rules(dpo: DpoSection) -> Iterator[Clash]:
    loss = LOSSES[dpo.loss_type]
    if not loss.has_reference and not dpo.reference_free:
        yield Clash(
            ("dpo.reference_free", "dpo.loss_type"),
            f"dpo.reference_free is false, but dpo.loss_type {dpo.loss_type} has no reference model",
            "Remove it.",
        )
    if dpo.reference_free and loss.has_reference and not loss.may_drop_reference:
        free = [name for name, kind in LOSSES.items() if kind.may_drop_reference or not kind.has_reference]
        yield Clash(
            ("dpo.reference_free", "dpo.loss_type"),
            f"dpo.reference_free is true, but dpo.loss_type {dpo.loss_type} needs a reference",
            f"Remove it or use one of {', '.join(free)}.",
        )
    if not dpo.reference_free and loss.has_reference:
        return
    why = "reference_free is true" if loss.has_reference else f"dpo.loss_type {dpo.loss_type} has no reference model"
    if dpo.reference is not None:
        yield Clash(
            ("dpo.reference", "dpo.loss_type", "dpo.reference_free"), f"dpo.reference is set, but {why}", "Remove it."
        )
    if dpo.precompute_ref_log_probs:
        yield Clash(
            ("dpo.precompute_ref_log_probs", "dpo.loss_type", "dpo.reference_free"),
            f"dpo.precompute_ref_log_probs is true, but {why}",
            "Remove it or write false.",
        )


def _distributed_rules(recipe: Recipe) -> Iterator[Clash]:
    distributed = recipe.distributed
    degree = distributed.sharding_parallel_degree
    if degree == 0:
        yield Clash(
            ("distributed.sharding_parallel_degree",),
            "distributed.sharding_parallel_degree is 0",
            "Use the number of processes that share a copy, or -1 for all of them.",
        )
    elif distributed.sharding and degree == 1:
        yield Clash(
            ("distributed.sharding_parallel_degree", "distributed.sharding"),
            f"distributed.sharding is {distributed.sharding}, but over 1 process nothing is sharded",
            "Use 2 or more, or leave it out for all data-parallel processes.",
        )
    elif not distributed.sharding and degree != 1:
        yield Clash(
            ("distributed.sharding_parallel_degree", "distributed.sharding"),
            f"distributed.sharding_parallel_degree is {degree}, but distributed.sharding is not set",
            "Set distributed.sharding to stage1, stage2 or stage3, or leave the degree out.",
        )


def check_world_size(recipe: Recipe, world: int) -> None:
    """Compare the degrees of `distributed` with the number of processes, machines times processes on each.

    Raises:
        ArgumentError: the product of the degrees does not divide the number of processes.
    """
    distributed = recipe.distributed
    degrees = {
        "tensor_parallel_degree": distributed.tensor_parallel_degree,
        "pipeline_parallel_degree": distributed.pipeline_parallel_degree,
        "sharding_parallel_degree": max(distributed.sharding_parallel_degree, 1),
    }
    product = 1
    for degree in degrees.values():
        product *= degree
    if world % product:
        named = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1)
        raise ArgumentError(
            f"{named} needs a multiple of {product} processes, but there {'is' if world == 1 else 'are'} {world}",
            where="distributed",
            fix=f"Start with --nproc {product}, or lower the degrees.",
        )
