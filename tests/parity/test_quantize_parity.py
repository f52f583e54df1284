"""nf4 against bitsandbytes: codes and scales to the bit, doubly quantized scales where the nearest level is clear; its
folders, and adapters on them in PEFT."""

from __future__ import annotations

import json
import os
import subprocess

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.model.quantize import quantize_nf4
from finetune.model.resolve import resolve_model
from finetune.model.weights import base_weights
from tests.model.compute import difference, logits
from tests.parity.bench import HERE, REFERENCE_PYTHON, SHAPE, needs_reference
from tests.runs import finetune, write_recipe
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = needs_reference
IDS = np.random.default_rng(0).integers(0, 400, (2, 16))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The matrices, and what bitsandbytes makes of them. FINETUNE_REAL_WEIGHTS names a file of real ones to add."""
    folder = tmp_path_factory.mktemp("quantize")
    draw = np.random.default_rng(0)
    weights = {
        "normal": draw.standard_normal([192, 320]) * 0.02,
        "uneven": draw.standard_normal([1024, 896]) * draw.uniform(0, 1, [1024, 1]),
        "half": (draw.standard_normal([128, 256]) * 0.05).astype(ml_dtypes.bfloat16),
        "zeros": np.concatenate([np.zeros([2, 64]), draw.standard_normal([6, 64])]),
        "odd": draw.standard_normal([7, 33]),
    }
    weights = {name: weight.astype(np.float32) for name, weight in weights.items()}
    if real := os.environ.get("FINETUNE_REAL_WEIGHTS"):
        found = load_file(real)
        weights |= {name: found[name].astype(np.float32) for name in found if "_proj.weight" in name}
    save_file(weights, folder / "weights.safetensors")
    files = [str(folder / "weights.safetensors"), str(folder / "answer.safetensors")]
    done = subprocess.run([REFERENCE_PYTHON, str(HERE / "ref_quantize.py"), *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return weights, load_file(files[1])


def test_codes_and_scales_are_the_same(answers):
    weights, theirs = answers
    odd = 0
    for name, weight in weights.items():
        plain, double = quantize_nf4(weight, double=False), quantize_nf4(weight)
        assert np.array_equal(plain.codes, theirs[f"{name}/codes"]), name
        assert np.array_equal(plain.scales.values, theirs[f"{name}/scales"]), name
        assert np.array_equal(double.codes, plain.codes), name
        # Their mean is summed in another order, as it is there by another number of threads: a unit in the last place
        # turns a few codes that lie between two levels.
        same = double.scales.values == theirs[f"{name}/nested"]
        odd += np.count_nonzero(~same)
        ours, doubled = double.scales.read()[same], theirs[f"{name}/doubled"][same]
        np.testing.assert_allclose(ours, doubled, rtol=0, atol=1e-6, err_msg=name)
    count = sum(theirs[f"{name}/nested"].size for name in weights)
    print(f"{odd} of {count:,} scales have another code")
    assert odd <= 2e-5 * count


def reference(folder, steps: list[dict]) -> list[np.ndarray]:
    """Logits of each step; see ref_bitsandbytes.py."""
    np.save(folder / "ids.npy", IDS)
    shared = {"ids": str(folder / "ids.npy")}
    (folder / "job.json").write_text(json.dumps([step | shared for step in steps]))
    script = [REFERENCE_PYTHON, str(HERE / "ref_bitsandbytes.py"), str(folder / "job.json")]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [np.load(step["output"]) for step in steps]


@pytest.mark.parametrize(("double", "variant"), [(True, "lora"), (False, "lora"), (True, "dora")])
def test_a_folder_of_bitsandbytes_and_an_adapter_trained_on_it(double, variant, tmp_path):
    from finetune.model.load import load_model

    base, folder, run = tiny_model(tmp_path / "base", shape=SHAPE), tmp_path / "nf4", tmp_path / "run"
    made = {"model": str(base), "double": double, "quantized": str(folder), "output": str(tmp_path / "base.npy")}
    (expected,) = reference(tmp_path, [made])
    tiny_tokenizer(folder)
    assert difference(logits(load_model(folder).model, IDS), expected) <= 1e-5
    weights = base_weights(resolve_model(folder))
    for name, weight in base_weights(resolve_model(base)).items():
        if (stored := weights[name].codes) is not None:
            assert np.array_equal(stored().codes, quantize_nf4(weight.read(), double=double).codes), name
    recipe = write_recipe(tmp_path, folder)
    changes = f"training.output_dir={run}", f"lora={{rank: 4, variant: {variant}}}", "model.quantization=nf4"
    assert finetune("train", recipe, *changes) == 0
    told = {"quantized": str(folder), "adapter": str(run / "final"), "output": str(tmp_path / "adapter.npy")}
    (adapted,) = reference(tmp_path, [told])
    assert np.abs(adapted - expected).max() > 1e-3
    assert difference(logits(load_model(run).model, IDS), adapted) <= 1e-5
