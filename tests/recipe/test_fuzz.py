"""Whatever the text is, reading it gives a recipe or a RecipeError; and what is written reads back equal."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import RecipeError
from finetune.model.family import ADAPTABLE
from finetune.recipe.load import dump_recipe, load_recipe
from finetune.recipe.schema import Recipe
from finetune.recipe.shipped import SHIPPED
from tests import fuzzing  # noqa: F401, how many cases

SAMPLES = [file.read_text() for file in sorted((SHIPPED / "recipes").glob("*.yaml"))]
KEYS = sorted({line.split(":")[0].strip(" -#") for text in SAMPLES for line in text.splitlines() if ":" in line})
PIECES = ["\n", " ", "  ", "- ", ": ", "[", "]", "{", "}", ",", "&a", "*a", "!!", "!x ", "|\n", ">", "'", '"', "#"]
PIECES += ["\t", "\x00", "\x85", "\ufeff", "<<", "?", "%YAML 1.1\n", "\\", '"\\x', '"\\U', "1e-4", "-1", ".nan"]
PIECES += ["---\n", "null", "é", "0x", "[[[[[[[[[[[[[[[", "{a: "]
PIECES += ["data:\n  train:\n    - path: x\n", "method: sft\n", "model: {path: x}\n"]


def read(text: bytes, overrides: list[str] = []) -> Recipe | None:  # noqa: B006
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "r.yaml"
        file.write_bytes(text)
        try:
            return load_recipe(file, overrides)
        except RecipeError as error:
            assert str(error) and all(fault.what for fault in error.faults)
            return None


@given(st.lists(st.sampled_from(PIECES + KEYS), max_size=40).map("".join))
def test_pieces_of_yaml(text):
    read(text.encode())


@given(st.binary(max_size=200))
def test_bytes(data):
    read(data)


@given(st.data())
def test_damaged_recipes(data):
    text = data.draw(st.sampled_from(SAMPLES))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 30)))
        text = text[:start] + data.draw(st.sampled_from(PIECES + KEYS)) + text[end:]
    read(text.encode())


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)
)


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(KEYS) | st.just("0"), anything), max_size=4))
def test_overrides(triples):
    read(SAMPLES[0].encode(), [f"{section}.{key}={value!r}" for section, key, value in triples])


@given(st.lists(st.text(max_size=30), max_size=4))
def test_overrides_of_any_text(texts):
    read(SAMPLES[0].encode(), texts)


name = st.text(st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="\ufeff"), min_size=1, max_size=12)
path = name.filter(lambda text: not set(text) & set("*?["))  # a glob would find r.yaml beside the recipe
source = st.fixed_dictionaries({"path": path}, optional={"split": name, "samples": st.integers(1, 9)})


@st.composite
def recipes(draw) -> Recipe:
    """Valid recipes of every kind, with odd texts."""
    method = draw(st.sampled_from(["sft", "dpo"]))
    training = {
        "output_dir": draw(name),
        "learning_rate": draw(st.floats(1e-9, 1)),
        "adam_epsilon": draw(st.floats(1e-12, 1e-3)),
        "save_total_limit": draw(st.none() | st.integers(1, 5)),
        draw(st.sampled_from(["max_steps", "num_train_epochs"])): draw(st.integers(1, 1000)),
        "shuffle": draw(st.booleans()),
    }
    data = {"train": draw(st.lists(source, min_size=1, max_size=3)), "packing": draw(st.booleans())}
    if draw(st.booleans()):
        data["eval"] = draw(st.lists(source, min_size=1, max_size=2))
        training["eval_steps"] = draw(st.integers(1, 9))
    tree = {"method": method, "model": {"path": draw(name)}, "data": data, "training": training}
    if draw(st.booleans()):
        modules = st.lists(st.sampled_from(ADAPTABLE), min_size=1, unique=True)
        variant = st.sampled_from(["lora", "rslora", "lora_plus", "pissa", "dora"])
        tree["lora"] = {"variant": draw(variant), "target_modules": draw(st.just("all-linear") | modules)}
    if method == "dpo":
        losses = ["sigmoid", "hinge", "ipo", "kto_pair", "simpo", "orpo", "dpop", "sppo_hard", "nca_pair"]
        tree["dpo"] = {"loss_type": draw(st.sampled_from(losses)), "beta": draw(st.floats(1e-6, 10))}
    return Recipe.model_validate(tree)


@given(recipes())
def test_what_is_written_reads_back_equal(recipe):
    assert read(dump_recipe(recipe).encode()) == recipe
