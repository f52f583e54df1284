"""A tree of plain values against the schema and the rules: the recipe, or every fault with its key."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from finetune.errors import did_you_mean
from finetune.methods import METHODS
from finetune.recipe.names import nearest_key, recipe_keys
from finetune.recipe.rules import clashes
from finetune.recipe.schema import Recipe
from finetune.recipe.tree import Path

_PLACEHOLDERS: dict[Path, Any] = {("method",): "sft", ("model",): {"path": "-"}, ("data",): {"train": [{"path": "-"}]}}
_REQUIRED = {"path": "-", "train": [{"path": "-"}]}


@dataclass(frozen=True)
class Finding:
    """A fault at a key, which may be one that is not there."""

    path: Path
    what: str
    fix: str | None = None


def check_tree(tree: dict[str, Any]) -> tuple[Recipe | None, list[Finding]]:
    """Build the recipe, or find all that is wrong with it: each value by itself, then what keys say together.

    The rules also run when single values are wrong, on what is left without these, so that one run shows all faults.
    """
    findings: list[Finding] = []
    broken: set[str] = set()
    recipe: Recipe | None
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        entries = [(_known_path(entry["loc"]), entry) for entry in reversed(error.errors(include_url=False))]
        # A key that is not in the tree was filled in from a faulty one, which has a fault of its own.
        locations = {path: entry for path, entry in entries if entry["type"] == "missing" or _is_in(tree, path)}
        findings = [_explain(path, entry["type"], tree) for path, entry in reversed(locations.items())]
        broken = {dotted(path) for path in locations}
        recipe = _without(tree, [(path, entry["type"]) for path, entry in locations.items()])
    if recipe is not None:
        for clash in clashes(recipe):
            if not any(_touches(key, bad) for key in clash.keys for bad in broken):
                keys = tuple(int(part) if part.isdigit() else part for part in clash.keys[0].split("."))
                findings.append(Finding(keys, clash.what, clash.fix))
    return (None if findings else recipe), findings


def dotted(path: Path) -> str:
    """`("data", "train", 0, "path")` as `data.train.0.path`."""
    return ".".join(map(str, path))


def show_path(path: Path) -> str:
    """`("data", "train", 0, "path")` as `data.train[0].path`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{_short(part)}" for part in path)
    return text.removeprefix(".") or "the recipe"


def show_value(value: Any) -> str:
    """A value as messages show it, cut when long."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, dict)):
        return ("an empty " if not value else "a ") + ("list" if isinstance(value, list) else "section")
    return _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _touches(key: str, bad: str) -> bool:
    return key == bad or key.startswith(f"{bad}.") or bad.startswith(f"{key}.")


def _known_path(location: tuple[str | int, ...]) -> Path:
    """The part of pydantic's location that is a path of the recipe: what it adds names branches of a union."""
    path: Path = ()
    section = ""
    for part in location:
        if isinstance(part, str) and path and isinstance(path[-1], str) and section not in recipe_keys():
            break
        path = (*path, part)
        if isinstance(part, str):
            section = f"{section}.{part}" if section else part
    return path


@lru_cache(maxsize=1)
def _json_schema() -> dict[str, Any]:
    return Recipe.model_json_schema()


def _schema_at(path: Path) -> dict[str, Any] | None:
    """The JSON schema of a key; None when there is no such key."""
    schema = _json_schema()
    for part in path:
        outer = _open(schema)
        inner = outer.get("items") if isinstance(part, int) else outer.get("properties", {}).get(part)
        if inner is None:
            return None
        schema = inner
    return schema


def _open(schema: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference, or the first branch of a union that is a section."""
    if "$ref" in schema:
        opened: dict[str, Any] = _json_schema()["$defs"][schema["$ref"].rpartition("/")[2]]
        return opened
    for branch in schema.get("anyOf", ()):
        if "$ref" in branch:
            return _open(branch)
    return schema


def _expected(schema: dict[str, Any]) -> str:
    """What a key takes, in words.

    >>> _expected({"type": "integer", "minimum": 1, "maximum": 8, "unit": "rows"})
    'a whole number from 1 to 8 (rows)'
    """
    if "takes" in schema:
        return str(schema["takes"])
    if "$ref" in schema:
        return f"a section with the keys {', '.join(_open(schema)['properties'])}"
    if "anyOf" in schema:
        text = " or ".join(_expected(branch) for branch in schema["anyOf"] if branch.get("type") != "null")
    elif "enum" in schema:
        text = "one of " + ", ".join(choice or '""' for choice in schema["enum"])
    elif "const" in schema:
        text = schema["const"]
    elif schema["type"] == "array":
        text = "a list, not empty" if schema.get("minItems") else "a list"
        if schema["items"].get("type") == "string":
            text = "a list of names"
    elif schema["type"] == "boolean":
        text = "true or false"
    elif schema["type"] == "string":
        text = f"text of {schema.get('minLength', 0)} to {schema.get('maxLength', 'any number of')} characters"
    else:
        text = ("a whole number" if schema["type"] == "integer" else "a number") + _range(schema)
    return f"{text} ({schema['unit']})" if "unit" in schema else text


def _range(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:.10g}"
    parts = [f"above {above:g}" if above is not None else "", f"of at least {low:g}" if low is not None else ""]
    parts += [f"below {below:.10g}" if below is not None else "", f"at most {high:.10g}" if high is not None else ""]
    parts = [part for part in parts if part]
    return " " + " and ".join(parts) if parts else ""


def _explain(path: Path, kind: str, tree: dict[str, Any]) -> Finding:
    """Words for one of pydantic's errors."""
    name = show_path(path)
    if kind == "extra_forbidden":
        return _explain_unknown(path)
    schema = _schema_at(path) or _json_schema()
    right = _expected(schema) if path else f"a mapping with the keys {', '.join(Recipe.model_fields)}"
    if kind == "missing":
        return Finding(path, f"{name} is missing", _how_to_add(path, right))
    value = _value_at(tree, path)
    if value is None:
        return Finding(path, f"{name} has no value", f"It must be {right}.")
    found = show_value(value)
    if isinstance(value, str) and _takes(schema, "integer", "number"):
        found = f"the text {found}"
    numeric = isinstance(value, (bool, int, float)) and not _takes(schema, "integer", "number")
    if numeric and _takes(schema, "string") and "takes" not in schema:
        right += ", in quotes where YAML would read it as something else"
    return Finding(path, f"{name} is {found}", did_you_mean(str(value), _words(schema), f"It must be {right}."))


def _words(schema: dict[str, Any]) -> list[str]:
    """The words that a key takes."""
    words = [str(c) for branch in (schema, *schema.get("anyOf", ())) for c in branch.get("enum", ())]
    return words + [branch["const"] for branch in schema.get("anyOf", ()) if "const" in branch]


def _takes(schema: dict[str, Any], *types: str) -> bool:
    return any(branch.get("type") in types for branch in (schema, *schema.get("anyOf", ())))


def _how_to_add(path: Path, right: str) -> str:
    examples: dict[Path, str] = {
        ("method",): f"Write {' or '.join(repr(f'method: {name}') for name in METHODS)}.",
        ("model",): "Add a 'model:' section with 'path:', for example Qwen/Qwen2-0.5B-Instruct.",
        ("model", "path"): "Name the base model, for example 'path: Qwen/Qwen2-0.5B-Instruct'.",
        ("data",): "Add a 'data:' section with 'train: [{path: FILE}]'.",
        ("data", "train"): "Name at least one source, for example 'train: [{path: data/train.jsonl}]'.",
    }
    return examples.get(path, f"It must be {right}.")


def _explain_unknown(path: Path) -> Finding:
    section = dotted(tuple(part for part in path[:-1] if isinstance(part, str)))
    near = nearest_key(section, str(path[-1]))
    what = f"{show_path(path)} is not a recipe key"
    if near and near == path[-1]:
        outer, _, inner = near.rpartition(".")
        return Finding(path, what, f"Keys are nested in a file: write '{inner}:' under '{outer}:'.")
    if near:
        return Finding(path, what, f"Did you mean {near}?")
    keys = ", ".join(recipe_keys().get(section, ()))
    return Finding(path, what, f"{section or 'A recipe'} has the keys {keys}." if keys else None)


def _is_in(tree: Any, path: Path) -> bool:
    try:
        _value_at(tree, path)
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _value_at(tree: Any, path: Path) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _without(tree: dict[str, Any], faults: list[tuple[Path, str]]) -> Recipe | None:
    """The recipe with faulty keys left out and missing ones filled with placeholders; None when nothing is left."""
    tree = copy.deepcopy(tree)
    for path, _ in sorted(faults, key=lambda fault: (len(fault[0]), dotted(fault[0])), reverse=True):
        if not path:
            return None
        parent = _value_at(tree, path[:-1])
        default = _PLACEHOLDERS.get(path, _REQUIRED.get(str(path[-1])) if _is_required(path) else None)
        if isinstance(parent, list):
            parent[int(path[-1])] = {"path": "-"}
        elif default is not None:
            parent[path[-1]] = copy.deepcopy(default)
        else:
            parent.pop(path[-1], None)
    try:
        return Recipe.model_validate(tree)
    except ValidationError:
        return None


def _is_required(path: Path) -> bool:
    parent = _schema_at(path[:-1])
    return parent is not None and path[-1] in _open(parent).get("required", ())
