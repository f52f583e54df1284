"""Preference training: the loss of one micro-batch of pairs, whatever the loss and the reference are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune.compute.forward import owner_counts
from finetune.compute.layout import Layout
from finetune.compute.losses import LOSSES, PairLogps, chosen_nll
from finetune.model.runtime import paddle as _bring_up
from finetune.train.preference.pairs import PairBatch, PairBatcher, evaluating, response_logps
from finetune.train.preference.reference import make_references
from finetune.train.task import Evaluation, evaluation_batches

_bring_up()
import paddle

if TYPE_CHECKING:
    from finetune.recipe.schema import DpoSection
    from finetune.train.preference.reference import Reference
    from finetune.train.processes.parallel import World
    from finetune.train.task import Ready


class DpoTask:
    """A preference loss over pairs; see `Task`.

    Args:
        model: The policy.
        batcher: Makes its micro-batches.
        section: The recipe's `dpo` section.
        reference: Gives the reference's log-probabilities.
    """

    metric_names: tuple[str, ...] = (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    )
    shown: tuple[str, ...] = ("loss", "rewards/accuracies", "rewards/margins")

    def __init__(self, model: Any, batcher: PairBatcher, section: DpoSection, reference: Reference):
        self.model, self.batcher, self.reference = model, batcher, reference
        self.kind = LOSSES[section.loss_type]
        self.options = {name: getattr(section, name) for name in self.kind.keys}
        self.sft_loss_ratio = section.sft_loss_ratio
        self._baseline: tuple[float, float] | None = None

    def layout(self, units: Sequence[int]) -> PairBatch:
        """The micro-batch of the given packs."""
        return self.batcher.batch(units)

    def sources(self, units: Sequence[int]) -> list[str]:
        """Where the pairs of the given packs come from, `file:row`."""
        return [self.batcher.dataset[i].source for unit in units for i in self.batcher.packs[unit]]

    def weight(self, batch: PairBatch) -> int:
        """What the loss is a mean over: pairs."""
        return len(batch.pairs)

    def begin_step(self, batches: Sequence[PairBatch], world: World) -> None:
        """Learn what the loss needs of all pairs of the step before any gradient: kto_pair's baseline.

        Costs a forward pass, and only where one micro-batch is not the whole step.
        """
        self._baseline = None
        if not self.kind.step_baseline or (len(batches) == 1 and world.size == 1):
            return
        sums = [0.0, 0.0, 0.0]
        with evaluating(self.model):
            for batch in batches:
                ratios = response_logps(self.model, batch.layout) - self.reference.logps(batch)
                pairs = [float(ratios[0::2].sum()), float(ratios[1::2].sum()), float(len(batch.pairs))]
                sums = [a + b for a, b in zip(sums, pairs)]
        chosen, rejected, count = world.all_sum(sums)
        self._baseline = (chosen / count, rejected / count)

    def loss(self, batch: PairBatch, denominator: float) -> tuple[Any, dict[str, float]]:
        """The preference loss, and with `sft_loss_ratio` the supervised one.

        Args:
            batch: One micro-batch.
            denominator: Pairs of the whole optimizer step, all micro-batches and ranks together.

        Returns:
            (float64 scalar to call backward on, sums over this micro-batch's pairs by metric name). Log-probabilities
            are means per token for losses that work on those, as TRL logs them.
        """
        inputs = []
        if self.kind.has_reference:
            inputs.append(_pair_logps(self.reference.logps(batch), batch.layout))
        policy = _pair_logps(response_logps(self.model, batch.layout), batch.layout)
        extra = {"baseline": self._baseline} if self.kind.step_baseline else {}
        result = self.kind.function(policy, *inputs, **self.options, **extra)
        losses = result.loss
        if self.sft_loss_ratio:
            losses = losses + self.sft_loss_ratio * chosen_nll(policy)
        total = losses.sum()
        shown = policy.averaged() if self.kind.per_token else policy
        values = (
            total,
            result.chosen_reward.sum(),
            result.rejected_reward.sum(),
            (result.chosen_reward - result.rejected_reward).sum(),
            (result.chosen_reward > result.rejected_reward).astype("float64").sum(),
            shown.chosen.sum(),
            shown.rejected.sum(),
        )
        return total / denominator, {name: float(value) for name, value in zip(self.metric_names, values)}


def _pair_logps(sums: paddle.Tensor, layout: Layout) -> PairLogps:
    counts = paddle.to_tensor(owner_counts(layout)).astype(sums.dtype)
    return PairLogps(sums[0::2], sums[1::2], counts[0::2], counts[1::2])


def make_tasks(ready: Ready) -> tuple[DpoTask, Evaluation[PairBatch] | None]:
    """The training task and, with evaluation rows, the evaluation; reference log-probabilities are made here.

    Raises:
        ValueError: the recipe has no `dpo` section, which the schema gives every recipe of this method.
    """
    prepared, world, section = ready.prepared, ready.world, ready.prepared.recipe.dpo
    if section is None:
        raise ValueError("preference training needs the recipe's dpo section")
    references = make_references(ready, section)
    batcher = PairBatcher(prepared.train.rows, prepared.train.packs)
    task = DpoTask(ready.model, batcher, section, references[0])
    held_out = prepared.eval
    if held_out is None:
        return task, None
    size = prepared.recipe.training.per_device_eval_batch_size
    judge = DpoTask(ready.model, PairBatcher(held_out.rows, held_out.packs), section, references[1])
    return task, Evaluation(judge, evaluation_batches(len(held_out.packs), size, world.rank, world.size))
