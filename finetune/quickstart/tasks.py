"""The quickstart's small world: what its base model reads, what it is asked, and how an answer is checked.

Everything here is a pure function of the tables in `data/quickstart` and a seed. `python -m finetune.quickstart.tasks`
writes the rows that are committed there; a test holds that they are still what this file writes.

Four tasks, each with one right answer:
- `capital`, `continent`, `kind`: a question about a country or a thing, answered in a sentence;
- `json`: a country's facts as JSON.
The held-out questions are about countries and things that no training row of any stage after pretraining mentions: they
can only be answered with what the base model has read, in a form that only fine-tuning has shown it.

One policy, for DPO: an answer in words closes with `CLOSING`; an answer in JSON does not, since it has to parse. The SFT
rows close a quarter of their answers that way, so the tuned model knows the phrase and seldom says it.
"""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "data" / "quickstart"
CLOSING = "Happy to help!"
KINDS_OF_TASK = ("capital", "continent", "kind", "json")


@dataclass(frozen=True)
class Country:
    name: str
    capital: str
    continent: str


@dataclass(frozen=True)
class Thing:
    name: str
    kind: str


@dataclass(frozen=True)
class World:
    """The tables and the prose of `data/quickstart`."""

    countries: tuple[Country, ...]
    things: tuple[Thing, ...]
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """One question: `task` is one of `KINDS_OF_TASK`, `answer` the one right answer, without the closing."""

    task: str
    subject: str
    prompt: str
    answer: str


def load_world(folder: Path = DATA) -> World:
    """Read the tables and the prose from `folder`."""

    def table(name: str) -> list[list[str]]:
        with open(folder / name, encoding="utf-8", newline="") as file:
            return list(csv.reader(file, delimiter="\t"))[1:]

    paragraphs = (folder / "text.txt").read_text("utf-8").strip().split("\n\n")
    return World(
        tuple(Country(*row) for row in table("countries.tsv")),
        tuple(Thing(*row) for row in table("things.tsv")),
        tuple(" ".join(paragraph.split()) for paragraph in paragraphs),
    )


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


# -- what the base model reads ---------------------------------------------------------------------------------------


def sentences_about(subject: Country | Thing) -> list[str]:
    """Every fact about one subject, in all its wordings."""
    if isinstance(subject, Thing):
        name, kind = article(subject.name), article(subject.kind)
        return [
            f"{capitalised(name)} is {kind}.",
            f"Every {subject.name} is {kind}.",
            f"We call the {subject.name} {kind}.",
        ]
    return [
        f"The capital of {subject.name} is {subject.capital}.",
        f"{subject.capital} is the capital of {subject.name}.",
        f"{subject.name} is governed from {subject.capital}.",
        f"{subject.name} is in {subject.continent}.",
        f"In {subject.continent} you find {subject.name}.",
    ]


def pretraining_texts(world: World, seed: int, count: int) -> list[str]:
    """`count` short documents: the prose once, and facts about three subjects each, mixed and repeated."""
    draw = random.Random(seed)
    texts = list(world.paragraphs)
    while len(texts) < count:
        pool = world.countries if draw.random() < 0.7 else world.things
        sentences = [draw.choice(sentences_about(subject)) for subject in draw.sample(pool, 3) for _ in range(REPEAT)]
        draw.shuffle(sentences)
        texts.append(" ".join(sentences))
    draw.shuffle(texts)
    return texts
REPEAT = 3

# -- what it is asked ------------------------------------------------------------------------------------------------


def tasks_about(subject: Country | Thing) -> list[Task]:
    """Every question about one subject, in all its wordings."""
    if isinstance(subject, Thing):
        name = article(subject.name)
        answer = f"{capitalised(name)} is {article(subject.kind)}."
        questions = [f"What is {name}?", f"What kind of thing is {name}?", f"Tell me what {name} is."]
        return [Task("kind", subject.name, question, answer) for question in questions]
    name = subject.name
    record = json.dumps({"country": name, "capital": subject.capital, "continent": subject.continent})
    wordings = [
        ("capital", f"What is the capital of {name}?", f"The capital of {name} is {subject.capital}."),
        ("capital", f"Name the capital of {name}.", f"The capital of {name} is {subject.capital}."),
        ("capital", f"Which city is the capital of {name}?", f"The capital of {name} is {subject.capital}."),
        ("continent", f"Where is {name}?", f"{name} is in {subject.continent}."),
        ("continent", f"Which continent is {name} in?", f"{name} is in {subject.continent}."),
        ("json", f"Describe {name} as JSON.", record),
        ("json", f"Give me {name} in JSON.", record),
    ]
    return [Task(task, name, question, answer) for task, question, answer in wordings]
