"""The documentation says what the code does: tables are those that the code makes, and examples are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import reference
from finetune.export.formats import FORMATS, NUMBERS
from finetune.recipe.load import load_recipe
from finetune.rows.formats import FORMS
from tests import test_layering

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("page", reference.PAGES, ids=lambda page: page.name)
def test_pages_hold_what_the_code_says(page):
    assert page.read_text(encoding="utf-8") == reference.filled(page), "run: python -m docs.reference"


def test_the_drawing_has_the_rooms_of_the_layering_test():
    assert (DOCS / "rooms.svg").read_text(encoding="utf-8") == reference.rooms_drawing(), (
        "run: python -m docs.reference"
    )
    drawn = re.findall(r'class="room".*?>(\w+)<', reference.rooms_drawing())
    assert set(drawn) == set(test_layering.HEIGHT) - {"__init__", "__main__"}


def test_every_key_has_a_meaning_in_both_languages():
    english, chinese = (language.meanings for language in reference.languages().values())
    keys = {f"{name}.{key}" for name, section in reference.schema.SECTIONS.items() for key in section.model_fields}
    keys |= {f"forms.{name}" for name in FORMS}
    keys |= {f"rooms.{room}" for room in test_layering.HEIGHT if not room.startswith("__")}
    assert {key for key, text in english.items() if text} == keys == set(chinese)


@pytest.mark.parametrize(
    "row",
    [
        "| `path` | required | text | Hub id,",
        "| `rank` | `16` | whole number from 1 to 4,096 | ",
        "| `target_modules` | `all-linear` | `all-linear` or list of names | ",
        "| `eval` | `[]` | list of sources | ",
        "| `loraplus_lr_ratio` | - | number above 0 to 10,000 | ",
        "| `label_smoothing` | `0.0` | number from 0 to below 0.5 | ",
        "| `sharding` | `''` | `''`, `stage1`, `stage2`, `stage3` | ",
    ],
)
def test_rows_of_the_recipe_reference_as_written_by_hand(row):
    assert f"\n{row}" in (DOCS / "recipe.md").read_text(encoding="utf-8")


def test_the_example_of_the_recipe_reference_is_valid(tmp_path):
    example = re.search(r"```yaml\n(.*?)```", (DOCS / "recipe.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    (tmp_path / "example.yaml").write_text(example, encoding="utf-8")
    recipe = load_recipe(tmp_path / "example.yaml")
    assert recipe.lora is not None and recipe.method == "sft"


@pytest.mark.parametrize("page", ["using.md", "using.zh.md"])
def test_the_pages_have_every_layout_and_number_of_exports(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)`[^|]* \| ([^|]*) \| [^|]* \|$", text, re.MULTILINE))
    assert set(FORMATS) <= set(rows)
    for name, dtypes in FORMATS.items():
        assert set(re.findall(r"`(q\d_\d)`", rows[name])) == set(dtypes) - set(NUMBERS)
