"""Supervised fine-tuning: the loss of one micro-batch."""

from __future__ import annotations

from finetune.compute.forward import total_nll
from finetune.compute.layout import Layout, lay_out_samples
from finetune.train.processes.parallel import World


class SftTask:
    """Cross-entropy over supervised tokens.

    The unit of the data order is a pack: the samples of one row. Without packing every pack holds one sample.
    """

    metric_names = ("loss",)

    def __init__(self, model, dataset, packs: list[list[int]]):
        self.model = model
        self.dataset = dataset
        self.packs = packs

    def layout(self, units: list[int]) -> Layout:
        """The micro-batch of the given packs."""
        examples = [self.dataset[i] for unit in units for i in self.packs[unit]]
        return lay_out_samples([(example.input_ids, example.labels) for example in examples])

    def sources(self, units: list[int]) -> list[str]:
        """Where the rows of the given packs come from, `file:row`."""
        return [self.dataset[i].source for unit in units for i in self.packs[unit]]

    def weight(self, layout: Layout) -> int:
        """What the loss is a mean over: supervised tokens."""
        return layout.num_targets

    def begin_step(self, layouts: list[Layout], world: World) -> None:
        """Called before the losses of a step; this loss needs nothing beforehand."""

    def loss(self, layout: Layout, denominator: float):
        """Negative log-likelihood.

        Args:
            layout: One micro-batch.
            denominator: Supervised tokens of the whole optimizer step, all micro-batches and ranks together, so that
                the gradients of the micro-batches add up to the gradient of the mean over the step's tokens.

        Returns:
            (float32 scalar to call backward on, {"loss": sum over this micro-batch}).
        """
        total = total_nll(self.model, layout)
        return total / denominator, {"loss": float(total)}
