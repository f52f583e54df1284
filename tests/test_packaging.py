"""What is installed and shipped: dependencies and their pins, the wheel, and the commands of the Makefile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from finetune import doctor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# Requirements of paddlenlp that its import does not need, left out where it is installed past its pin of numpy.
UNNEEDED = ("onnx", "paddle2onnx", "fast_dataindex", "paddlefsl", "blobfile", "colorama")


def requirements() -> list[Requirement]:
    """Those of the package and of the extras that `make` installs, each with the marker of its extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [Requirement(text) for text in project["dependencies"]]
    for extra, texts in project["optional-dependencies"].items():
        found += [Requirement(f'{text}; extra == "{extra}"') for text in texts]
    return [each for each in found if each.name != project["name"]]


def applies(requirement: Requirement, python: str, extra: str = "") -> bool:
    place = {"python_version": python, "python_full_version": f"{python}.0", "extra": extra}
    return requirement.marker is None or requirement.marker.evaluate(place)


def pins(python: str) -> dict[str, str]:
    """Name and version of each package of constraints.txt for one Python; a name that stands twice is an error."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        if applies(pin, python):
            (specifier,) = pin.specifier
            assert specifier.operator == "==" and pin.name not in found, line
            found[canonicalize_name(pin.name)] = specifier.version
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_within_what_pyproject_admits(python):
    pinned = pins(python)
    extras = ("", "cpu", "gguf", "evaluate", "dev")
    for requirement in requirements():
        if any(applies(requirement, python, extra) for extra in extras) and requirement.name != "pip":
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_versions_of_the_pair_stand_once():
    pinned = pins("3.13")
    assert (pinned["paddlepaddle"], pinned["paddlenlp"]) == (doctor.PADDLE_VERSION, doctor.PADDLENLP_VERSION)


def test_no_pin_names_a_host():
    for file in ("constraints.txt", "docs/requirements.txt", "tests/parity/requirements.txt"):
        assert not re.search(r"://|@", (ROOT / file).read_text(encoding="utf-8")), file


def test_paddlenlp_imports_with_what_python_3_13_is_given_of_it():
    """All of it: what the package requires on 3.13 and paddlenlp on the others differs by what no import needs."""
    given = {canonicalize_name(each.name) for each in requirements() if applies(each, "3.13")}
    all_of_it = map(Requirement, metadata.requires("paddlenlp") or ())
    wanted = {canonicalize_name(each.name) for each in all_of_it if applies(each, "3.13")}
    # what comes with another: dill with datasets, protobuf with paddle, flask-babel with visualdl
    missing = wanted - given - {"dill", "protobuf", "flask-babel"}
    assert missing <= {canonicalize_name(name) for name in UNNEEDED}
    program = (
        f"import sys\nfor name in {UNNEEDED}: sys.modules[name] = None\n"
        "from finetune.model.runtime import paddle; paddle()\n"
        "import paddlenlp; print(paddlenlp.Taskflow, paddlenlp.trainer.Trainer, paddlenlp.transformers.AutoTokenizer)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_the_wheel_holds_types_recipes_and_data(tmp_path):
    source = tmp_path / "source"
    leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("finetune", "recipes", "data"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=leave_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    run = subprocess.run([sys.executable, *build], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    shipped = set(zipfile.ZipFile(wheel).namelist())
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "finetune").rglob("*.py")}
    wanted |= {f"finetune/shipped/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    wanted |= {f"finetune/shipped/data/examples/{path.name}" for path in (ROOT / "data/examples").glob("*.jsonl")}
    wanted |= {
        f"finetune/report/{path.name}" for path in (ROOT / "finetune/report").glob("*.*") if path.suffix != ".py"
    }
    assert len(wanted) > 100 and wanted | {"finetune/py.typed"} <= shipped
    assert not [name for name in shipped if name.startswith(("tests", "tools", "benchmarks"))]


# --- the Makefile ---------------------------------------------------------------------------------------------------


def make(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "--no-print-directory", *words], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder with what `make install` reads, and no environment."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_help_lists_every_target():
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    listed = re.findall(r"^make (\S+)", make("help").stdout, re.MULTILINE)
    assert sorted(listed) == sorted(set(phony.split()) - {"help"})


def test_quick_is_made_of_tests_that_are_there():
    recipe = make("-n", "quick").stdout
    named = re.findall(r"\btests/\S+", recipe)
    assert len(named) > 5 and all((ROOT / name).exists() for name in named)


def test_a_python_that_will_not_do_is_named(checkout):
    run = make("install", "PYTHON=/bin/false", folder=checkout)
    assert run.returncode == 2
    assert "Python 3.10 to 3.13 with its venv module is needed; none of these is one: /bin/false" in run.stderr


def test_an_environment_is_made_anew_when_it_is_not_whole_or_was_moved(checkout):
    def is_ready() -> bool:
        return "tools/environment.py" not in make("-n", "install", folder=checkout).stdout

    assert not is_ready()
    venv = checkout / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    assert not is_ready()
    (venv / ".ready").write_text(str(venv))
    assert is_ready()
    (venv / ".ready").write_text(str(venv.with_name("elsewhere")))
    assert not is_ready() and not (venv / ".ready").exists()
    (venv / ".ready").write_text(str(venv))
    later = (venv / ".ready").stat().st_mtime + 1
    os.utime(checkout / "constraints.txt", (later, later))
    assert not is_ready()
