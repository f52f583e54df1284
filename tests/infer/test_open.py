"""Every kind of MODEL opens, and says what the model it was made from says."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.files import read_json
from finetune.infer.open import AS_STORED, Held, open_model, read_generation_config
from finetune.infer.sampling import Sampling
from finetune.model.config import read_config
from finetune.model.quantize import Quantization
from finetune.model.resolve import resolve_model

PROMPT = [65, 66, 67, 68]
SAMPLING = Sampling(max_new_tokens=16)


def answer(folder) -> list[int]:
    return open_model(str(folder)).engine.generate([PROMPT], SAMPLING)[0].tokens


@pytest.fixture(scope="module")
def adapter(tiny_untied_folder, tmp_path_factory):
    """A PEFT folder, and what the adapted model answers unmerged."""
    from finetune.infer.engine import Engine
    from finetune.model.load import load_model
    from finetune.model.lora import LoraSettings, add_lora, lora_layers
    from finetune.model.save import save_peft

    base = load_model(tiny_untied_folder).model
    model = add_lora(base, LoraSettings(rank=4, alpha=8, dropout=0.0, target_modules="all-linear"))
    rng = np.random.default_rng(0)
    for layer in lora_layers(model).values():
        layer.lora_B.set_value((rng.standard_normal(layer.lora_B.shape) * 0.2).astype(np.float32))
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_peft(model, folder, base=str(tiny_untied_folder))
    tokens = Engine(model, stop_token_ids=[402, 400]).generate([PROMPT], SAMPLING)[0].tokens
    return folder, tokens


def test_an_adapter_folder(adapter, tiny_untied_folder):
    folder, tokens = adapter
    assert answer(folder) == tokens != answer(tiny_untied_folder)


def test_a_runs_folder(adapter, tmp_path):
    folder, tokens = adapter
    shutil.copytree(folder, tmp_path / "run" / "final")
    assert answer(tmp_path / "run") == tokens


def test_a_paddlenlp_folder(tiny_untied_folder, tmp_path):
    from finetune.model.load import load_model
    from finetune.model.save import save_paddle

    folder = tmp_path / "paddle"
    save_paddle(load_model(tiny_untied_folder).model, folder, tokenizer=tiny_untied_folder)
    assert resolve_model(folder).kind == "paddle"
    assert answer(folder) == answer(tiny_untied_folder)


def test_an_adapter_without_a_generation_config_takes_its_bases(adapter, tmp_path):
    folder = shutil.copytree(adapter[0], tmp_path / "adapter")
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = read_generation_config(resolve_model(folder))
    assert (config["eos_token_id"], config["pad_token_id"]) == ([402, 400], 400)


def test_end_tokens_fall_back_to_the_models_config(tiny_untied_folder, tmp_path):
    folder = shutil.copytree(tiny_untied_folder, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    assert read_generation_config(resolve_model(folder))["eos_token_id"] == [402]
    assert open_model(str(folder)).engine.stop_token_ids == {400, 402}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_weights_answer_as_the_numbers_that_their_codes_stand_for(kind, tiny_folder, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / "whole")
    config = read_config(read_json(model / "config.json"), model)
    weights = load_file(model / "model.safetensors")
    for name in weights:
        if name.removesuffix(".weight") in config.linears:
            weights[name] = Quantization(kind).quantize(weights[name]).dequantize()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    quantized, whole = (
        open_model(str(folder), held, pack=True).engine.generate([PROMPT], SAMPLING)[0].tokens
        for folder, held in ((tiny_folder, Held(quantization=kind)), (model, AS_STORED))
    )
    assert quantized == whole
