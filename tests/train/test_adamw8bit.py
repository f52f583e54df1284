"""8-bit AdamW: each step by its definition, with a search of all levels; small tensors as AdamW; state survives."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.model.quantize import dynamic_levels
from finetune.model.runtime import paddle as bring_up
from finetune.recipe.schema import TrainingSection

SETTINGS = TrainingSection(weight_decay=0.1, adam_beta2=0.95, optim="adamw_8bit")
LARGE, SMALL, BIAS = "q_proj.weight", "k_proj.weight", "q_proj.bias"
SHAPES = {LARGE: (70, 61), SMALL: (60, 60), BIAS: (70,)}  # 4,270 numbers: 16 blocks of 256 and 174 over


def build(seed: int = 0, **changes):
    paddle = bring_up()
    from finetune.train.optimizer import Optimizer

    draw = np.random.default_rng(seed)
    parameters = {}
    for name, shape in SHAPES.items():
        parameters[name] = paddle.create_parameter(list(shape), "float32")
        parameters[name].set_value(draw.standard_normal(shape).astype("float32"))
    return Optimizer(parameters, SETTINGS.model_copy(update=changes))


def gradients(step: int) -> dict[str, np.ndarray]:
    """Of very different size from row to row, one of them zero."""
    draw = np.random.default_rng(100 + step)
    found = {}
    for name, shape in SHAPES.items():
        scale = 10.0 ** draw.uniform(-6, 0, shape[:1]) * (draw.random(shape[:1]) > 0.1)
        found[name] = (draw.standard_normal(shape) * scale.reshape(-1, *[1] * (len(shape) - 1))).astype("float32")
    return found


def run(optimizer, steps: range) -> None:
    paddle = bring_up()
    for step in steps:
        for name, gradient in gradients(step).items():
            optimizer.parameters[name].grad = paddle.to_tensor(gradient)
        optimizer.step(0.01 * (step + 1), 0.0)


def values(optimizer) -> dict[str, np.ndarray]:
    return {name: p.numpy().copy() for name, p in optimizer.parameters.items()}


def whole(state: dict[str, np.ndarray], name: str, number: int) -> np.ndarray:
    """A moment made whole, float32 [n]."""
    codes, scales = state[f"{name}/moment{number}"], state[f"{name}/scale{number}"]
    return dynamic_levels(signed=number == 1)[codes] * np.repeat(scales, 256)[: len(codes)]


def is_quantized(state: dict[str, np.ndarray], name: str, number: int, moment: np.ndarray) -> None:
    """Every scale is its block's largest, every code the nearest level or as near."""
    levels = dynamic_levels(signed=number == 1).astype(np.float64)
    codes, scales = state[f"{name}/moment{number}"], state[f"{name}/scale{number}"]
    for block, start in enumerate(range(0, len(moment), 256)):
        part = moment[start : start + 256]
        assert scales[block] == pytest.approx(np.abs(part).max(), rel=1e-5)
        scaled = part.astype(np.float64) / max(scales[block], 1e-38)
        far = np.abs(scaled[:, None] - levels)
        chosen = far[np.arange(len(part)), codes[start : start + 256]]
        assert (chosen <= far.min(axis=1) + 2e-6).all()


def test_steps_follow_the_definition():
    optimizer = build()
    run(optimizer, range(1))
    for step in range(1, 5):
        before = {key: array.copy() for key, array in optimizer.state().items()}
        weight = values(optimizer)[LARGE].reshape(-1)
        run(optimizer, range(step, step + 1))
        gradient, rate = gradients(step)[LARGE].reshape(-1), 0.01 * (step + 1)
        first = 0.9 * whole(before, LARGE, 1) + 0.1 * gradient
        second = 0.95 * whole(before, LARGE, 2) + 0.05 * gradient**2
        expected = weight * (1 - rate * 0.1)
        root = np.sqrt(second / (1 - 0.95 ** (step + 1)))
        expected -= rate * first / (1 - 0.9 ** (step + 1)) / (root + 1e-8)
        np.testing.assert_allclose(values(optimizer)[LARGE].reshape(-1), expected, rtol=1e-5, atol=1e-6)
        is_quantized(optimizer.state(), LARGE, 1, first)
        is_quantized(optimizer.state(), LARGE, 2, second)


def test_small_tensors_step_as_adamw():
    coded, plain = build(), build(optim="adamw")
    for optimizer in (coded, plain):
        run(optimizer, range(5))
    for name in (SMALL, BIAS):
        np.testing.assert_allclose(values(coded)[name], values(plain)[name], rtol=1e-5, atol=1e-6)
    assert not np.allclose(values(coded)[LARGE], values(plain)[LARGE], rtol=1e-5, atol=1e-6)


def test_a_restored_optimizer_goes_on_to_the_same_bits():
    through, first = build(), build()
    run(through, range(5))
    run(first, range(2))
    state, weights = {key: array.copy() for key, array in first.state().items()}, values(first)
    assert state[f"{LARGE}/moment1"].dtype == np.uint8 and f"{SMALL}/scale1" not in state
    second = build(seed=9)
    for name, parameter in second.parameters.items():
        parameter.set_value(weights[name])
    second.load(state)
    run(second, range(2, 5))
    for name, value in values(second).items():
        np.testing.assert_array_equal(value, values(through)[name])


def test_half_precision_keeps_a_master():
    paddle = bring_up()
    from finetune.train.optimizer import Optimizer

    ones = paddle.nn.initializer.Constant(1.0)
    weight = paddle.create_parameter([64, 64], "bfloat16", default_initializer=ones)
    optimizer = Optimizer({LARGE: weight}, SETTINGS.model_copy(update={"weight_decay": 0.0}))
    for _ in range(30):
        weight.grad = paddle.ones([64, 64], "bfloat16")
        optimizer.step(1e-4, 0.0)  # each step is less than half of bfloat16's spacing below 1
    np.testing.assert_allclose(optimizer.state()[f"{LARGE}/master"], 1 - 30 * 1e-4, rtol=1e-5)
    np.testing.assert_allclose(weight.astype("float32").numpy(), 1 - 30 * 1e-4, rtol=4e-3)
