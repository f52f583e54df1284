"""What `make` makes its environments with: where packages come from, uv or pip, the log and the mark of a whole one."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import environment

UV = next(
    line.strip() for line in environment.CONSTRAINTS.read_text(encoding="utf-8").splitlines() if line[:4] == "uv=="
)

# A stand-in for uv: it notes what it is told, and installs by pip, with the index that it is told of.
STAND_IN = """
import os, subprocess, sys
with open(os.environ["NOTES"], "a") as notes:
    print(sys.argv[1:], os.environ.get("UV_FIND_LINKS"), os.environ.get("UV_NO_INDEX"), file=notes)
words = [word for word in sys.argv[4:] if word != "--compile-bytecode"]
sys.exit(subprocess.call([sys.argv[sys.argv.index("--python") + 1], "-m", "pip", "install", *words[1:]]))
"""


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """Write a wheel with these files."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members = {**files, f"{info}/METADATA": metadata, f"{info}/WHEEL": tags}
    record = "".join(f"{member},,\n" for member in [*members, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for member, text in {**members, f"{info}/RECORD": record}.items():
            archive.writestr(member, text)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Make an environment from a package index that is a folder with one package, `greeting`, and what is put there."""
    index = tmp_path / "index"
    index.mkdir()
    wheel(index, "greeting", "1.0", {"greeting.py": "WORDS = 'good day'\n"})
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)  # nor what the machine's files say
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))

    def make(*commands: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, environment.__file__, "made", *commands]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)

    return make


def test_pip_installs_where_uv_is_not_to_be_had(make, tmp_path):
    made = make("greeting")
    assert made.returncode == 0, made.stderr
    assert "uv does not install: the package index does not have it. pip does" in made.stdout
    assert "Successfully installed greeting-1.0" in made.stdout
    python = tmp_path / "made/bin/python"
    assert subprocess.check_output([python, "-c", "import greeting; print(greeting.WORDS)"], text=True) == "good day\n"
    assert (tmp_path / "made/.ready").read_text() == str(tmp_path / "made")


def test_uv_installs_from_where_pip_is_configured_to(make, tmp_path):
    wheel(tmp_path / "index", "uv", UV.removeprefix("uv=="), {"uv/__init__.py": "", "uv/__main__.py": STAND_IN})
    made = make("greeting", "--no-deps greeting")
    assert made.returncode == 0, made.stderr
    assert "uv does not install" not in made.stdout
    notes = (tmp_path / "notes").read_text().splitlines()
    assert len(notes) == 2 and "'--no-deps', 'greeting'" in notes[1]
    assert all(note.endswith(f"{tmp_path / 'index'} 1") for note in notes)


def test_what_uv_cannot_install_pip_tries(make, tmp_path):
    wheel(tmp_path / "index", "uv", UV.removeprefix("uv=="), {"uv/__init__.py": "", "uv/__main__.py": "raise OSError"})
    made = make("greeting")
    assert made.returncode == 0, made.stderr
    assert "uv does not install: it failed, as made/install.log says. pip does" in made.stdout


def test_a_failure_shows_the_end_of_the_log_and_leaves_no_mark(make, tmp_path):
    made = make("farewell")
    assert made.returncode == 1
    assert "No matching distribution found for farewell" in made.stderr
    assert "all of its output is in made/install.log. To retry, run the same command again." in made.stderr
    assert not (tmp_path / "made/.ready").exists()


def test_the_environment_goes_over_the_files_as_in_pip(tmp_path):
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = file:///global\nfind-links = /a\n  /b c\n[install]\nindex-url = file:///install\n"
        "[freeze]\nall = true\n"
    )
    command = [sys.executable, "-m", "pip", "config", "list"]
    given = {
        "PIP_CONFIG_FILE": str(file),
        "PIP_DEFAULT_TIMEOUT": "7",
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
    }
    listing = subprocess.check_output(command, text=True, env=given)
    settings = environment.pip_settings(listing)
    assert settings["index-url"] == "file:///install"
    assert settings["find-links"].split() == ["/a", "/b", "c"]
    assert settings["default-timeout"] == "7" and "all" not in settings


def test_uv_is_told_what_pip_is():
    settings = {
        "index-url": "file:///one",
        "extra-index-url": "file:///two\nfile:///three",
        "find-links": "/a /b",
        "constraint": "/etc/some.txt",
        "no-input": "1",
    }
    told, words = environment.as_uv_reads(settings, {"PATH": "/bin", "UV_DEFAULT_INDEX": "file:///said"})
    assert told == {
        "PATH": "/bin",
        "UV_DEFAULT_INDEX": "file:///said",  # what is said to uv itself stands
        "UV_INDEX": "file:///two file:///three",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/a,/b",
    }
    assert words == ["-c", "/etc/some.txt"]


def test_what_uv_has_no_word_for_leaves_it_to_pip():
    with pytest.raises(environment.UvCannot, match="has keyring-provider"):
        environment.as_uv_reads({"keyring-provider": "subprocess"}, {})


def test_lines_that_are_shown():
    assert list(environment.shown("  Downloading   paddlepaddle (185.8MiB)\n")) == [
        "Downloading paddlepaddle (185.8MiB)"
    ]
    assert list(environment.shown(" + greeting==1.0\n")) == []
    installed, compiling = environment.shown("Installed 169 packages in 1.09s\n")
    assert installed.startswith("Installed") and "bytecode" in compiling
    (long,) = environment.shown("Installing collected packages: " + "name, " * 100)
    assert len(long) == environment.WIDTH and long.endswith("...")
