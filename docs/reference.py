"""What the pages derive from the code: `python -m docs.reference` writes it between their markers.

    <!-- begin recipe.training -->      the keys of a recipe's section: schema and docstrings
    <!-- begin forms -->                the forms of rows: their table
    <!-- begin losses -->               the losses over pairs: their table, formulas and sources
    <!-- begin rooms -->                the rooms of the package, by floor: tests/test_layering.py and their docstrings
    <!-- begin needs -->                the GPUs that the shipped recipes need, from their headers
    <!-- begin cards -->                the smallest GPU by model, method and length: finetune/train/cards.py

`page.zh.md` and README.zh-CN.md get the same with the words of docs/zh.yaml. docs/rooms.svg is drawn too. A test fails
where a page is not what this writes.
"""

from __future__ import annotations

import ast
import html
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic.fields import FieldInfo

from finetune.compute.losses import LOSSES
from finetune.methods import METHODS, methods_on
from finetune.model.family import Qwen2
from finetune.recipe import schema
from finetune.recipe.load import load_recipe
from finetune.recipe.shipped import shipped_recipes
from finetune.rows.formats import FORMS
from finetune.train.cards import Load, smallest_card

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted(DOCS.glob("*.md"))]
ENGLISH_OF = {page: page.with_name(page.name.replace(".zh.md", ".md")) for page in DOCS.glob("*.zh.md")}
ENGLISH_OF[ROOT / "README.zh-CN.md"] = ROOT / "README.md"

ENGLISH = {
    "head": "key | default | values | meaning",
    "required": "required",
    "section": "section",
    "text": "text",
    "list of sources": "list of sources",
    "list of names": "list of names",
    "mapping of names": "mapping of names to names",
    "forms head": "`format` | row | method",
    "or": "or",
    "whole number": "whole number",
    "number": "number",
    "from": "from {}",
    "above": "above {}",
    "to": "to {}",
    "below": "to below {}",
    "rooms head": "floor | room | what it does",
    "losses head": "`loss_type` | loss of a pair | keys of its own | reference | source",
    "yes": "yes",
    "no": "no",
    "needs head": "recipe | GPUs | memory of each",
    "cards head": "model | method | tuning",
    "tokens": "{} tokens",
    "none": "none",
}


@dataclass(frozen=True)
class Language:
    """The words of a page.

    Attributes:
        words: By the keys of ENGLISH.
        meanings: What keys ("training.seed"), forms ("forms.text") and rooms ("rooms.rows") mean, where the code does
            not say it in this language.
        cells: Of tables that benchmarks write.
    """

    words: Mapping[str, str]
    meanings: Mapping[str, str]
    cells: Mapping[str, str]


@cache
def languages() -> dict[str, Language]:
    """English, whose words are the code's, and those of docs/zh.yaml."""
    chinese = yaml.safe_load((DOCS / "zh.yaml").read_text(encoding="utf-8"))
    return {"en": Language(ENGLISH, english(), {}), "zh": Language(**chinese)}


def english() -> dict[str, str]:
    """What keys and rooms mean, from their docstrings."""
    keys = {
        f"{name}.{key}": text
        for name, section in schema.SECTIONS.items()
        for part in section.__mro__  # a section may take keys over from where they are used
        if "finetune" in part.__module__
        for key, text in attributes(inspect.cleandoc(part.__doc__ or ""))
    }
    forms = {f"forms.{name}": form.says for name, form in FORMS.items()}
    return keys | forms | {f"rooms.{room}": room_docstring(room) for rooms in floors() for room in rooms}


def attributes(docstring: str) -> Iterator[tuple[str, str]]:
    """(name, text) of a docstring's "Attributes", each text in one line."""
    _, _, body = docstring.partition("Attributes:\n")
    for entry in re.split(r"\n(?= {4}\w)", body.rstrip()):
        name, _, text = entry.strip().partition(": ")
        if text:
            yield name, " ".join(text.split())


# -- the recipe ------------------------------------------------------------------------------------------------


def recipe_table(name: str, language: Language) -> str:
    """The keys of a section with their defaults, values and meanings."""
    lines = [f"| {language.words['head']} |", "| --- | --- | --- | --- |"]
    for key, field in schema.SECTIONS[name].model_fields.items():
        cells = f"`{key}`", default_of(field, language), values_of(field, language), language.meanings[f"{name}.{key}"]
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines)


def default_of(field: FieldInfo, language: Language) -> str:
    """A key's default as YAML; a dash where there is none."""
    if field.is_required():
        return language.words["required"]
    if isinstance(field.default, (str, bool, int, float, list, dict)):
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
    if get_origin(kind) is dict:
        return words["mapping of names"]
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


def losses_table(language: Language) -> str:
    """The losses over pairs; formula and source are the first "loss = " and "arXiv:" of a function's docstring."""
    lines = [f"| {language.words['losses head']} |", "| --- | --- | --- | --- | --- |"]
    for name, kind in LOSSES.items():
        text = inspect.cleandoc(kind.function.__doc__ or "")
        formula, paper = re.search(r"loss = (.*)\.\n", text), re.search(r"arXiv:\d{4}\.\d{5}", text)
        if formula is None or paper is None:
            raise KeyError(f"the docstring of {kind.function.__name__} has no line 'loss = ...' or no arXiv number")
        keys = ", ".join(f"`{key}`" for key in kind.options)
        reference = language.words["yes" if kind.has_reference else "no"]
        lines.append(f"| `{name}` | {_code(formula[1])} | {keys} | {reference} | {paper[0]} |")
    return "\n".join(lines)


def forms_table(language: Language) -> str:
    """The forms of rows, and what the sketch of a row does not say."""
    lines = [f"| {language.words['forms head']} |", "| --- | --- | --- |"]
    for name, form in FORMS.items():
        row = _cell(f"`{form.row}` {language.meanings[f'forms.{name}']}".strip())
        lines.append(f"| `{name}` | {row} | {', '.join(f'`{method}`' for method in methods_on(form.kind))} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text with code in a cell."""
    return re.sub(r"`([^`]*)`", lambda match: _code(match[1]), text).replace("|", r"\|")


def _code(text: str) -> str:
    """Code in a cell. GitHub and the site agree on a bar in it only where it is written so."""
    return f"`{text}`" if "|" not in text else f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>"


def needs_table(language: Language) -> str:
    """The GPUs that each shipped recipe of a published model asks for in its header."""
    numbers = {"one": 1, "two": 2, "four": 4, "eight": 8}
    lines = [f"| {language.words['needs head']} |", "| --- | --- | --- |"]
    for name, file in shipped_recipes().items():
        asked = re.search(r"^# Needs: (\w+) GPUs? of (\d+ GB)", file.read_text(encoding="utf-8"), re.MULTILINE)
        if asked:
            lines.append(f"| `{name}` | {numbers[asked[1]]} | {asked[2]} |")
    return "\n".join(lines)


_LENGTHS = (1024, 2048, 4096, 8192)
_TUNINGS = {
    "full": ["lora=null"],
    "lora": ["lora={rank: 16}"],
    "qlora": ["lora={rank: 16}", "model.quantization=nf4"],
}


def _qwen2(hidden: int, ffn: int, layers: int, heads: int, groups: int, vocabulary: int, tied: bool) -> Qwen2:
    return Qwen2(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=tied,
    )


# From config.json of each size.
MODELS = {
    "0.5b": _qwen2(896, 4864, 24, 14, 2, 151_936, True),
    "1.5b": _qwen2(1536, 8960, 28, 12, 2, 151_936, True),
    "7b": _qwen2(3584, 18_944, 28, 28, 4, 152_064, False),
    "72b": _qwen2(8192, 29_568, 80, 64, 8, 152_064, False),
}


def cards_table(language: Language) -> str:
    """GB of the smallest GPU for one row at a time with recompute, by model, method, tuning and length."""
    words = language.words
    heads = " | ".join(words["tokens"].format(f"{length:,}") for length in _LENGTHS)
    lines = [f"| {words['cards head']} | {heads} |", f"| --- | --- | --- |{' --- |' * len(_LENGTHS)}"]
    for size, config in MODELS.items():
        for method, tuning in [(method, tuning) for method in METHODS for tuning in _TUNINGS]:
            cells = []
            for length in _LENGTHS:
                span = length * METHODS[method].rows.sides
                load = Load(_one_row(method, tuning), config, "bfloat16", tokens=span, largest=span, length=span)
                card = smallest_card(load)
                cells.append(f"{card} GB" if card else words["none"])
            lines.append(f"| Qwen2-{size.upper()} | {method} | {tuning} | {' | '.join(cells)} |")
    return "\n".join(lines)


@cache
def _one_row(method: str, tuning: str) -> schema.Recipe:
    """A shipped recipe, tuned so, of one row at a time with recompute."""
    file = shipped_recipes()[f"qwen2-0.5b-instruct_{method}_full"]
    one = ["training.per_device_train_batch_size=1", "training.recompute=true"]
    return load_recipe(file, [*_TUNINGS[tuning], *one])


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

_MADE: dict[str, Callable[[Language], str]] = {
    "cards": cards_table,
    "forms": forms_table,
    "losses": losses_table,
    "needs": needs_table,
    "rooms": rooms_table,
    **{f"recipe.{name}": partial(recipe_table, name) for name in schema.SECTIONS},
}
_BLOCK = re.compile(r"(?<=<!-- begin )([\w.]+)( -->\n).*?(?=<!-- end \1 -->)", re.DOTALL)


def filled(page: Path) -> str:
    """A page's text as it should be.

    Tables of the benchmarks stand between such markers too. In the English pages they are left as
    `python -m benchmarks --tables` wrote them, and a Chinese page gets its English one's.
    """
    chinese = ENGLISH_OF.get(page)
    language = languages()["zh" if chinese else "en"]

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name in _MADE:
            return f"{name}{match[2]}{_MADE[name](language)}\n"
        return match[0] if chinese is None else f"{name}{match[2]}{translated(measured(chinese)[name], language)}"

    return _BLOCK.sub(fill, page.read_text(encoding="utf-8"))


@cache
def measured(page: Path) -> dict[str, str]:
    """What stands between the markers of a page, by name."""
    return {match[1]: match[0].split("\n", 1)[1] for match in _BLOCK.finditer(page.read_text(encoding="utf-8"))}


def translated(table: str, language: Language) -> str:
    """A table with those of its cells in this language that `language.cells` knows."""

    def cell(match: re.Match[str]) -> str:
        return f"| {language.cells.get(match[1], match[1])} "

    return re.sub(r"\| ([^|\n]*?) (?=\|)", cell, table)


def main() -> int:
    """Write all pages."""
    for page in PAGES:
        page.write_text(filled(page), encoding="utf-8")
    (DOCS / "rooms.svg").write_text(rooms_drawing(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
