"""What the training loop knows of a method: its task, and the steps that the task's units are taken in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from finetune.train.prepare import Prepared
    from finetune.train.processes.parallel import World


class MicroBatch(Protocol):
    """What one forward pass is made of."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the model computes."""
        ...


class Packs(Protocol):
    """The rows of each unit."""

    def __getitem__(self, unit: int, /) -> list[int]: ...


Batch = TypeVar("Batch", bound=MicroBatch)


class Task(Protocol[Batch]):
    """A loss over rows. Its unit is a pack: the rows of one sequence; without packing every pack holds one row.

    Attributes:
        model: What is trained.
        metric_names: The sums that `loss` gives, `loss` itself among them.
        shown: Those of them that stand beside the progress bar.
    """

    model: Any
    metric_names: tuple[str, ...]
    shown: tuple[str, ...]

    def layout(self, units: Sequence[int]) -> Batch:
        """The micro-batch of the given units."""
        ...

    def sources(self, units: Sequence[int]) -> list[str]:
        """Where the rows of the given units come from, `file:row`."""
        ...

    def weight(self, batch: Batch) -> int:
        """What the loss is a mean over: supervised tokens, or pairs."""
        ...

    def begin_step(self, batches: Sequence[Batch], world: World) -> None:
        """Called with the micro-batches of a step before their losses are computed."""
        ...

    def loss(self, batch: Batch, denominator: float) -> tuple[Any, dict[str, float]]:
        """The loss of a micro-batch.

        Args:
            batch: One micro-batch.
            denominator: The weight of the whole optimizer step, all micro-batches and ranks together, so that the
                gradients of the micro-batches add up to the gradient of the mean.

        Returns:
            (scalar to call backward on, sums over this micro-batch by metric name).
        """
        ...


@dataclass(frozen=True)
class Evaluation(Generic[Batch]):
    """What is evaluated on: the task over the evaluation rows, and the units of each micro-batch of this rank."""

    task: Task[Batch]
    batches: list[list[int]]


def evaluation_batches(units: int, size: int, rank: int, world_size: int) -> list[list[int]]:
    """The units of each evaluation micro-batch of a rank: every world_size-th unit, `size` at a time.

    >>> evaluation_batches(7, 2, rank=1, world_size=2)
    [[1, 3], [5]]
    """
    own = list(range(rank, units, world_size))
    return [own[at : at + size] for at in range(0, len(own), size)]


@dataclass(frozen=True)
class Ready:
    """A run whose model is there: what tasks are made from.

    Attributes:
        prepared: Data and plan.
        model: What is trained, as it is when training begins or goes on.
        dtype: Of its weights.
        world: This process among its peers.
        resumed: Whether the model is a checkpoint's, and so no longer the one before training.
    """

    prepared: Prepared
    model: Any
    dtype: str
    world: World
    resumed: bool


# What a method's module has under the name `make_tasks`, see `finetune.methods`: the training task and, with evaluation
# rows, the evaluation.
TaskMaker = Callable[[Ready], tuple[Task[Any], Evaluation[Any] | None]]
