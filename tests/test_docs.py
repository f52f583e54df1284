"""The documentation says what the code does: docs/recipe.md is held against the schema, key by key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import pytest
import yaml
from pydantic.fields import FieldInfo

from finetune.recipe import schema
from finetune.recipe.load import load_recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

SECTIONS = {
    "top": schema.Recipe,
    "model": schema.ModelSection,
    "lora": schema.LoraSection,
    "data": schema.DataSection,
    "data.train and data.eval": schema.Source,
    "training": schema.TrainingSection,
    "dpo": schema.DpoSection,
    "distributed": schema.DistributedSection,
}


def values_of(field: FieldInfo) -> str:
    """Write what a key takes, as the tables of docs/recipe.md do."""
    kinds = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not type(None)]
    if get_origin(field.annotation) is Literal or not _is_union(field.annotation):
        kinds = [field.annotation]
    return " or ".join(_kind(kind, list(field.metadata)) for kind in kinds)


def default_of(field: FieldInfo) -> str:
    """Write a key's default, as the tables do: a dash for none."""
    if field.is_required():
        return "required"
    if field.default is None:
        return "-"
    if isinstance(field.default, (str, bool, int, float, list)):
        return f"`{yaml.safe_dump(field.default, default_flow_style=True).splitlines()[0]}`"
    return "-"


def _is_union(kind: Any) -> bool:
    return get_origin(kind) is Union or type(kind).__name__ == "UnionType"


def _kind(kind: Any, metadata: list[Any]) -> str:
    if hasattr(kind, "__metadata__"):
        inner = kind.__metadata__
        for item in inner:
            metadata = metadata + (item.metadata if isinstance(item, FieldInfo) else [item])
        kind = kind.__origin__
    if _is_union(kind):
        return " or ".join(_kind(one, metadata) for one in get_args(kind) if one is not type(None))
    if get_origin(kind) is Literal:
        return ", ".join(f"`{yaml.safe_dump(value).splitlines()[0]}`" for value in get_args(kind))
    if kind is bool:
        return "`true`, `false`"
    if kind in (int, float):
        return f"{'whole number' if kind is int else 'number'}{_bounds(metadata)}"
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return "list of sources" if item is schema.Source else "list of names"
    return "text" if kind is str else "section"


def _bounds(metadata: list[Any]) -> str:
    words = {
        annotated_types.Ge: "from",
        annotated_types.Gt: "above",
        annotated_types.Le: "to",
        annotated_types.Lt: "to below",
    }
    parts = []
    for bound in metadata:
        for kind, word in words.items():
            if isinstance(bound, kind):
                value = getattr(bound, kind.__name__.lower())
                if abs(value) < 1_000_000:
                    parts.append(f"{word} {value:,.10g}")
    return f" {' '.join(parts)}" if parts else ""


def tables() -> dict[str, dict[str, tuple[str, str]]]:
    """Read docs/recipe.md as {section: {key: (default, values)}}."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    section = ""
    for line in (DOCS / "recipe.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:].replace("`", "")
        row = re.match(r"\| `([a-z_0-9]+)` \| (.*?) \| (.*?) \| ", line)
        if row:
            found.setdefault(section, {})[row[1]] = (row[2], row[3])
    return found


@pytest.mark.parametrize("section", SECTIONS)
def test_the_recipe_reference_is_in_step_with_the_schema(section):
    expected = {name: (default_of(f), values_of(f)) for name, f in SECTIONS[section].model_fields.items()}
    assert tables()[section] == expected


def test_the_recipe_reference_has_no_other_tables():
    assert set(tables()) == set(SECTIONS)


def test_the_example_of_the_recipe_reference_is_valid(tmp_path):
    example = re.search(r"```yaml\n(.*?)```", (DOCS / "recipe.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    (tmp_path / "example.yaml").write_text(example, encoding="utf-8")
    recipe = load_recipe(tmp_path / "example.yaml")
    assert recipe.lora is not None and recipe.method == "sft"


@pytest.mark.parametrize(
    "page", ["README.md", "docs/recipe.md", "docs/log.md", "docs/serving.md", "docs/performance.md"]
)
def test_files_that_the_pages_name_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    named = re.findall(r"`((?:finetune|tests|docs|recipes)/[\w./-]+)`", text)
    missing = [name for name in links if not ((ROOT / page).parent / name).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_the_readme_names_real_keys_with_their_defaults():
    recipe = tables()
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Recipe")[1].split("## ")[0]
    compared = 0
    for cells in re.findall(r"^\| (`.*?) \| (.*?) \| .*\|$", text, re.MULTILINE):
        names, defaults = re.findall(r"`(?:(\w+)\.)?(\w+)`", cells[0]), cells[1].split(", ")
        section = names[0][0]
        for index, (own, key) in enumerate(names):
            default = recipe[own or section or "top"][key][0].strip("`")
            if default not in ("-", "required", "[]") and not key.endswith("_fraction"):  # those are told in words
                assert defaults[index] in (default, default.replace("0.0001", "1e-4").removesuffix(".0")), key
                compared += 1
    assert compared > 12
