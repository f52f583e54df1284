"""What happens to a run: the disk fills up or is read-only, files vanish, memory ends, somebody presses Ctrl-C."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune.errors import CheckpointError, StorageError
from finetune.files import write_fault
from finetune.train import loop
from tests.runs import finetune, finetune_process, metrics, steps, write_recipe
from tests.tiny import Shape, tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a tmpfs of a size, or gives a mounted one other options."""
    mounted: list[Path] = []

    def mount(options: str, folder: Path | None = None) -> Path:
        place = folder or tmp_path / "disk"
        place.mkdir(exist_ok=True)
        options = f"remount,{options}" if folder else options
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    if shutil.which("mount") is None:
        pytest.skip("there is no mount command here")
    yield mount
    if mounted:
        subprocess.run(["umount", "--lazy", str(mounted[0])], check=True)


def test_a_full_disk_is_told_with_figures_and_the_run_goes_on_after_room_is_made(
    tmp_path, tiny_folder, small_disk, capsys
):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=4, save_steps=1)
    undisturbed, disk = tmp_path / "undisturbed", small_disk("size=1000k")
    run = disk / "run"
    assert finetune("train", recipe, f"training.output_dir={undisturbed}") == 0
    capsys.readouterr()
    assert finetune("train", recipe, f"training.output_dir={run}") == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert f"{run}/checkpoints/step-3: cannot be written: No space left on device (it takes about 3" in said[0]
    assert "KiB are free there). Earlier checkpoints are intact: make room" in said[0]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-1", "step-2"]
    assert finetune("train", recipe, f"training.output_dir={run}") == 1  # nothing is lost by trying again
    assert "step-3: cannot be written" in capsys.readouterr().err
    small_disk("size=8m", disk)
    assert finetune("train", recipe, f"training.output_dir={run}") == 0
    assert "resumed after step 2" in " ".join(capsys.readouterr().err.split())
    assert (run / "final/model.safetensors").read_bytes() == (undisturbed / "final/model.safetensors").read_bytes()
    assert [row["loss"] for row in steps(run)] == [row["loss"] for row in steps(undisturbed)]


def test_an_export_to_a_full_disk_leaves_nothing(tiny_folder, small_disk, capsys):
    disk = small_disk("size=64k")
    assert finetune("export", tiny_folder, disk / "out") == 1
    assert "out: cannot be written: No space left on device (" in capsys.readouterr().err
    assert list(disk.iterdir()) == []


def test_a_read_only_folder_is_said_before_anything_is_loaded(tmp_path, tiny_folder, small_disk, capsys):
    disk = small_disk("size=64k,ro")
    recipe = write_recipe(tmp_path, tiny_folder)
    assert finetune("train", recipe, f"training.output_dir={disk / 'run'}") == 2
    assert "cannot be written (Read-only file system). Choose another training.output_dir" in capsys.readouterr().err
    assert finetune("export", tiny_folder, disk / "out") in (1, 2)
    assert "out: cannot be written: Read-only file system" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_faults_of_storage_have_figures(tmp_path, number):
    fault = write_fault(OSError(number, os.strerror(number)), tmp_path / "a" / "b", needed=3 * 2**20)
    assert isinstance(fault, StorageError) and fault.exit_code == 1
    assert "it takes about 3.0 MiB, and " in str(fault) and " are free there" in str(fault)
    assert isinstance(write_fault(OSError(errno.EACCES, "Permission denied"), tmp_path), CheckpointError)


@contextmanager
def before_step(monkeypatch, number: int, act):
    """Call `act` before the optimizer step of this number, from 0."""
    real = loop._step

    def step(task, step, *rest):
        if step.number == number:
            act()
        return real(task, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", step)
        yield


def test_files_that_vanish_during_a_run_are_not_missed(tmp_path, tiny_folder, monkeypatch, capsys):
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    recipe = write_recipe(tmp_path, model, save_steps=2)

    def vanish() -> None:
        shutil.rmtree(model)
        (tmp_path / "train.jsonl").unlink()

    with before_step(monkeypatch, 1, vanish):
        assert finetune("train", recipe) == 0
    for result in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-2"):
        assert finetune("generate", result, "--prompt", "say one", "--max-new-tokens", "2") == 0
    capsys.readouterr()
    assert finetune("train", recipe) == 2
    assert str(model) in capsys.readouterr().err


def test_where_the_loss_runs_away_the_checkpoint_before_the_last_is_still_there(
    tmp_path, tiny_folder, monkeypatch, capsys
):
    from finetune.train import sft

    recipe = write_recipe(tmp_path, tiny_folder, save_steps=1, save_total_limit=1)
    real = sft.SftTask.loss

    def run_away() -> None:
        def loss(self, layout, denominator):
            value, parts = real(self, layout, denominator)
            return value * float("inf"), {name: part * float("inf") for name, part in parts.items()}

        monkeypatch.setattr(sft.SftTask, "loss", loss)

    with before_step(monkeypatch, 2, run_away):
        assert finetune("train", recipe) == 1
    said = capsys.readouterr().err
    assert "at step 3, on rows" in said and "train.jsonl:" in said and "learning_rate" in said
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-1", "step-2"]
    monkeypatch.setattr(sft.SftTask, "loss", real)
    assert finetune("train", recipe) == 0
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-4"]


def test_the_rows_named_are_those_of_the_micro_batch_whose_loss_ran_away(tmp_path, tiny_folder, monkeypatch, capsys):
    from finetune.train import sft

    recipe = write_recipe(
        tmp_path, tiny_folder, shuffle=False, per_device_train_batch_size=2, gradient_accumulation_steps=3
    )
    real, seen = sft.SftTask.loss, []

    def loss(self, layout, denominator):
        seen.append(layout)
        factor = float("nan") if len(seen) == 2 else 1.0
        value, parts = real(self, layout, denominator)
        return value * factor, {name: part * factor for name, part in parts.items()}

    monkeypatch.setattr(sft.SftTask, "loss", loss)
    assert finetune("train", recipe) == 1
    rows = tmp_path / "train.jsonl"
    assert f"at step 1, on rows {rows}:3, {rows}:4." in capsys.readouterr().err


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_started_over_says_how_to_go_on_and_keeps_a_recipe_that_does(
    tmp_path, tiny_folder, monkeypatch, capsys
):
    recipe, run = write_recipe(tmp_path, tiny_folder, max_steps=3), tmp_path / "run"
    with before_step(monkeypatch, 1, stop):
        assert finetune("train", recipe, "training.resume_from_checkpoint=never") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "Run it again with training.resume_from_checkpoint=auto to go on." in said
    assert finetune("train", run / "recipe.yaml") == 0
    assert "resumed after step 2" in " ".join(capsys.readouterr().err.split())


def test_other_ranks_end_after_the_first_has_written_that_the_run_stopped(tmp_path, tiny_folder, monkeypatch):
    from finetune.train.processes.parallel import World

    recipe, seen = write_recipe(tmp_path, tiny_folder, max_steps=3), []
    manifest, report = (tmp_path / "run" / name for name in ("manifest.json", "report.html"))

    def barrier(self) -> None:
        status = json.loads(manifest.read_text())["status"] if manifest.exists() else None
        seen.append((status, report.exists()))

    monkeypatch.setattr(World, "barrier", barrier)
    with before_step(monkeypatch, 1, stop):
        assert finetune("train", recipe) == 1
    assert seen[-1] == ("stopped", True)


def test_a_stopped_run_that_logs_rarely_goes_on_to_the_same_metrics(tmp_path, tiny_folder, monkeypatch):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=8, logging_steps=3)
    assert finetune("train", recipe, f"training.output_dir={tmp_path / 'undisturbed'}") == 0
    with before_step(monkeypatch, 3, stop):
        assert finetune("train", recipe) == 1
    assert finetune("train", recipe) == 0
    timed = ("tokens_per_second", "seconds")
    found, wanted = (
        [{k: v for k, v in row.items() if k not in timed} for row in metrics(tmp_path / name)]
        for name in ("run", "undisturbed")
    )
    assert [row["step"] for row in wanted] == [3, 6, 8]
    assert found == wanted


def test_a_disk_that_fills_up_under_the_recipe_leaves_the_old_one(tmp_path, tiny_folder, monkeypatch, capsys):
    recipe, run = write_recipe(tmp_path, tiny_folder, max_steps=2, save_steps=1), tmp_path / "run"
    assert finetune("train", recipe) == 0
    shutil.rmtree(run / "final")
    before = (run / "recipe.yaml").read_text(encoding="utf-8")
    real = os.fsync

    def fsync(handle):
        if "recipe.yaml" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert finetune("train", recipe) == 1
    assert f"{run}: cannot be written: No space left on device (" in capsys.readouterr().err
    assert (run / "recipe.yaml").read_text(encoding="utf-8") == before


def test_a_disk_that_fills_up_under_the_best_model_is_told_and_leaves_no_part_of_it(
    tmp_path, tiny_folder, monkeypatch, capsys
):
    options = {"eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    recipe, run = write_recipe(tmp_path, tiny_folder, max_steps=2, **options), tmp_path / "run"
    real = shutil.copyfile

    def copyfile(source, target, **options):
        if ".final.partial" not in str(target):
            return real(source, target, **options)
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", copyfile)
        assert finetune("train", recipe, "data.eval_fraction=0.2") == 1
    said = capsys.readouterr().err
    assert f"{run}/.final.partial/final/" in said and "make room, then run the same command again" in said
    assert not (run / ".final.partial").exists() and not (run / "final").exists()
    assert finetune("train", recipe, "data.eval_fraction=0.2") == 0


def test_the_end_of_memory_after_a_checkpoint_names_what_may_still_change(tmp_path, tiny_folder, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, tiny_folder, save_steps=1)

    with before_step(monkeypatch, 1, run_out):
        assert finetune("train", recipe) == 1
    said = capsys.readouterr().err
    assert "To go on, set training.recompute: true and run the same command again." in said
    assert "Or start a new run in another training.output_dir with training.per_device_train_batch_size=1" in said
    assert finetune("train", recipe, "training.recompute=true") == 0


def run_out() -> None:
    """Ask paddle for more than there can be."""
    import paddle

    paddle.empty([2**44])


def test_the_end_of_memory_ends_with_the_advice_of_the_dry_run(tmp_path, tiny_folder, monkeypatch, capsys):
    from finetune.train import run

    recipe = write_recipe(tmp_path, tiny_folder)
    monkeypatch.setattr(run, "device_bytes", lambda: 803_000_000)  # 3 MB beside what is kept free
    with before_step(monkeypatch, 0, run_out):
        assert finetune("train", recipe) == 1
    said = capsys.readouterr().err
    assert "this is too large for the 0.8 GB here; the cheapest change: " in said
    change = said.rpartition(" run the same command with ")[2].strip()
    assert f"the cheapest change: {change}\n" in said and "step 1: memory ran out" in said
    assert finetune("train", recipe, *change.split(" ")) == 0
    assert "too large" not in capsys.readouterr().err
    monkeypatch.setattr(run, "device_bytes", lambda: 800_000_000)
    with before_step(monkeypatch, 0, run_out):
        assert finetune("train", recipe, f"training.output_dir={tmp_path / 'none'}") == 1
    assert "no change makes it fit the 0.8 GB here: take a smaller model." in capsys.readouterr().err


MEMORY = """
import resource, sys
from finetune import cli
from finetune.train import loop
import paddle
real = loop._step
def step(*arguments):
    paddle.matmul(paddle.ones([512, 512]), paddle.ones([512, 512]))  # MKL's threads start now; without room they abort
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 24 * 2**20, resource.RLIM_INFINITY))
    return real(*arguments)
loop._step = step
cli.main(sys.argv[1:])
"""


def test_the_end_of_memory_says_what_to_lower(tmp_path):
    model = tiny_model(tmp_path / "wide", shape=Shape(hidden_size=256, intermediate_size=2048))
    recipe = write_recipe(tmp_path, model, per_device_train_batch_size=24)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, "train", str(recipe)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1, done.stderr
    said = done.stderr.splitlines()[-1]
    assert "step 1: memory ran out" in said and "Traceback" not in done.stderr
    assert said.endswith("with training.per_device_train_batch_size=1 training.gradient_accumulation_steps=24")


def start(recipe: Path, *options: str) -> subprocess.Popen:
    """A training process with some steps behind it."""
    run = recipe.parent / "run"
    command = [sys.executable, "-m", "finetune", "train", str(recipe), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or not metrics(run):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)
    return process


def test_ctrl_c_saves_and_ends_without_the_word_error(tmp_path, tiny_folder):
    process = start(write_recipe(tmp_path, tiny_folder, max_steps=5000))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "error:" not in said
    assert said.splitlines()[-1].startswith("stopped at step ") and "Run the same command again to go on." in said


def test_a_second_signal_ends_at_once_and_the_lock_of_the_dead_is_no_hindrance(tmp_path, tiny_folder, monkeypatch):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=5000)
    process = start(recipe)
    process.send_signal(signal.SIGSTOP)  # both signals are there before the step can end
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    assert "Stopping after this step" in said and "Traceback" not in said
    assert process.returncode in (-signal.SIGINT, -signal.SIGTERM)
    owner = json.loads((tmp_path / "run" / ".lock").read_text())
    assert owner["pid"] == process.pid and owner["host"]
    (tmp_path / "run" / ".lock").write_text(json.dumps({"pid": os.getpid(), "host": "another"}))
    assert finetune("train", recipe, "training.max_steps=1", "training.resume_from_checkpoint=never") == 0


SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz0123",
    "OPENAI_API_KEY": "sk-proj-abcdefghijklmnopqrstuvw",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCY",
    "FINETUNE_API_KEY": "my-own-serving-key-12345",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef",
    "http_proxy": "http://me:proxy-password@127.0.0.1:9",
}


def test_no_secret_of_the_environment_or_of_an_address_is_written_down(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=2, save_steps=1)
    environment = os.environ | SECRETS
    done = finetune_process("train", recipe, "data.eval_fraction=0.2", env=environment)
    assert done.returncode == 0, done.stderr
    address = "https://user:url-password@example.com/rows.jsonl?token=query-secret-123&x=1"
    failed = finetune_process("train", recipe, f"data.train={address}", "--debug", env=environment)
    assert failed.returncode == 2 and "example.com/rows.jsonl" in failed.stderr
    secrets = [*SECRETS.values(), "proxy-password", "url-password", "query-secret-123"]
    texts = [done.stdout, done.stderr, failed.stdout, failed.stderr]
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 20
    texts += [path.read_bytes().decode("latin1") for path in files]
    for secret in secrets:
        assert not any(secret in text for text in texts), secret
