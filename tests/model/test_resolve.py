"""Every kind of MODEL is found, and what cannot be used is refused with its place and a fix. No paddle is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetune.errors import CheckpointError
from finetune.model.resolve import resolve_model
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer, write_json


def adapter(folder, base, *, rank=4, **changes):
    """A PEFT folder on q_proj and v_proj of a tiny model."""
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    write_json(folder / "adapter_config.json", config | changes)
    tensors = {}
    for layer in range(2):
        for name, rows in (("q_proj", 32), ("v_proj", 16)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = np.ones((rank, 32), np.float32)
            tensors[f"{prefix}.lora_B.weight"] = np.ones((rows, rank), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def refused(name) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve_model(name)
    return str(caught.value)


def test_a_hugging_face_folder(tiny_folder):
    source = resolve_model(tiny_folder)
    assert (source.kind, source.layout, source.stem, source.base, source.lora) == ("hf", "hf", "model", None, None)
    assert source.config.hidden_size == 32
    assert source.tokenizer_folder == tiny_folder


def test_an_adapter_and_its_base(tiny_folder, tmp_path):
    source = resolve_model(adapter(tmp_path / "a", tiny_folder))
    assert (source.kind, source.layout, source.base.folder) == ("adapter", "peft", tiny_folder)
    assert (source.lora.rank, source.lora.alpha, source.lora.variant) == (4, 8.0, "lora")
    assert source.tokenizer_folder == tiny_folder
    tiny_tokenizer(tmp_path / "a")
    assert source.tokenizer_folder == tmp_path / "a"


def test_the_base_is_looked_up_beside_the_adapter_too(tiny_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path / "base")
    adapter(tmp_path / "a", "../base")
    assert resolve_model(tmp_path / "a").base.config.hidden_size == 32
    adapter(tmp_path / "b", "base")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("b").base.config.hidden_size == 32


def test_a_base_named_from_the_home_folder_is_named_absolutely(tiny_folder, tmp_path, monkeypatch):
    """What an adapter writes about its base must hold for other programs, which do not know `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny_folder, tmp_path / "models" / "base")
    assert resolve_model("~/models/base").hub_or_folder == str((tmp_path / "models" / "base").resolve())
    adapter(tmp_path / "a", "~/models/base")
    assert resolve_model(tmp_path / "a").base.hub_or_folder == str((tmp_path / "models" / "base").resolve())


def test_the_generation_config_of_an_adapter_is_its_bases_unless_it_has_one(tiny_folder, tmp_path):
    folder = adapter(tmp_path / "a", tiny_folder)
    assert resolve_model(folder).generation_file == tiny_folder / "generation_config.json"
    write_json(folder / "generation_config.json", {})
    assert resolve_model(folder).generation_file == folder / "generation_config.json"


def test_a_checkpoint_and_a_run(tiny_folder, tmp_path):
    step = tmp_path / "run" / "checkpoints" / "step-20"
    step.mkdir(parents=True)
    shutil.copytree(tiny_folder, step / "model")
    assert "not complete" in refused(step)
    write_json(step / "complete.json", {})
    assert resolve_model(step).folder == step / "model"
    assert "no final model yet" in refused(tmp_path / "run") and "step-20" in refused(tmp_path / "run")
    shutil.copytree(tiny_folder, tmp_path / "run" / "final")
    assert resolve_model(tmp_path / "run").folder == tmp_path / "run" / "final"


def test_nothing_there_names_the_nearest(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "my-model")
    assert f"Did you mean {tmp_path / 'my-model'}?" in refused(tmp_path / "my-modle")
    assert "Did you mean" in refused(tmp_path)
    assert "Qwen/Qwen2-1.5B-Instruct" in refused("Qwen/Qwen2-1.5B-Instuct")


def test_a_name_that_could_be_a_hubs_is_compared_with_the_folders_here(tiny_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    assert "Did you mean my-model?" in refused("my-modle")
    assert "Did you mean" not in refused("another")


def test_things_that_are_no_model(tmp_path, tiny_folder):
    assert "is a file" in refused(tiny_folder / "config.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no model" in refused(empty)
    assert "empty" in refused("")
    assert "NUL" in refused("a\0b")
    write_json(empty / "config.json", tiny_config())
    assert "no weights" in refused(empty)
    lone = tmp_path / "lone"
    shutil.copytree(tiny_folder, lone)
    (lone / "config.json").unlink()
    assert "config.json is missing" in refused(lone)


@pytest.mark.parametrize("file", ["model_state.pdparams", "pytorch_model.bin", "model.pth"])
def test_pickled_weights_are_refused_with_the_way_out(file, tmp_path):
    write_json(tmp_path / "config.json", tiny_config())
    (tmp_path / file).write_bytes(b"cos\nsystem\n(S'touch planted'\ntR.")
    message = refused(tmp_path)
    assert "pickle" in message and file in message and "safetensors" in message


@pytest.mark.parametrize(
    "file, config",
    [("adapter_model.bin", "adapter_config.json"), ("lora_model_state.pdparams", "lora_config.json")],
)
def test_pickled_adapters_are_refused(file, config, tmp_path):
    write_json(tmp_path / config, {"peft_type": "LORA", "r": 4})
    (tmp_path / file).write_bytes(b"x")
    assert "pickle" in refused(tmp_path)


def test_a_model_and_an_adapter_in_one_folder(tiny_folder, tmp_path):
    folder = adapter(tmp_path / "a", tiny_folder)
    shutil.copy(tiny_folder / "model.safetensors", folder)
    assert "a whole model and an adapter" in refused(folder)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"bias": "some"}, "bias"),
        ({"modules_to_save": [1]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": ["x"]}, "init_lora_weights"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"r": 0}, "r is '0'"),
        ({"r": True}, "r is 'True'"),
        ({"lora_alpha": "big"}, "lora_alpha"),
        ({"lora_dropout": 2}, "lora_dropout"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"a_key_of_tomorrow": {"on": True}}, "a_key_of_tomorrow"),
        ({"base_model_name_or_path": None}, "which model it belongs to"),
        ({"base_model_name_or_path": "../gone"}, "cannot be had"),
        ({"base_model_name_or_path": "."}, "itself"),
    ],
)
def test_adapters_that_are_not_supported(changes, words, tiny_folder, tmp_path, monkeypatch):
    folder = adapter(tmp_path / "a", tiny_folder, **changes)
    monkeypatch.chdir(folder)
    assert words in refused(folder)


def test_an_adapter_on_an_adapter(tiny_folder, tmp_path):
    first = adapter(tmp_path / "first", tiny_folder)
    assert "an adapter itself" in refused(adapter(tmp_path / "second", first))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"a": 1, "a": 2}', b"[" * 200_000, b"nope", b'"text"', b"\xef\xbb\xbf{}"],
)
def test_a_broken_config_names_the_file(content, tiny_folder, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_folder, folder)
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refused(folder)


def test_a_config_with_a_byte_order_mark_is_read(tiny_folder, tmp_path):
    folder = tiny_model(tmp_path / "bom", tokenizer=False)
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(tiny_config()).encode())
    assert resolve_model(folder).config.vocab_size == 416


def test_no_paddle(tiny_folder):
    code = (
        f"import sys; from finetune.model.resolve import resolve_model; resolve_model({str(tiny_folder)!r});"
        "assert 'paddle' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
