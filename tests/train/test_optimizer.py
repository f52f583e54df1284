"""AdamW against its formula in NumPy, clipping against torch's rule, and state that survives."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.errors import CheckpointError
from finetune.model.runtime import paddle as bring_up
from finetune.recipe.schema import TrainingSection

SETTINGS = TrainingSection(weight_decay=0.1, adam_beta2=0.95, learning_rate=0.5)


def build(seed: int = 0):
    paddle = bring_up()
    from finetune.train.optimizer import Optimizer

    draw = np.random.default_rng(seed)
    names = {"model.q_proj.weight": (3, 2), "model.q_proj.bias": (2,), "model.input_layernorm.weight": (3,)}
    parameters = {}
    for name, shape in names.items():
        tensor = paddle.create_parameter(list(shape), "float32")
        tensor.set_value(draw.standard_normal(shape).astype("float32"))
        parameters[name] = tensor
    return Optimizer(parameters, SETTINGS)


def run(optimizer, steps: range) -> None:
    paddle = bring_up()
    for step in steps:
        draw = np.random.default_rng(100 + step)
        for parameter in optimizer.parameters.values():
            parameter.grad = paddle.to_tensor(draw.standard_normal(parameter.shape).astype("float32"))
        optimizer.step(0.01 * (step + 1), 0.0)


def values(optimizer) -> dict[str, np.ndarray]:
    return {name: p.numpy().copy() for name, p in optimizer.parameters.items()}


def test_three_steps_follow_the_formula_and_only_matrices_decay():
    optimizer = build()
    expected = {name: value.astype(np.float64) for name, value in values(optimizer).items()}
    moments = {name: (np.zeros(v.shape), np.zeros(v.shape)) for name, v in expected.items()}
    for step in range(3):
        draw, rate = np.random.default_rng(100 + step), 0.01 * (step + 1)
        for name, weight in expected.items():
            gradient = draw.standard_normal(weight.shape).astype("float32")
            m = 0.9 * moments[name][0] + 0.1 * gradient
            v = 0.95 * moments[name][1] + 0.05 * gradient**2
            moments[name] = m, v
            if name == "model.q_proj.weight":
                weight *= 1 - rate * 0.1
            weight -= rate * (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-8)
    run(optimizer, range(3))
    for name, value in values(optimizer).items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=1e-6)


def test_a_restored_optimizer_goes_on_to_the_same_bits_whatever_was_built_before_it():
    through = build()
    run(through, range(5))
    first = build()
    run(first, range(2))
    state, weights = first.state(), values(first)
    second = build(seed=9)
    for name, parameter in second.parameters.items():
        parameter.set_value(weights[name])
    second.load(state)
    run(second, range(2, 5))
    for name, value in values(second).items():
        np.testing.assert_array_equal(value, values(through)[name])


def test_state_of_other_parameters_is_refused():
    optimizer = build()
    run(optimizer, range(1))
    state = {key.replace("q_proj", "k_proj"): value for key, value in optimizer.state().items()}
    with pytest.raises(CheckpointError, match="4 names differ"):
        build().load(state)


@pytest.mark.parametrize("limit", [1.0, 0.0, 100.0])
def test_clipping_returns_the_joint_norm_and_acts_like_smaller_gradients(limit):
    paddle = bring_up()
    clipped, plain = build(), build()
    draw = np.random.default_rng(1)
    gradients = {name: draw.standard_normal(p.shape).astype("float32") for name, p in plain.parameters.items()}
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
    scale = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
    for name, gradient in gradients.items():
        clipped.parameters[name].grad = paddle.to_tensor(gradient)
        plain.parameters[name].grad = paddle.to_tensor((gradient * scale).astype("float32"))
    assert clipped.step(0.01, limit) == pytest.approx(norm, rel=1e-6)
    plain.step(0.01, 0.0)
    for key, value in clipped.state().items():
        np.testing.assert_allclose(value, plain.state()[key], rtol=1e-5)
    assert all(p.grad is None for p in clipped.parameters.values())


def test_a_gradient_that_is_not_finite_changes_nothing():
    paddle = bring_up()
    optimizer = build()
    before = values(optimizer)
    for parameter in optimizer.parameters.values():
        parameter.grad = paddle.full(parameter.shape, float("inf"))
    assert not np.isfinite(optimizer.step(0.01, 1.0))
    for name, value in values(optimizer).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_parameter_without_gradient_is_an_error():
    paddle = bring_up()
    optimizer = build()
    for name, parameter in optimizer.parameters.items():
        if not name.endswith("bias"):
            parameter.grad = paddle.ones(parameter.shape)
    with pytest.raises(RuntimeError, match="q_proj.bias"):
        optimizer.step(0.01, 1.0)


def test_restored_state_of_half_precision_is_found_under_its_masters_names():
    paddle = bring_up()
    from finetune.train.optimizer import Optimizer

    weight = paddle.create_parameter([2, 2], "bfloat16", default_initializer=paddle.nn.initializer.Constant(1.0))
    optimizer = Optimizer({"a.w": weight}, TrainingSection(num_train_epochs=1.0))
    zero, power = np.zeros((2, 2), np.float32), np.full(1, 0.5, np.float32)
    moments = {f"a.w/{name}": value for name, value in (("moment1", zero), ("moment2", zero))}
    optimizer.load(moments | {"a.w/beta1_pow_acc": power, "a.w/beta2_pow_acc": power, "a.w/master": zero + 1})
    weight.grad = paddle.ones([2, 2], "bfloat16")
    try:
        optimizer.step(0.1, 0.0)
    except RuntimeError as error:  # the state was found; Paddle has no such kernel for the CPU
        assert "adamw" in str(error)
    else:
        assert float(weight.astype("float32").max()) < 1
