"""What the pages derive from the code: `python -m docs.reference` writes it between their markers.

    <!-- begin recipe.training -->      the keys of a recipe's section: schema and docstrings
    <!-- begin rooms -->                the rooms of the package, by floor: tests/test_layering.py and their docstrings

`page.zh.md` gets the same with the words of docs/zh.yaml. docs/rooms.svg is drawn too. A test fails where a page is not
what this writes.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic.fields import FieldInfo

from finetune.recipe import schema

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGES = sorted(DOCS.glob("*.md"))

SECTIONS: dict[str, type[schema.Section]] = {
    "recipe": schema.Recipe,
    "model": schema.ModelSection,
    "lora": schema.LoraSection,
    "data": schema.DataSection,
    "source": schema.Source,
    "training": schema.TrainingSection,
    "dpo": schema.DpoSection,
    "distributed": schema.DistributedSection,
}

ENGLISH = {
    "head": "key | default | values | meaning",
    "required": "required",
    "section": "section",
    "text": "text",
    "list of sources": "list of sources",
    "list of names": "list of names",
    "or": "or",
    "whole number": "whole number",
    "number": "number",
    "from": "from {}",
    "above": "above {}",
    "to": "to {}",
    "below": "to below {}",
    "rooms head": "floor | room | what it does",
}


@dataclass(frozen=True)
class Language:
    """The words of a page.

    Attributes:
        words: By the keys of ENGLISH.
        meanings: What keys ("training.seed") and rooms ("rooms.rows") mean, where the code does not say it in this
            language.
    """

    words: Mapping[str, str]
    meanings: Mapping[str, str]


@cache
def languages() -> dict[str, Language]:
    """English, whose words are the code's, and those of docs/zh.yaml."""
    chinese = yaml.safe_load((DOCS / "zh.yaml").read_text(encoding="utf-8"))
    return {"en": Language(ENGLISH, english()), "zh": Language(chinese["words"], chinese["meanings"])}


def english() -> dict[str, str]:
    """What keys and rooms mean, from their docstrings."""
    keys = {
        f"{name}.{key}": text
        for name, section in SECTIONS.items()
        for part in section.__mro__  # a section may take keys over from where they are used
        if "finetune" in part.__module__
        for key, text in attributes(part.__doc__ or "")
    }
    return keys | {f"rooms.{room}": room_docstring(room) for rooms in floors() for room in rooms}


def attributes(docstring: str) -> Iterator[tuple[str, str]]:
    """(name, text) of a docstring's "Attributes", each text in one line."""
    _, _, body = docstring.partition("Attributes:\n")
    for entry in re.split(r"\n(?= {8}\w)", body.rstrip()):
        name, _, text = entry.strip().partition(": ")
        if text:
            yield name, " ".join(text.split())


# -- the recipe ------------------------------------------------------------------------------------------------


def recipe_table(name: str, language: Language) -> str:
    """The keys of a section with their defaults, values and meanings."""
    lines = [f"| {language.words['head']} |", "| --- | --- | --- | --- |"]
    for key, field in SECTIONS[name].model_fields.items():
        cells = f"`{key}`", default_of(field, language), values_of(field, language), language.meanings[f"{name}.{key}"]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


def default_of(field: FieldInfo, language: Language) -> str:
    """A key's default as YAML; a dash where there is none."""
    if field.is_required():
        return language.words["required"]
    if isinstance(field.default, (str, bool, int, float, list)):
        return f"`{yaml.safe_dump(field.default, default_flow_style=True).splitlines()[0]}`"
    return "-"


def values_of(field: FieldInfo, language: Language) -> str:
    """What a key takes, in words."""
    return _kind(field.annotation, list(field.metadata), language.words)


def _kind(kind: Any, metadata: list[Any], words: Mapping[str, str]) -> str:
    if hasattr(kind, "__metadata__"):
        for item in kind.__metadata__:
            metadata = metadata + (item.metadata if isinstance(item, FieldInfo) else [item])
        kind = kind.__origin__
    if get_origin(kind) is Union or type(kind).__name__ == "UnionType":
        return f" {words['or']} ".join(_kind(one, metadata, words) for one in get_args(kind) if one is not type(None))
    if get_origin(kind) is Literal:
        return ", ".join(f"`{yaml.safe_dump(value).splitlines()[0]}`" for value in get_args(kind))
    if kind is bool:
        return "`true`, `false`"
    if kind in (int, float):
        return " ".join([words["whole number" if kind is int else "number"], *_bounds(metadata, words)])
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return words["list of sources" if item is schema.Source else "list of names"]
    return words["text" if kind is str else "section"]


def _bounds(metadata: list[Any], words: Mapping[str, str]) -> Iterator[str]:
    """Limits in words; those that only keep a number from being absurd are left out."""
    kinds = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}
    for bound in metadata:
        if isinstance(bound, (annotated_types.Ge, annotated_types.Gt, annotated_types.Le, annotated_types.Lt)):
            name = type(bound).__name__.lower()
            value = getattr(bound, name)
            if abs(value) < 1_000_000:
                yield words[kinds[name]].format(f"{value:,.10g}")


# -- the rooms -------------------------------------------------------------------------------------------------


@cache
def floors() -> tuple[tuple[str, ...], ...]:
    """FLOORS of tests/test_layering.py, lowest first, without the package's two entries."""
    tree = ast.parse((ROOT / "tests" / "test_layering.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FLOORS":
            found = [sorted(room for room in rooms if room[:2] != "__") for rooms in ast.literal_eval(node.value)]
            return tuple(tuple(rooms) for rooms in found if rooms)
    raise ValueError("tests/test_layering.py has no FLOORS")


def room_docstring(room: str) -> str:
    """The first sentence of a room's docstring."""
    package = ROOT / "finetune" / room
    file = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def rooms_table(language: Language) -> str:
    """The rooms, highest floor first."""
    lines = [f"| {language.words['rooms head']} |", "| --- | --- | --- |"]
    for height, rooms in reversed(list(enumerate(floors()))):
        lines += [f"| {height} | `{room}` | {language.meanings[f'rooms.{room}']} |" for room in rooms]
    return "\n".join(lines)


def rooms_drawing() -> str:
    """The house as an SVG: a floor is a row, and what stands on it may use all that is below."""
    width, step, height, gap = 760, 58, 38, 14
    levels = list(reversed(floors()))
    shapes = []
    for level, rooms in enumerate(levels):
        y, room_width = 10 + level * step, (width - 40 - gap * (len(rooms) - 1)) / len(rooms)
        shapes.append(f'<text class="floor" x="14" y="{y + 24}">{len(levels) - 1 - level}</text>')
        for place, room in enumerate(rooms):
            x = 34 + place * (room_width + gap)
            shapes.append(f'<rect x="{x:.1f}" y="{y}" width="{room_width:.1f}" height="{height}" rx="6"/>')
            shapes.append(f'<text class="room" x="{x + room_width / 2:.1f}" y="{y + 24}">{room}</text>')
        if level + 1 < len(levels):
            middle = 34 + (width - 40) / 2
            shapes.append(f'<path d="M{middle} {y + height + 4} v9 m-5 -5 l5 6 l5 -6"/>')
    style = (
        "rect{fill:#eef1fb;stroke:#5c6bc0}path{fill:none;stroke:#5c6bc0;stroke-width:1.5}"
        "text{font:15px sans-serif;fill:#26327a}.room{text-anchor:middle;font-family:monospace}.floor{fill:#8a93b8}"
    )
    size = f"{width + 10} {20 + step * len(levels) - (step - height) + 10}"
    body = "\n".join(shapes)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}">\n<style>{style}</style>\n{body}\n</svg>\n'


# -- the pages -------------------------------------------------------------------------------------------------


def made(name: str, language: Language) -> str:
    """What belongs between the markers of this name.

    Raises:
        KeyError: nothing of this name is made here, or a key has no meaning in its docstring or in docs/zh.yaml.
    """
    kinds: dict[str, Callable[[Language], str]] = {"rooms": rooms_table}
    if name.startswith("recipe."):
        return recipe_table(name.removeprefix("recipe."), language)
    return kinds[name](language)


def filled(page: Path) -> str:
    """A page's text as it should be. Tables of the benchmarks, which stand between such markers too, are left."""
    language = languages()["zh" if page.name.endswith(".zh.md") else "en"]

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{made(match[2], language)}\n{match[3]}"

    pattern = r"(<!-- begin (recipe\.\w+|rooms) -->)\n.*?(<!-- end \2 -->)"
    return re.sub(pattern, fill, page.read_text(encoding="utf-8"), flags=re.DOTALL)


def main() -> int:
    """Write all pages."""
    for page in PAGES:
        page.write_text(filled(page), encoding="utf-8")
    (DOCS / "rooms.svg").write_text(rooms_drawing(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
