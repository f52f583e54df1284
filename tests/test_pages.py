"""What the pages tell people to type: the program takes every command, every example is valid, both languages agree.

Those commands that need nothing but a CPU are run, in the order of the pages, and print what is shown. The run uses a
model of random weights with the quickstart's tokenizer, which also stands in the hub's cache for the model that the
shipped recipes name. What weights decide, such as an answer, is therefore not compared.
"""

from __future__ import annotations

import ast
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
import typer

from finetune.cli import app
from finetune.quickstart import base, tasks
from finetune.recipe.load import load_recipe
from finetune.rows.formats import parse_row
from tests.runs import finetune

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
LANGUAGES = {"sh", "console", "text", "yaml", "json", "python"}
HUB_MODEL = "Qwen/Qwen2-0.5B-Instruct"


@dataclass(frozen=True)
class Command:
    """A line to type, and what is shown below it."""

    line: str
    output: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """The line's words, without variables set before it and comments behind it."""
        words = shlex.split(self.line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        return words


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of all fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> Iterator[Command]:
    """All lines to type: those of sh blocks, and those behind `$ ` in console blocks."""
    for language, text in blocks(page):
        if language == "sh":
            yield from (Command(line) for line in text.splitlines() if line.strip())
        elif language == "console":
            for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                line, *output = part.splitlines()
                yield Command(line, tuple(output))


def inline_commands(page: Path) -> list[list[str]]:
    """Words of `finetune ...` in running text."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [shlex.split(line)[1:] for line in re.findall(r"`(finetune [^`\n]+)`", text)]


def find_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words name, and the words behind it."""
    command = typer.main.get_command(app)
    words = list(words)
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"there is no command {' '.join(words[:1])}"
        command = command.commands[words.pop(0)]
    return command, words


def pages_with(*languages: str) -> list[Path]:
    return [page for page in PAGES if any(language in languages for language, _ in blocks(page))]


def named(page: Path) -> str:
    return page.name


# -- what is written is valid ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_blocks_say_what_they_are(page):
    assert {language for language, _ in blocks(page)} <= LANGUAGES
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks(page))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_program_takes_the_commands_of_the_pages(page):
    for typed in commands(page):
        words = typed.words
        if words[:1] == ["finetune"]:
            command, rest = find_command(words[1:])
            command.make_context(command.name, rest)  # raises what a user would read
        elif words[:1] == ["make"]:
            targets = [word for word in words[1:] if "=" not in word]
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), typed.line
        elif words[1:2] == ["-m"]:
            assert find_spec(words[2]) is not None, typed.line
        else:
            assert words[:1] in (["."], ["pip"], ["head"], ["curl"]) or words == ["set"], typed.line


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_in_running_text_have_the_options_that_they_name(page):
    for words in inline_commands(page):
        if words[0].startswith("-"):
            continue
        command, rest = find_command(words)
        known = {option for parameter in command.params for option in parameter.opts} | {"--debug"}
        assert {word for word in rest if word.startswith("-")} <= known, words


def test_extras_that_the_pages_install_are_those_of_the_package():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    extras = re.findall(r"^(\w+) = \[", text.split("\n[")[0], re.MULTILINE)
    for page in PAGES:
        named = re.findall(r"(?:paddle-finetune|'\.)\[(\w+(?:,\w+)*)\]", page.read_text(encoding="utf-8"))
        assert {extra for group in named for extra in group.split(",")} <= set(extras), page


@pytest.mark.parametrize("page", pages_with("yaml"), ids=named)
def test_recipes_of_the_pages_are_valid(page, tmp_path):
    for language, text in blocks(page):
        if language == "yaml":
            rest = "" if text.startswith("method:") else "method: sft\nmodel: {path: model}\n"  # a part of a recipe
            (tmp_path / "recipe.yaml").write_text(rest + text, encoding="utf-8")
            load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("page", pages_with("json"), ids=named)
def test_rows_of_the_pages_are_rows(page):
    for language, text in blocks(page):
        if language == "json":
            for number, line in enumerate(text.splitlines(), 1):
                parse_row(json.loads(line), "auto", f"{page.name}:{number}")


@pytest.mark.parametrize("page", pages_with("python"), ids=named)
def test_python_of_the_pages_compiles(page):
    for language, text in blocks(page):
        if language == "python":
            ast.parse(text)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_and_anchors_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]+))?\)", text):
        file = (page.parent / target) if target else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in {slug(head) for head in headings(file)}, f"{page.name} links to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_and_names_that_the_pages_tell_of_are_there(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:finetune|tests|docs|recipes|benchmarks)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), name
    for file, name in re.findall(r"`(\w[\w/]*\.py): (\w+)`", text):
        source = (ROOT / "finetune" / file).read_text(encoding="utf-8")
        assert re.search(rf"^(?:class|def) {name}\b", source, re.MULTILINE), f"{file} has no {name}"


def headings(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    kept = re.sub(r"[^\w\- ]", "", heading.lower())
    return kept.strip().replace(" ", "-")


# -- both languages --------------------------------------------------------------------------------------------


ENGLISH_OF = {page: page.with_name(page.name.replace(".zh.md", ".md")) for page in sorted(DOCS.glob("*.zh.md"))}
ENGLISH_OF |= {ROOT / "README.zh-CN.md": ROOT / "README.md", DOCS / "contributing.zh.md": ROOT / "CONTRIBUTING.md"}


@pytest.mark.parametrize("chinese", ENGLISH_OF, ids=named)
def test_a_chinese_page_is_built_as_its_english_one(chinese):
    def levels(page: Path) -> list[int]:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        return [len(mark) for mark in re.findall(r"^(#+) ", text, re.MULTILINE)]

    def rows(page: Path) -> int:
        return len(re.findall(r"^\|", page.read_text(encoding="utf-8"), re.MULTILINE))

    english = ENGLISH_OF[chinese]
    assert levels(chinese) == levels(english)
    assert rows(chinese) == rows(english)
    assert blocks(chinese) == blocks(english)


def test_every_page_is_there_in_chinese():
    english = {page.name for page in DOCS.glob("*.md") if not page.name.endswith(".zh.md")}
    chinese = {page.name.replace(".zh.md", ".md") for page in DOCS.glob("*.zh.md")}
    assert english - chinese <= {"changelog.md", "log.md"}  # records, kept in one language


def test_the_readme_is_short():
    for name in ("README.md", "README.zh-CN.md"):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 130


# -- what is written is what happens ---------------------------------------------------------------------------

# Not run here: what needs other machines, the hub, an installation, or a whole suite of its own.
NOT_RUN = (
    "finetune serve",
    "finetune evaluate",
    "finetune doctor",
    "--nproc",
    "--nnodes",
    "head ",
    "make ",
    "pip ",
    ". ",
)
RUN_PAGES = ("quickstart.md", "data.md", "training.md", "memory.md", "using.md", "run-folder.md", "errors.md")
# Lines that tell a rate or a time.
VARIES = re.compile(r"^(read |train |wrote )")


def shown(lines: list[str] | tuple[str, ...]) -> list[str]:
    """The lines that are the same on every machine, with other numbers of steps taken for the same."""
    kept = [line.rstrip() for line in lines if line.strip() and not VARIES.match(line)]
    return [re.sub(r"step-\d+", "step-N", re.sub(r"\d+ of \d+ steps", "N of N steps", line)) for line in kept]


def shortened(words: list[str]) -> list[str]:
    """The same command, for fewer steps or tokens."""
    if words[0] == "train" and "--dry-run" not in words and "recipe.yaml" not in words[1]:
        return [*words, "training.max_steps=2", "training.num_train_epochs=null", "training.save_steps=2"]
    if words[0] in ("generate", "chat"):
        return [*words, "--max-new-tokens=2"]
    return words


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder as the pages assume it: the demo's base model and rows, a model in the hub's cache, some wrong rows."""
    place = tmp_path_factory.mktemp("pages")
    folder = place / "outputs" / "quickstart" / "base"
    countries = tasks.load_countries()
    tuned, _ = tasks.split_countries(countries)
    prompts = [question.prompt for question in tasks.all_questions(tuned)]  # as the demo does
    tokenizer = base.train_tokenizer([*tasks.pretraining_texts(countries, tasks.load_prose()), *prompts])
    base.write_model(folder, tokenizer, seed=1)
    base.save_tokenizer(tokenizer, folder, base.CHATML)
    shutil.copytree(ROOT / "data" / "quickstart", place / "data" / "quickstart")
    snapshot = place / "hub" / f"models--{HUB_MODEL.replace('/', '--')}" / "snapshots" / "0123456"
    shutil.copytree(folder, snapshot)
    config = json.loads((snapshot / "config.json").read_text(encoding="utf-8"))
    (snapshot / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}), encoding="utf-8")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123456", encoding="utf-8")
    shutil.copytree(folder, place / "outputs" / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    (place / "outputs" / "pickled" / "pytorch_model.bin").touch()
    write_wrong_rows(place)
    return place


def write_wrong_rows(place: Path) -> None:
    good = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}'
    wrong = good.replace('"Hi"', '"Who are you?"').replace("assistant", "asistant")
    files = {
        "my-rows": next(text for language, text in blocks(ROOT / "README.md") if language == "json").rstrip(),
        "one": good,
        "support": good,
        "bad": f"{good}\n{wrong}",
        "keys": '{"question": "Hi", "answer": "Hello."}',
        "cut": good[:47],
    }
    for name, text in files.items():
        (place / f"{name}.jsonl").write_text(text + "\n", encoding="utf-8")


@pytest.fixture()
def here(place, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.chdir(place)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setenv("FINETUNE_CACHE", str(place / "cache"))
    return place


def test_the_readme_and_the_quickstart_have_the_same_five_commands():
    five = [
        [c.line for c in commands(page) if "my-rows" in c.line or "mine" in c.line]
        for page in (ROOT / "README.md", DOCS / "quickstart.md")
    ]
    assert len(five[0]) == 5 and five[0] == five[1]


@pytest.mark.parametrize("page", RUN_PAGES)
def test_commands_of_the_pages_run_as_shown(page, here, monkeypatch, capsys):
    if page == "errors.md":  # it speaks of runs that `make demo` has made
        for name in ("quickstart_sft_lora", "quickstart_sft_full"):
            assert finetune(*shortened(["train", name])) == 0
    for typed in commands(DOCS / page):
        if any(part in typed.line for part in NOT_RUN):
            continue
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/exit\n"))
        code = finetune(*shortened(typed.words[1:]))
        out, err = capsys.readouterr()
        is_error = any(line.startswith("error:") for line in typed.output)
        assert code == (2 if is_error else 0), f"{typed.line}\n{err}"
        if typed.output and (is_error or "--dry-run" in typed.line or typed.words[1] in ("preview", "recipes")):
            printed = (out + err)[(out + err).find("error:") if is_error else 0 :]  # a plan may stand before it
            assert shown(printed.splitlines()) == shown(typed.output), typed.line


def test_the_python_of_the_pages_runs(here, capsys):
    (code,) = [text for language, text in blocks(DOCS / "using.md") if language == "python"]
    exec(compile(code, "using.md", "exec"), {})
    assert capsys.readouterr().out
