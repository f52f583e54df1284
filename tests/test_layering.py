"""Imports point one way: cli; train, serve, export, evaluate; infer; recipe; rows, compute; model; chat; errors.

`recipe` stands above the rooms whose choices it offers: the forms of rows, the losses, the modules of a model. Each of
them is one entry where it is done, and the recipe's allowed names, rules and messages derive from it. What it imports
of them is light, so that every recipe error comes without paddle, numpy or pyarrow (tests below).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "finetune"
FILES = sorted(PACKAGE.rglob("*.py"))

# What each room may import besides itself. Rooms on one floor never import each other.
FLOORS = (
    {"errors"},
    {"files", "console", "methods"},
    {"report"},
    {"chat"},
    {"model"},
    {"rows", "compute"},
    {"recipe"},
    {"infer"},
    {"train", "serve", "export", "evaluate"},
    {"doctor", "quickstart"},
    {"cli"},
    {"__init__", "__main__"},
)
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}

MAY_TOUCH_PADDLE = {"model", "compute", "train", "infer", "export", "evaluate"}


def _room(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def _imports(file: Path) -> list[tuple[str, ast.AST, bool]]:
    """(module, node, at the top level) of every import; those for type checkers only are left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write imports in full"
            found.append((node.module, node, id(node) in top))
            if node.module == "finetune":
                found += [(f"finetune.{a.name}", node, id(node) in top) for a in node.names if a.name in HEIGHT]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file):
    room = _room(file)
    assert room in HEIGHT, f"{room} is a new room: give it a floor"
    for module, node, _ in _imports(file):
        parts = module.split(".")
        if parts[0] != "finetune" or len(parts) == 1 or parts[1] == room:
            continue
        assert HEIGHT[parts[1]] < HEIGHT[room], f"{file}:{node.lineno}: {room} imports {module}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_paddle_is_imported_in_its_rooms_and_after_bring_up(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    for module, node, at_top in _imports(file):
        name = module.split(".")[0]
        assert name not in ("torch", "transformers", "trl", "peft"), f"{file}:{node.lineno}: {name} is not a dependency"
        if name not in ("paddle", "paddlenlp"):
            continue
        assert _room(file) in MAY_TOUCH_PADDLE, f"{file}:{node.lineno}: {_room(file)} imports {name}"
        if at_top:
            assert "_bring_up()" in lines[: node.lineno], f"{file}:{node.lineno}: call _bring_up() first"


def _modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(sorted({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert run.returncode == 0, run.stderr
    return set(ast.literal_eval(run.stdout.splitlines()[-1]))


def test_light_parts_load_no_heavy_package():
    code = "import finetune, finetune.cli, finetune.recipe.load, finetune.recipe.shipped, finetune.doctor"
    heavy = {"paddle", "paddlenlp", "datasets", "numpy", "transformers", "torch", "pyarrow", "pandas"}
    assert not _modules_after(code) & heavy


def test_data_and_model_lookup_load_no_paddle():
    code = "import finetune.rows.dataset, finetune.chat.render, finetune.rows.preview, finetune.model.resolve"
    assert not _modules_after(code) & {"paddle", "paddlenlp", "torch"}
