"""What differs by method of training, a row each. Who must tell methods apart reads it here; no paddle, no numpy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowKind:
    """What one row of data is.

    Attributes:
        name, plural: As messages call it.
        sides: Token sequences of a row: 1, or 2 that share a prompt.
    """

    name: str
    plural: str
    sides: int


CONVERSATION = RowKind("conversation", "conversations", sides=1)
PREFERENCE = RowKind("preference", "preferences", sides=2)


@dataclass(frozen=True)
class Method:
    """One method of training.

    Attributes:
        rows: What it trains on.
        title: What reports call it.
        tasks: The module whose `make_tasks` builds its tasks (`finetune.train.task.TaskMaker`): a name, so that this
            table loads without paddle.
        section: The recipe section that only this method reads.
        train_on: The values of `data.train_on` that mean something to it.
    """

    rows: RowKind
    title: str
    tasks: str
    section: str | None = None
    train_on: tuple[str, ...] = ("responses", "last_response", "all")


METHODS: dict[str, Method] = {
    "sft": Method(
        rows=CONVERSATION,
        title="supervised fine-tuning",
        tasks="finetune.train.sft",
    ),
    "dpo": Method(
        rows=PREFERENCE,
        title="preference optimization (DPO)",
        tasks="finetune.train.preference.task",
        section="dpo",
        train_on=("responses",),
    ),
}


def methods_on(rows: RowKind) -> list[str]:
    """The methods that train on rows of this kind."""
    return [name for name, method in METHODS.items() if method.rows == rows]
