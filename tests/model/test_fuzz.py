"""Whatever a stranger's folder holds, it is read or refused with a CheckpointError; nothing else comes out."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import CheckpointError
from finetune.files import read_json, within
from finetune.model.adapter_config import parse_paddle_config, parse_peft_config
from finetune.model.config import hf_config, read_config
from finetune.model.resolve import resolve_model
from finetune.model.tensorfile import TensorFolder
from tests import fuzzing  # noqa: F401, how many cases
from tests.tiny import tiny_config

WHERE = Path("f")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
PARTS = ["rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "ensure_weight_tying"]
PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}


@given(st.dictionaries(st.sampled_from([*tiny_config(), "dtype", "rope_parameters", "rope_scaling", "head_dim"]), JSON))
def test_configs(changes):
    try:
        hf_config(read_config(tiny_config() | changes, WHERE), "float32")
    except CheckpointError:
        pass


@given(
    st.dictionaries(st.sampled_from([*PEFT, "use_rslora", "rslora", "init_lora_weights", "lora_dropout", *PARTS]), JSON)
)
def test_adapter_configs(changes):
    for parse in (parse_peft_config, parse_paddle_config):
        try:
            assert parse(PEFT | changes, WHERE).scaling_of("model.layers.0.self_attn.q_proj") is not None
        except CheckpointError:
            pass


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "X"]) | JSON,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-4, 64), min_size=2, max_size=2) | JSON,
    }
)


@given(st.dictionaries(st.text(max_size=4), ENTRY | JSON, max_size=3), st.binary(max_size=64), st.integers(-2, 2))
def test_tensor_files(tmp_path, header, data, lie):
    raw = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", max(0, len(raw) + lie)) + raw + data)
    try:
        folder = TensorFolder(tmp_path, "model")
        for name in folder.entries:
            assert folder.read(name).nbytes == folder.entries[name].nbytes
    except CheckpointError:
        pass


@given(st.binary(max_size=80))
def test_raw_files(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_bytes(content)
    for read in (lambda: TensorFolder(tmp_path, "model"), lambda: read_json(tmp_path / "config.json")):
        try:
            read()
        except CheckpointError:
            pass


@given(st.text(max_size=20) | st.from_regex(r"(\.\./|/|a|\x00|\\){1,6}"))
def test_no_name_leads_out_of_a_folder(tmp_path, name):
    try:
        path = within(name, tmp_path)
        assert tmp_path.resolve() in path.resolve().parents
    except CheckpointError:
        pass


@pytest.mark.parametrize("name", ["\ud800", "a" * 5000, "a/" * 3000, "..", "/", "~", "~nobody/x", "-", "*"])
def test_odd_model_names(name):
    with pytest.raises(CheckpointError):
        resolve_model(name)
