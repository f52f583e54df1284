"""Recipe files: read with overrides into a `Recipe`, or one error with every fault; and written back."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path as File
from typing import Any

import yaml

from finetune.errors import Fault, RecipeError
from finetune.recipe.check import Finding, check_tree, dotted
from finetune.recipe.schema import Recipe, Source, TrainingSection
from finetune.recipe.shipped import SHIPPED, find_recipe
from finetune.recipe.tree import Path, Tree, parse_yaml, resolve_scalar

MAX_BYTES = 65_536
# Setting one on the command line takes the place of the other in the file.
_EXCLUSIVE = (
    ("training.max_steps", "training.num_train_epochs"),
    ("training.warmup_steps", "training.warmup_ratio"),
    ("data.eval", "data.eval_fraction"),
)


def load_recipe(path: str | File, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    What it leaves open is settled: `output_dir` is outputs/<name of the file>, `eval_steps` is `save_steps` when there
    is evaluation data. A relative data path that is not there from the current directory is tried from the recipe's
    folder, and example data from the package's own.

    Args:
        path: A recipe file, or the name of a shipped recipe.
        overrides: `KEY=VALUE` with dotted keys and YAML values.

    Raises:
        RecipeError: the file cannot be read or anything in it is wrong; `faults` holds all, each with file and line.
    """
    file = find_recipe(path)
    tree = parse_yaml(_read_text(file))
    faults = [Fault(what, _place_of(file, line), fix) for line, what, fix in tree.faults]
    if not tree.complete or (tree.value is not None and not isinstance(tree.value, dict)):
        if not faults:
            faults = [Fault("this is not a mapping of keys", f"{file}:1", "Start with 'method: sft'.")]
        raise RecipeError.of(faults)
    if tree.value is None:
        raise RecipeError("the recipe is empty", where=str(file), fix="`finetune recipes list` names complete ones.")
    value = tree.value
    argument_of, override_faults = _apply_overrides(value, overrides)
    findings = _empty_sections(value)
    _settle(value, file)
    recipe, found = check_tree(value)
    findings += found
    lines = {path: line for path, line in tree.lines.items() if not any(path[: len(a)] == a for a in argument_of)}
    faults += override_faults + _place_findings(findings, file, lines, argument_of)
    if faults or recipe is None:
        raise RecipeError.of(faults)
    return _locate_data(recipe, file)


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML, keys in the order of the schema; `load_recipe` reads the same recipe back."""
    value = recipe.model_dump()
    for name in ("train", "eval"):
        for source in value["data"][name]:
            source["path"] = _portable(source["path"])
    return yaml.dump(_written(recipe, value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31)


class _Dumper(yaml.SafeDumper):
    """Writes what `parse_yaml` reads: text is quoted where YAML 1.2 would take it for something else."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    style = None if isinstance(resolve_scalar(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _written(model: Any, value: dict[str, Any]) -> dict[str, Any]:
    """Values without those that are None by default, sources included."""
    kept: dict[str, Any] = {}
    for name, info in type(model).model_fields.items():
        inner = getattr(model, name)
        if inner is None and info.default is None:
            continue
        if hasattr(inner, "model_fields_set"):
            kept[name] = _written(inner, value[name])
        elif isinstance(inner, list) and inner and hasattr(inner[0], "model_fields_set"):
            kept[name] = [_written(item, plain) for item, plain in zip(inner, value[name])]
        else:
            kept[name] = value[name]
    return kept


def _read_text(file: File) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=str(file)) from error
    if len(data) > MAX_BYTES:
        raise RecipeError(f"is larger than {MAX_BYTES} bytes", where=str(file), fix="A recipe is a page of YAML.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"byte 0x{data[error.start]:02X} is not UTF-8", where=f"{file}:{line}", fix="Save the file as UTF-8."
        ) from error


def _place_of(file: File, line: int | None) -> str:
    return f"{file}:{line}" if line else str(file)


def _place_findings(
    findings: list[Finding], file: File, lines: dict[Path, int], argument_of: dict[Path, str]
) -> list[Fault]:
    """Findings in the order of the file, arguments last; a key that is not there has its section's line.

    A section that only an argument names (`traning.max_steps=3`) is that argument's.
    """
    placed = []
    for finding in findings:
        path = finding.path
        if path not in lines:
            path = next((key for key in argument_of if key[: len(path)] == path and path), path)
        while path and path not in argument_of and path not in lines:
            path = path[:-1]
        line = lines.get(path, 0)
        place = argument_of.get(path) or _place_of(file, line)
        placed.append((path in argument_of, line, Fault(finding.what, place, finding.fix)))
    return [fault for *_, fault in sorted(placed, key=lambda entry: entry[:2])]


def _empty_sections(value: dict[str, Any]) -> list[Finding]:
    """A section that is named but empty would silently mean full fine-tuning, or no section."""
    return [
        Finding((name,), f"{name} is empty", f"Write '{name}: {{}}' for its defaults, or remove it.")
        for name in ("lora", "dpo")
        if name in value and value[name] is None
    ]


def _settle(value: dict[str, Any], file: File) -> None:
    training, data = value.setdefault("training", {}), value.get("data")
    if not isinstance(training, dict):
        return
    training.setdefault("output_dir", f"outputs/{file.stem}")
    save_steps = training.get("save_steps", TrainingSection.model_fields["save_steps"].default)
    if isinstance(data, dict) and (data.get("eval") or data.get("eval_fraction")) and isinstance(save_steps, int):
        training.setdefault("eval_steps", save_steps)


# -- KEY=VALUE arguments -----------------------------------------------------------------------------------------


def _apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[Path, str], list[Fault]]:
    """Lay overrides over `tree`, in place, the last of a key winning.

    A value of null takes a key out again, so that its default holds; `lora=null` is full fine-tuning. Sources in a
    short form become lists of sources, so that `data.train.0.path` is there to be set.

    Returns:
        The argument that set each path, for messages, and what was wrong with arguments themselves.
    """
    places: dict[Path, str] = {}
    faults: list[Fault] = []
    _wrap_sources(tree)
    for argument in overrides:
        place = f"argument {_shown(argument)}"
        if not argument.isprintable():
            faults.append(Fault("it holds bytes that are not text", place, "Use UTF-8 without control characters."))
            continue
        key, sign, text = argument.partition("=")
        path = _path_of(key)
        if not sign or not all(str(part) for part in path) or isinstance(path[0], int):
            faults.append(Fault("this is not KEY=VALUE", place, "Write for example training.max_steps=3."))
            continue
        # A glob: in an argument of its own there is nothing that an alias could name.
        parsed = Tree(text) if text.startswith("*") else parse_yaml(text)
        faults += [Fault(what, place, fix) for _, what, fix in parsed.faults]
        if parsed.faults:
            continue
        fault = _place(tree, path, parsed.value)
        if fault:
            faults.append(Fault(fault, place))
            continue
        _wrap_sources(tree)
        places[path] = place
        if parsed.value:
            _displace(tree, key.strip(), places)
    return places, faults


def _path_of(key: str) -> Path:
    # No list has more than nine digits of items, and Python refuses to convert thousands.
    return tuple(int(part) if part.isdecimal() and len(part) <= 9 else part for part in key.strip().split("."))


def _wrap_sources(tree: dict[str, Any]) -> None:
    """Let `data.train` and `data.eval` be one path, one source or a list of paths too."""
    data = tree.get("data")
    if not isinstance(data, dict):
        return
    for name in ("train", "eval"):
        sources = data.get(name)
        if isinstance(sources, (str, dict)) and sources:
            sources = [sources]
        if isinstance(sources, list):
            data[name] = [{"path": source} if isinstance(source, str) else source for source in sources]


def _shown(argument: str) -> str:
    return repr(argument if len(argument) <= 80 else f"{argument[:77]}...")


def _place(tree: dict[str, Any], path: Path, value: Any) -> str | None:
    """Put a value where the path says; sections on the way are made. Returns what is wrong with the path, if so."""
    at: Any = tree
    removes = value is None and path != ("training", "save_total_limit")
    for index, part in enumerate(path):
        if isinstance(at, list) and not (isinstance(part, int) and part < len(at)):
            return f"{dotted(path[:index])} is a list of {len(at)}, which has no item {_shown(str(part))}"
        if not isinstance(at, (dict, list)):
            return f"{dotted(path[:index])} is a value and has no keys"
        key = part if isinstance(at, list) else str(part)
        if index < len(path) - 1:
            if isinstance(at, dict) and at.get(key) is None:
                if removes:
                    return None  # a section that is made switches something on
                at[key] = {}
            at = at[key]
    if removes and isinstance(at, dict):
        at.pop(key, None)
    else:
        at[key] = value
    return None


def _displace(tree: dict[str, Any], key: str, places: dict[Path, str]) -> None:
    for pair in _EXCLUSIVE:
        if key in pair:
            section, name = pair[1 - pair.index(key)].split(".")
            if (section, name) not in places and isinstance(tree.get(section), dict):
                tree[section].pop(name, None)


# -- data paths ---------------------------------------------------------------------------------------------------


def _locate_data(recipe: Recipe, file: File) -> Recipe:
    def located(sources: list[Source]) -> list[Source]:
        return [source.model_copy(update={"path": _locate(source.path, file)}) for source in sources]

    update = {"train": located(recipe.data.train), "eval": located(recipe.data.eval)}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=update)})


def _locate(path: str, file: File) -> str:
    if os.path.isabs(path) or _is_there(path):
        return path
    folders = [file.parent]
    if path.startswith("data/examples/"):
        folders.append(SHIPPED)
    return next((os.path.join(folder, path) for folder in folders if _is_there(os.path.join(folder, path))), path)


def _is_there(path: str) -> bool:
    return os.path.exists(path) or (glob.has_magic(path) and next(glob.iglob(path, recursive=True), None) is not None)


def _portable(path: str) -> str:
    """Example data by its place in the package, so that a written recipe holds no path of this installation."""
    prefix = f"{SHIPPED}{os.sep}"
    return path.removeprefix(prefix)
