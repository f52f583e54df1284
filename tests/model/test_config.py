"""config.json: old and new keys, faults named together, features refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from finetune.errors import CheckpointError
from finetune.model.config import hf_config, read_config
from tests.tiny import tiny_config

WHERE = Path("somewhere/config.json")


def refused(**changes) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_config(tiny_config() | changes, WHERE)
    assert "somewhere/config.json" in str(caught.value)
    return str(caught.value)


def test_both_places_of_rope_theta_are_read():
    old, new = tiny_config(rope_theta=5e5), tiny_config(rope="parameters", rope_theta=5e5)
    assert "rope_theta" not in new
    assert read_config(old, WHERE).rope_theta == read_config(new, WHERE).rope_theta == 5e5


def test_two_different_values_of_rope_theta_are_a_fault():
    assert "two values" in refused(rope_parameters={"rope_theta": 1.5, "rope_type": "default"})


def test_what_is_written_reads_back_the_same():
    config = read_config(tiny_config(), WHERE)
    written = hf_config(config, "bfloat16")
    assert read_config(written, WHERE) == replace(config, dtype="bfloat16")
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1000000.0
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"use_sliding_window": True}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "dynamic"}}, "'dynamic'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
        ({"head_dim": 16}, "head_dim"),
        ({"hidden_size": 30}, "30"),
        ({"num_key_value_heads": 3}, "key-value heads"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"torch_dtype": "int8"}, "int8"),
    ],
)
def test_refused(changes, words):
    assert words in refused(**changes)


def test_all_faults_are_named_at_once():
    message = refused(hidden_act="gelu", vocab_size=0, use_sliding_window=True)
    assert len(message.splitlines()) == 3


def test_rope_scaling_of_type_default_changes_nothing():
    assert read_config(tiny_config() | {"rope_scaling": {"rope_type": "default"}}, WHERE).rope_theta == 1e6
