"""Make a virtual environment and install pinned packages into it; `make` calls this, with the Python it found.

    python tools/environment.py FOLDER 'WORDS OF AN INSTALL COMMAND' ['WORDS OF THE NEXT']...

uv installs where the package index has it, pip where not: uv does in seconds what takes pip minutes. Both get their
packages from where pip is configured to. What they do is shown as it goes, all of it is kept in FOLDER/install.log, and
FOLDER/.ready is written last: an environment without it is not whole. Needs nothing but the standard library.
"""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
LOG = "install.log"
READY = ".ready"
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")
TAIL = 20  # lines of the log that a failure shows
WIDTH = 110  # characters of a line that is shown

# First words of the lines worth showing: uv's and pip's. The rest (each file found, each package written) is in LOG.
SHOWN = ("Resolved", "Building", "Built", "Downloading", "Prepared", "Installed", "Bytecode",
         "Collecting", "Installing", "Successfully")  # fmt: skip

# What pip's configuration says, as uv's environment is told it. `constraint` becomes words of the command.
AS_UV_READS = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
# What changes neither which packages are found nor what is installed.
NO_MATTER = {
    "break-system-packages", "cache-dir", "compile", "config-file", "disable-pip-version-check", "no-cache-dir",
    "no-color", "no-compile", "no-input", "no-python-version-warning", "no-warn-script-location", "progress-bar",
    "quiet", "require-virtualenv", "resume-retries", "retries", "root-user-action", "use-pep517", "verbose",
}  # fmt: skip


class UvCannot(Exception):
    """Why pip installs; the message completes "uv does not install: "."""


class InstallFailed(Exception):
    """An installer ended with an error; the log says which."""


def main(folder: Path, commands: list[list[str]]) -> int:
    """Make `folder` anew and install each command's packages in turn; 0, or 1 with the end of the log on stderr."""
    print(f"Making {folder} with Python {sys.version.split()[0]}", flush=True)
    venv.create(folder, clear=True, symlinks=True, with_pip=True)
    try:
        install(folder, commands)
    except InstallFailed:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        print(*lines, sep="\n", file=sys.stderr)
        whole = f"all of its output is in {folder / LOG}. To retry, run the same command again."
        print(f"The installation failed; {whole}", file=sys.stderr)
        return 1
    prefix = subprocess.check_output([python_of(folder), "-c", "import sys; print(sys.prefix, end='')"], text=True)
    (folder / READY).write_text(prefix, encoding="utf-8")
    return 0


def install(folder: Path, commands: list[list[str]]) -> None:
    """By uv; by pip where uv is not to be had, cannot read what pip is told, or fails."""
    try:
        try:
            install_by_uv(folder, commands)
        except InstallFailed:
            raise UvCannot(f"it failed, as {folder / LOG} says") from None
    except UvCannot as reason:
        print(f"uv does not install: {reason}. pip does, which takes a few minutes", flush=True)
        for words in commands:
            run(folder, [*PIP, "install", "--use-pep517", *words])


def install_by_uv(folder: Path, commands: list[list[str]]) -> None:
    """Install pinned uv by pip, then everything by uv.

    Raises:
        UvCannot: uv is not to be had, or pip's configuration says what uv cannot be told.
        InstallFailed: uv ended with an error.
    """
    listing = subprocess.run([python_of(folder), *PIP, "config", "list"], capture_output=True, text=True, check=True)
    environment, constraints = as_uv_reads(pip_settings(listing.stdout), os.environ)
    try:
        run(folder, [*PIP, "install", "--quiet", "--retries", "1", "--only-binary", ":all:", "-c", CONSTRAINTS, "uv"])
    except InstallFailed:
        raise UvCannot("the package index does not have it") from None
    for words in commands:
        uv: list[str | Path] = ["-m", "uv", "pip", "install", "--python", python_of(folder), "--compile-bytecode"]
        run(folder, [*uv, *constraints, *words], environment)


def pip_settings(listing: str) -> dict[str, str]:
    """What `pip install` is configured to, from `pip config list`: the environment over [install] over [global]."""
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in found:
            found[section][key] = str(ast.literal_eval(value))
    return found["global"] | found["install"] | found[":env:"]


def as_uv_reads(settings: Mapping[str, str], environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The environment in which uv takes packages from where pip would, and the words of pip's own constraints.

    What the environment says to uv already stands.

    Raises:
        UvCannot: pip is told something that uv has no word for.
    """
    told = {}
    for key, value in settings.items():
        if key in AS_UV_READS:
            words = value.split()
            told[AS_UV_READS[key]] = (",".join if key == "find-links" else " ".join)(words)
        elif key != "constraint" and key not in NO_MATTER:
            raise UvCannot(f"pip's configuration has {key}, for which it has no word")
    if "UV_INDEX" in told:  # pip takes the best release of all indexes, uv that of the first index which has any
        told["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    constraints = [word for file in settings.get("constraint", "").split() for word in ("-c", file)]
    return told | dict(environment), constraints


def run(folder: Path, words: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
    """Run Python of `folder` with `words`, into the log; the lines that say how far it is are shown as they come."""
    command = [str(word) for word in (python_of(folder), *words)]
    with open(folder / LOG, "a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        )
        with process:
            for line in process.stdout or ():
                log.write(line)
                log.flush()
                for text in shown(line):
                    print(f"  {text}", flush=True)
    if process.returncode:
        raise InstallFailed


def shown(line: str) -> Iterator[str]:
    """The line as it is shown, or nothing."""
    if line.strip().startswith(SHOWN):
        text = " ".join(line.split())
        yield text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."
        if text.startswith("Installed"):  # uv's; it says nothing more until it is done
            yield "Compiling their bytecode, which takes the longest"


def python_of(folder: Path) -> Path:
    """The environment's Python, by its place: a link followed would leave the environment."""
    return Path(os.path.abspath(folder)) / "bin" / "python"


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), [shlex.split(words) for words in sys.argv[2:]]))
    except KeyboardInterrupt:
        sys.exit(130)
