"""The shape of the house: imports point one way and never in a circle, files and functions stay small.

The way is cli; train, serve, export, evaluate; infer; recipe; rows, compute; model; chat; errors.

`recipe` stands above the rooms whose choices it offers: the forms of rows, the losses, the modules of a model. Each of
them is one entry where it is done, and the recipe's allowed names, rules and messages derive from it. What it imports
of them is light, so that every recipe error comes without paddle, numpy or pyarrow (tests below).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "finetune"
FILES = sorted(PACKAGE.rglob("*.py"))

# What each room may import besides itself. Rooms on one floor never import each other.
FLOORS = (
    {"errors"},
    {"files", "console", "methods", "arguments"},
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

# Imports inside functions count as imports in every test below, and are made for these reasons only.
LATE = {
    "a command loads its own part, and --help none": {("cli.py", "finetune"), ("__init__.py", "finetune.infer.auto")},
    "only models and data from a hub need it": {
        ("model/hubs/aistudio.py", "aistudio_sdk"),
        ("model/hubs/huggingface.py", "huggingface_hub"),
        ("model/hubs/huggingface.py", "requests"),
        ("model/hubs/modelscope.py", "modelscope_hub"),
        ("model/hubs/paddlenlp.py", "paddlenlp"),
        ("model/hubs/paddlenlp.py", "requests"),
        ("model/hubs/store.py", "requests"),
    },
    "only some kinds of files, and caches, need it": {
        ("rows/arrowfile.py", "pyarrow"),
        ("rows/cache.py", "pyarrow"),
        ("rows/sources.py", "datasets"),
    },
    "not installed by default, which has a message of its own": {
        ("evaluate/run.py", "lm_eval"),
        ("evaluate/run.py", "datasets"),
        ("evaluate/run.py", "finetune.evaluate.harness"),
        ("model/gguf/package.py", "gguf"),
    },
    "only answers under a grammar need it": {("serve/protocol.py", "finetune.serve.grammar")},
    "takes hold of the terminal": {("infer/chat.py", "readline")},
    "paddle takes seconds, and is brought up quietly": {
        ("model/runtime.py", "paddle"),
        ("model/runtime.py", "paddlenlp"),
    },
    "what comes before works without paddle: arguments, a tokenizer, a dry run, the launcher, one process": {
        ("export/export.py", "finetune.export.verify"),
        ("infer/auto.py", "finetune.infer.engine"),
        ("infer/auto.py", "finetune.model.load"),
        ("infer/open.py", "finetune.compute.packed"),
        ("infer/open.py", "finetune.infer.engine"),
        ("infer/open.py", "finetune.model.load"),
        ("infer/open.py", "finetune.model.lora"),
        ("train/processes/parallel.py", "paddle"),
        ("train/processes/sharding.py", "paddle"),
        ("train/run.py", "finetune.train.processes.launch"),
        ("train/run.py", "finetune.train.session"),
    },
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
MOST_LINES_OF_A_FUNCTION = 60
LONGER = {("train/loop.py", "train_loop")}  # read top to bottom, it is what a step is
MOST_LINES_OF_A_FILE = {"finetune": 500, "tests": 500, "benchmarks": 500}


@dataclass(frozen=True)
class Import:
    """One imported module.

    Attributes:
        module: In full; `from finetune.model import convert` imports finetune.model.convert.
        line: Where.
        late: Whether inside a function.
    """

    module: str
    line: int
    late: bool


def _name(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def _module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_module(file): file for file in FILES}


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


@cache
def _imports(file: Path) -> tuple[Import, ...]:
    """All imports of a file, those inside functions too; those for type checkers only are left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {id(inner) for node in ast.walk(tree) if _is_for_typing(node) for inner in ast.walk(node)}
    late = {id(inner) for node in ast.walk(tree) if isinstance(node, FUNCTIONS) for inner in ast.walk(node)}
    return tuple(
        Import(module, node.lineno, id(node) in late)
        for node in ast.walk(tree)
        if id(node) not in typing_only
        for module in _modules_of(node, file)
    )


def _is_for_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def _modules_of(node: ast.AST, file: Path) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, f"{file}:{node.lineno}: write imports in full"
        names = (f"{node.module}.{alias.name}" for alias in node.names)
        yield from {name if name in MODULES else node.module for name in names}


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_imports_point_down(file):
    room = _room(_module(file))
    assert room in HEIGHT, f"{room} is a new room: give it a floor"
    for found in _imports(file):
        if found.module in MODULES and found.module != "finetune" and _room(found.module) != room:
            below = HEIGHT[_room(found.module)] < HEIGHT[room]
            assert below, f"{file}:{found.line}: {room} imports {found.module}"


def test_no_imports_in_a_circle():
    needs = {name: {found.module for found in _imports(file)} - {name} for name, file in MODULES.items()}
    assert not _in_circles(needs)


def _in_circles(needs: dict[str, set[str]]) -> dict[str, set[str]]:
    """Those that both need and are needed, by others of which the same is true."""
    while True:
        kept = {name: {other for other in others if other in needs} for name, others in needs.items()}
        needed = set().union(*kept.values())
        kept = {name: others for name, others in kept.items() if others and name in needed}
        if kept == needs:
            return needs
        needs = kept


def test_imports_inside_functions_have_a_reason():
    allowed = {place for places in LATE.values() for place in places}
    used = set()
    for file in FILES:
        for found in _imports(file):
            if found.late:
                places = {(name, late) for name, late in allowed if name == _name(file) and _is_in(found.module, late)}
                assert places, f"{file}:{found.line}: import {found.module} at the top, or say in LATE why not"
                used |= places
    assert used == allowed, "LATE names imports that are no more"


def _is_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def test_functions_are_short():
    found = {
        (_name(file), node.name)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, FUNCTIONS[:2])
        if (node.end_lineno or 0) - node.lineno >= MOST_LINES_OF_A_FUNCTION
    }
    assert found == LONGER


@pytest.mark.parametrize(("folder", "most"), MOST_LINES_OF_A_FILE.items())
def test_files_are_short(folder, most):
    for file in (ROOT / folder).rglob("*.py"):
        lines = len(file.read_text(encoding="utf-8").splitlines())
        assert lines <= most, f"{file} has {lines} lines"


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_paddle_is_imported_in_its_rooms_and_after_bring_up(file):
    lines, room = file.read_text(encoding="utf-8").splitlines(), _room(_module(file))
    for found in _imports(file):
        name, place = found.module.split(".")[0], f"{file}:{found.line}"
        assert name not in ("torch", "transformers", "trl", "peft"), f"{place}: {name} is not a dependency"
        if name not in ("paddle", "paddlenlp"):
            continue
        assert room in MAY_TOUCH_PADDLE, f"{place}: {room} imports {name}"
        assert found.late or "_bring_up()" in lines[: found.line], f"{place}: call _bring_up() first"


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
