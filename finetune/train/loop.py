"""The training loop: read it top to bottom.

Built on our own loop and not on PaddleNLP's Trainer, whose loss averages per micro-batch and per rank instead of per
token, whose data order changes on resume after epoch 1, and whose checkpoints are pickles written in place
(docs/log.md). Everything a step depends on is a function of the step number: its rows, its learning rate and its
dropout, so that a resumed run needs weights, moments and the step number only.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.console import progress
from finetune.errors import TrainingError
from finetune.model.runtime import paddle as _bring_up
from finetune.rows.plan import Plan, Step
from finetune.train.optimizer import Optimizer
from finetune.train.processes.parallel import World
from finetune.train.task import Batch, Evaluation, Task

_bring_up()
import paddle

if TYPE_CHECKING:
    from finetune.recipe.schema import TrainingSection


_SHOW_CURSOR = b"\x1b[?25h"  # the live bar hides it
_STOPPING = b"\nStopping after this step; a checkpoint will be saved. Again: at once, unsaved.\n"
_NAMED_ROWS = 8


@dataclass
class Interval:
    """Sums since the last logged step."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    def add(self, metrics: dict[str, float], tokens: int, seconds: float) -> None:
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds
        for key, value in metrics.items():
            self.metrics[key] = self.metrics.get(key, 0.0) + value


@dataclass
class RunState:
    """What a checkpoint must hold beside weights and moments."""

    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    evals_without_gain: int = 0
    interval: Interval = field(default_factory=Interval)

    def forget_best(self) -> None:
        """Judge the next evaluation as if it were the first."""
        self.best_loss, self.best_step, self.evals_without_gain = None, None, 0


def train_loop(
    *,
    task: Task[Batch],
    evaluation: Evaluation[Batch] | None,
    plan: Plan,
    optimizer: Optimizer,
    learning_rate: Callable[[int], float],
    training: TrainingSection,
    world: World,
    state: RunState,
    log: Callable[[dict[str, Any]], None],
    save: Callable[[], None],
    rotate: Callable[[], None],
) -> str:
    """Run optimizer steps from `state.step` to the end of the plan.

    Args:
        task: Turns unit indices into a micro-batch and its loss.
        evaluation: The same over the evaluation rows, or None.
        plan: Which units make up each step of this rank.
        optimizer: Holds the trainable parameters.
        learning_rate: Rate of a 0-based step.
        state: Where to start; kept up to date for `save`.
        log: Takes one row of metrics.jsonl.
        save: Writes a checkpoint of `state.step`.
        rotate: Deletes older ones; called after a good step.

    Returns:
        "done", "early_stopping", or "interrupted" (a signal asked to stop, or a stream of rows ended with a fault).
        A checkpoint of the last step was saved, where one was done.

    Raises:
        TrainingError: the loss or a gradient is not finite; nothing was saved after the last good step.
    """
    total = plan.total_steps
    if _out_of_patience(state, training):  # the process ended between the last checkpoint and the final model
        return "early_stopping"
    task.model.train()
    with _stop_requests(world) as stop, progress(total, "train", unit="step", done=state.step) as bar:
        saved_at = state.step
        for step in plan.steps(state.step):
            if plan.may_fail and world.all_sum([float(step.failed)])[0]:
                if not step.failed:
                    plan.put_back()  # another rank's rows are wrong, so that this step is not made
                if saved_at < state.step:
                    save()
                return "interrupted"
            started = time.perf_counter()
            metrics, tokens = _step(task, step, optimizer, learning_rate, training, world)
            seconds = time.perf_counter() - started
            rotate()
            state.step += 1
            state.num_tokens += tokens
            state.seconds += seconds
            state.interval.add(metrics, tokens, seconds)
            last = state.step == total
            if state.step % training.logging_steps == 0 or last:
                row = _row(state, step, learning_rate, metrics)
                log(row)
                bar.update(**{name: row[name] for name in (*task.shown, "tokens_per_second")})
                state.interval = Interval()
            bar.advance(1)
            saved = False
            if evaluation is not None and (last or (training.eval_steps and state.step % training.eval_steps == 0)):
                improved = _evaluate_and_judge(evaluation, world, state, log)
                if improved and training.load_best_model_at_end:
                    save()
                    saved = True
                task.model.train()
            stopping = world.all_sum([float(stop.is_set())])[0] > 0
            out_of_patience = _out_of_patience(state, training)
            due = state.step % training.save_steps == 0
            if not saved and (due or stopping or out_of_patience or last):
                save()
                saved = True
            saved_at = state.step if saved else saved_at
            if out_of_patience:
                return "early_stopping"
            if stopping and not last:
                return "interrupted"
    return "done"


def _out_of_patience(state: RunState, training: TrainingSection) -> bool:
    """Whether enough evaluations in a row brought nothing."""
    patience = training.early_stopping_patience
    return patience is not None and state.evals_without_gain >= patience


def _step(
    task: Task[Batch],
    step: Step,
    optimizer: Optimizer,
    learning_rate: Callable[[int], float],
    training: TrainingSection,
    world: World,
) -> tuple[dict[str, float], int]:
    """One optimizer step. Returns metrics (means over the step, all ranks) and the tokens of all ranks."""
    units = [batch.tolist() for batch in step.batches if len(batch)]
    layouts = [task.layout(micro) for micro in units]
    counts = world.all_sum([sum(map(task.weight, layouts)), sum(layout.num_tokens for layout in layouts)])
    denominator, tokens = counts[0], int(counts[1])
    task.begin_step(layouts, world)
    sums: dict[str, float] = {}
    odd: list[list[int]] = []
    for index, layout in enumerate(layouts):
        paddle.seed(step_seed(training.seed, step.number, index, world.rank))
        loss, parts = task.loss(layout, denominator)
        loss.backward()
        if not math.isfinite(parts["loss"]):
            odd.append(units[index])
        for key, value in parts.items():
            sums[key] = sums.get(key, 0.0) + value
    world.sum_gradients(optimizer.parameters)
    # Named by the task, not by what came up here: every rank must send the same list.
    totals = world.all_sum([sums.get(name, 0.0) for name in task.metric_names])
    metrics = {name: total / denominator for name, total in zip(task.metric_names, totals)}
    metrics["grad_norm"] = math.nan
    if math.isfinite(metrics["loss"]):
        metrics["grad_norm"] = optimizer.step(learning_rate(step.number), training.max_grad_norm)
    if not math.isfinite(metrics["grad_norm"]):
        rows = _rows_to_look_at(task, units, odd, world)
        raise TrainingError(
            f"the loss is {metrics['loss']} and the gradient norm {metrics['grad_norm']} at step {step.number + 1}, "
            f"on rows {', '.join(rows[:_NAMED_ROWS])}{' ...' if len(rows) > _NAMED_ROWS else ''}",
            fix="Lower training.learning_rate or raise training.warmup_steps, and look at these rows with "
            "`finetune preview`. Nothing was saved since; earlier checkpoints are as they were.",
        )
    return metrics, tokens


def _rows_to_look_at(task: Task[Batch], units: list[list[int]], odd: list[list[int]], world: World) -> list[str]:
    """Where the rows of micro-batches come from that gave a loss that is not finite; of all where every one did not.

    Args:
        units: The step's micro-batches of this rank.
        odd: Those whose own loss is not finite.
    """
    named = odd if world.all_sum([float(len(odd))])[0] else units
    rows = [source for micro in named for source in task.sources(micro)]
    # One more than are shown of each rank, so that the message tells that there are more.
    return [source for found in world.gather(rows[: _NAMED_ROWS + 1]) for source in found]


def step_seed(*parts: int) -> int:
    """A well-mixed 31-bit seed from (seed, step, micro-batch, rank)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0] & 0x7FFFFFFF)


def _row(
    state: RunState, step: Step, learning_rate: Callable[[int], float], metrics: dict[str, float]
) -> dict[str, Any]:
    interval = state.interval
    row: dict[str, Any] = {"step": state.step, "epoch": step.epoch_end}
    row |= {key: value / interval.steps for key, value in interval.metrics.items() if key != "grad_norm"}
    row["learning_rate"] = learning_rate(state.step - 1)
    row["grad_norm"] = metrics["grad_norm"]
    row["num_tokens"] = state.num_tokens
    row["tokens_per_second"] = interval.tokens / max(interval.seconds, 1e-9)
    row["seconds"] = state.seconds
    return row


def _evaluate_and_judge(
    evaluation: Evaluation[Batch], world: World, state: RunState, log: Callable[[dict[str, Any]], None]
) -> bool:
    """Evaluate, log, and say whether this is the best loss so far."""
    metrics = evaluate(evaluation, world, state.step)
    log({"step": state.step} | metrics)
    loss = metrics["eval_loss"]
    if math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss):
        state.best_loss, state.best_step, state.evals_without_gain = loss, state.step, 0
        return True
    state.evals_without_gain += 1
    return False


def evaluate(evaluation: Evaluation[Batch], world: World, step: int) -> dict[str, float]:
    """Means over the whole evaluation set, each name prefixed by `eval_`; a line of them stays on the screen."""
    task = evaluation.task
    task.model.eval()
    sums: dict[str, float] = {}
    weight = 0.0
    with paddle.no_grad(), progress(len(evaluation.batches), "evaluate", unit="batch", stays=True) as bar:
        for batch in evaluation.batches:
            layout = task.layout(batch)
            weight += task.weight(layout)
            for key, value in task.loss(layout, 1.0)[1].items():
                sums[key] = sums.get(key, 0.0) + value
            bar.advance(1)
        weight, *totals = world.all_sum([weight] + [sums.get(name, 0.0) for name in task.metric_names])
        metrics = {f"eval_{name}": total / weight for name, total in zip(task.metric_names, totals)}
        bar.update(step=step, **{f"eval_{name}": metrics[f"eval_{name}"] for name in task.shown})
    return metrics


@contextmanager
def _stop_requests(world: World) -> Iterator[threading.Event]:
    """SIGINT and SIGTERM ask for a stop after the current step; a second one ends the process at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def ask(signum: int, frame: Any) -> None:
        if event.is_set():
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        event.set()
        if world.is_main:  # past rich, which may be in the middle of a line
            cursor = _SHOW_CURSOR if os.isatty(2) else b""
            with suppress(OSError):  # the terminal may be what went away
                os.write(2, cursor + _STOPPING)

    previous = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
