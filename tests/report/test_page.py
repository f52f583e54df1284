"""report.html: complete, self-contained, escaped, small, and there for runs in any state."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest

from finetune.report.metrics import MetricsWriter
from finetune.report.page import MAX_SAMPLES, write_report

PAYLOAD = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"'&"

VOID = {"meta", "link", "img", "br", "path"}


class Page(HTMLParser):
    """Collects tags and attributes, and checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def make_run(folder, rows, recipe=None, manifest=None, samples=None):
    folder.mkdir(exist_ok=True)
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        for row in rows:
            writer.write(row)
    if recipe is not None:
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    for name, value in (("manifest.json", manifest), ("samples.json", samples)):
        if value is not None:
            (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


def report(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def sft_rows(n):
    return [
        {
            "step": step,
            "epoch": step / 100,
            "loss": 3.0 * math.exp(-step / n * 3) + 0.2,
            "learning_rate": 1e-4 * (1 - step / n),
            "grad_norm": 1.0 + (step % 7) / 10,
            "num_tokens": step * 512,
            "tokens_per_second": 800.0 + step % 5,
            "seconds": step * 0.64,
        }
        for step in range(1, n + 1)
    ]


def dpo_rows(n):
    extra = {"rewards/chosen": 0.5, "rewards/rejected": -0.5, "rewards/margins": 1.0, "rewards/accuracies": 0.75}
    return [{**row, **extra, "logps/chosen": -80.0, "logps/rejected": -90.0} for row in sft_rows(n)]


RECIPE = "method: sft\nmodel:\n  path: Qwen/Qwen2-0.5B  # the base\nlora:\n  rank: 8\n  variant: rslora\n"
MANIFEST = {
    "status": "finished",
    "method": "sft",
    "device": "cpu",
    "seconds": 64.0,
    "steps": {"done": 100, "planned": 100},
    "versions": {"paddlenlp": "3.0.0b4"},
    "base_model": {"path": "Qwen/Qwen2-0.5B", "parameters": 494032768},
    "data": {
        "train": {
            "read": 1200, "kept": 1180, "truncated": 7, "dropped": 0, "unsupervised": 3, "prompts_cut": 0,
            "files": [{"path": "data/train.jsonl", "rows": 1200, "sha256": "ab" * 32}],
            "notes": ["7 rows were cut"],
        }
    },
}  # fmt: skip


def test_a_finished_run(tmp_path):
    rows = sft_rows(100) + [
        {"step": 50, "eval_loss": 0.9},
        {"step": 75, "eval_loss": 0.7},
        {"step": 100, "eval_loss": 0.8},
    ]
    samples = [
        {"prompt": "2 + 2?", "reference": "4", "before": "two", "after": " 4\n"},
        {"prompt": "Say hi", "after": "Hi!"},
    ]
    _, page = report(make_run(tmp_path / "run", rows, RECIPE, MANIFEST, samples))
    for expected in (
        "Qwen2-0.5B: supervised fine-tuning",
        "Supervised fine-tuning of Qwen/Qwen2-0.5B with rsLoRA of rank 8 on 1,180 rows of train.jsonl.",
        "100 optimizer steps in 1:04 on the CPU.",
        "Evaluation loss fell from 0.9 to 0.7 at step 75 and ended higher, at 0.8. Training loss fell from",
        "Evaluation loss 0.8 from 0.9, lowest 0.7 at step 75",
        "Faint lines are the logged values",
        "1 of 1 answers are exactly the reference after training, 0 before.",
        "without a supervised token 3",
        "7 rows were cut",
        "3.0.0b4",
        "494,032,768",
        "finished",
    ):
        assert expected in page.text
    assert "prompts cut" not in page.text
    titles = [attrs["aria-label"].split(":")[0] for tag, attrs in page.tags if tag == "svg"]
    assert titles == ["Loss", "Learning rate", "Gradient norm", "Tokens a second"]


def test_a_dpo_run_has_its_curves(tmp_path):
    _, page = report(make_run(tmp_path / "run", dpo_rows(30), "method: dpo\nmodel: {path: m}\n", {"method": "dpo"}))
    titles = [attrs["aria-label"].split(":")[0] for tag, attrs in page.tags if tag == "svg"]
    assert titles == [
        "Loss", "Rewards", "Reward margin", "Share of pairs ranked right", "Log-probability of the answers",
        "Learning rate", "Gradient norm", "Tokens a second",
    ]  # fmt: skip
    assert "Pairs ranked right 75%" in page.text and "all weights" in page.text


def test_the_page_asks_for_nothing_from_outside(tmp_path):
    text, page = report(
        make_run(tmp_path / "run", dpo_rows(50), RECIPE, MANIFEST, [{"prompt": "https://x.test/a", "after": "b"}])
    )
    for tag, attrs in page.tags:
        assert tag not in {"img", "iframe", "object", "embed", "base", "form", "a"}
        assert "src" not in attrs and "srcset" not in attrs
        assert attrs.get("href", "data:,") == "data:,"
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_everything_from_the_run_is_escaped(tmp_path):
    recipe = f"method: sft\nmodel:\n  path: {json.dumps(PAYLOAD)}  # {PAYLOAD}\n"
    files = [dict.fromkeys(["path", "rows", "sha256"], PAYLOAD)]
    manifest = {
        "method": "sft", "device": PAYLOAD, "command": [PAYLOAD], "versions": {PAYLOAD: PAYLOAD}, "status": PAYLOAD,
        "base_model": {"path": PAYLOAD}, "tokens": {PAYLOAD: PAYLOAD},
        "data": {PAYLOAD: {PAYLOAD: 1, "notes": [PAYLOAD], "files": files}},
    }  # fmt: skip
    samples = [
        {"prompt": [{"role": PAYLOAD, "content": PAYLOAD}], "reference": PAYLOAD, "before": PAYLOAD, "after": PAYLOAD}
    ]
    _, page = report(make_run(tmp_path / "a<b>&", sft_rows(3), recipe, manifest, samples))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "img" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count("alert('x')") >= 10


def test_a_long_run_with_long_samples_stays_small(tmp_path):
    samples = [{"prompt": "é<" * 5000, "reference": "&" * 5000, "before": '"' * 5000, "after": "x" * 5000}] * 500
    manifest = {**MANIFEST, "data": {"train": {"files": [{"path": "p" * 100, "rows": 1, "sha256": "0" * 64}] * 5000}}}
    text, page = report(
        make_run(tmp_path / "run", dpo_rows(20_000), RECIPE + "# comment\n" * 50_000, manifest, samples)
    )
    assert len(text.encode()) < 1_000_000
    assert f"{500 - MAX_SAMPLES} more in samples.json" in page.text
    assert "4900 more files in manifest.json" in page.text and "Cut here" in page.text


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "No step has been logged yet."),
        ([{"step": 1, "loss": 2.5}], "Training loss 2.5 the only one logged"),
        ([{"step": 1, "loss": math.nan}], "1 optimizer step"),
        ([{"step": 5, "eval_loss": 1.5}], "Evaluation loss was 1.5 at step 5."),
        (sft_rows(40), "not finished at step 40"),
    ],
)
def test_runs_in_any_state(tmp_path, rows, expected):
    assert expected in report(make_run(tmp_path / "run", rows))[1].text


def test_an_empty_folder(tmp_path):
    assert "This folder holds no record of a run yet." in report(tmp_path)[1].text


def test_a_stopped_run(tmp_path):
    _, page = report(make_run(tmp_path / "run", sft_rows(40), RECIPE, {**MANIFEST, "status": "stopped"}))
    assert "stopped at step 40 of 100" in page.text


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
    folder = make_run(tmp_path / "run", sft_rows(5))
    (folder / "manifest.json").write_text("{")
    (folder / "samples.json").write_text('{"not": "a list"}')
    (folder / "recipe.yaml").write_bytes(b"a: [\xff\n")
    text = report(folder)[1].text
    assert "manifest.json is not valid JSON." in text and "recipe.yaml is not valid YAML." in text
    assert "5 optimizer steps" in text
    (folder / "metrics.jsonl").write_text("x\n{}\n")
    assert "No curves:" in report(folder)[1].text


def test_lone_surrogates_do_not_stop_the_page(tmp_path):
    folder = make_run(tmp_path / "run", sft_rows(2))
    (folder / "samples.json").write_text('[{"prompt": "\\ud83d", "after": "ok"}]')
    assert "ok" in report(folder)[1].text


def test_the_page_is_replaced_whole(tmp_path):
    report(make_run(tmp_path / "run", sft_rows(2)))
    report(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "report.html"]
