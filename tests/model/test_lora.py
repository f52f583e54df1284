"""Adapters: start, disabling, merging, saving and loading, for every variant."""

from __future__ import annotations

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.errors import ArgumentError, CheckpointError, StorageError
from finetune.model.adapted import open_adapter
from finetune.model.adapters import LoraSettings
from finetune.model.resolve import resolve_model
from tests.model.compute import difference, logits, prompts, shake
from tests.tiny import write_json

VARIANTS = ("lora", "rslora", "lora_plus", "pissa")


@pytest.fixture(scope="module")
def lora():
    import finetune.model.lora as module

    return module


@pytest.fixture
def base(tiny_folder):
    from finetune.model.load import load_model

    return lambda: load_model(tiny_folder).model


def adapted(lora, base, variant="lora", **changes):
    """A tiny model with an adapter that does something."""
    settings = LoraSettings(**({"rank": 4, "alpha": 8, "variant": variant} | changes))
    model = lora.add_lora(base(), settings, seed=1)
    shake(model)
    model.eval()
    return model


def save_peft(*args, **kwargs):
    from finetune.model.save import save_peft

    save_peft(*args, **kwargs)


def as_loaded(folder):
    from finetune.model.load import load_model

    return load_model(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_adapter_changes_nothing(variant, lora, base):
    model = base()
    before = logits(model)
    fresh = lora.add_lora(model, LoraSettings(rank=4, variant=variant), seed=0)
    fresh.eval()
    assert difference(logits(fresh), before) < (1e-5 if variant == "pissa" else 1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_it_gives_the_same_logits(variant, lora, base, tiny_folder, tmp_path):
    model = adapted(lora, base, variant)
    save_peft(model, tmp_path / "a", base=str(tiny_folder), tokenizer=tiny_folder)
    again = as_loaded(tmp_path / "a")
    assert difference(logits(again.model), logits(model)) <= (1e-5 if variant == "pissa" else 0.0)
    assert again.source.kind == "adapter" and again.source.tokenizer_folder == tmp_path / "a"


@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_twice_gives_the_same_bytes(variant, lora, base, tiny_folder, tmp_path):
    for name in "ab":
        save_peft(adapted(lora, base, variant), tmp_path / name, base=str(tiny_folder))
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_equals_the_adapter(variant, lora, base):
    model = adapted(lora, base, variant)
    expected = logits(model)
    plain = lora.merge_lora(model)
    assert type(plain).__name__ == "Qwen2ForCausalLM"
    assert difference(logits(plain), expected) < 1e-5
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in base().named_parameters()}
    assert all(not parameter.stop_gradient for parameter in plain.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_goes_on_from_its_state(variant, lora, base):
    model = adapted(lora, base, variant)
    again = lora.add_lora(base(), model.settings, seed=99, state=lora.training_state(model))
    again.eval()
    assert np.array_equal(logits(again), logits(model))
    left, right = lora.lora_layers(model), lora.lora_layers(again)
    assert all(np.array_equal(left[name].weight.numpy(), right[name].weight.numpy()) for name in left)


@pytest.mark.parametrize("variant", VARIANTS)
def test_disabled_it_is_the_base_again(variant, lora, base):
    plain = logits(base())
    model = adapted(lora, base, variant)
    active = logits(model)
    with lora.adapter_disabled(model):
        assert difference(logits(model), plain) < 1e-5
    assert np.array_equal(logits(model), active)
    assert np.abs(active - plain).max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_disabling_leaves_an_earlier_gradient_right(variant, lora, base):
    import paddle

    def gradients(interrupted: bool) -> list[np.ndarray]:
        model = adapted(lora, base, variant)
        output = model(paddle.to_tensor(prompts()))
        loss = (output[0] if isinstance(output, tuple) else output).square().mean()
        if interrupted:
            with lora.adapter_disabled(model), paddle.no_grad():
                model(paddle.to_tensor(prompts(seed=8)))
        loss.backward()
        return [parameter.grad.numpy() for parameter in model.parameters() if not parameter.stop_gradient]

    assert all(np.array_equal(*pair) for pair in zip(gradients(False), gradients(True)))


def test_only_the_adapter_is_trainable(lora, base):
    model = adapted(lora, base)
    trainable = {name for name, parameter in model.named_parameters() if not parameter.stop_gradient}
    assert trainable == {name for name, _ in model.named_parameters() if name.endswith(("lora_A", "lora_B"))}
    assert len(trainable) == 2 * 2 * 7  # A and B, layers, projections


def test_the_start_depends_on_the_seed_and_the_module_only(lora, base):
    import paddle

    def starts(seed: int, **changes) -> dict[str, np.ndarray]:
        paddle.seed(np.random.randint(1000))
        model = lora.add_lora(base(), LoraSettings(rank=4, **changes), seed=seed)
        return {name: layer.lora_A.numpy() for name, layer in lora.lora_layers(model).items()}

    every, some, other = starts(1), starts(1, target_modules=["q_proj"]), starts(2)
    assert all(np.array_equal(every[name], some[name]) for name in some)
    assert not any(np.array_equal(every[name], other[name]) for name in every)
    assert all(np.abs(value).max() <= value.shape[0] ** -0.5 for value in every.values())


def test_the_global_random_state_is_left_alone(lora, base):
    import paddle

    model = base()
    paddle.seed(5)
    expected = paddle.randn([3]).numpy()
    paddle.seed(5)
    lora.add_lora(model, LoraSettings(rank=4), seed=0)
    assert np.array_equal(paddle.randn([3]).numpy(), expected)


def test_scaling_and_learning_rates(lora, base):
    def layer(**changes):
        model = lora.add_lora(base(), LoraSettings(rank=4, alpha=8, **changes))
        return next(iter(lora.lora_layers(model).values()))

    assert layer().scaling == 2.0
    assert layer(variant="rslora").scaling == 4.0
    assert layer(variant="lora_plus").lora_B.optimize_attr["learning_rate"] == 16.0
    assert layer(variant="lora_plus", lora_plus_ratio=4.0).lora_B.optimize_attr["learning_rate"] == 4.0
    assert layer().lora_B.optimize_attr["learning_rate"] == 1.0


def test_pissa_starts_from_the_largest_singular_vectors(lora, base):
    plain = base()
    weight = plain.qwen2.layers[0].mlp.up_proj.weight.numpy()
    model = lora.add_lora(plain, LoraSettings(rank=4, alpha=8, variant="pissa"))
    layer = lora.lora_layers(model)["model.layers.0.mlp.up_proj"]
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    best = left[:, :4] * values[:4] @ right[:4]
    assert np.allclose(2 * layer.lora_A.numpy() @ layer.lora_B.numpy(), best, atol=1e-5)
    assert np.allclose(layer.weight.numpy(), weight - best, atol=1e-5)


def test_pissa_is_saved_as_a_plain_adapter_of_twice_the_rank(lora, base, tiny_folder, tmp_path):
    save_peft(adapted(lora, base, "pissa"), tmp_path / "a", base=str(tiny_folder))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)


def test_dropout_is_on_in_training_only(lora, base):
    model = adapted(lora, base, dropout=0.5)
    model.train()
    assert not np.array_equal(logits(model), logits(model))
    model.eval()
    assert np.array_equal(logits(model), logits(model))


@pytest.mark.parametrize(
    "targets, count",
    [("all-linear", 14), (["q_proj", "v_proj"], 4), (["layers.1.mlp.up_proj"], 1), (["self_attn.o_proj"], 2)],
)
def test_target_modules(targets, count, lora, base, tiny_folder, tmp_path):
    model = adapted(lora, base, target_modules=targets)
    assert len(lora.lora_layers(model)) == count
    save_peft(model, tmp_path / "a", base=str(tiny_folder))
    assert np.array_equal(logits(as_loaded(tmp_path / "a").model), logits(model))


def test_an_unknown_module_names_the_nearest(lora, base):
    with pytest.raises(ArgumentError, match="Did you mean q_proj?"):
        lora.add_lora(base(), LoraSettings(target_modules=["q_prj"]))
    with pytest.raises(ArgumentError, match="all-linear"):
        lora.add_lora(base(), LoraSettings(target_modules=["norm"]))


def test_a_state_that_does_not_fit(lora, base):
    state = lora.training_state(adapted(lora, base))
    with pytest.raises(CheckpointError, match="lora_A"):
        lora.add_lora(base(), LoraSettings(rank=8, alpha=8), state=state)


@pytest.fixture
def saved(lora, base, tiny_folder, tmp_path):
    save_peft(adapted(lora, base, target_modules=["q_proj", "v_proj"]), tmp_path / "a", base=str(tiny_folder))
    return tmp_path / "a"


def rewrite(folder, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})


Q = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGE = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"}, "q_proj.lora_B"),
    "unexpected": (lambda t: t | {"base_model.model.model.norm.weight": np.ones(32, np.float32)}, "norm"),
    "head": (lambda t: t | {"base_model.model.lm_head.lora_A.weight": np.ones((4, 32), np.float32)}, "lm_head"),
    "not named": (lambda t: t | {f"{Q.replace('q_', 'k_')}.lora_A.weight": np.ones((4, 32), np.float32)}, "k_proj"),
    "no such layer": (lambda t: t | {f"{Q.replace('0', '7')}.lora_A.weight": np.ones((4, 32), np.float32)}, "layers.7"),
    "transposed": (lambda t: {k: np.ascontiguousarray(v.T) for k, v in t.items()}, "shape"),
    "integers": (lambda t: {k: v.astype(np.int32) for k, v in t.items()}, "int32"),
    "nothing": (lambda t: {}, "no tensors"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_an_adapter_that_does_not_add_up(name, saved):
    change, words = DAMAGE[name]
    rewrite(saved, change)
    with pytest.raises(CheckpointError) as caught:
        as_loaded(saved)
    assert words in str(caught.value) and str(saved) in str(caught.value)


def test_a_pattern_as_target_is_taken_from_the_tensors(saved, lora, base):
    before = logits(as_loaded(saved).model)
    config = json.loads((saved / "adapter_config.json").read_text())
    write_json(saved / "adapter_config.json", config | {"target_modules": r"(.*)+(q|v)_proj$"})
    assert np.array_equal(logits(as_loaded(saved).model), before)


def test_a_paddlenlp_adapter(lora, base, tiny_folder, tmp_path):
    model = adapted(lora, base)
    folder = tmp_path / "nlp"
    model.save_pretrained(str(folder))
    write_json(
        folder / "lora_config.json",
        json.loads((folder / "lora_config.json").read_text()) | {"base_model_name_or_path": str(tiny_folder)},
    )
    with pytest.raises(CheckpointError, match="pickle"):
        as_loaded(folder)
    (folder / "lora_model_state.pdparams").unlink()
    tensors = {name: tensor.numpy() for name, tensor in model.get_trainable_state_dict().items()}
    save_file(tensors, folder / "peft_model.safetensors", metadata={"format": "np"})
    assert np.array_equal(logits(as_loaded(folder).model), logits(model))
    rounded = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    bits = {name: tensor.view(np.uint16) for name, tensor in rounded.items()}  # as PaddleNLP saves bfloat16
    save_file(bits, folder / "peft_model.safetensors", metadata={"format": "np"})
    found, _ = open_adapter(resolve_model(folder))
    assert {weight.dtype.name for weight in found.values()} == {"bfloat16"}
    assert difference(logits(as_loaded(folder).model), logits(model)) < 0.05


@pytest.mark.parametrize("key", ["pissa", "use_mora", "loraga", "trainable_bias"])
def test_paddlenlp_variants_that_are_saved_wrong(key, tmp_path, tiny_folder):
    config = {"r": 4, "lora_alpha": 8, "base_model_name_or_path": str(tiny_folder), key: True}
    write_json(tmp_path / "lora_config.json", config)
    save_file({"x": np.ones(1, np.float32)}, tmp_path / "peft_model.safetensors")
    with pytest.raises(CheckpointError, match=key):
        as_loaded(tmp_path)


def test_attached_to_a_model_in_memory(saved, lora, base):
    model = lora.attach_adapter(base(), resolve_model(saved))
    model.eval()
    assert np.array_equal(logits(model), logits(as_loaded(saved).model))


def test_a_failed_save_leaves_nothing(lora, base, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finetune.model.save.write_tensors", fail)
    with pytest.raises(StorageError, match="No space left"):
        save_peft(adapted(lora, base), tmp_path / "a", base="x")
    assert list(tmp_path.iterdir()) == []
    shutil.rmtree(tmp_path)
