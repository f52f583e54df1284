"""Supervised fine-tuning: the loss of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from finetune.chat.example import Example
from finetune.compute.forward import total_nll
from finetune.compute.layout import Layout, lay_out_samples
from finetune.train.processes.parallel import World
from finetune.train.task import Evaluation, Packs, Ready, evaluation_batches


class Examples(Protocol):
    """Tokenized conversations by number: all of them, or those that a stream has at hand."""

    def __getitem__(self, row: int, /) -> Example: ...


class SftTask:
    """Cross-entropy over supervised tokens; see `Task`."""

    metric_names: tuple[str, ...] = ("loss",)
    shown: tuple[str, ...] = ("loss",)

    def __init__(self, model: Any, dataset: Examples, packs: Packs):
        self.model = model
        self.dataset = dataset
        self.packs = packs

    def layout(self, units: Sequence[int]) -> Layout:
        """The micro-batch of the given packs."""
        examples = [self.dataset[i] for unit in units for i in self.packs[unit]]
        return lay_out_samples([(example.input_ids, example.labels) for example in examples])

    def sources(self, units: Sequence[int]) -> list[str]:
        """Where the rows of the given packs come from, `file:row`."""
        return [self.dataset[i].source for unit in units for i in self.packs[unit]]

    def weight(self, batch: Layout) -> int:
        """What the loss is a mean over: supervised tokens."""
        return batch.num_targets

    def begin_step(self, batches: Sequence[Layout], world: World) -> None:
        """This loss needs nothing beforehand."""

    def loss(self, batch: Layout, denominator: float) -> tuple[Any, dict[str, float]]:
        """Negative log-likelihood.

        Args:
            batch: One micro-batch.
            denominator: Supervised tokens of the whole optimizer step, all micro-batches and ranks together.

        Returns:
            (float32 scalar to call backward on, {"loss": sum over this micro-batch}).
        """
        total = total_nll(self.model, batch)
        return total / denominator, {"loss": float(total)}


def make_tasks(ready: Ready) -> tuple[SftTask, Evaluation[Layout] | None]:
    """The training task and, with evaluation rows, the evaluation."""
    prepared, world = ready.prepared, ready.world
    task, held_out = SftTask(ready.model, prepared.train.rows, prepared.train.packs), prepared.eval
    if held_out is None:
        return task, None
    size = prepared.recipe.training.per_device_eval_batch_size
    batches = evaluation_batches(len(held_out.packs), size, world.rank, world.size)
    return task, Evaluation(SftTask(ready.model, held_out.rows, held_out.packs), batches)
