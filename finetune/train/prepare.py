"""All of a run that is known before weights load: data, order of rows, steps, memory. No paddle here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from finetune import console
from finetune.chat.tokenizer import Tokenizer
from finetune.methods import METHODS
from finetune.model.resolve import ModelSource
from finetune.model.runtime import dtype_on, gpu_count
from finetune.rows.dataset import DataReport, build_dataset, mixed, split_report
from finetune.rows.encode import Settings
from finetune.rows.mix import Mix
from finetune.rows.mixstream import open_stream
from finetune.rows.plan import EpochPlan, Packs, Plan, pack, plan_steps
from finetune.rows.stream import Stream, StreamPacks, StreamPlan, StreamSettings
from finetune.rows.table import split_dataset
from finetune.train.cards import CARDS, Load, least_change, smallest_card
from finetune.train.estimate import Estimate
from finetune.train.preflight import Settled
from finetune.train.schedule import warmup_steps_of

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe, Source

_FIRST_ROWS = 3
P = TypeVar("P", Packs, StreamPacks, covariant=True)


@dataclass(frozen=True)
class RowSet(Generic[P]):
    """Rows that are trained or evaluated on.

    Attributes:
        rows: Tokenized, by number.
        report: What became of those that were read.
        packs: The rows of each sequence that the model sees.
    """

    rows: Any
    report: DataReport
    packs: P


@dataclass(frozen=True)
class Prepared:
    """A run, ready to load its weights.

    Attributes:
        recipe: What to do.
        source: The base model.
        tokenizer: Its tokenizer and chat template.
        train, eval: What is trained and evaluated on; eval is None without evaluation.
        plan: Which packs make up each step of this rank.
        reference: `dpo.reference`, where it names a model.
        world_size: Processes.
        load: What its memory depends on.
        first_rows: Training rows to show something with: all, or those that a stream begins with.
        stream: Where rows are tokenized as the run goes, the same object as `train.rows`; None where they were before.
    """

    recipe: Recipe
    source: ModelSource
    tokenizer: Tokenizer
    train: RowSet[Packs] | RowSet[StreamPacks]
    eval: RowSet[Packs] | None
    plan: Plan
    reference: ModelSource | None
    world_size: int
    load: Load
    first_rows: Any
    stream: Stream | None = None

    @property
    def estimate(self) -> Estimate:
        """Parameters and memory."""
        return self.load.size()

    @property
    def sharding_degree(self) -> int:
        """Processes that share one state of the optimizer; 1 where it is not split."""
        return _sharding_degree(self.recipe, self.world_size)

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of warm-up."""
        training = self.recipe.training
        return warmup_steps_of(training.warmup_steps, training.warmup_ratio, self.plan.total_steps)


def prepare(settled: Settled, rank: int = 0) -> Prepared:
    """Read and tokenize the data, and plan the steps of a rank.

    Raises:
        UserError: the data, or what it makes with the model, is wrong.
    """
    recipe, source, tokenizer = settled.recipe, settled.source, settled.tokenizer
    data, training = recipe.data, recipe.training
    if data.streaming:
        return _prepare_stream(settled, rank)
    train, report = _build(recipe, source, tokenizer, data.train, "read training rows")
    held_out = _evaluation_rows(recipe, source, tokenizer)
    needed = training.load_best_model_at_end or training.early_stopping_patience
    if data.eval_fraction and len(train) == 1 and not needed:
        report.notes.append("1 row is trained on and not evaluated: data.eval_fraction takes effect from 2 rows on.")
    elif data.eval_fraction:
        train, rows = split_dataset(train, data.eval_fraction, training.seed)
        report, other = split_report(report, train, rows, data.max_length)
        held_out = RowSet(rows, other, _packs(rows, recipe))
    mix = mixed(train, data.train, report)
    packs = _packs(train, recipe, mix)
    plan = plan_steps(
        len(packs) if mix is None or data.packing else len(mix),
        batch_size=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        max_steps=training.max_steps,
        epochs=training.num_train_epochs,
        seed=training.seed,
        shuffle=training.shuffle,
        world_size=settled.world_size,
        rank=rank,
        mix=None if data.packing else mix,
    )
    return Prepared(
        recipe=recipe,
        source=settled.source,
        tokenizer=tokenizer,
        train=RowSet(train, report, packs),
        eval=held_out,
        first_rows=train,
        plan=plan,
        reference=settled.reference,
        world_size=settled.world_size,
        load=_load(
            settled,
            tokens=_largest_batch(train, packs, training.per_device_train_batch_size),
            largest=_largest_batch(train, packs, 1),
            length=int(np.max(train.lengths)),
        ),
    )


def _evaluation_rows(recipe: Recipe, source: ModelSource, tokenizer: Tokenizer) -> RowSet[Packs] | None:
    """The rows of data.eval; None where it names none."""
    if not recipe.data.eval:
        return None
    rows, report = _build(recipe, source, tokenizer, recipe.data.eval, "read evaluation rows")
    return RowSet(rows, report, _packs(rows, recipe))


def _prepare_stream(settled: Settled, rank: int) -> Prepared:
    """The same where rows are tokenized as the run goes: only the first few are looked at here.

    Raises:
        ValueError: training.max_steps is not set, which the recipe's rules ask for.
    """
    recipe, source, tokenizer = settled.recipe, settled.source, settled.tokenizer
    data, training = recipe.data, recipe.training
    if training.max_steps is None:
        raise ValueError("the length of a stream is not known, so training.max_steps must be")
    known = source.config.vocab_size
    first, _ = build_dataset(
        data.train, tokenizer, data=data, method=recipe.method, limit=_FIRST_ROWS, vocab_size=known
    )
    stream = open_stream(
        data.train,
        tokenizer,
        StreamSettings(
            encode=Settings.of(data, recipe.method, known),
            room=_room(recipe) if data.packing else None,
            seed=training.seed,
            shuffle=training.shuffle,
            share=(rank, settled.world_size),
        ),
    )
    held_out = _evaluation_rows(recipe, source, tokenizer)
    size = training.per_device_train_batch_size
    plan = StreamPlan(stream, size, training.gradient_accumulation_steps, training.max_steps)
    return Prepared(
        recipe=recipe,
        source=settled.source,
        tokenizer=tokenizer,
        train=RowSet(stream, stream.report, StreamPacks(stream)),
        eval=held_out,
        first_rows=first,
        plan=plan,
        reference=settled.reference,
        world_size=settled.world_size,
        # Lengths are not known: the most that can come.
        load=_load(settled, tokens=size * _room(recipe), largest=_room(recipe), length=data.max_length),
        stream=stream,
    )


def _build(
    recipe: Recipe, source: ModelSource, tokenizer: Tokenizer, sources: Sequence[Source], title: str
) -> tuple[Any, DataReport]:
    with console.progress(None, title, unit="row") as bar:

        def advance(rows: int, total: int | None) -> None:
            bar.total = total
            bar.advance(rows)

        return build_dataset(
            sources,
            tokenizer,
            data=recipe.data,
            method=recipe.method,
            progress=advance,
            vocab_size=source.config.vocab_size,
        )


def _packs(dataset: Any, recipe: Recipe, mix: Mix | None = None) -> Packs:
    """Units of the data order: rows, or packs of those of a mix's first epoch, where there is one."""
    if not recipe.data.packing:
        return Packs.single(len(dataset))
    if mix is None:
        return pack(dataset.lengths, _room(recipe))
    rows = mix.order(recipe.training.seed, 0, recipe.training.shuffle)
    packs = pack(dataset.lengths[rows], _room(recipe))
    return Packs(rows[packs.rows], packs.starts)


def _room(recipe: Recipe) -> int:
    """Tokens of a pack. A pair is prompt, chosen and rejected long, so packs of pairs get twice the room."""
    return recipe.data.max_length * METHODS[recipe.method].rows.sides


def _largest_batch(dataset: Any, packs: Packs, size: int) -> int:
    """Tokens of the `size` longest packs."""
    return int(np.sort(packs.sums(dataset.lengths))[::-1][:size].sum())


def _load(settled: Settled, *, tokens: int, largest: int, length: int) -> Load:
    recipe = settled.recipe
    return Load(
        recipe,
        settled.source.config,
        dtype=dtype_on(recipe.model.dtype, on_cpu=gpu_count() == 0),
        tokens=tokens,
        largest=largest,
        length=length,
        shards=_sharding_degree(recipe, settled.world_size),
        continued=settled.source.lora,
    )


def _sharding_degree(recipe: Recipe, world_size: int) -> int:
    wanted = recipe.distributed
    if not wanted.sharding:
        return 1
    return world_size if wanted.sharding_parallel_degree == -1 else wanted.sharding_parallel_degree


def describe(prepared: Prepared, resumed_at: int = 0, *, cards: bool = False) -> None:
    """Print what the run will do, what of the data was cut or left out, and (`cards`) which GPUs it fits."""
    recipe, report, plan, size = prepared.recipe, prepared.train.report, prepared.plan, prepared.estimate
    training = recipe.training
    per_step = f"{training.per_device_train_batch_size} rows x {training.gradient_accumulation_steps} micro-batches" + (
        f" x {prepared.world_size} processes" if prepared.world_size > 1 else ""
    )
    share = 100 * size.trainable / (size.parameters + (size.trainable if recipe.lora else 0))
    known = plan if isinstance(plan, EpochPlan) else None
    steps = f"{plan.total_steps:,}" + (f" ({plan.total_steps / known.steps_per_epoch:.2f} epochs)" if known else "")
    console.table(
        f"{recipe.method.upper()} of {recipe.model.path}",
        [
            ("tuning", _tuning(recipe)),
            ("trainable parameters", f"{size.trainable:,} of {size.parameters:,} ({share:.2f} %)"),
            ("rows", _rows(report) if known else "streamed: tokenized as the run goes"),
            ("packed into", f"{known.n:,} sequences" if known and recipe.data.packing else None),
            (
                "tokens per epoch",
                _epoch_tokens(prepared, known) if known else None,
            ),
            ("evaluation rows", None if prepared.eval is None else _rows(prepared.eval.report)),
            ("steps", f"{steps}, {per_step}"),
            ("resumed after step", resumed_at or None),
            (
                "memory, estimated",
                f"{_size(size.total)} ({_parts(size)}){', each process' if prepared.world_size > 1 else ''}",
            ),
            *(_cards(prepared.load) if cards else ()),
            ("output", training.output_dir),
        ],
    )
    for note in report.notes:
        console.warn(note)
    for note in prepared.eval.report.notes if prepared.eval else []:
        console.warn(f"evaluation: {note}")


def _cards(load: Load) -> list[tuple[str, str]]:
    """The smallest GPU that a run fits, and of each smaller one what has to change."""
    load = replace(load, dtype=dtype_on(load.recipe.model.dtype, on_cpu=False))
    fits = smallest_card(load)
    found = f"{fits} GB or more" if fits else f"more than {CARDS[-1]} GB"
    rows = [("fits a GPU of", f"{found}, in {load.dtype}")]
    for card in [card for card in CARDS if fits is None or card < fits]:
        rows.append((f"for {card} GB", least_change(load, card) or "too small for this model and length"))
    return rows


def _epoch_tokens(prepared: Prepared, plan: EpochPlan) -> str:
    rows, packs = prepared.train.rows, prepared.train.packs
    if plan.mix is None:
        order: Any = slice(None)
    elif prepared.recipe.data.packing and isinstance(packs, Packs):
        order = packs.rows
    else:
        order = plan.mix.order(plan.seed, 0, plan.shuffle)
    tokens, supervised = int(rows.lengths[order].sum()), int(rows.num_supervised[order].sum())
    return f"{tokens:,}, {supervised:,} of them trained on"


def _tuning(recipe: Recipe) -> str:
    lora = recipe.lora
    if lora is None:
        return "full"
    modules = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    return f"{lora.variant}, rank {lora.rank}, alpha {lora.alpha:g}, {modules}"


def _rows(report: DataReport) -> str:
    counts = [("truncated", report.truncated), ("dropped", report.dropped), ("unsupervised", report.unsupervised)]
    odd = ", ".join(f"{count:,} {name}" for name, count in counts if count)
    return f"{report.kept:,} of {report.read:,}" + (f" ({odd})" if odd else "")


def _parts(size: Estimate) -> str:
    parts = ("weights", "gradients", "optimizer", "activations")
    return ", ".join(f"{name} {_size(getattr(size, name))}" for name in parts)


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
