"""8-bit AdamW against bitsandbytes' AdamW8bit: 50 steps on random gradients, and on those of a model."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from finetune.model.runtime import paddle as bring_up
from finetune.recipe.schema import TrainingSection
from tests.parity.bench import HERE, REFERENCE_PYTHON, needs_reference

pytestmark = needs_reference

STEPS = 50
SETTINGS = TrainingSection(weight_decay=0.1, optim="adamw_8bit")
RATES = 1e-3 * (1 - np.arange(STEPS) / STEPS)
WEIGHT = "model.embed_tokens.weight"


def random_gradients() -> tuple[np.ndarray, np.ndarray]:
    """A weight and its gradients, of other size from row to row."""
    draw = np.random.default_rng(0)
    scale = 10.0 ** draw.uniform(-2, 0, [64, 1])
    gradients = draw.standard_normal([STEPS, 64, 157]) * scale  # 10,048 numbers: 39 blocks and 64 over
    return draw.standard_normal([64 * 157]).astype("float32"), gradients.reshape(STEPS, -1).astype("float32")


def model_gradients(folder) -> tuple[np.ndarray, np.ndarray]:
    """The embedding of a model, and its gradients over 50 batches of random tokens; most rows of them are zero."""
    from finetune.compute.forward import total_nll
    from finetune.compute.layout import lay_out_samples
    from finetune.model.build import body_of
    from finetune.model.load import load_model

    model, draw, found = load_model(folder, training=True).model, np.random.default_rng(1), []
    weight = body_of(model).embed_tokens.weight
    for _ in range(STEPS):
        ids = draw.integers(0, 400, 24)
        (total_nll(model, lay_out_samples([(ids, ids)])) / 24).backward()
        found.append(weight.grad.numpy().reshape(-1))
        model.clear_gradients()
    return weight.numpy().reshape(-1), np.stack(found)


@pytest.mark.parametrize("kind", ["random", "model"])
def test_codes_and_weights_are_the_same(kind, tiny_folder, tmp_path):
    weight, gradients = random_gradients() if kind == "random" else model_gradients(tiny_folder)
    options = {"betas": (SETTINGS.adam_beta1, SETTINGS.adam_beta2), "epsilon": SETTINGS.adam_epsilon}
    job = {"weight": weight, "gradients": gradients, "rates": RATES, "weight_decay": SETTINGS.weight_decay} | options
    np.savez(tmp_path / "job.npz", **job)
    command = [REFERENCE_PYTHON, str(HERE / "ref_adam.py"), *(str(tmp_path / f"{n}.npz") for n in ("job", "answer"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = np.load(tmp_path / "answer.npz")
    ours, state = stepped(weight, gradients)
    # A moment halfway between two levels may be rounded either way, by the last bit of its sum.
    same = np.logical_and(*(state[slot] == theirs[slot] for slot in ("moment1", "moment2")))
    print(f"{kind}: {np.count_nonzero(~same)} of {weight.size} numbers have another code")
    assert np.count_nonzero(~same) <= 1e-4 * weight.size
    for slot in ("scale1", "scale2"):
        np.testing.assert_allclose(state[slot], theirs[slot], rtol=1e-5)
    worst = np.abs(ours - theirs["weight"])[same].max()
    print(f"{kind}: weights differ by {worst:.1e} at most, moved by {np.abs(ours - weight).max():.1e}")
    assert worst <= 1e-5


def stepped(weight: np.ndarray, gradients: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The weight after all steps, and the optimizer's state."""
    paddle = bring_up()
    from finetune.train.optimizer import Optimizer

    parameter = paddle.create_parameter([weight.size], "float32")
    parameter.set_value(weight)
    optimizer = Optimizer({WEIGHT: parameter}, SETTINGS)
    for gradient, rate in zip(gradients, RATES.tolist()):
        parameter.grad = paddle.to_tensor(gradient)
        optimizer.step(rate, 0.0)
    return parameter.numpy(), {key.removeprefix(f"{WEIGHT}/"): value for key, value in optimizer.state().items()}
