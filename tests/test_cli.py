"""The command line: exit codes, messages, what is loaded, and what reaches the functions behind the commands."""

from __future__ import annotations

import io
import os
import re
import resource
import subprocess
import sys
import types
from operator import attrgetter
from pathlib import Path

import pytest

from finetune import cli
from finetune.errors import DataError, Fault, TrainingError
from finetune.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parent.parent
GOOD = "method: sft\nmodel: {path: base}\ndata: {train: rows.jsonl}\ntraining: {output_dir: out}\n"


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Run a command line in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(arguments))
        out, err = capfd.readouterr()
        return stop.value.code or 0, out, err

    return run


@pytest.fixture
def behind(monkeypatch):
    """Put a function in the place of a command's module, and get the calls it sees."""

    def behind(module: str, name: str, action=lambda *args, **kwargs: None) -> list:
        calls: list = []
        fake = types.ModuleType(module)

        def record(*args, **kwargs):
            calls.append((args, kwargs))
            return action(*args, **kwargs)

        setattr(fake, name, record)
        monkeypatch.setitem(sys.modules, module, fake)
        return calls

    return behind


def process(*arguments: str, cwd: Path = ROOT, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "finetune", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=60, **options)


def child_seconds() -> float:
    """Processor time of ended child processes: what they take on a machine that is doing nothing else."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_and_version(run):
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for command in ("train", "generate", "chat", "serve", "export", "preview", "recipes", "doctor"):
        assert re.search(rf"^  {command} ", out, re.MULTILINE)
    assert run()[1] == out
    code, out, _ = run("--version")
    assert code == 0 and re.fullmatch(r"paddle-finetune \d+\.\d+\.\d+\n", out)


@pytest.mark.parametrize("command", ["train", "generate", "chat", "serve", "export", "preview", "recipes list"])
def test_every_command_has_help_with_an_example(run, command):
    code, out, _ = run(*command.split(), "--help")
    assert code == 0 and f"Example: finetune {command}" in out


def test_help_takes_under_half_a_second():
    start = child_seconds()
    for _ in range(3):
        assert process("--help").returncode == 0
    assert (child_seconds() - start) / 3 < 0.5


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["recipes", "list"], 0),
        (["train", "bad.yaml", "--dry-run"], 2),
        (["train", "bad.yaml"], 2),
        (["train", "missing.yaml"], 2),
        (["preview", "bad.yaml"], 2),
    ],
)
def test_light_paths_load_no_paddle_and_are_quick(tmp_path, arguments, code):
    (tmp_path / "bad.yaml").write_text(GOOD + "lr: 3\n")
    heavy = ("paddle", "paddlenlp", "datasets", "numpy", "torch")
    script = (
        "import sys\nfrom finetune.cli import main\n"
        f"try: main({arguments!r})\n"
        "finally: print('LOADED', [name for name in sys.modules if name.split('.')[0] in "
        f"{heavy!r}])"
    )
    start = child_seconds()
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child_seconds() - start < 1
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_recipe_faults_are_one_message_with_all_places(run, tmp_path):
    (tmp_path / "bad.yaml").write_text(GOOD + "lora:\n  rank: 0\n  alfa: 3\n")
    code, out, err = run("train", "bad.yaml", "lr=1", "--dry-run")
    assert (code, out) == (2, "")
    assert err == (
        "error: 3 things are wrong\n"
        "  bad.yaml:6: lora.rank is 0. It must be a whole number from 1 to 4096.\n"
        "  bad.yaml:7: lora.alfa is not a recipe key. Did you mean lora.alpha?\n"
        "  argument 'lr=1': lr is not a recipe key. Did you mean training.learning_rate?\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "Did you mean 'train'"),
        (["train"], "RECIPE"),
        (["train", "r.yaml", "--dryrun"], "--dry-run"),
        (["train", "r.yaml", "--nproc", "0"], "0 is not a whole number of at least 1"),
        (["train", "r.yaml", "--nproc", "two"], "two is not a whole number"),
        (["train", "r.yaml", "--nnodes", "2"], "needs --master"),
        (["train", "r.yaml", "--nnodes", "2", "--master", "here"], "HOST:PORT"),
        (["train", "r.yaml", "--nnodes", "2", "--master", "h:99999"], "HOST:PORT"),
        (["train", "r.yaml", "--master", "h:1"], "--nnodes is 1"),
        (["train", "r.yaml", "distributed.tensor_parallel_degree=2"], "--nproc 2"),
        (["train", "training.max_steps=3"], "RECIPE comes first"),
        (["train", "r.yaml", "nonsense"], "KEY=VALUE"),
        (["train", "."], "is a folder"),
        (["train", "r.yml"], "Did you mean r.yaml"),
        (["generate", "m", "--prompt", "a", "--temperature", "-1"], "--temperature is -1"),
        (["generate", "m", "--prompt", "a", "--temperature", "nan"], "--temperature is nan"),
        (["generate", "m", "--prompt", "a", "--temperature", "warm"], "'warm' is not a number"),
        (["generate", "m", "--prompt", "a", "--top-p", "0"], "--top-p is 0"),
        (["generate", "m", "--prompt", "a", "--top-p", "1.5"], "--top-p is 1.5"),
        (["generate", "m", "--prompt", "a", "--top-k", "-1"], "--top-k"),
        (["generate", "m", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "m", "--prompt", "a", "--batch-size", "0"], "--batch-size"),
        (["generate", "m", "--prompt", "a", "--input", "b"], "Keep one"),
        (["chat", "m", "--top-p", "2"], "--top-p is 2"),
        (["export", "m", "out", "--format", "padle"], "Did you mean paddle?"),
        (["export", "m", "out", "--dtype", "int8"], "bfloat16"),
        (["export", "m"], "OUTPUT_DIR"),
        (["preview", "r.yaml", "-n", "0"], "whole number of at least 1"),
        (["recipes", "show", "qwen2-0.5b_sft_lroa"], "qwen2-0.5b_sft_lora"),
        (["recipes"], "Missing command"),
    ],
)
def test_wrong_arguments_are_one_plain_message(run, tmp_path, arguments, message):
    (tmp_path / "r.yaml").write_text(GOOD)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err and "Traceback" not in err


def test_train_passes_on_what_it_read(run, behind, tmp_path):
    (tmp_path / "r.yaml").write_text(GOOD)
    calls = behind("finetune.train.run", "train")
    assert run("train", "r.yaml", "--dry-run", "training.max_steps=3", "--nproc", "2", "model.dtype=float32")[0] == 0
    ((recipe,), options) = calls[0]
    assert (recipe.training.max_steps, recipe.model.dtype) == (3, "float32")
    assert callable(options.pop("answer"))
    assert options == {"dry_run": True, "nproc": 2, "nnodes": 1, "master": None}


def test_generate_reads_its_prompt_from_a_pipe(run, behind, monkeypatch):
    calls = behind("finetune.infer.generate", "generate")
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert run("generate", "m", "--temperature", "0.5", "--raw")[0] == 0
    ((model,), options) = calls[0]
    assert (model, options["prompt"], options["temperature"], options["raw"]) == ("m", "two\nlines", 0.5, True)


def test_generate_without_a_prompt(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: True))
    code, _, err = run("generate", "m")
    assert code == 2 and "--prompt TEXT or --input" in err


def test_preview_shows_three_rows_and_all_as_json(run, behind, tmp_path):
    (tmp_path / "r.yaml").write_text(GOOD)
    calls = behind("finetune.rows.preview", "preview")
    for arguments in ([], ["--json"], ["-n", "7", "--json"]):
        assert run("preview", "r.yaml", *arguments)[0] == 0
    assert [call[0][1:] for call in calls] == [(3, False), (None, True), (7, True)]


@pytest.mark.parametrize("key", ["schlüssel", "two words", "tab\tinside", "\x1b[2J"])
def test_an_api_key_that_no_header_can_carry_is_refused_at_the_start(run, key):
    code, _, err = run("serve", "m", "--api-key", key)
    assert code == 2 and "API key has characters" in err and "\x1b" not in err


@pytest.mark.parametrize(
    ("variable", "arguments", "key"),
    [
        (None, [], None),
        ("secret\n", [], "secret"),
        (None, ["--api-key", " secret "], "secret"),
        ("", ["--api-key", "secret"], "secret"),
        ("", [], "empty"),
        (" \n", [], "empty"),
        (None, ["--api-key", " "], "empty"),
    ],
)
def test_an_api_key_that_is_set_is_never_dropped(run, behind, monkeypatch, variable, arguments, key):
    monkeypatch.delenv("FINETUNE_API_KEY", raising=False)
    if variable is not None:
        monkeypatch.setenv("FINETUNE_API_KEY", variable)
    calls = behind("finetune.serve.app", "serve")
    code, _, err = run("serve", "m", *arguments)
    if key == "empty":
        assert code == 2 and "the API key is empty" in err and calls == []
    else:
        assert code == 0 and calls[0][1]["api_key"] == key


@pytest.mark.parametrize("port", ["65536", "70000", "-1", "x"])
def test_a_port_that_does_not_exist_is_named(run, port):
    code, _, err = run("serve", "m", "--port", port)
    assert code == 2 and f"{port} is not a whole number from 0 to 65535" in err


def test_export_and_doctor(run, behind):
    calls = behind("finetune.export.export", "export")
    assert run("export", "m", "out", "--format", "peft", "--verify")[0] == 0
    options = {"format": "peft", "dtype": "auto", "quantization": "none", "verify": True, "allow_pickle": False}
    assert calls == [(("m", Path("out")), options)]
    behind("finetune.doctor", "doctor", lambda network: 1)
    assert run("doctor")[0] == 1


def _raise(error):
    def action(*args, **kwargs):
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("odd row", where="a.jsonl:3"), 2, "error: a.jsonl:3: odd row\n"),
        (
            DataError.of([Fault("x", "a:1"), Fault("y", "a:2", "Do z.")]),
            2,
            "error: 2 things are wrong\n  a:1: x\n  a:2: y. Do z.\n",
        ),
        (TrainingError("loss is not finite"), 1, "error: loss is not finite\n"),
        (OSError(28, "No space left on device", "f"), 1, "error: No space left on device: f\n"),
        (
            RuntimeError("boom\nmore"),
            1,
            "error: this is a fault of the program, not of your input (RuntimeError: boom)."
            " Add --debug to see where.\n",
        ),
        (MemoryError(), 1, "error: out of memory. Lower data.max_length or the batch size.\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_exit_codes(run, behind, error, code, message):
    behind("finetune.export.export", "export", _raise(error))
    assert run("export", "m", "out") == (code, "", message)


def test_missing_paddle_says_how_to_install_it(run, behind):
    behind("finetune.export.export", "export", _raise(ModuleNotFoundError("No module", name="paddle")))
    code, _, err = run("export", "m", "out")
    assert code == 1 and "pip install paddle-finetune[cpu]" in err


@pytest.mark.parametrize("position", [0, 1, 3])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(run, behind, position):
    behind("finetune.export.export", "export", _raise(DataError("odd row")))
    arguments = ["export", "m", "out"]
    arguments.insert(position, "--debug")
    code, _, err = run(*arguments)
    assert code == 2 and "Traceback" in err and "odd row" in err


def test_a_closed_pipe_is_quiet():
    with subprocess.Popen(
        [sys.executable, "-m", "finetune", "recipes", "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as job:
        job.stdout.close()
        assert job.stderr.read() == ""
        assert job.wait(timeout=60) == 1


def test_recipes_list_show_copy(run, tmp_path):
    code, out, _ = run("recipes", "list")
    assert code == 0 and "qwen2-1.5b-instruct_sft_lora" in out
    code, shown, _ = run("recipes", "show", "qwen2-1.5b-instruct_sft_lora")
    assert code == 0 and shown == (ROOT / "recipes/qwen2-1.5b-instruct_sft_lora.yaml").read_text()
    code, out, _ = run("recipes", "copy", "qwen2-1.5b-instruct_sft_lora", "mine.yaml")
    assert code == 0 and max(map(len, out.splitlines())) < 80
    recipe = load_recipe("mine.yaml")
    for key in ("model.path", "data.train", "data.eval_fraction", "data.max_length", "training.output_dir"):
        assert f"\n  {key} " in out and attrgetter(key)(recipe)
    assert "add it" not in out and "add it" in run("recipes", "copy", "quickstart_sft_lora", "quick.yaml")[1]
    assert (tmp_path / "mine.yaml").read_text() == shown
    code, _, err = run("recipes", "copy", "qwen2-0.5b_sft_lora", "mine.yaml")
    assert code == 2 and "--force" in err and (tmp_path / "mine.yaml").read_text() == shown
    assert run("recipes", "copy", "qwen2-0.5b_sft_lora", "mine.yaml", "--force")[0] == 0
    assert (tmp_path / "mine.yaml").read_text() != shown
    assert run("recipes", "copy", "qwen2-0.5b_sft_lora", "no/such/folder.yaml")[0] == 2


@pytest.mark.parametrize("words", [["train", "a\udcff.yaml"], ["generate", "m", "--prompt", "\udcff"], ["\ud800"]])
def test_an_argument_that_is_not_utf8_is_said(words, capsys):
    assert cli._run(words, debug=False) == 2
    assert "is not UTF-8 from its character" in capsys.readouterr().err
