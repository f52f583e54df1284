"""The quickstart's small world: what its base model reads, what it is asked, and how an answer is checked.

Everything here is a pure function of `data/quickstart/countries.tsv`, `text.txt` and a seed.
`python -m finetune.quickstart.tasks` writes the rows that are committed there; a test holds that they are the same.

Four tasks, each with one right answer: a country's `capital`, `continent` and `language` in a sentence, and all three
as `json`. The held-out questions are about countries that no fine-tuning row mentions. Their facts, in the very wording
of the answers, are in the text that the base model reads; the questions and the chat form are not. So an answer counts
what fine-tuning draws out of the base model, not new knowledge, and the 0 % before is largely the unknown form.

One policy, for DPO: an answer in words closes with `CLOSING`; an answer in JSON does not, since it has to parse. The
SFT rows close a quarter of their sentences that way, so the tuned model knows the phrase and seldom says it.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "data" / "quickstart"
TASKS = ("capital", "continent", "language", "json")
CLOSING = "Happy to help!"
CLOSED_SHARE = 0.25
HELD_OUT_COUNTRIES = 18
PRETRAINING_TEXTS = 2400
LIST_SHARE = 0.2
SEED = 2026


@dataclass(frozen=True)
class Country:
    """One row of `countries.tsv`."""

    name: str
    capital: str
    continent: str
    language: str

    def as_json(self) -> str:
        return json.dumps({"capital": self.capital, "continent": self.continent, "language": self.language})


@dataclass(frozen=True)
class Question:
    """`task` is one of `TASKS`; `answer` is the one right answer, without the closing."""

    task: str
    country: str
    prompt: str
    answer: str


def load_countries(folder: Path = DATA) -> list[Country]:
    """The facts, in file order."""
    with open(folder / "countries.tsv", encoding="utf-8", newline="") as file:
        return [Country(*row) for row in list(csv.reader(file, delimiter="\t"))[1:]]


def load_prose(folder: Path = DATA) -> list[str]:
    """The paragraphs of `text.txt`."""
    return [" ".join(part.split()) for part in (folder / "text.txt").read_text("utf-8").strip().split("\n\n")]


def split_countries(countries: Sequence[Country]) -> tuple[list[Country], list[Country]]:
    """(fine-tuned on, held out), shuffled once from `SEED`."""
    shuffled = random.Random(SEED).sample(list(countries), len(countries))
    return shuffled[HELD_OUT_COUNTRIES:], shuffled[:HELD_OUT_COUNTRIES]


# -- what the base model reads ---------------------------------------------------------------------------------------


def sentences_about(country: Country) -> list[str]:
    """Every fact about one country, in all its wordings."""
    return [
        f"The capital of {country.name} is {country.capital}.",
        f"The city of {country.capital} is the capital of {country.name}.",
        f"The continent of {country.name} is {country.continent}.",
        f"You find {country.name} in {country.continent}.",
        f"The language of {country.name} is {country.language}.",
        f"People in {country.name} speak {country.language}.",
        f"Record of {country.name}: {country.as_json()}",
    ]


def pretraining_texts(countries: Sequence[Country], prose: Iterable[str]) -> list[str]:
    """`PRETRAINING_TEXTS` short documents: the prose once; entries of a gazetteer; lists of names said three times.

    The lists hold no facts; they are there to teach copying a name from the context (one run each way, in an earlier
    version of these texts, was better with them).
    """
    draw = random.Random(SEED)
    texts = list(prose)
    while len(texts) < PRETRAINING_TEXTS:
        if draw.random() < LIST_SHARE:
            names = " and ".join(country.name for country in draw.sample(list(countries), 8))
            texts.append("\n".join([names] * 3))
            continue
        entries = draw.sample(list(countries), 3)
        lines = (" ".join([f"About {one.name}:", *draw.sample(sentences_about(one), 3)]) for one in entries)
        texts.append("\n".join(lines))
    draw.shuffle(texts)
    return texts


# -- what it is asked ------------------------------------------------------------------------------------------------


def questions_about(country: Country) -> list[Question]:
    """Every question about one country, in all its wordings."""
    name = country.name
    answers = {
        "capital": f"The capital of {name} is {country.capital}.",
        "continent": f"The continent of {name} is {country.continent}.",
        "language": f"The language of {name} is {country.language}.",
        "json": country.as_json(),
    }
    prompts = {
        "capital": (f"What is the capital of {name}?", f"Name the capital of {name}.", f"Which city governs {name}?"),
        "continent": (f"Where is {name}?", f"Which continent is {name} in?"),
        "language": (f"What do people speak in {name}?", f"Which language is spoken in {name}?"),
        "json": (f"Describe {name} as JSON.", f"Give me {name} in JSON."),
    }
    return [Question(task, name, prompt, answers[task]) for task in TASKS for prompt in prompts[task]]


def all_questions(countries: Sequence[Country]) -> list[Question]:
    """The questions about several countries, in an order that mixes countries and tasks."""
    questions = [question for country in countries for question in questions_about(country)]
    return random.Random(SEED).sample(questions, len(questions))


def is_right(question: Question, response: str) -> bool:
    """Whether a response is the answer. A sentence may close with `CLOSING`; JSON may have nothing around it."""
    if question.task != "json":
        return response.removesuffix(f" {CLOSING}") == question.answer
    try:
        return json.loads(response) == json.loads(question.answer)
    except ValueError:
        return False


def closes_politely(response: str) -> bool:
    return response.endswith(CLOSING)


# -- rows ------------------------------------------------------------------------------------------------------------


def training_rows(questions: Iterable[Question]) -> list[dict]:
    """SFT rows in the messages format; `CLOSED_SHARE` of the sentences close with `CLOSING`."""
    draw = random.Random(SEED)
    rows = []
    for question in questions:
        closed = question.task != "json" and draw.random() < CLOSED_SHARE
        answer = f"{question.answer} {CLOSING}" if closed else question.answer
        rows.append({"messages": [_message("user", question.prompt), _message("assistant", answer)]})
    return rows


def preference_rows(questions: Iterable[Question]) -> list[dict]:
    """DPO rows: the policy of this file's head, once per question."""
    rows = []
    for question in questions:
        plain, closed = question.answer, f"{question.answer} {CLOSING}"
        chosen, rejected = (plain, closed) if question.task == "json" else (closed, plain)
        rows.append({"prompt": question.prompt, "chosen": chosen, "rejected": rejected})
    return rows


def heldout_rows(questions: Iterable[Question]) -> list[dict]:
    """Rows for `finetune generate --input`; the keys besides `prompt` are for scoring."""
    return [vars(question) for question in questions]


def read_heldout(path: Path) -> list[Question]:
    return [Question(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def text_rows(texts: Iterable[str]) -> list[dict]:
    """Plain text as messages of one; the pretraining tokenizer's template adds nothing but the end of text."""
    return [{"messages": [_message("assistant", text)]} for text in texts]


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def committed_rows(folder: Path = DATA) -> dict[str, list[dict]]:
    """File name to rows of everything that is committed."""
    tuned, held_out = split_countries(load_countries(folder))
    questions = all_questions(tuned)
    return {
        "train.jsonl": training_rows(questions),
        "preferences.jsonl": preference_rows(questions),
        "heldout.jsonl": heldout_rows(all_questions(held_out)),
    }


def _message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


if __name__ == "__main__":
    for name, written in committed_rows().items():
        write_rows(DATA / name, written)
