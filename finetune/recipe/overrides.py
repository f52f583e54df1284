"""KEY=VALUE arguments: dotted recipe keys with YAML values, laid over the tree of a recipe file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.errors import Fault
from finetune.recipe.check import dotted
from finetune.recipe.tree import Path, Tree, parse_yaml

# Setting one on the command line takes the place of the other in the file.
_EXCLUSIVE = (
    ("training.max_steps", "training.num_train_epochs"),
    ("training.warmup_steps", "training.warmup_ratio"),
    ("data.eval", "data.eval_fraction"),
)


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[Path, str], list[Fault]]:
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
