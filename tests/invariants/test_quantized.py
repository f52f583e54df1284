"""QLoRA is LoRA over the numbers that the codes stand for, in every way a run can go; so are 8-bit moments, DoRA and
modules saved whole the same in pieces, packed, and after a stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from finetune.model.config import read_config
from finetune.model.quantize import Quantization
from tests.invariants.test_sft import final_digest, losses_and_norms, train
from tests.runs import WORDS, finetune, metrics, write_recipe

KINDS = {
    "nf4": ("model.quantization=nf4",),
    "nf4_plain": ("model.quantization=nf4", "model.double_quantization=false"),
    "int8": ("model.quantization=int8",),
}
LORA = "lora={rank: 4, alpha: 8, dropout: 0.3}"
PAIR_KEYS = ("rewards/margins", "logps/chosen", "logps/rejected")


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """A function of the kind: the base with each linear layer replaced by what its codes stand for."""
    config = read_config(json.loads((tiny_folder / "config.json").read_text()), tiny_folder)
    root = tmp_path_factory.mktemp("whole")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            shutil.copytree(tiny_folder, root / kind)
            weights = load_file(root / kind / "model.safetensors")
            how = Quantization(kind.removesuffix("_plain"), double=kind != "nf4_plain")
            for name in weights:
                if name.removesuffix(".weight") in config.linears:
                    weights[name] = how.quantize(weights[name]).dequantize()
            save_file(weights, root / kind / "model.safetensors", {"format": "pt"})
        return root / kind

    return folder


def preference_rows(folder: Path) -> Path:
    rows = [
        {"prompt": f"say {a} {b}", "chosen": f"{a} {b}", "rejected": f"{b} {a}"} for a, b in zip(WORDS, reversed(WORDS))
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_sft_is_lora_on_the_dequantized_base(kind, whole, tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder)
    quantized = train(recipe, tmp_path / "quantized", LORA, *KINDS[kind])
    plain = train(recipe, tmp_path / "plain", LORA, f"model.path={whole(kind)}")
    assert losses_and_norms(quantized) == pytest.approx(losses_and_norms(plain), rel=1e-5)


@pytest.mark.parametrize("cached", ["true", "false"])
def test_dpo_is_lora_on_the_dequantized_base(cached, whole, tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder)
    dpo = (
        "method=dpo",
        f"data.train=[{{path: {preference_rows(tmp_path)}}}]",
        "lora={rank: 4}",
        f"dpo.precompute_ref_log_probs={cached}",
    )
    quantized = train(recipe, tmp_path / "quantized", *dpo, *KINDS["nf4"])
    plain = train(recipe, tmp_path / "plain", *dpo, f"model.path={whole('nf4')}")
    assert losses_and_norms(quantized) == pytest.approx(losses_and_norms(plain), rel=1e-4)
    for mine, theirs in zip(metrics(quantized), metrics(plain)):
        assert [mine[key] for key in PAIR_KEYS] == pytest.approx([theirs[key] for key in PAIR_KEYS], rel=1e-4, abs=1e-5)


LEAN = {
    "nf4": ("lora={rank: 4}", *KINDS["nf4"]),
    "int8": ("lora={rank: 4}", *KINDS["int8"]),
    "dora": ("lora={rank: 4, variant: dora}",),
    "qdora": ("lora={rank: 4, variant: dora}", *KINDS["nf4"]),
    "saved": ("lora={rank: 4, modules_to_save: [embed_tokens, lm_head]}",),
    "adamw_8bit": ("training.optim=adamw_8bit",),
}


@pytest.mark.parametrize("kind", LEAN)
def test_packing_accumulation_and_recompute_change_nothing(kind, tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder, shuffle=False, per_device_train_batch_size=24, max_steps=3)
    expected = losses_and_norms(train(recipe, tmp_path / "apart", *LEAN[kind]))
    pieces = "training.per_device_train_batch_size=3", "training.gradient_accumulation_steps=8"
    for name, changes in {
        "packed": ("data.packing=true",),
        "pieces": pieces,
        "recomputed": ("training.recompute=true",),
    }.items():
        run = train(recipe, tmp_path / name, *LEAN[kind], *changes)
        assert losses_and_norms(run) == pytest.approx(expected, rel=1e-5), name


RESUMED = {
    "qdora": (
        "lora={rank: 4, variant: dora, dropout: 0.3, modules_to_save: [embed_tokens]}",
        *KINDS["nf4"],
        "training.optim=adamw_8bit",
    ),
    "nf4": (LORA, *KINDS["nf4"], "training.optim=adamw_8bit"),
    "int8": (LORA, *KINDS["int8"]),
    "dora": ("lora={rank: 4, variant: dora, dropout: 0.3}",),
    "saved": ("lora={rank: 4, modules_to_save: [embed_tokens]}", "training.optim=adamw_8bit"),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_stopped_run_goes_on_to_the_same_bits(kind, tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder, lr_scheduler_type="constant")
    whole_run = train(recipe, tmp_path / "whole", *RESUMED[kind])
    stopped = train(recipe, tmp_path / "stopped", *RESUMED[kind], "training.max_steps=2")
    assert final_digest(train(recipe, stopped, *RESUMED[kind])) == final_digest(whole_run)


def test_another_quantization_is_another_run(tmp_path, tiny_folder, capsys):
    recipe = write_recipe(tmp_path, tiny_folder)
    train(recipe, tmp_path / "run", LORA, "training.max_steps=1", *KINDS["nf4"])
    assert finetune("train", recipe, f"training.output_dir={tmp_path / 'run'}", LORA, *KINDS["int8"]) == 2
    assert "model.quantization" in capsys.readouterr().err
