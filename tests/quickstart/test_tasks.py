"""The quickstart's rows: committed as written, nothing held out is trained on, answers scored as they should be."""

from __future__ import annotations

import json

import pytest

from finetune.quickstart import tasks
from finetune.quickstart.demo import overlap
from finetune.quickstart.tasks import CLOSING, DATA, Question, is_right


@pytest.fixture(scope="module")
def countries():
    return tasks.load_countries()


@pytest.mark.parametrize("name", ["train.jsonl", "preferences.jsonl", "heldout.jsonl"])
def test_committed_rows_are_what_tasks_writes(name):
    committed = [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]
    assert committed == tasks.committed_rows()[name], "run: python -m finetune.quickstart.tasks"


def test_nothing_held_out_is_trained_on():
    held_out = tasks.read_heldout(DATA / "heldout.jsonl")
    assert len({question.prompt for question in held_out}) == len(held_out) == 162
    assert overlap(held_out) == []


def test_overlap_is_noticed():
    row = json.loads((DATA / "train.jsonl").read_text("utf-8").splitlines()[0])
    prompt = row["messages"][0]["content"]
    assert overlap([Question("capital", "Nowhere", prompt, "")]) == [prompt]


def test_countries_are_split_without_remainder(countries):
    tuned, held_out = tasks.split_countries(countries)
    assert len(held_out) == tasks.HELD_OUT_COUNTRIES
    assert sorted(one.name for one in tuned + held_out) == sorted(one.name for one in countries)
    assert len({one.name for one in countries}) == len(countries)


def test_the_base_reads_every_fact_but_no_question(countries):
    texts = tasks.pretraining_texts(countries, tasks.load_prose())
    assert len(texts) == tasks.PRETRAINING_TEXTS
    everything = "\n".join(texts)
    for country in countries:
        assert f"The capital of {country.name} is {country.capital}." in everything
        assert f"The language of {country.name} is {country.language}." in everything
    assert "What is the capital" not in everything and CLOSING not in everything


def test_preferences_state_the_policy():
    for row in tasks.committed_rows()["preferences.jsonl"]:
        assert row["rejected"] != row["chosen"]
        assert row["chosen"].endswith(CLOSING) != row["chosen"].startswith("{")


@pytest.mark.parametrize(
    ("task", "response", "right"),
    [
        ("capital", "The capital of Peru is Lima.", True),
        ("capital", f"The capital of Peru is Lima. {CLOSING}", True),
        ("capital", f"The capital of Peru is Lima.{CLOSING}", False),
        ("capital", "The capital of Peru is Lima", False),
        ("capital", "", False),
        ("json", '{"language": "Spanish", "capital":"Lima"}', True),
        ("json", f'{{"capital": "Lima", "language": "Spanish"}} {CLOSING}', False),
        ("json", '{"capital": "Lima"}', False),
        ("json", "Lima", False),
    ],
)
def test_scoring(task, response, right):
    answer = '{"capital": "Lima", "language": "Spanish"}' if task == "json" else "The capital of Peru is Lima."
    assert is_right(Question(task, "Peru", "?", answer), response) is right
