"""Programs hidden wherever something of the stack might unpickle or import: no command runs one.

Each payload makes the marker file when it runs. They lie beside a model that works, so that every command gets as far
as it can, and in place of its weights.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.runs import finetune, finetune_process, write_recipe
from tests.tiny import tiny_model, write_json

BESIDE_A_MODEL = (
    "pytorch_model.bin", "model_state.pdparams", "lora_model_state.pdparams", "adapter_model.bin",
    "model.pth", "model.pt", "model.ckpt", "consolidated.00.pth", "optimizer.pdopt", "optimizer.pt",
    "scheduler.pdparams", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin",
    "tokenizer.pkl", "vocab.pkl", "added_tokens.pkl", "model.joblib", "model.npy", "chat_template.pkl",
    "generation_config.pkl", "static_name_to_dyg_name.pdparams", "spiece.model",
)  # fmt: skip
MODULES = (
    "modeling_qwen2.py", "configuration_qwen2.py", "tokenization_qwen2.py", "numpy.py", "paddle.py",
    "paddlenlp.py", "yaml.py", "rich.py", "typer.py", "pyarrow.py", "datasets.py", "safetensors.py",
    "sitecustomize.py", "usercustomize.py", "conftest.py", "setup.py", "__init__.py",
)  # fmt: skip


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "a-payload-ran"


def archive(marker: Path) -> bytes:
    """The payload as `torch.save` packs it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Payload(marker)))
        file.writestr("archive/version", "3")
    return out.getvalue()


def plant(folder: Path, marker: Path) -> None:
    """Payloads under every name that a loader somewhere knows; what is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(BESIDE_A_MODEL):
        (folder / name).write_bytes(archive(marker) if number % 2 else pickle.dumps(Payload(marker)))
    np.savez(folder / "model.npz", weights=np.array([Payload(marker)], dtype=object))
    program = f"import os\nos.system('touch {marker}')\n"
    for name in MODULES:
        (folder / name).write_text(program)
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            value = json.loads((folder / name).read_text())
            classes = {"AutoConfig": "configuration_qwen2.C", "AutoModelForCausalLM": "modeling_qwen2.M"}
            custom = {
                "auto_map": classes | {"AutoTokenizer": ["tokenization_qwen2.T", None]},
                "trust_remote_code": True,
            }
            write_json(folder / name, value | custom)


def test_the_payloads_work(tmp_path, marker):
    """Else the tests below could not fail."""
    plant(tmp_path / "x", marker)
    pickle.loads((tmp_path / "x" / "pytorch_model.bin").read_bytes())
    assert marker.exists()
    marker.unlink()
    subprocess.run([sys.executable, "-c", "import rich"], cwd=tmp_path / "x")
    assert marker.exists()


def test_no_command_runs_what_lies_beside_a_model(tmp_path, marker, capsys, monkeypatch):
    model = tiny_model(tmp_path / "model")
    plant(model, marker)
    recipe = write_recipe(tmp_path, model, save_steps=2)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4)
    dpo = ["method=dpo", f"data.train={pairs}", f"training.output_dir={tmp_path / 'dpo'}", "lora={rank: 2, alpha: 4}"]
    assert finetune("preview", recipe) == 0
    assert finetune("train", recipe, "--dry-run") == 0
    assert finetune("train", recipe) == 0
    assert finetune("train", recipe, *dpo) == 0
    for step in (tmp_path / "run" / "checkpoints").iterdir():
        for folder in (step, step / "model"):
            for name in BESIDE_A_MODEL:
                (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-4")
    assert finetune("train", recipe) == 0  # resumes from step-2
    for result in (tmp_path / "run", tmp_path / "dpo", tmp_path / "run" / "checkpoints" / "step-2"):
        plant(result, marker)
        assert finetune("generate", result, "--prompt", "a", "--max-new-tokens", "2") == 0
    for number, (source, options) in enumerate(
        [
            (model, ["--verify"]),
            (model, ["--format", "paddle", "--allow-pickle"]),
            (model, ["--format", "gguf"]),
            (tmp_path / "dpo", ["--format", "peft"]),
        ]
    ):
        assert finetune("export", source, tmp_path / f"out-{number}", *options) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/quit\n"))
    assert finetune("chat", model, "--max-new-tokens", "2") == 0
    assert not marker.exists()


def test_weights_that_are_only_pickled_are_refused_by_every_command(tmp_path, marker, capsys, monkeypatch):
    model = tiny_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    plant(model, marker)
    recipe = write_recipe(tmp_path, model)
    commands = [
        ["train", recipe],
        ["train", recipe, "--dry-run"],
        ["generate", model, "--prompt", "a"],
        ["chat", model],
        ["serve", model, "--port", "0"],
        ["export", model, tmp_path / "out"],
    ]
    for command in commands:
        assert finetune(*command) == 2
        said = capsys.readouterr().err
        assert "pickle file" in said and "--allow-pickle" in said and "Traceback" not in said, command
    assert finetune("export", model, tmp_path / "out", "--allow-pickle") == 2
    assert finetune("preview", recipe) in (0, 2)  # needs the tokenizer only
    assert not marker.exists()


def arrow_with_a_pickled_type(path: Path, marker: Path) -> None:
    """An extension type that pyarrow once unpickled by itself (CVE-2023-47248)."""
    import pyarrow

    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    metadata[b"ARROW:extension:metadata"] = pickle.dumps(Payload(marker))
    schema = pyarrow.schema(
        [pyarrow.field("instruction", pyarrow.string(), metadata=metadata), pyarrow.field("output", pyarrow.string())]
    )
    table = pyarrow.Table.from_arrays([pyarrow.array(["a", "b"]), pyarrow.array(["c", "d"])], schema=schema)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(str(path), schema) as writer:
            writer.write_table(table)


def test_data_files_and_caches_are_not_unpickled(tmp_path, marker, tiny_folder, capsys):
    recipe = write_recipe(tmp_path, tiny_folder)
    folder = tmp_path / "data"
    plant(folder, marker)
    for name in ("cache.pkl", "cache.arrow.pkl", "rows.dill", "data.py"):
        (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    for name, code in (("model.npy", 2), ("model.npz", 2), ("cache.pkl", 2), ("data.py", 2), (".", 2)):
        assert finetune("preview", recipe, f"data.train={folder / name}") == code, name
    for name in ("rows.arrow", "rows.parquet"):
        arrow_with_a_pickled_type(folder / name, marker)
        assert finetune("preview", recipe, f"data.train={folder / name}") == 0
    assert finetune("train", recipe, f"data.train={folder}", "training.max_steps=1") == 0
    assert not marker.exists()


def test_a_cached_script_of_a_hub_data_set_does_not_run(tmp_path, marker, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder)
    home = tmp_path / "home"
    for place in ("modules/datasets_modules/datasets/who--what/0123", "datasets/who___what/default/0.0.0", "hub"):
        plant(home / place, marker)
        (home / place / "what.py").write_text(f"import os\nos.system('touch {marker}')\n")
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_TRUST_REMOTE_CODE": "1"}
    done = finetune_process("preview", recipe, "data.train=who/what", env=environment)
    assert done.returncode == 2 and "it is not in the hub cache" in done.stderr
    assert not marker.exists()


def entry(*arguments: str | Path) -> list[str]:
    """The command as the installed script starts it: without the current folder among the places of modules."""
    code = (
        f"import sys; sys.path[:] = {[p for p in sys.path if p]!r}; from finetune.cli import main; main(sys.argv[1:])"
    )
    return [sys.executable, "-I", "-c", code, *map(str, arguments)]


def test_modules_of_the_current_folder_are_not_imported(tmp_path, marker):
    """Not by the command, not by the processes it starts."""
    model = tiny_model(tmp_path / "model")
    recipe = write_recipe(tmp_path, model, max_steps=1)
    plant(model, marker)
    missing = f"data.train={tmp_path / 'missing.jsonl'}"  # said by the two processes, before they load paddle
    for arguments, code, words in (
        (["doctor"], 0, "All checks passed"),
        (["train", recipe, missing, "--nproc", "2"], 2, "missing.jsonl"),
    ):
        done = subprocess.run(entry(*arguments), cwd=model, capture_output=True, text=True, timeout=240)
        assert done.returncode == code and words in done.stdout + done.stderr, done.stdout + done.stderr
    assert not marker.exists()
