"""The first sentences of a report: evaluation leads, and nothing is said that the noise does not carry."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.report.charts import series
from finetune.report.headline import figures, sentences, trend
from tests.report.test_page import make_run, report, sft_rows


def losses(values, key="loss"):
    return [{"step": step, key: float(value)} for step, value in enumerate(values, 1)]


def test_twelve_noisy_steps_make_no_headline():
    """Of 300 runs of 12 steps whose loss is noise around one value, a direction is claimed in hardly any."""
    draw = np.random.default_rng(0)
    said = [sentences(losses(2 + 0.3 * draw.standard_normal(12))) for _ in range(300)]
    assert sum("fell" in text or "rose" in text for text in said) <= 9
    assert said[0].startswith("Training loss changed by no more than its noise, around ")
    unlucky = losses([2.0, 2.2, 1.8, 2.1, 1.9, 2.0, 2.2, 1.8, 2.1, 1.9, 2.0, 2.6])
    assert sentences(unlucky) == "Training loss changed by no more than its noise, around 2.05."
    assert list(figures(unlucky)) == [("Training loss", "2.05", "mean of all steps")]


@pytest.mark.parametrize("steps", [12, 100])
def test_a_fall_out_of_the_noise_is_said(steps):
    draw = np.random.default_rng(1)
    falling = np.linspace(3, 1, steps) + 0.1 * draw.standard_normal(steps)
    assert sentences(losses(falling)).startswith("Training loss fell from ")
    assert sentences(losses(falling[::-1])).startswith("Training loss rose from ")
    found = trend(series(losses(falling), "loss", ""))
    tenth = steps // 10
    assert (found.first, found.last) == (falling[:tenth].mean(), falling[-tenth:].mean())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([2.0, 1.5], "Evaluation loss fell from 2 to 1.5."),
        ([2.0, 1.5, 1.8], "Evaluation loss fell from 2 to 1.5 at step 2 and ended higher, at 1.8."),
        ([1.5, 1.8], "Evaluation loss was lowest at its first evaluation, step 1 (1.5), and rose to 1.8."),
        ([1.5, 1.501], "Evaluation loss stayed at 1.5."),
        ([1.5, float("nan")], "Evaluation loss was 1.5 at step 1."),
    ],
)
def test_evaluation_leads(values, said):
    rows = losses(values, "eval_loss") + losses(np.linspace(3, 1, 50))
    assert sentences(rows) == f"{said} Training loss fell from 2.92 to 1.08."
    assert [name for name, *_ in figures(rows)] == ["Evaluation loss", "Training loss"]


def test_held_out_pairs_speak_for_the_ranking():
    rows = losses([0.5, 1.0], "rewards/accuracies") + losses([0.6, 0.8], "eval_rewards/accuracies")
    assert sentences(rows) == "At the end the chosen answer is preferred in 80% of the evaluation pairs."
    assert list(figures(rows)) == [("Pairs ranked right", "80%", "evaluation")]


def test_the_pairs_of_the_last_batch_make_no_headline():
    rows = losses([0.5, 1.0, 0.5, 0.5, 1.0, 0.0], "rewards/accuracies")
    assert sentences(rows) == "The chosen answer was preferred in 58% of the training pairs."
    assert list(figures(rows)) == [("Pairs ranked right", "58%", "mean of all steps")]
    learned = losses([*[0.25, 0.5] * 10, *[0.75, 1.0] * 40], "rewards/accuracies")
    said = "The chosen answer was preferred in 38% of the training pairs at the start, in 88% at the end."
    assert sentences(learned) == said
    assert list(figures(learned)) == [("Pairs ranked right", "88%", "from 38%")]


def test_the_footnote_tells_of_faint_lines_only_where_there_are_any(tmp_path):
    text = report(make_run(tmp_path / "short", sft_rows(5)))[1].text
    assert "By optimizer step." in text and "Faint lines" not in text and "tenth" not in text
    text = report(make_run(tmp_path / "long", sft_rows(100)))[1].text
    assert "Faint lines" in text and "tenth" in text


def test_tokens_are_counted_once_and_a_history_is_told(tmp_path):
    history = [{"after_step": 3, "changes": {"training.learning_rate": [0.001, 0.0005], "data.train": [[], []]}}]
    manifest = {"tokens": {"seen": 2560}, "history": history}
    text = report(make_run(tmp_path / "run", sft_rows(5), manifest=manifest))[1].text
    assert text.count("2,560") == 1
    assert "changed after step 3 training.learning_rate 0.001 \u2192 0.0005, data.train" in text


def test_prompts_are_shown_without_tags_which_can_be_unfolded(tmp_path):
    raw = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhich city?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    more = "Hi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    two = raw.replace("Which city?<|im_end|>\n", more)
    samples = [{"prompt": prompt, "before": "x", "after": "y"} for prompt in (raw, two, "no [INST] of ours")]
    samples.append({"prompt": "<s><|User|>Why?<|Assistant|>", "plain": "Why?", "before": "x", "after": "y"})
    _, page = report(make_run(tmp_path / "run", sft_rows(3), samples=samples))
    assert "Which city? with its tags <|im_start|>system" in page.text
    assert "user Hi assistant Hello! user Bye with its tags" in page.text
    assert "no [INST] of ours before x after y" in page.text
    assert "Why? with its tags <s><|User|>Why?<|Assistant|> before x" in page.text
    assert [tag for tag, _ in page.tags].count("details") == 3
