"""Folders written for transformers and for PaddleNLP."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from finetune.errors import ArgumentError, CheckpointError
from finetune.model.adapted import stored_weights
from finetune.model.family import Qwen2
from finetune.model.resolve import resolve_model
from finetune.model.write import generation_config, special_tokens, write_hf, write_paddle
from tests.model.compute import logits
from tests.tiny import Shape, tiny_model, tiny_tokenizer, tiny_weights, write_json


@pytest.fixture(scope="module")
def load():
    from finetune.model.load import load_model

    return load_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000])
def test_hugging_face_there_and_back_is_bit_equal(tied, max_shard_bytes, tmp_path, load):
    from finetune.model.save import save_hf

    folder = tiny_model(tmp_path / "m", tied=tied)
    save_hf(load(folder).model, tmp_path / "out", tokenizer=folder, max_shard_bytes=max_shard_bytes)
    stored = {}
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        stored |= load_file(path)
        with safe_open(path, "np") as file:
            assert file.metadata() == {"format": "pt"}
    expected = tiny_weights(tied=tied)
    assert stored.keys() == expected.keys()
    assert all(stored[name].tobytes() == expected[name].tobytes() for name in expected)
    assert np.array_equal(logits(load(tmp_path / "out").model), logits(load(folder).model))
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (max_shard_bytes == 40_000)


def test_the_files_of_a_folder(tmp_path, load, tiny_folder):
    from finetune.model.save import save_hf

    save_hf(load(tiny_folder).model, tmp_path / "out", tokenizer=tiny_folder)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in tiny_folder.iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_folder / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["max_position_embeddings"] == 512


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_round_to_nearest(dtype, tmp_path, load):
    from finetune.model.save import save_hf

    folder = tiny_model(tmp_path / "m", tokenizer=False)
    save_hf(load(folder).model, tmp_path / "out", dtype=dtype)
    stored, expected = load_file(tmp_path / "out" / "model.safetensors"), tiny_weights(dtype=dtype)
    assert all(stored[name].tobytes() == expected[name].tobytes() for name in expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


def test_values_beyond_float16_are_refused(tmp_path, load):
    from finetune.model.save import save_hf

    model = load(tiny_model(tmp_path / "m", tokenizer=False)).model
    model.qwen2.norm.weight.set_value(model.qwen2.norm.weight * 1e6)
    with pytest.raises(ArgumentError, match="65504"):
        save_hf(model, tmp_path / "out", dtype="float16")
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000])
def test_paddlenlp_opens_what_we_write_for_it(tied, max_shard_bytes, tmp_path, load):
    from paddlenlp.transformers import AutoModelForCausalLM

    from finetune.model.save import save_paddle

    loaded = load(tiny_model(tmp_path / "m", tied=tied, rope_theta=5e5))
    save_paddle(loaded.model, tmp_path / "out", tokenizer=loaded.source.folder, max_shard_bytes=max_shard_bytes)
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    theirs.eval()
    assert np.array_equal(logits(theirs), logits(loaded.model))
    assert np.array_equal(logits(load(tmp_path / "out").model), logits(loaded.model))


def test_paddlenlp_reads_our_bfloat16(tmp_path):
    """We write BF16 where PaddleNLP itself writes U16; its reader knows both."""
    from paddlenlp.transformers import AutoModelForCausalLM

    source = resolve_model(tiny_model(tmp_path / "m", tied=False, dtype="bfloat16", tokenizer=False))
    write_paddle(source.config, stored_weights(source), tmp_path / "out", dtype="bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype="float32")
    expected = tiny_weights(tied=False, dtype="bfloat16")["lm_head.weight"].astype(np.float32)
    assert np.array_equal(theirs.lm_head.weight.numpy(), expected.T)


def test_weights_go_from_file_to_file_without_a_model(tmp_path, tiny_untied_folder):
    source = resolve_model(tiny_untied_folder)
    write_hf(source.config, stored_weights(source), tmp_path / "out", dtype="float32", tokenizer=tiny_untied_folder)
    stored, expected = load_file(tmp_path / "out" / "model.safetensors"), tiny_weights(tied=False, seed=1)
    assert all(stored[name].tobytes() == expected[name].tobytes() for name in expected)


def test_a_full_folder_is_not_written_to(tmp_path, tiny_folder, load):
    from finetune.model.save import save_hf

    (tmp_path / "out").mkdir()
    save_hf(load(tiny_folder).model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="not empty"):
        save_hf(load(tiny_folder).model, tmp_path / "out")


def test_an_adapter_must_be_merged_first(tmp_path, tiny_folder, load):
    from finetune.model.lora import LoraSettings, add_lora
    from finetune.model.save import save_hf

    with pytest.raises(ArgumentError, match="merge"):
        save_hf(add_lora(load(tiny_folder).model, LoraSettings(rank=2)), tmp_path / "out")


def described(eos=400):
    return Qwen2(eos_token_id=eos)


def test_a_base_model_gets_the_end_of_a_turn_as_stop(tmp_path):
    tiny_tokenizer(tmp_path)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 400, "max_new_tokens": 2048, "top_p": 0.8})
    config = generation_config(described(), tmp_path)
    assert config["eos_token_id"] == [402, 400]
    assert (config["max_new_tokens"], config["top_p"], config["pad_token_id"]) == (2048, 0.8, 400)


def test_an_instruct_model_keeps_its_generation_config(tmp_path):
    tiny_tokenizer(tmp_path)
    found = {"eos_token_id": [402, 400], "do_sample": True, "top_p": 0.7, "pad_token_id": 400, "bos_token_id": 400}
    write_json(tmp_path / "generation_config.json", found)
    assert generation_config(described(), tmp_path) == found


def test_without_a_tokenizer_the_config_says_where_to_stop():
    assert generation_config(described((7, 8)), None) == {"do_sample": False, "eos_token_id": [7, 8]}


def test_special_tokens_from_either_file(tmp_path):
    tiny_tokenizer(tmp_path)
    both = special_tokens(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert both == special_tokens(tmp_path) == {"<|endoftext|>": 400, "<|im_start|>": 401, "<|im_end|>": 402}


def test_a_model_paddlenlp_built_by_itself_is_written_too(tmp_path, load):
    from paddlenlp.transformers import AutoModelForCausalLM, Qwen2Config

    from finetune.model.save import save_hf

    keys = Shape().__dict__
    model = AutoModelForCausalLM.from_config(Qwen2Config(architectures=["Qwen2ForCausalLM"], rope_theta=5e5, **keys))
    model.eval()
    save_hf(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.config.rope_theta == 5e5
    assert np.array_equal(logits(again.model), logits(model))
