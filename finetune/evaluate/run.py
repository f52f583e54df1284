"""The `evaluate` command: benchmarks of a model, as a table on stdout and, when asked, all figures as JSON."""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.console import say
from finetune.errors import ArgumentError, FinetuneError, did_you_mean
from finetune.evaluate.benchmarks import BENCHMARKS, Benchmark, find_benchmark
from finetune.infer.open import AS_STORED, Held, open_model
from finetune.infer.partial import output_file
from finetune.infer.sampling import DEFAULT_BATCH_SIZE
from finetune.model.resolve import resolve_model


def evaluate(
    model: str,
    *,
    tasks: list[str],
    limit: int | None = None,
    num_fewshot: int | None = None,
    output: Path | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    raw: bool = False,
    include: Path | None = None,
    allow_code: bool = False,
    held: Held = AS_STORED,
) -> None:
    """Run benchmarks and print one line for each as soon as it is done.

    Args:
        model: Any MODEL.
        tasks: Names of `BENCHMARKS`, or of any task of lm-evaluation-harness.
        limit: Only the first so many questions of each task (of each subject, where a task has subjects).
        num_fewshot: Examples before each question; the benchmark's own number when None.
        output: JSON file, replaced after each task, so that what is done survives an interruption.
        raw: Ask in plain text, without the chat template, as for base models.
        include: Folder of tasks in the harness's YAML form; they may name Python code, which is run.
        allow_code: Run programs that the model writes (HumanEval, MBPP).
        held: How the weights are held in memory.

    Raises:
        UserError: a task, an argument or the model is wrong.
        FinetuneError: the harness is not installed, or a benchmark's questions cannot be had.
    """
    _check_harness()
    source = resolve_model(model)
    with _quiet():
        manager = _manager(tasks, include)
        chosen = {name: _checked(name, manager, allow_code) for name in tasks}
        from finetune.evaluate.harness import EvaluatedModel

        opened = open_model(source, held)
        if not raw and opened.tokenizer.chat_template is None:
            raise ArgumentError(f"{model} has no chat template", where="MODEL", fix="Add --raw to ask in plain text.")
        judged = EvaluatedModel(opened, batch_size)
        record = _record(model, limit, raw)
        for name, benchmark in chosen.items():
            shots = benchmark.num_fewshot if num_fewshot is None else num_fewshot
            record["tasks"][name] = _run(judged, benchmark, manager, limit, shots, raw, allow_code)
            if output is not None:
                with output_file(output) as file:
                    json.dump(record, file, indent=2, ensure_ascii=False, default=str)
            if len(record["tasks"]) == 1:
                print(_line("task", "metric", "value", "error", "questions"))
            _print_lines(name, benchmark, record["tasks"][name])
    if output is not None:
        say(f"All figures: {output}")


def _check_harness() -> None:
    try:
        importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise ArgumentError(
            "lm-evaluation-harness is not installed",
            where="finetune evaluate",
            fix="Install it: pip install 'paddle-finetune[evaluate]'.",
        ) from error


def _manager(names: list[str], include: Path | None):
    """The harness's index of tasks: of the folders that hold these, or of all, which takes seconds."""
    if include is not None and not include.is_dir():
        raise ArgumentError(f"{include} is not a folder", where="--include", fix="Name a folder of task YAML files.")
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = [root / benchmark.folder for benchmark in map(find_benchmark, names) if benchmark.folder]
    few = lm_eval.tasks.TaskManager(
        include_path=[*folders, *([include] if include else [])] or None, include_defaults=False
    )
    if all(find_benchmark(name).task in few.all_tasks for name in names):
        return few
    return lm_eval.tasks.TaskManager(include_path=include)


def _checked(name: str, manager, allow_code: bool) -> Benchmark:
    benchmark = find_benchmark(name)
    if benchmark.task not in manager.all_tasks:
        known = sorted({*BENCHMARKS, *manager.all_tasks})
        fix = did_you_mean(name, known, f"The page's are {', '.join(BENCHMARKS)}.")
        raise ArgumentError(f"{name!r} is not a task", where="--tasks", fix=fix)
    if not allow_code and _runs_code(benchmark.task, manager):
        raise ArgumentError(
            f"{name} runs the programs that the model writes, on this machine and with your rights",
            where="--tasks",
            fix="Add --allow-code where that is acceptable, such as in a container.",
        )
    return benchmark


def _runs_code(task: str, manager) -> bool:
    """Whether a task, or one of those that a group or a tag stands for, is marked as running what the model writes."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index.get(task)
    if entry is None:
        return False
    config = load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else entry.cfg or {}
    members = entry.tags if entry.kind.name == "TAG" else config.get("task")
    return bool(config.get("unsafe_code")) or _any_runs_code(members, manager)


def _any_runs_code(members: Any, manager) -> bool:
    """The same of a group's `task` list, which may hold names, tasks with settings and groups written in place."""
    for member in members if isinstance(members, (list, set)) else ():
        settings = member if isinstance(member, dict) else {"task": member}
        inside = settings.get("task")
        names = [name for name in (inside, settings.get("group")) if isinstance(name, str)]
        if settings.get("unsafe_code") or any(_runs_code(name, manager) for name in names):
            return True
        if _any_runs_code(inside, manager):
            return True
    return False


def _run(
    judged, benchmark: Benchmark, manager, limit: int | None, shots: int | None, raw: bool, allow_code: bool
) -> dict[str, Any]:
    from datasets import disable_progress_bars
    from lm_eval import evaluator

    disable_progress_bars()
    evaluator.get_git_commit_hash = lambda: None  # runs git in the user's folder, whose complaints would be shown
    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what the metric itself asks for
    try:
        with redirect_stdout(io.StringIO()):  # tasks print; stdout is for results
            results = evaluator.simple_evaluate(
                judged,
                tasks=[benchmark.task],
                num_fewshot=shots,
                limit=limit,
                task_manager=manager,
                apply_chat_template=not raw,
                fewshot_as_multiturn=not raw,
                log_samples=False,
                bootstrap_iters=1000,
                confirm_run_unsafe_code=allow_code,
            )
    except (OSError, ImportError) as error:  # a dataset, a metric or a package that is not here and cannot be fetched
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FinetuneError(
            f"what task {benchmark.task} needs cannot be had: {first[:300]}",
            where="--tasks",
            fix="Check the way to the hub (finetune doctor --network, HF_ENDPOINT for a mirror), or fill the cache "
            "(HF_HOME) where there is one.",
        ) from error
    questions = sum(count["effective"] for count in results["n-samples"].values())
    return {"questions": questions, "results": results["results"], "groups": results.get("groups", {})} | {
        key: results[key] for key in ("versions", "n-shot", "n-samples", "higher_is_better")
    }


def _record(model: str, limit: int | None, raw: bool) -> dict[str, Any]:
    packages = ("lm_eval", "paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "datasets")
    return {
        "model": model,
        "limit": limit,
        "chat_template": not raw,
        "versions": {"paddle-finetune": __version__} | {name: _version(name) for name in packages if _version(name)},
        "tasks": {},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _headline(task: str, wanted: str, result: dict[str, Any]) -> tuple[str, float, float | None] | None:
    """The figure that stands for a task: its name, value, and standard error where there is one.

    None where it has no figure of its own: a tag, or a group that does not sum its tasks up.
    """
    figures = result["results"].get(task, {})
    named = [key for key, value in figures.items() if "," in key and "_stderr," not in key and _is_number(value)]
    if not named:
        return None
    key = wanted if wanted in named else named[0]
    metric, _, filtered = key.partition(",")
    error = figures.get(f"{metric}_stderr,{filtered}")
    label = metric if filtered in ("none", "create_test") else f"{metric} ({filtered})"
    return label, figures[key], error if _is_number(error) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _line(task: str, label: str, value: str, error: str, questions: str) -> str:
    """A line of 79 columns; names that are wider than theirs stand above the figures.

    >>> len(_line("gsm8k", "exact_match (flexible-extract)", "0.3510", "0.0131", "1,319"))
    79
    """
    names = f"{task:<18}  {label:<30}"
    above, names = (f"{names.rstrip()}\n", "") if len(names) > 50 else ("", names)
    return f"{above}{names:<50}  {value:>7}  {error:>7}  {questions:>9}"


def _print_lines(name: str, benchmark: Benchmark, result: dict[str, Any]) -> None:
    """A line for the benchmark, or for each of its tasks where it has no figure of its own."""
    lines = [(name, _headline(benchmark.task, benchmark.metric, result), result["questions"])]
    if lines[0][1] is None:
        lines = [(task, _headline(task, "", result), count["effective"]) for task, count in result["n-samples"].items()]
    for task, figure, questions in lines:
        label, value, error = figure or ("no figure", float("nan"), None)
        shown = "" if error is None else f"{error:.4f}"
        print(_line(task, label, f"{value:.4f}", shown, f"{questions:,}"), flush=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness and what it uses log a lot; what matters is said by the command."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
