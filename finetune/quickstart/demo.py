"""`make demo`: the main job from nothing to a tuned, exported, preference-trained model, with counted results.

Everything past the random weights is done by the commands a user types; each is shown as it runs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from finetune.chat.folder import TOKENIZER_FILES
from finetune.errors import FinetuneError
from finetune.quickstart import base, tasks
from finetune.quickstart.tasks import DATA, Question

OUTPUT = Path("outputs/quickstart")
HELD_OUT = Path("data/quickstart/heldout.jsonl")
LOG = OUTPUT / "log.txt"
MAX_NEW_TOKENS = 64
SAMPLES = 3
LOG_LINES_SHOWN = 30

# What the run has to show, or it fails.
MOST_BEFORE = 0.1
LEAST_AFTER = 0.8
LEAST_POLICY = 0.8
MOST_LOST = 0.05


class DemoError(FinetuneError):
    """A stage failed, or did not improve what it had to."""


class Stages:
    """Runs commands, times stages and keeps what they report, in order."""

    def __init__(self, console: Console):
        self.console = console
        self.results: dict[str, dict] = {}

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[dict]:
        """Time a block; the dictionary it gets is the stage's entry in summary.json."""
        self.console.print(f"\n[bold]{title}[/bold]")
        started = time.monotonic()
        result: dict[str, Any] = {}
        yield result
        result["seconds"] = round(time.monotonic() - started, 1)
        self.results[name] = result

    def finetune(self, *arguments: str) -> None:
        """Run `finetune ARGUMENTS` with its output in the log; on a terminal its progress bars are shown too."""
        command = f"finetune {' '.join(arguments)}"
        self.console.print(shown_command(command, self.console.width), style="cyan", highlight=False, soft_wrap=True)
        with open(LOG, "a", encoding="utf-8") as log:
            log.write(f"$ {command}\n")
            log.flush()
            done = subprocess.run(
                [sys.executable, "-m", "finetune", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=None if sys.stderr.isatty() else log,
            )
        if done.returncode:
            tail = "\n".join(LOG.read_text("utf-8").splitlines()[-LOG_LINES_SHOWN:])
            raise DemoError(f"`{command}` ended with exit code {done.returncode}:\n{tail}", where=str(LOG))


# -- stages ----------------------------------------------------------------------------------------------------------


def build_base(stages: Stages) -> None:
    """Tokenizer and random weights here, then pretraining by `finetune train`; leaves outputs/quickstart/base."""
    countries = tasks.load_countries()
    texts = tasks.pretraining_texts(countries, tasks.load_prose())
    tuned, _ = tasks.split_countries(countries)
    prompts = [question.prompt for question in tasks.all_questions(tuned)]
    with stages.stage("pretrain", "1. A base model: its own tokenizer, random Qwen2 weights, pretraining on text"):
        tasks.write_rows(OUTPUT / "texts.jsonl", tasks.text_rows(texts))
        tokenizer = base.train_tokenizer([*texts, *prompts])
        base.write_model(OUTPUT / "random", tokenizer, tasks.SEED)
        stages.finetune("train", "recipes/quickstart-pretrain_sft_full.yaml")
        ignored = shutil.ignore_patterns(*TOKENIZER_FILES)
        shutil.copytree(OUTPUT / "pretrain" / "final", OUTPUT / "base", ignore=ignored)
        base.save_tokenizer(tokenizer, OUTPUT / "base", base.CHATML)


def answer(stages: Stages, model: str, questions: Sequence[Question]) -> list[str]:
    """The model's answers to the held-out questions, by `finetune generate`."""
    output = OUTPUT / "answers" / f"{model}.jsonl"
    stages.finetune(
        *("generate", str(OUTPUT / model), "--input", str(HELD_OUT), "--output", str(output)),
        *("--max-new-tokens", str(MAX_NEW_TOKENS), "--batch-size", "32"),
    )
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    if len(rows) != len(questions):
        raise DemoError(f"{len(rows)} answers to {len(questions)} questions", where=str(output))
    return [row["response"] for row in rows]


def tune(stages: Stages, name: str, title: str, questions: Sequence[Question], before: Sequence[str]) -> list[str]:
    """SFT by the recipe `quickstart_{name}` and the answers after it."""
    with stages.stage(name, title) as result:
        stages.finetune("train", f"recipes/quickstart_{name}.yaml")
        after = answer(stages, name, questions)
        result |= {"accuracy_before": accuracy(questions, before), "accuracy_after": accuracy(questions, after)}
    result["accuracy_after_by_task"] = by_task(questions, after)
    report(stages, "held-out questions answered right", result["accuracy_before"], result["accuracy_after"])
    if result["accuracy_before"] > MOST_BEFORE or result["accuracy_after"] < LEAST_AFTER:
        raise DemoError(f"{name} did not improve as it should: {result}")
    return after


def export_merged(stages: Stages, questions: Sequence[Question], adapter: Sequence[str]) -> None:
    """Merge the adapter into a Hugging Face folder, reopen it, and compare its answers with the adapter's."""
    with stages.stage("export", "4. Export: merge the adapter into a Hugging Face folder, verify, reload") as result:
        stages.finetune("export", str(OUTPUT / "sft_lora"), str(OUTPUT / "merged"), "--verify")
        reloaded = answer(stages, "merged", questions)
        result["same_answers"] = sum(map(str.__eq__, reloaded, adapter))
        result["questions"] = len(questions)
    stages.console.print(f"  same answers as the adapter: {result['same_answers']} of {len(questions)}")
    if result["same_answers"] != len(questions):
        raise DemoError("the exported model answers differently from the adapter it was merged from")


def align(stages: Stages, questions: Sequence[Question], before: Sequence[str]) -> list[str]:
    """DPO on the exported model: the policy's rate before and after, and the accuracy kept."""
    title = f'5. DPO: preferences for closing a sentence with "{tasks.CLOSING}", and for leaving JSON alone'
    with stages.stage("dpo_lora", title) as result:
        stages.finetune("train", "recipes/quickstart_dpo_lora.yaml")
        after = answer(stages, "dpo_lora", questions)
        result |= {
            "policy_rate_before": policy_rate(questions, before),
            "policy_rate_after": policy_rate(questions, after),
            "accuracy_before": accuracy(questions, before),
            "accuracy_after": accuracy(questions, after),
        }
    report(stages, "answers that follow the policy", result["policy_rate_before"], result["policy_rate_after"])
    report(stages, "held-out questions answered right", result["accuracy_before"], result["accuracy_after"])
    lost = result["accuracy_before"] - result["accuracy_after"]
    gained = result["policy_rate_after"] - result["policy_rate_before"]
    if result["policy_rate_after"] < LEAST_POLICY or gained <= MOST_LOST or lost > MOST_LOST:
        raise DemoError(f"DPO did not teach the policy, or cost accuracy: {result}")
    return after


# -- counting --------------------------------------------------------------------------------------------------------


def accuracy(questions: Sequence[Question], answers: Sequence[str]) -> float:
    """Share of right answers, in [0, 1]."""
    return round(sum(map(tasks.is_right, questions, answers)) / len(questions), 4)


def by_task(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    shares = {}
    for task in tasks.TASKS:
        chosen = [(question, text) for question, text in zip(questions, answers, strict=True) if question.task == task]
        shares[task] = accuracy(*zip(*chosen))
    return shares


def policy_rate(questions: Sequence[Question], answers: Sequence[str]) -> float:
    """Share of answers that close as the policy asks: sentences with the closing, JSON without."""
    followed = [tasks.closes_politely(text) == (question.task != "json") for question, text in zip(questions, answers)]
    return round(sum(followed) / len(questions), 4)


def overlap(questions: Sequence[Question]) -> list[str]:
    """Held-out prompts and countries that a fine-tuning row mentions: there must be none."""
    rows = [(DATA / name).read_text("utf-8") for name in ("train.jsonl", "preferences.jsonl")]
    texts = "\n".join([*rows, *tasks.pretraining_texts(tasks.load_countries(), tasks.load_prose())])
    fine_tuning = "\n".join(rows)
    prompts = [question.prompt for question in questions if question.prompt in texts]
    return prompts + sorted({question.country for question in questions if question.country in fine_tuning})


# -- showing ---------------------------------------------------------------------------------------------------------


def report(stages: Stages, what: str, before: float, after: float) -> None:
    stages.console.print(f"  {what}: {before:.1%} before, [bold]{after:.1%} after[/bold]", highlight=False)


def sample_rows(questions: Sequence[Question], columns: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """A few questions of different tasks with every model's answer."""
    picked = [next(i for i, question in enumerate(questions) if question.task == task) for task in tasks.TASKS]
    return [
        {"prompt": questions[i].prompt, **{name: answers[i] for name, answers in columns.items()}}
        for i in (*picked[: SAMPLES - 1], picked[-1])
    ]


def shown_command(command: str, width: int) -> str:
    """A command as it can be copied: lines of at most `width`, broken between the shell's words."""
    whole = re.sub(r'"[^"]*"', lambda quoted: quoted[0].replace(" ", "\0"), command)
    lines = textwrap.wrap(whole, width - len("      ") - len(" \\"), break_long_words=False, break_on_hyphens=False)
    return "  $ " + " \\\n      ".join(lines).replace("\0", " ")


def show_samples(console: Console, rows: Sequence[dict[str, str]]) -> None:
    """Each question with a line for what every model answers, cut at the console's width."""
    console.print("\n[bold]Held-out questions[/bold]")
    for row in rows:
        console.print(Text(f"  {row['prompt']}"))
        for name, text in row.items():
            if name != "prompt":
                line = f"    {name.replace('_', ' '):<10}{' '.join(text.split())}"
                console.print(Text(line, style="dim" if name == "before" else ""), no_wrap=True, overflow="ellipsis")


def run(console: Console) -> None:
    """All stages; writes outputs/quickstart/summary.json at the end, whether they passed or not.

    Raises:
        DemoError: a stage failed or did not improve what it had to.
    """
    if not HELD_OUT.is_file():
        raise DemoError("there is no such file", where=str(HELD_OUT), fix="Run this in the repository: make demo")
    questions = tasks.read_heldout(HELD_OUT)
    if shared := overlap(questions):
        raise DemoError(f"held-out questions occur in training: {', '.join(shared)}", where=str(HELD_OUT))
    shutil.rmtree(OUTPUT, ignore_errors=True)
    (OUTPUT / "answers").mkdir(parents=True)
    stages, started, samples, passed = Stages(console), time.monotonic(), [], False
    try:
        build_base(stages)
        with stages.stage("baseline", "   What it answers before fine-tuning"):
            before = answer(stages, "base", questions)
        lora = tune(stages, "sft_lora", "2. SFT with LoRA", questions, before)
        full = tune(stages, "sft_full", "3. SFT in full, from the same base", questions, before)
        export_merged(stages, questions, lora)
        dpo = align(stages, questions, lora)
        columns = {"before": before, "SFT_LoRA": lora, "SFT_full": full, "DPO": dpo}
        samples = sample_rows(questions, columns)
        passed = True
    finally:
        summary = {
            "passed": passed,
            "seconds": round(time.monotonic() - started, 1),
            "held_out": {"questions": len(questions), "countries": len({question.country for question in questions})},
            "stages": stages.results,
            "samples": samples,
        }
        (OUTPUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    show_samples(console, samples)
    console.print(f"\nDone in {summary['seconds']:.0f} s. Numbers: {OUTPUT / 'summary.json'}", highlight=False)
    tried = f'.venv/bin/finetune generate {OUTPUT / "sft_lora"} --prompt "Which city governs Iran?"'
    console.print(f"Try it:\n{shown_command(tried, console.width)}", highlight=False, soft_wrap=True)


def main() -> int:
    console = Console(width=None if sys.stdout.isatty() else 120)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        run(console)
    except FinetuneError as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo stopped; it starts over the next time", file=sys.stderr)
        return 130
    return 0
