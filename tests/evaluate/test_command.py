"""`finetune evaluate`, as users type it."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from finetune.evaluate.benchmarks import BENCHMARKS
from tests.evaluate.tasks import NAMES, write_tasks
from tests.runs import finetune, finetune_process
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("evaluate") / "tiny")


def test_own_tasks(model, tmp_path):
    include, output = write_tasks(tmp_path / "tasks", count=12), tmp_path / "figures.json"
    done = finetune_process(
        "evaluate", model, "--tasks", ",".join(NAMES), "--include", include, "--limit", 10, "--output", output
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["task", *NAMES]
    assert all(line.split()[-1] == "10" for line in lines[1:])
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["score", "score", "answer", "score", "All"]
    figures = json.loads(output.read_text())
    assert figures["limit"] == 10 and figures["chat_template"] is True
    for name, line in zip(NAMES, lines[1:]):
        result = figures["tasks"][name]
        assert result["questions"] == 10
        assert f"{result['results'][name][line.split()[1] + ',none']:.4f}" == line.split()[2]


def test_a_name_that_is_no_task(model, capsys):
    assert finetune("evaluate", model, "--tasks", "gsm8") == 2
    error = capsys.readouterr().err
    assert "'gsm8' is not a task" in error and "gsm8k" in error


def test_a_tag_and_a_group_without_a_sum_have_a_line_for_each_of_their_tasks(model, tmp_path, capsys):
    include, output = write_tasks(tmp_path / "tasks", count=4), tmp_path / "figures.json"
    for name in ("sums_choice", "sums_text"):
        with (include / f"{name}.yaml").open("a") as file:
            file.write("tag: sums_tag\n")
    (include / "group.yaml").write_text("group: sums_group\ntask: [sums_answer, sums_whole]\n")
    command = ("evaluate", model, "--include", include, "--output", output)
    assert finetune(*command, "--tasks", "sums_tag,sums_group") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["task", "sums_choice", "sums_text", "sums_answer", "sums_whole"]
    assert all(line.split()[-1] == "4" for line in lines[1:])
    figures = json.loads(output.read_text())["tasks"]
    assert figures["sums_tag"]["questions"] == figures["sums_group"]["questions"] == 8


def test_figures_are_written_before_they_are_shown(model, tmp_path, monkeypatch):
    include, output = write_tasks(tmp_path / "tasks", count=4), tmp_path / "figures.json"

    def fail(*arguments):
        raise RuntimeError("the terminal is gone")

    monkeypatch.setattr("finetune.evaluate.run._print_lines", fail)
    assert finetune("evaluate", model, "--tasks", "sums_text", "--include", include, "--output", output) == 1
    assert json.loads(output.read_text())["tasks"]["sums_text"]["questions"] == 4


@pytest.mark.parametrize("task", ["HumanEval", "humaneval_instruct", "mbpp", "mbpp_instruct"])
def test_programs_of_the_model_run_only_when_allowed(task, model, capsys):
    assert finetune("evaluate", model, "--tasks", task) == 2
    assert "--allow-code" in capsys.readouterr().err


@pytest.mark.parametrize(
    "group",
    [
        "group: mixed\ntask: [sums_text, coded]\n",
        "group: mixed\ntask:\n  - group: inside\n    task:\n      - {task: coded, num_fewshot: 0}\n",
        "group: mixed\ntask:\n  - {task: sums_text, unsafe_code: true}\n",
    ],
)
def test_a_group_that_holds_such_a_task_runs_only_when_allowed(group, model, tmp_path, capsys):
    include = write_tasks(tmp_path / "tasks", count=4)
    (include / "coded.yaml").write_text("include: sums_text.yaml\ntask: coded\nunsafe_code: true\n")
    (include / "group.yaml").write_text(group)
    assert finetune("evaluate", model, "--tasks", "mixed", "--include", include) == 2
    assert "--allow-code" in capsys.readouterr().err


def test_no_chat_template(tmp_path, capsys):
    folder = tiny_model(tmp_path / "plain")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    include = write_tasks(tmp_path / "tasks", count=4)
    command = ("evaluate", folder, "--tasks", "sums_text", "--include", include)
    assert finetune(*command) == 2
    assert "--raw" in capsys.readouterr().err
    assert finetune(*command, "--raw") == 0


def test_without_the_harness(model, monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert finetune("evaluate", model, "--tasks", "gsm8k") == 2
    assert "pip install 'paddle-finetune[evaluate]'" in capsys.readouterr().err


def test_questions_that_cannot_be_had(model, monkeypatch, capsys):
    import datasets

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert finetune("evaluate", model, "--tasks", "gsm8k") == 1
    error = capsys.readouterr().err
    assert "Couldn't reach 'openai/gsm8k'" in error and "HF_ENDPOINT" in error


QUESTION = {"A": "1", "B": "2", "C": "3", "D": "4", "question": "1+1=?", "answer": "B", "explanation": "", "id": 0}
# Columns as the hub's data sets have them.
ROWS = {
    "cais/mmlu": {"question": "What is 1+1?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "x"},
    "ceval/ceval-exam": QUESTION,
    "openai/gsm8k": {"question": "What is 1+1?", "answer": "It is 2.\n#### 2"},
}


@pytest.mark.parametrize("name", ["mmlu", "ceval", "gsm8k"])
def test_benchmarks_of_the_page(name, model, monkeypatch, capsys):
    """The harness's own task files, on rows of the form that the hub's have."""
    import datasets

    def load(path, *arguments, **options):
        rows = datasets.Dataset.from_list([ROWS[path]] * 6)
        return datasets.DatasetDict({split: rows for split in ("train", "auxiliary_train", "dev", "val", "test")})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert finetune("evaluate", model, "--tasks", name, "--limit", 1, "--num-fewshot", 1) == 0
    header, line = capsys.readouterr().out.splitlines()
    subjects = {"mmlu": 57, "ceval": 52, "gsm8k": 1}[name]
    assert line.split()[0] == name and line.split()[-1] == str(subjects)
    assert line.split()[1] == BENCHMARKS[name].metric.split(",")[0]


def test_long_names_of_tasks_stand_above_their_figures():
    from finetune.evaluate.run import _line

    figures = "0.5000", "0.0100", "200"
    short, long = _line("gsm8k", "exact_match", *figures), _line("a_task_of_thirty_letters_and_so", "acc", *figures)
    above, below = long.splitlines()
    assert above == "a_task_of_thirty_letters_and_so  acc" and below.lstrip() == short[52:].lstrip()
    assert len(below) == len(short) == 79
