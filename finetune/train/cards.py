"""Which GPU a run fits, by the estimate, and the least change that makes it fit a smaller one or what is here.

No paddle here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finetune.methods import METHODS
from finetune.model.adapters import LoraSettings
from finetune.model.family import Architecture
from finetune.recipe.schema import LoraSection
from finetune.train.estimate import Estimate, estimate

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe

CARDS = (8, 12, 16, 24, 40, 80)  # GB, of 10^9 bytes
# What a card has besides the run: CUDA's and Paddle's own, and room that the allocator loses between blocks. Assumed,
# not measured: there was no GPU.
_CONTEXT_BYTES = 800_000_000
_FRAGMENTED = 0.1


@dataclass(frozen=True)
class Load:
    """What memory depends on.

    Attributes:
        recipe, config: The run and its model.
        dtype: float32, bfloat16 or float16.
        tokens: Of the largest micro-batch.
        largest: Of its largest row or pack.
        length: Of the longest sequence.
        shards, continued: See `estimate`.
    """

    recipe: Recipe
    config: Architecture
    dtype: str
    tokens: int
    largest: int
    length: int
    shards: int = 1
    continued: LoraSettings | None = None

    def size(self) -> Estimate:
        """The estimate."""
        return estimate(
            self.recipe,
            self.config,
            dtype=self.dtype,
            tokens_per_micro_batch=self.tokens,
            length=self.length,
            shards=self.shards,
            continued=self.continued,
        )

    def fits(self, card: float) -> bool:
        """Whether a card of so many GB has room for it."""
        return self.size().total * (1 + _FRAGMENTED) + _CONTEXT_BYTES <= card * 10**9


def smallest_card(load: Load) -> int | None:
    """GB of the smallest card that it fits; None where it fits none."""
    return next((card for card in CARDS if load.fits(card)), None)


def change_after(load: Load, gigabytes: float) -> str | None:
    """The cheapest arguments for a run that was out of memory on a device of so many GB; None where there are none.

    Where the estimate has room for it, something else had taken memory, or the estimate is too low: then a change is
    named that takes a tenth of the run.
    """
    less = 0.9 * load.size().total * (1 + _FRAGMENTED) + _CONTEXT_BYTES
    return least_change(load, min(gigabytes, less / 10**9))


def least_change(load: Load, card: float) -> str | None:
    """The cheapest KEY=VALUE arguments that make a run fit a card; None where all together do not.

    They are taken in the order of what they cost (`_CHANGES`) until the run fits; then those go again, the dearest
    first, that were not needed.
    """
    taken: list[Change] = []
    for change in _CHANGES:
        if (after := _after(load, [*taken, change])) is None:
            continue
        taken.append(change)
        if not after.fits(card):
            continue
        for spare in reversed(taken[:-1]):
            fewer = [kept for kept in taken if kept is not spare]
            less = _after(load, fewer)
            taken = fewer if less is not None and less.fits(card) else taken
        return _arguments(load, taken)
    return None


Step = tuple[str, Load]
Change = Callable[[Load], "Step | None"]


def _after(load: Load, changes: list[Change]) -> Load | None:
    """The run with these changes; None where one of them cannot be made."""
    for change in changes:
        step = change(load)
        if step is None:
            return None
        load = step[1]
    return load


def _arguments(load: Load, changes: list[Change]) -> str:
    said = []
    for change in changes:
        step = change(load)
        if step is not None:
            said.append(step[0])
            load = step[1]
    return " ".join(said)


def _with(load: Load, section: str, **values: Any) -> Recipe:
    changed = getattr(load.recipe, section).model_copy(update=values)
    return load.recipe.model_copy(update={section: changed})


def _one_row(load: Load) -> Step | None:
    training = load.recipe.training
    rows, parts = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if rows == 1:
        return None
    recipe = _with(load, "training", per_device_train_batch_size=1, gradient_accumulation_steps=rows * parts)
    says = f"training.per_device_train_batch_size=1 training.gradient_accumulation_steps={rows * parts}"
    return says, replace(load, recipe=recipe, tokens=load.largest)


def _recompute(load: Load) -> Step | None:
    if load.recipe.training.recompute:
        return None
    return "training.recompute=true", replace(load, recipe=_with(load, "training", recompute=True))


def _eight_bit(load: Load) -> Step | None:
    if load.recipe.training.optim == "adamw_8bit":
        return None
    return "training.optim=adamw_8bit", replace(load, recipe=_with(load, "training", optim="adamw_8bit"))


def _lora(load: Load) -> Step | None:
    if load.recipe.lora is not None:
        return None
    recipe = load.recipe.model_copy(update={"lora": LoraSection()})
    return "lora.rank=16", replace(load, recipe=recipe)


def _nf4(load: Load) -> Step | None:
    recipe = load.recipe
    if recipe.lora is None or recipe.lora.variant == "pissa" or recipe.model.quantization == "nf4":
        return None
    return "model.quantization=nf4", replace(load, recipe=_with(load, "model", quantization="nf4"))


def _shorter(load: Load) -> Step | None:
    length = load.recipe.data.max_length // 2
    if length < 2:
        return None
    row = METHODS[load.recipe.method].rows.sides * length
    recipe, largest = _with(load, "data", max_length=length), min(load.largest, row)
    tokens = min(load.tokens, largest * recipe.training.per_device_train_batch_size)
    after = replace(load, recipe=recipe, tokens=tokens, largest=largest, length=min(load.length, row))
    return f"data.max_length={length}", after


# From what leaves each step's numbers as they are to what changes what is learned: the same step in pieces; the same
# step with activations made twice, for 30 to 40 % more time; moments in 8 bits; an adapter instead of all weights; its
# base in 4 bits; less of each long row.
_CHANGES: tuple[Change, ...] = (_one_row, _recompute, _eight_bit, _lora, _nf4, _shorter)
