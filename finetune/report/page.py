"""report.html: a run on one page that needs nothing but a browser, not even a network."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from finetune.console import format_number, format_seconds
from finetune.errors import DataError
from finetune.files import replace_file
from finetune.methods import METHODS
from finetune.report import headline
from finetune.report.charts import Chart, draw, series
from finetune.report.metrics import read_metrics

MAX_SAMPLES = 24
MAX_SAMPLE_CHARS = 1200
MAX_FILES = 100
MAX_RECIPE_CHARS = 40_000

VARIANTS = {"lora": "LoRA", "rslora": "rsLoRA", "lora_plus": "LoRA+", "pissa": "PiSSA", "dora": "DoRA"}

COUNT_NAMES = {"unsupervised": "without a supervised token", "longest": "tokens of the longest row"}
ALWAYS_COUNTED = ("read", "kept", "truncated", "dropped")

_CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n?", re.DOTALL)
_ASKING, _DEFAULT_SYSTEM = "<|im_start|>assistant", "You are a helpful assistant."
_YAML_LINE = re.compile(r"^(\s*(?:- )?)([\w.-]+:)(.*?)(\s#.*)?$")


@dataclass
class Run:
    """What a run's folder holds; parts that are missing are empty, and `notes` says what could not be read."""

    folder: Path
    recipe_text: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Mapping[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write_report(run_folder: str | Path) -> Path:
    """Write report.html of a run, finished or not, from the other files in its folder.

    A file that is missing leaves its part of the page out. One that cannot be read does too, and the page says so: a
    finished run must not fail for its report.

    Args:
        run_folder: Holds metrics.jsonl, recipe.yaml, manifest.json, and samples.json: a list of objects with `prompt`,
            `after`, and, if known, `plain` (the prompt without tags), `reference` and `before`.

    Returns:
        The path of the page, replaced whole.
    """
    page = render_report(read_run(Path(run_folder)))
    path = Path(run_folder) / "report.html"
    replace_file(path, page)
    return path


def read_run(folder: Path) -> Run:
    """Read what a run's folder holds."""
    run = Run(folder=folder)
    try:
        run.rows = [row for row in read_metrics(folder / "metrics.jsonl") if isinstance(row.get("step"), int)]
    except DataError as error:
        run.notes.append(f"No curves: {error}")
    if (folder / "recipe.yaml").exists():
        run.recipe_text = (folder / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
        try:
            recipe = yaml.safe_load(run.recipe_text)
            run.recipe = recipe if isinstance(recipe, dict) else {}
        except yaml.YAMLError:
            run.notes.append("recipe.yaml is not valid YAML.")
    manifest = _read_json(run, "manifest.json")
    run.manifest = manifest if isinstance(manifest, dict) else {}
    samples = _read_json(run, "samples.json")
    run.samples = [sample for sample in samples if isinstance(sample, dict)] if isinstance(samples, list) else []
    return run


def render_report(run: Run) -> str:
    """Write a run as an HTML page."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["json"] = lambda value: json.dumps(value, separators=(",", ":"))
    files = resources.files("finetune.report")
    template = environment.from_string((files / "report.html.j2").read_text(encoding="utf-8"))
    charts = _charts(run.rows)
    return template.render(
        css=Markup((files / "report.css").read_text(encoding="utf-8")),
        js=Markup((files / "report.js").read_text(encoding="utf-8")),
        name=_name(run),
        title=_title(run),
        what=_what(run),
        went=headline.sentences(run.rows),
        status=_status(run),
        tiles=list(_tiles(run)),
        charts=charts,
        smoothed=any(line.kind == "raw" for chart in charts for line in chart.lines),
        averaged=headline.speaks_of_tenths(run.rows),
        samples=[_sample(sample) for sample in run.samples[:MAX_SAMPLES]],
        samples_left=max(0, len(run.samples) - MAX_SAMPLES),
        matches=_matches(run.samples),
        data=_data(run.manifest),
        throughput=list(_throughput(run)),
        recipe=[_yaml_line(line) for line in run.recipe_text[:MAX_RECIPE_CHARS].splitlines()],
        recipe_cut=len(run.recipe_text) > MAX_RECIPE_CHARS,
        provenance=[*_history(run.manifest), *_provenance(run.manifest)],
        notes=run.notes,
    )


def _read_json(run: Run, name: str) -> Any:
    path = run.folder / name
    if not path.exists():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        run.notes.append(f"{name} is not valid JSON.")
        return None


def _get(mapping: Mapping[str, Any], *keys: str) -> Any:
    """Look up nested keys; None when one is missing."""
    value: Any = mapping
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _name(run: Run) -> str:
    return run.folder.resolve().name


def _method_title(run: Run) -> str:
    """What was done, also in a folder that another version wrote with a method that is not known here."""
    method = METHODS.get(str(run.manifest.get("method") or run.recipe.get("method")))
    return method.title if method else "training"


def _model(run: Run) -> str:
    return str(_get(run.manifest, "base_model", "path") or _get(run.recipe, "model", "path") or "")


def _title(run: Run) -> str:
    model = _model(run).rstrip("/").split("/")[-1]
    return f"{model}: {_method_title(run)}" if model else _name(run)


def _what(run: Run) -> str:
    """Say in a sentence or two what was trained, on what, and for how long."""
    if not (run.recipe or run.manifest or run.rows):
        return "This folder holds no record of a run yet."
    text = _method_title(run)
    text = text[0].upper() + text[1:] + f" of {_model(run) or 'a model'}"
    lora = run.recipe.get("lora")
    if isinstance(lora, dict):
        text += f" with {VARIANTS.get(lora.get('variant', 'lora'), 'LoRA')} of rank {lora.get('rank')}"
    elif run.recipe:
        text += ", all weights,"
    kept = _get(run.manifest, "data", "train", "kept")
    files = [Path(str(entry.get("path"))).name for entry in _files(run.manifest, "train")]
    if files:
        rows = f"{kept:,} rows of " if isinstance(kept, int) else ""
        text += f" on {rows}{files[0] if len(files) == 1 else f'{len(files)} files'}"
    text += "."
    if run.rows:
        text += f" {_count(run.rows[-1]['step'], 'optimizer step')}"
        seconds = _training_seconds(run)
        text += f" in {_duration(seconds)}" if seconds is not None else ""
        device = run.manifest.get("device")
        text += f" on {'the CPU' if device == 'cpu' else device}" if device else ""
        text += "."
    return text.replace(",.", ".")


def _status(run: Run) -> tuple[str, str]:
    """Give the state of the run, and its CSS class."""
    done, planned = run.rows[-1]["step"] if run.rows else 0, _get(run.manifest, "steps", "planned")
    of = f" at step {done:,}" + (f" of {planned:,}" if isinstance(planned, int) else "")
    status = run.manifest.get("status")
    if status == "finished":
        return "finished", "good"
    if status == "stopped":
        return f"stopped{of}", "bad"
    return (f"not finished{of}" if run.rows else "no steps yet"), "open"


def _tiles(run: Run) -> Iterator[tuple[str, str, str]]:
    """Give the headline figures as (name, value, remark)."""
    yield from headline.figures(run.rows)
    matches = _matches(run.samples)
    if matches:
        remark = f"before: {matches['before']}" if matches["before"] is not None else "equal to the reference"
        yield "Exact answers", f"{matches['after']} of {matches['of']}", remark
    tokens = [row["num_tokens"] for row in run.rows if isinstance(row.get("num_tokens"), int)]
    if tokens:
        short, full = _short(tokens[-1]), f"{tokens[-1]:,}"
        yield "Tokens seen", short, "in all steps" if short == full else full
    speeds = _speeds(run)
    if speeds:
        yield "Throughput", _short(statistics.median(speeds)), "tokens a second, median"
    seconds = _training_seconds(run)
    if seconds is not None:
        yield "Time", _duration(seconds), "of training steps"


def _charts(rows: list[dict[str, Any]]) -> list[Chart]:
    def pick(key: str, name: str, color: str = "a", smooth: bool = True) -> Any:
        return series(rows, key, name, color, smooth=smooth)

    def held_out(key: str) -> Any:
        return series(rows, key, "evaluation", "b", dots=True)

    logps = [pick("logps/chosen", "chosen"), pick("logps/rejected", "rejected", "b")]
    rewards = [pick("rewards/chosen", "chosen"), pick("rewards/rejected", "rejected", "b")]
    margins = [pick("rewards/margins", "training"), held_out("eval_rewards/margins")]
    accuracies = [pick("rewards/accuracies", "training"), held_out("eval_rewards/accuracies")]
    charts = [
        draw("Loss", [pick("loss", "training"), held_out("eval_loss")], size="full"),
        draw("Rewards", rewards, size="half"),
        draw("Reward margin", margins, size="half"),
        draw("Share of pairs ranked right", accuracies, bounds=(0.0, 1.0), size="half"),
        draw("Log-probability of the answers", logps, size="half"),
        draw("Learning rate", [pick("learning_rate", "learning rate", "c", smooth=False)], from_zero=True),
        draw("Gradient norm", [pick("grad_norm", "gradient norm", "c")], from_zero=True, log_if_wide=True),
        draw("Tokens a second", [pick("tokens_per_second", "tokens/s", "c")], from_zero=True),
    ]
    return [chart for chart in charts if chart is not None]


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    reference = sample.get("reference")
    answers = []
    for key in ("before", "after"):
        if sample.get(key) is not None:
            right = None if reference is None else str(sample[key]).strip() == str(reference).strip()
            answers.append({"name": key, "text": _clip(sample[key]), "right": right})
    prompt = sample.get("prompt", "")
    turns = _turns(prompt, sample.get("plain", prompt))
    return {
        "turns": [(role, _clip(text)) for role, text in turns],
        "prompt": _clip(prompt) if isinstance(prompt, str) else None,
        "reference": None if reference is None else _clip(reference),
        "answers": answers,
    }


def _turns(prompt: Any, plain: Any) -> list[tuple[str, str]]:
    """What a prompt says, as (role, text), without tags: messages, or a text of ChatML. Else its plain text.

    Left out are the system prompt that Qwen2's template puts in and the header that asks for the answer, and the role
    where there is one turn.
    """
    if isinstance(prompt, list):
        messages = [message for message in prompt if isinstance(message, dict)]
        turns = [(str(message.get("role")), str(message.get("content"))) for message in messages]
    else:
        found = _CHATML.findall(str(prompt))
        if not found or _CHATML.sub("", str(prompt)).strip() not in ("", _ASKING):
            return [("", str(plain))]
        turns = [turn for turn in found if turn != ("system", _DEFAULT_SYSTEM)]
    return [("", turns[0][1])] if len(turns) == 1 and turns[0][0] == "user" else turns


def _matches(samples: list[Mapping[str, Any]]) -> dict[str, int | None] | None:
    """Count the samples whose answer is exactly the reference; None when there are none to count."""
    known = [sample for sample in samples if sample.get("reference") is not None and sample.get("after") is not None]
    counts = {
        key: sum(str(sample.get(key)).strip() == str(sample["reference"]).strip() for sample in known)
        for key in ("before", "after")
    }
    if not any(counts.values()):
        return None
    before = counts["before"] if all(sample.get("before") is not None for sample in known) else None
    return {"before": before, "after": counts["after"], "of": len(known)}


def _files(manifest: Mapping[str, Any], split: str) -> list[Mapping[str, Any]]:
    files = _get(manifest, "data", split, "files")
    return [entry for entry in files if isinstance(entry, dict)] if isinstance(files, list) else []


def _data(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give for each split its files and counts."""
    splits = []
    data = manifest.get("data")
    for split, report in data.items() if isinstance(data, dict) else ():
        if not isinstance(report, dict):
            continue
        files = _files(manifest, split)
        counts = [
            (COUNT_NAMES.get(key, _words(key)), f"{value:,}")
            for key, value in report.items()
            if isinstance(value, int) and (value or key in ALWAYS_COUNTED)
        ]
        rows = [(str(entry.get("path")), entry.get("rows"), str(entry.get("sha256") or "")) for entry in files]
        splits.append(
            {
                "name": {"train": "Training", "eval": "Evaluation"}.get(split, split),
                "files": [(path, f"{n:,}" if isinstance(n, int) else "", sha) for path, n, sha in rows[:MAX_FILES]],
                "files_left": max(0, len(rows) - MAX_FILES),
                "counts": counts,
                "notes": [str(note) for note in report.get("notes") or ()],
            }
        )
    return splits


def _speeds(run: Run) -> list[float]:
    return [row["tokens_per_second"] for row in run.rows if isinstance(row.get("tokens_per_second"), (int, float))]


def _training_seconds(run: Run) -> float | None:
    """Give the seconds spent in training steps, over all sessions of a resumed run."""
    return max((row["seconds"] for row in run.rows if isinstance(row.get("seconds"), (int, float))), default=None)


def _throughput(run: Run) -> Iterator[tuple[str, str]]:
    speeds = _speeds(run)
    if speeds:
        tenth, median, ninetieth = np.percentile(speeds, [10, 50, 90])
        yield "Tokens a second", f"{format_number(median)} (median)"
        yield "Four steps in five lie between", f"{format_number(tenth)} and {format_number(ninetieth)}"
    timed = [row for row in run.rows if isinstance(row.get("seconds"), (int, float)) and "loss" in row]
    seconds = run.manifest.get("seconds")
    if len(timed) > 1 and timed[-1]["seconds"] > timed[0]["seconds"]:
        per_step = (timed[-1]["seconds"] - timed[0]["seconds"]) / (timed[-1]["step"] - timed[0]["step"] or 1)
        yield "Seconds a step", format_number(per_step)
    if isinstance(seconds, (int, float)):
        resumed = (_training_seconds(run) or 0) > seconds
        yield "Start to end" + (" of the last session" if resumed else ""), _duration(seconds)
    for key, value in (_get(run.manifest, "tokens") or {}).items():
        if key == "seen":  # among the figures at the top
            continue
        yield f"Tokens, {_words(key)}", f"{value:,}" if isinstance(value, int) else str(value)


def _history(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """List what changed between the sessions of a run that was gone on with."""
    history = manifest.get("history")
    for entry in history if isinstance(history, list) else ():
        changes = entry.get("changes") if isinstance(entry, dict) else None
        if not isinstance(changes, dict):
            continue
        said = [
            f"{key} {_plain(pair[0])} \u2192 {_plain(pair[1])}"
            if isinstance(pair, list) and len(pair) == 2 and not any(isinstance(value, (list, dict)) for value in pair)
            else str(key)
            for key, pair in changes.items()
        ]
        yield f"changed after step {_plain(entry.get('after_step'))}", ", ".join(said)


def _provenance(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """List the rest of the manifest, nested keys joined."""
    for key, value in manifest.items():
        if key in ("data", "tokens", "status", "steps", "method", "seconds", "history") or value in (None, {}, []):
            continue
        if key == "command" and isinstance(value, list):
            yield "command", shlex.join(str(word) for word in value)
        elif isinstance(value, dict):
            for name, item in value.items():
                yield (name if key == "versions" else f"{_words(key)}, {_words(name)}"), _plain(item)
        else:
            yield _words(key), _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00", value):
        return datetime.fromisoformat(value).strftime("%d %B %Y, %H:%M:%S UTC").lstrip("0")
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _yaml_line(line: str) -> tuple[str, str, str, str]:
    """Cut a line of YAML into indent, key, rest and comment, for its colours."""
    match = _YAML_LINE.match(line)
    return tuple(part or "" for part in match.groups()) if match else ("", "", line, "")  # type: ignore[return-value]


def _clip(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= MAX_SAMPLE_CHARS:
        return text
    return f"{text[:MAX_SAMPLE_CHARS]} … ({len(text) - MAX_SAMPLE_CHARS:,} more characters)"


def _words(key: str) -> str:
    return str(key).replace("_", " ").replace("num ", "")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    return f"{format_number(seconds)} s" if seconds < 60 else format_seconds(seconds)


def _short(number: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{number:,.0f}"
