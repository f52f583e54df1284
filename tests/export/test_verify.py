"""`export --verify`: one tensor that is not the model's is named, whatever the format; so is a merge or a rounding gone
wrong, which tensors do not show. Figures over text are those of a closed form.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from finetune.errors import FinetuneError
from finetune.export import export as module
from finetune.export.export import export
from finetune.export.formats import NUMBERS, QUANTIZED
from finetune.model import adapted
from finetune.model.adapted import open_adapter, stored_weights
from finetune.model.resolve import resolve_model
from tests.model.test_resolve import adapter as adapter_folder
from tests.runs import finetune
from tests.tiny import tiny_model

LAYER = "model.layers.0."
KINDS = (
    "model.embed_tokens.weight",
    *(f"{LAYER}self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"{LAYER}self_attn.{name}_proj.bias" for name in "qkv"),
    *(f"{LAYER}mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    *(f"{LAYER}{name}_layernorm.weight" for name in ("input", "post_attention")),
    "model.norm.weight",
    "lm_head.weight",
)
DAMAGES = {
    "zeroed": lambda array: np.zeros_like(array),
    "shifted": lambda array: np.roll(array, 1, axis=0),
    "transposed": lambda array: np.ascontiguousarray(array.T).reshape(array.shape) if array.ndim > 1 else array[::-1],
}
FORMATS = [*(("hf", name) for name in NUMBERS), *(("gguf", name) for name in (*NUMBERS, *QUANTIZED))]


def quiet(line: str) -> None:
    return None


def damaged(weights, name, damage):
    """Those weights with one that is not the model's. `swapped`: the next layer's, or rows backwards where none is."""
    weight, other = weights[name], weights.get(name.replace(".0.", ".1."))
    if damage != "swapped":
        return weights | {name: replace(weight, read=lambda: DAMAGES[damage](weight.read()))}
    if other is weight:
        return weights | {name: replace(weight, read=lambda: np.ascontiguousarray(weight.read()[::-1]))}
    return weights | {name: replace(other, read=other.read)}


@pytest.fixture
def spoil(monkeypatch):
    """Export writes weights that are not the model's; verifying reads the right ones."""

    def spoil(*names, damage):
        def spoilt(*told):
            weights = stored_weights(*told)
            for name in names:
                weights = damaged(weights, name, damage)
            return weights

        monkeypatch.setattr(module, "stored_weights", spoilt)

    return spoil


@pytest.mark.parametrize("damage", [*DAMAGES, "swapped"])
@pytest.mark.parametrize(("format", "dtype"), FORMATS)
def test_each_kind_of_tensor_that_is_not_the_models_is_named(
    format, dtype, damage, tiny_untied_folder, tmp_path, spoil
):
    """All kinds in one file: each is compared by itself, so that each is found as if it were the only one."""
    from finetune.export.verify import expected_tensors, held_tensors, wrong_tensors

    if format == "gguf":
        pytest.importorskip("gguf")
    spoil(*KINDS, damage=damage)
    written = export(tiny_untied_folder, tmp_path / "out", format=format, dtype=dtype, say=quiet)
    found = resolve_model(next(written.folder.glob("*.gguf")) if format == "gguf" else written.folder)
    expected = expected_tensors(resolve_model(tiny_untied_folder), format, dtype)
    assert set(wrong_tensors(expected, held_tensors(found, format))) == set(KINDS)


def test_an_adapters_tensor_that_is_not_the_adapters_is_named(tiny_folder, tmp_path, monkeypatch):
    folder, name = adapter_folder(tmp_path / "a", tiny_folder), f"{LAYER}self_attn.q_proj.lora_A"

    def spoilt(source):
        weights, settings = open_adapter(source)
        return damaged(weights, name, "zeroed"), settings

    monkeypatch.setattr(module, "open_adapter", spoilt)
    with pytest.raises(FinetuneError, match=f"{name} is not the model's"):
        export(folder, tmp_path / "out", format="peft", dtype="bfloat16", verify=True, say=quiet)


@pytest.mark.parametrize(("format", "dtype"), [("hf", "bfloat16"), ("paddle", "float16"), ("gguf", "q4_0")])
def test_one_bias_is_enough_by_command(format, dtype, tiny_folder, tmp_path, spoil, capsys):
    """What its logits would not say: a key's bias moves all scores of a query alike, but for its rotation."""
    spoil(f"{LAYER}self_attn.k_proj.bias", damage="zeroed")
    arguments = ("export", tiny_folder, tmp_path / "out", "--format", format, "--dtype", dtype, "--verify")
    assert finetune(*arguments) == 1
    assert "model.layers.0.self_attn.k_proj.bias is not the model's" in capsys.readouterr().err


def test_a_merge_gone_wrong_is_found_behind_any_rounding(tiny_folder, tmp_path, monkeypatch):
    """The merge is the same on both sides of the tensors' comparison; the adapter beside its base is not merged."""
    merge = adapted.merge
    folder = adapter_folder(tmp_path / "a", tiny_folder)
    monkeypatch.setattr(adapted, "merge", lambda *parts, scaling: merge(*parts, scaling=2 * scaling))
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(FinetuneError, match="largest logit difference") as error:
            export(folder, tmp_path / dtype, dtype=dtype, verify=True, say=quiet)
        assert "not the model's" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", *QUANTIZED])
def test_a_rounding_gone_wrong_is_found_by_what_is_predicted(dtype, tiny_folder, tmp_path, monkeypatch):
    """It too is the same on both sides of the tensors' comparison."""
    from finetune.export import gguf as writer
    from finetune.export import verify

    pytest.importorskip("gguf")
    encoded = writer._encoded

    def wrong(package, array, kind, name):
        return encoded(package, np.roll(array, 1, axis=0) if name.endswith("o_proj.weight") else array, kind, name)

    monkeypatch.setattr(writer, "_encoded", wrong)
    with pytest.raises(FinetuneError) as error:
        export(tiny_folder, tmp_path / "out", format="gguf", dtype=dtype, verify=True, say=quiet)
    assert "not the model's" not in str(error.value) and "KL divergence" in str(error.value)
    assert verify.LIMITS.keys() == {name for _, name in FORMATS} - {"float32"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", *QUANTIZED])
def test_right_exports_are_well_within_their_limits(dtype, tiny_untied_folder, tmp_path):
    pytest.importorskip("gguf")
    likeness = export(tiny_untied_folder, tmp_path / "out", format="gguf", dtype=dtype, verify=True, say=quiet).likeness
    assert likeness.difference == 0 and not likeness.wrong and likeness.tensors == 27 and likeness.positions == 640
    assert 0 < likeness.divergence < likeness.limits.divergence / 2 and likeness.agreement > likeness.limits.agreement


def test_divergence_in_closed_form():
    """KL of two coins, 0.5 and 0.25, over more positions than are taken at a time; a shift of all logits is none."""
    from finetune.export.verify import mean_divergence

    model = np.zeros((130, 2), np.float32)
    other = np.tile(np.log([0.25, 0.75]).astype(np.float32) + 7, (130, 1))
    assert mean_divergence(model, other) == pytest.approx(0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75), rel=1e-6)
    assert mean_divergence(other, other) == 0.0


def test_a_model_without_a_tokenizer_is_verified_over_drawn_tokens(tmp_path):
    folder = tiny_model(tmp_path / "m", tokenizer=False)
    likeness = export(folder, tmp_path / "out", dtype="bfloat16", verify=True, say=quiet).likeness
    assert likeness.positions == 640 and not likeness.faults
