"""Folders in nf4 as transformers and bitsandbytes write them; held against theirs in tests/parity."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.errors import CheckpointError
from finetune.model.adapted import stored_weights
from finetune.model.config import read_config
from finetune.model.quantize import NF4, dynamic_levels, quantize_nf4
from finetune.model.resolve import resolve_model
from tests.runs import finetune, steps, write_recipe

CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def write_nf4(source: Path, target: Path, *, double: bool) -> dict[str, np.ndarray]:
    """The folder with each linear layer as bitsandbytes has it. Returns what its codes stand for."""
    shutil.copytree(source, target)
    raw = json.loads((source / "config.json").read_text())
    config, tensors, whole = read_config(raw, source), {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.removesuffix(".weight") not in config.linears:
            tensors[name] = whole[name] = weight
            continue
        matrix = quantize_nf4(weight, double=double)
        whole[name] = matrix.dequantize()
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
        tensors |= {name: matrix.codes[:, None], f"{name}.absmax": matrix.scales.values, f"{name}.quant_map": NF4}
        if double:
            nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(matrix.scales.offset)}
            state |= nested
            tensors[f"{name}.nested_absmax"] = matrix.scales.nested
            tensors[f"{name}.nested_quant_map"] = dynamic_levels()
        content = np.frombuffer(json.dumps(state).encode(), np.uint8)
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = content
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(raw | {"quantization_config": CONFIG}))
    return whole


@pytest.mark.parametrize("double", [True, False])
def test_a_folder_in_nf4_is_read(double, tmp_path, tiny_folder):
    whole = write_nf4(tiny_folder, tmp_path / "nf4", double=double)
    weights = stored_weights(resolve_model(tmp_path / "nf4"))
    assert weights.keys() == whole.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight.read(), whole[name], err_msg=name)


def test_it_is_trained_on_answered_from_and_merged_with_the_codes_it_has(tmp_path, tiny_folder, capsys):
    whole = write_nf4(tiny_folder, tmp_path / "nf4", double=False)
    shutil.copytree(tiny_folder, tmp_path / "whole")
    save_file(whole, tmp_path / "whole/model.safetensors", {"format": "pt"})
    told = {}
    for base, how in (("nf4", "nf4"), ("whole", "none")):
        recipe, run = write_recipe(tmp_path, tmp_path / base), tmp_path / f"run-{base}"
        changes = f"training.output_dir={run}", "lora={rank: 4}", f"model.quantization={how}"
        assert finetune("train", recipe, *changes) == 0
        assert finetune("export", run, tmp_path / f"merged-{base}") == 0
        capsys.readouterr()
        assert finetune("generate", run, "--quantization", how, "--prompt", "say one", "--max-new-tokens", 8) == 0
        merged = load_file(tmp_path / f"merged-{base}/model.safetensors")
        told[base] = capsys.readouterr().out, [row["loss"] for row in steps(run)], merged
    assert told["nf4"][0] == told["whole"][0]
    assert told["nf4"][1] == pytest.approx(told["whole"][1], rel=1e-5)
    for name, weight in told["whole"][2].items():
        np.testing.assert_allclose(told["nf4"][2][name], weight, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "quantized to fp4"),
        ({"load_in_8bit": True, "bnb_4bit_quant_type": "fp4"}, "quantized to 8-bit"),
    ],
)
def test_other_codes_are_refused_with_the_fix(config, said, tmp_path, tiny_folder):
    shutil.copytree(tiny_folder, tmp_path / "other")
    raw = json.loads((tiny_folder / "config.json").read_text())
    quantized = {"quantization_config": {"quant_method": "bitsandbytes"} | config}
    (tmp_path / "other/config.json").write_text(json.dumps(raw | quantized))
    with pytest.raises(CheckpointError, match=f"{said}.*not supported.*--quantization"):
        resolve_model(tmp_path / "other")


DAMAGE = {
    "missing": (lambda name: {f"{name}.absmax": None}, "absmax"),
    "levels": (lambda name: {f"{name}.quant_map": NF4[::-1].copy()}, "levels"),
    "state": (lambda name: {f"{name}.quant_state.bitsandbytes__nf4": np.zeros(5, np.uint8)}, "not readable"),
    "short": (lambda name: {name: np.zeros([7, 1], np.uint8)}, "size"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind, tmp_path, tiny_folder):
    write_nf4(tiny_folder, tmp_path / "nf4", double=True)
    change, said = DAMAGE[kind]
    file, name = tmp_path / "nf4/model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file) | change(name)
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        stored_weights(resolve_model(tmp_path / "nf4"))[name].read()
