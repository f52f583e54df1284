"""Adapters as PEFT writes them, of every kind: opened, merged, exported, trained, against Qwen2 in NumPy.

tests/parity/test_adapter_parity.py has the same kinds against PEFT itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.errors import ArgumentError, CheckpointError
from finetune.export.export import export
from finetune.model.resolve import resolve_model
from tests.model.closed_form import nll, qwen2
from tests.model.compute import difference
from tests.runs import finetune, steps
from tests.tiny import tiny_model, tiny_weights, write_json

IDS = np.random.default_rng(5).integers(0, 416, 24)
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none"}
# adapter_config.json; modules with an update, each with rank and scaling; tensors that stand in the adapter whole.
KINDS: dict[str, tuple[dict, dict[str, tuple[int, float]], list[str]]] = {
    "patterns": (
        {"target_modules": ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"],
         "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"^model.layers.1.mlp.down_proj": 3}},
        {Q: (2, 4.0), DOWN: (4, 0.75)}, []),
    "embedding": ({"target_modules": ["embed_tokens"]}, {EMBEDDING: (4, 2.0)}, []),
    "head": ({"target_modules": ["lm_head", "layers.0.self_attn.q_proj"]}, {HEAD: (4, 2.0), Q: (4, 2.0)}, []),
    "saved": (
        {"target_modules": [Q], "modules_to_save": [EMBEDDING, HEAD]},
        {Q: (4, 2.0)}, [f"{EMBEDDING}.weight", f"{HEAD}.weight"]),
    "saved embedding": (
        {"target_modules": [Q], "modules_to_save": ["embed_tokens"]}, {Q: (4, 2.0)}, [f"{EMBEDDING}.weight"]),
    "tied by PEFT": (
        {"target_modules": [Q], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {Q: (4, 2.0)}, [f"{EMBEDDING}.weight", f"{HEAD}.weight"]),
    "norms": (
        {"target_modules": [Q], "modules_to_save": ["layers.1.input_layernorm"]},
        {Q: (4, 2.0)}, ["model.layers.1.input_layernorm.weight"]),
    "a projection": (
        {"target_modules": [Q], "modules_to_save": ["layers.1.mlp.up_proj"]},
        {Q: (4, 2.0)}, ["model.layers.1.mlp.up_proj.weight"]),
    "biases": (
        {"target_modules": [Q, DOWN], "bias": "lora_only"}, {Q: (4, 2.0), DOWN: (4, 2.0)}, [f"{Q}.bias"]),
    "all biases": (
        {"target_modules": [DOWN], "bias": "all"}, {DOWN: (4, 2.0)},
        [f"model.layers.{n}.self_attn.{x}_proj.bias" for n in (0, 1) for x in "qkv"]),
    "dora": ({"target_modules": [Q, DOWN], "use_dora": True}, {Q: (4, 2.0), DOWN: (4, 2.0)}, []),
    "dora, rslora": ({"target_modules": [Q], "use_dora": True, "use_rslora": True}, {Q: (4, 4.0)}, []),
    "dora of the ends": (
        {"target_modules": [EMBEDDING, HEAD], "use_dora": True}, {EMBEDDING: (4, 2.0), HEAD: (4, 2.0)}, []),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {tied: tiny_model(folder / str(tied), tied=tied, seed=2) for tied in (True, False)}


def base_weights(tied: bool) -> dict[str, np.ndarray]:
    """With a head in any case."""
    weights = tiny_weights(tied=tied, seed=2)
    return {f"{HEAD}.weight": weights[f"{EMBEDDING}.weight"]} | weights


class Case:
    """A kind of adapter on a base, with its tensors by their names here: `<module>.A`, `.B`, `.m`, or the tensor's."""

    def __init__(self, kind: str, tied: bool):
        self.config, self.updates, self.whole = KINDS[kind]
        self.base, random = base_weights(tied), np.random.default_rng(7)
        self.dora = self.config.get("use_dora", False)
        self.tensors: dict[str, np.ndarray] = {}
        for module, (rank, _) in self.updates.items():
            outputs, inputs = self.oriented(module, self.base).shape
            self.tensors[f"{module}.A"] = random.standard_normal((rank, inputs)) * inputs**-0.5
            self.tensors[f"{module}.B"] = random.standard_normal((outputs, rank)) * 0.2
            if self.dora:
                self.tensors[f"{module}.m"] = 0.5 + random.random(outputs)
        for name in self.whole:
            self.tensors[name] = self.base[name] + 0.2 * random.standard_normal(self.base[name].shape)
        if "ensure_weight_tying" in self.config:
            self.tensors[f"{HEAD}.weight"] = self.tensors[f"{EMBEDDING}.weight"]
        self.tensors = {name: array.astype(np.float32) for name, array in self.tensors.items()}

    @staticmethod
    def oriented(module: str, weights: dict[str, np.ndarray]) -> np.ndarray:
        """A module's weight as [outputs, inputs]: an embedding has as many inputs as tokens."""
        return weights[f"{module}.weight"].T if module == EMBEDDING else weights[f"{module}.weight"]

    def lengths(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """||W + scaling B A|| of each output."""
        return {module: np.linalg.norm(self._sum(module, tensors), axis=1) for module in self.updates}

    def _sum(self, module: str, tensors: dict[str, np.ndarray]) -> np.ndarray:
        update = tensors[f"{module}.B"].astype(np.float64) @ tensors[f"{module}.A"]
        return self.oriented(module, self.base) + self.updates[module][1] * update

    def weights(self, tensors: dict | None = None, lengths: dict | None = None) -> dict[str, np.ndarray]:
        """The model's, with the adapter in them. With `lengths`, DoRA's are these constants."""
        tensors = self.tensors if tensors is None else tensors
        lengths = self.lengths(tensors) if lengths is None else lengths
        found = self.base | {name: tensors[name] for name in self.whole}
        for module in self.updates:
            total = self._sum(module, tensors)
            if self.dora:
                total *= (tensors[f"{module}.m"] / lengths[module])[:, None]
            found[f"{module}.weight"] = total.T if module == EMBEDDING else total
        return found

    def write(self, folder: Path, base: Path) -> Path:
        """As PEFT does."""
        tensors = {}
        for name, array in self.tensors.items():
            module, _, part = name.rpartition(".")
            if part in "AB":
                part = f"lora_embedding_{part}" if module == EMBEDDING else f"lora_{part}.weight"
            elif part == "m":
                part = "lora_magnitude_vector"
            elif part == "bias" and module in self.updates:
                part = "base_layer.bias"
            tensors[f"base_model.model.{module}.{part}"] = array
        for module in {EMBEDDING, HEAD} & set(self.updates):
            tensors[f"base_model.model.{module}.base_layer.weight"] = self.base[f"{module}.weight"].copy()
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        write_json(folder / "adapter_config.json", CONFIG | self.config | {"base_model_name_or_path": str(base)})
        return folder


def ours(model) -> np.ndarray:
    import paddle

    with paddle.no_grad():
        output = model(paddle.to_tensor(IDS[None]))
    return (output[0] if isinstance(output, tuple) else output).numpy()[0]


def test_the_closed_form_is_the_model(bases):
    from finetune.model.load import load_model

    for tied, folder in bases.items():
        assert difference(ours(load_model(folder).model), qwen2(base_weights(tied), IDS)) < 1e-5


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_opened_merged_and_exported(kind, tied, bases, tmp_path):
    from finetune.model.load import load_model
    from finetune.model.lora import adapter_disabled, merge_lora

    case = Case(kind, tied)
    folder = case.write(tmp_path / "a", bases[tied])
    expected = qwen2(case.weights(), IDS)
    model = load_model(folder).model
    assert difference(ours(model), expected) < 1e-5
    with adapter_disabled(model):
        assert difference(ours(model), qwen2(case.base, IDS)) < 1e-5
    assert difference(ours(model), expected) < 1e-5
    assert difference(ours(merge_lora(model)), expected) < 1e-5
    for layout in ("hf", "peft", "gguf"):
        export(folder, tmp_path / layout, format=layout, say=lambda line: None, verify=layout == "gguf")
        if layout != "gguf":
            assert difference(ours(load_model(tmp_path / layout).model), expected) < 1e-5
    assert np.abs(qwen2(case.base, IDS) - expected).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_saved_again_it_is_what_peft_wrote(kind, bases, tmp_path):
    from finetune.model.load import load_model
    from finetune.model.save import save_peft

    folder = Case(kind, True).write(tmp_path / "a", bases[True])
    save_peft(load_model(folder).model, tmp_path / "again", base=str(bases[True]))
    stored, again = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "again"))
    repeated = {name for name in stored if name.endswith("base_layer.weight")}
    assert again.keys() == stored.keys() - repeated
    assert all(np.array_equal(again[name], stored[name]) for name in again)
    config, found = (json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path / "again", folder))
    for key in ("r", "lora_alpha", "bias", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora"):
        assert (config[key] or None) == (found.get(key) or None), key


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tied by PEFT"])
def test_gradients_are_those_of_the_closed_form(kind, bases, tmp_path):
    """Central differences of the loss, in float64. DoRA's lengths are constants to the gradient, as in PEFT."""
    from finetune.compute.forward import total_nll
    from finetune.compute.layout import lay_out_samples
    from finetune.model.load import load_model
    from finetune.model.lora import lora_layers, saved_tensors

    case = Case(kind, True)
    model = load_model(case.write(tmp_path / "a", bases[True]), training=True).model
    total_nll(model, lay_out_samples([(IDS, IDS)])).backward()
    found = {name: getattr(owner, part) for name, (owner, part) in saved_tensors(model).items()}
    for module, layer in lora_layers(model).items():
        found |= {f"{module}.A": layer.lora_A, f"{module}.B": layer.lora_B}
        found |= {f"{module}.m": layer.lora_magnitude} if case.dora else {}
    assert found.keys() == case.tensors.keys()
    trained = {id(parameter) for parameter in model.parameters() if not parameter.stop_gradient}
    assert trained == {id(parameter) for parameter in found.values()}
    lengths, random = case.lengths(case.tensors), np.random.default_rng(1)
    for name, parameter in found.items():
        gradient = parameter.grad.numpy()
        gradient = gradient.T if gradient.shape != case.tensors[name].shape or name[-2:] in (".A", ".B") else gradient
        scale = np.abs(gradient).max()
        for place in [
            np.unravel_index(np.abs(gradient).argmax(), gradient.shape),
            tuple(map(random.integers, gradient.shape)),
        ]:
            losses = []
            for step in (1e-4, -1e-4):
                moved = case.tensors | {name: case.tensors[name].astype(np.float64)}
                moved[name][place] += step
                losses.append(nll(qwen2(case.weights(moved, lengths), IDS)[:-1], IDS[1:]))
            assert abs((losses[0] - losses[1]) / 2e-4 - gradient[place]) < 2e-3 * scale, (name, place)


def write_rows(folder: Path) -> Path:
    rows = [{"instruction": f"{number} and {number}?", "output": str(2 * number)} for number in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder / "rows.jsonl"


@pytest.mark.parametrize("kind", ["patterns", "head", "saved", "biases", "dora of the ends"])
def test_trained_further(kind, bases, tmp_path, capfd):
    """Two steps, and again with a stop after the first: the same bits, what is trained has moved, and was counted."""
    case = Case(kind, True)
    folder = case.write(tmp_path / "a", bases[True])
    recipe = {
        "method": "sft",
        "model": {"path": str(folder)},
        "lora": {"rank": 4, "alpha": 8, "variant": "dora" if case.dora else "lora"},
        "data": {"train": [{"path": str(write_rows(tmp_path))}], "max_length": 64},
        "training": {"max_steps": 2, "save_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 0.01},
    }
    write_json(tmp_path / "r.json", recipe)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finetune("train", str(tmp_path / "r.json"), f"training.output_dir={whole}") == 0
    count = sum(array.size for array in case.tensors.values())
    assert re.search(rf"trainable parameters +{count:,} of ", capfd.readouterr().err)
    for count in (1, 2):
        to = (f"training.output_dir={parts}", f"training.max_steps={count}")
        assert finetune("train", str(tmp_path / "r.json"), *to) == 0
    assert len(steps(whole)) == 2
    trained, resumed, before = (
        load_file(path / "adapter_model.safetensors") for path in (whole / "final", parts / "final", folder)
    )
    assert {name: array.tobytes() for name, array in trained.items()} == {n: a.tobytes() for n, a in resumed.items()}
    assert all(not np.array_equal(array, before[name]) for name, array in trained.items())


@pytest.mark.parametrize("lora, whole", [
    ({"variant": "dora"}, []),
    ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, []),
    ({"modules_to_save": ["embed_tokens", "lm_head"]}, ["model.embed_tokens.weight", "lm_head.weight"]),
])  # fmt: skip
def test_new_ones_from_a_recipe(lora, whole, bases, tmp_path):
    from finetune.model.load import load_model

    recipe = {
        "method": "sft",
        "model": {"path": str(bases[True])},
        "lora": {"rank": 4} | lora,
        "data": {"train": [{"path": str(write_rows(tmp_path))}], "max_length": 64},
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 12,
            "learning_rate": 0.01,
            "output_dir": str(tmp_path / "run"),
        },
    }
    write_json(tmp_path / "r.json", recipe)
    assert finetune("train", str(tmp_path / "r.json")) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    loaded = load_model(tmp_path / "run" / "final")
    trainable = sum(int(p.size) for p in loaded.model.parameters() if not p.stop_gradient)
    assert trainable == manifest["base_model"]["trainable_parameters"]
    stored = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert {f"base_model.model.{name}" for name in whole} <= stored.keys()
    losses = [row["loss"] for row in steps(tmp_path / "run")]
    assert losses == sorted(losses, reverse=True)


def test_a_vocabulary_that_grew_is_refused_with_the_way_out(bases, tmp_path):
    folder = Case("embedding", True).write(tmp_path / "a", bases[True])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = f"base_model.model.{EMBEDDING}.base_layer.weight"
    save_file(tensors | {name: np.concatenate([tensors[name], tensors[name][:4]])}, file)
    with pytest.raises(CheckpointError, match="tokens were added.*merge_and_unload"):
        export(folder, tmp_path / "out", say=lambda line: None)


@pytest.mark.parametrize("key, value", [
    ("lora_bias", True), ("trainable_token_indices", [1]), ("layer_replication", [[0, 1]]), ("use_qalora", True),
    ("alpha_pattern", {"layers\\.[01].*": 3}), ("peft_type", "IA3"), ("peft_type", "LOHA"),
])  # fmt: skip
def test_what_stays_refused_names_the_way_out(key, value, bases, tmp_path):
    folder = Case("patterns", True).write(tmp_path / "a", bases[True])
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", config | {key: value})
    with pytest.raises(CheckpointError, match=f"{key}.*merge_and_unload"):
        resolve_model(folder)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_what_cannot_be_merged_names_no_way_that_is_none(kind, bases, tmp_path):
    folder = Case("patterns", True).write(tmp_path / "a", bases[True])
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", config | {"peft_type": kind})
    with pytest.raises(CheckpointError, match=f"peft_type is '{kind}'. Only LORA adapters are supported.$"):
        resolve_model(folder)


def test_what_needs_whole_weights_is_not_quantized(bases, tmp_path):
    from finetune.model.frozen import is_frozen
    from finetune.model.load import load_model
    from finetune.model.quantize import Quantization

    folder = Case("a projection", True).write(tmp_path / "a", bases[True])
    with pytest.raises(ArgumentError, match="up_proj.weight, which the adapter trains"):
        load_model(folder, quantization=Quantization("int8"))
    folder = Case("patterns", True).write(tmp_path / "b", bases[True])
    assert is_frozen(load_model(folder, quantization=Quantization("int8")).model)
