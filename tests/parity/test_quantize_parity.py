"""nf4 against bitsandbytes: codes and scales to the bit, doubly quantized scales where the nearest level is clear."""

from __future__ import annotations

import os
import subprocess

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.model.quantize import quantize_nf4
from tests.parity.bench import HERE, REFERENCE_PYTHON, needs_reference

pytestmark = needs_reference


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
    for name, weight in weights.items():
        plain, double = quantize_nf4(weight, double=False), quantize_nf4(weight)
        assert np.array_equal(plain.codes, theirs[f"{name}/codes"]), name
        assert np.array_equal(plain.scales.values, theirs[f"{name}/scales"]), name
        assert np.array_equal(double.codes, plain.codes), name
        # The mean of the scales is summed in another order, which can turn a code that lies between two levels.
        odd = double.scales.values != theirs[f"{name}/nested"]
        assert odd.mean() < 1e-3, name
        ours, doubled = double.scales.read()[~odd], theirs[f"{name}/doubled"][~odd]
        np.testing.assert_allclose(ours, doubled, rtol=0, atol=1e-6, err_msg=name)
