"""Recipes and example data that come with the package, and how RECIPE on a command line finds a file.

`finetune/shipped/` holds links to the repository's `recipes/` and `data/examples/`; a wheel holds the files themselves.
"""

from __future__ import annotations

import os
from pathlib import Path

from finetune.errors import ArgumentError, RecipeError, did_you_mean, nearest

SHIPPED = Path(__file__).parent.parent / "shipped"


def shipped_recipes() -> dict[str, Path]:
    """Files of the shipped recipes by name, sorted."""
    return {file.stem: file for file in sorted((SHIPPED / "recipes").glob("*.yaml"))}


def shipped_recipe(name: str) -> Path:
    """The file of a shipped recipe.

    Raises:
        ArgumentError: there is none of that name; the message has the nearest name.
    """
    recipes = shipped_recipes()
    key = name.removesuffix(".yaml")
    if key not in recipes:
        fix = did_you_mean(key, recipes) or "`finetune recipes list` names them all."
        raise ArgumentError(f"there is no shipped recipe {name!r}", where="NAME", fix=fix)
    return recipes[key]


def copy_shipped(name: str, target: Path, *, replace: bool = False) -> Path:
    """Copy a shipped recipe to `target`, or into it when it is a folder.

    Raises:
        ArgumentError: there is no such recipe, the file exists and `replace` is false, or it cannot be written.
    """
    source = shipped_recipe(name)
    if target.is_dir():
        target = target / source.name
    try:
        with target.open("w" if replace else "x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise ArgumentError(f"{target} exists", where="FILE", fix="Add --force to replace it.") from error
    except OSError as error:
        raise ArgumentError(f"{target} cannot be written: {error.strerror}", where="FILE") from error
    return target


def to_edit(recipe: Path) -> dict[str, str]:
    """The keys of a shipped recipe that rows and a machine of one's own usually change, and what each is."""
    evaluates = "eval_fraction:" in recipe.read_text(encoding="utf-8")
    return {
        "model.path": "the model to tune",
        "data.train": "your rows",
        "data.eval_fraction": f"{'the' if evaluates else 'add it, 0.05 say: the'} share of them to evaluate on",
        "data.max_length": "tokens of a row at most",
        "training.output_dir": "the run's folder",
    }


def summary(file: Path) -> str:
    """What a recipe does: the first line of its header."""
    with file.open(encoding="utf-8") as lines:
        return lines.readline().lstrip("# ").rstrip()


def find_recipe(recipe: str | Path) -> Path:
    """The file that RECIPE names: a file, or else a shipped recipe.

    Raises:
        RecipeError: neither, or a folder; the message says what was probably meant.
    """
    text = os.fspath(recipe)
    file = Path(text)
    if "\0" in text or not text:
        raise RecipeError(f"{text!r} cannot be a file's name", where="RECIPE", fix="Name a recipe file")
    if os.path.isdir(text):
        inside = file / "recipe.yaml"
        fix = f"Did you mean {inside}?" if inside.is_file() else "Name a YAML file."
        raise RecipeError(f"{text} is a folder", where="RECIPE", fix=fix)
    if os.path.exists(text):
        return file
    recipes = shipped_recipes()
    if text in recipes:
        return recipes[text]
    raise RecipeError(f"there is no file {text}", where="RECIPE", fix=_fix_for_missing(text, file, recipes))


def _fix_for_missing(text: str, file: Path, recipes: dict[str, Path]) -> str:
    if "=" in text:
        return "RECIPE comes first, then KEY=VALUE."
    try:
        beside = [path.name for path in file.parent.glob("*.y*ml")]
    except OSError:
        beside = []
    if near := nearest(file.name, beside):
        return f"Did you mean {file.with_name(near)}?"
    return did_you_mean(file.name, recipes, "`finetune recipes list` names the shipped ones.")
