"""Every preference loss against its formula in float64 NumPy, its gradient's sign, its limits and its range errors."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from finetune.model.runtime import paddle as bring_up

paddle = bring_up()

from finetune.compute import losses
from finetune.compute.losses import (
    LOSSES,
    PairLogps,
    chosen_nll,
    dpo_loss,
    dpop_loss,
    hinge_loss,
    ipo_loss,
    kto_pair_loss,
    nca_pair_loss,
    orpo_loss,
    sppo_hard_loss,
)
from tests.runs import steps
from tests.tiny import tiny_model

# Four pairs: the policy better, worse, far better and far worse than the reference on the chosen response.
POLICY_W = np.array([-12.5, -30.25, -7.0, -41.0])
POLICY_L = np.array([-20.0, -11.5, -35.0, -9.0])
REFERENCE_W = np.array([-14.0, -28.0, -21.0, -30.0])
REFERENCE_L = np.array([-18.5, -13.0, -22.0, -19.5])
TOKENS_W = np.array([5.0, 11.0, 4.0, 20.0])
TOKENS_L = np.array([9.0, 6.0, 13.0, 3.0])
R_W, R_L = POLICY_W - REFERENCE_W, POLICY_L - REFERENCE_L
MEAN_W, MEAN_L = POLICY_W / TOKENS_W, POLICY_L / TOKENS_L
BETA = 0.3
OPTIONS = {"beta": BETA, "label_smoothing": 0.0, "simpo_gamma": 0.5, "dpop_lambda": 5.0}


def pairs(chosen, rejected, chosen_tokens=TOKENS_W, rejected_tokens=TOKENS_L, *, dtype="float64", trained=False):
    tensors = [paddle.to_tensor(np.asarray(v), dtype=dtype) for v in (chosen, rejected, chosen_tokens, rejected_tokens)]
    for tensor in tensors[:2]:
        tensor.stop_gradient = not trained
    return PairLogps(*tensors)


def policy(**kwargs):
    return pairs(POLICY_W, POLICY_L, **kwargs)


def reference(**kwargs):
    return pairs(REFERENCE_W, REFERENCE_L, **kwargs)


def call(name, policy, reference, **changed):
    kind = LOSSES[name]
    options = {key: value for key, value in (OPTIONS | changed).items() if key in kind.keys}
    given = (policy, reference) if kind.has_reference else (policy,)
    return kind.function(*given, **options)


def softplus(x):
    return np.logaddexp(0.0, x)  # -log sigmoid(-x)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def log_odds(mean):
    return mean - np.log(1.0 - np.exp(mean))


FORMULAS = {
    "sigmoid": softplus(-BETA * (R_W - R_L)),
    "hinge": np.maximum(0.0, 1.0 - BETA * (R_W - R_L)),
    "ipo": (R_W / TOKENS_W - R_L / TOKENS_L - 1.0 / (2.0 * BETA)) ** 2,
    "kto_pair": 0.5
    * ((1 - sigmoid(BETA * (R_W - max(0.0, R_L.mean())))) + (1 - sigmoid(BETA * (max(0.0, R_W.mean()) - R_L)))),
    "simpo": softplus(-(BETA * (MEAN_W - MEAN_L) - 0.5)),
    "orpo": -MEAN_W + BETA * softplus(-(log_odds(MEAN_W) - log_odds(MEAN_L))),
    "dpop": softplus(-BETA * (R_W - R_L - 5.0 * np.maximum(0.0, -R_W))),
    "sppo_hard": (R_W - 0.5 / BETA) ** 2 + (R_L + 0.5 / BETA) ** 2,
    "nca_pair": softplus(-BETA * R_W) + 0.5 * softplus(BETA * R_W) + 0.5 * softplus(BETA * R_L),
}
# The value at equal policy and reference (or equal per-token log-probabilities) that each docstring states
NEUTRAL = {
    "sigmoid": math.log(2),
    "hinge": 1.0,
    "ipo": 1.0 / (4 * BETA**2),
    "kto_pair": 0.5,
    "simpo": math.log(2),
    "orpo": 2.0 + BETA * math.log(2),
    "dpop": math.log(2),
    "sppo_hard": 1.0 / (2 * BETA**2),
    "nca_pair": 2 * math.log(2),
}


def test_every_loss_has_a_formula_here():
    assert set(FORMULAS) == set(NEUTRAL) == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_its_formula(name):
    result = call(name, policy(), reference())
    assert result.loss.dtype == paddle.float64
    np.testing.assert_allclose(result.loss.numpy(), FORMULAS[name], rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_rewards_are_what_trl_logs(name):
    result = call(name, policy(trained=True), reference())
    w, l = (MEAN_W, MEAN_L) if LOSSES[name].per_token else (R_W, R_L)  # noqa: E741
    np.testing.assert_allclose(result.chosen_reward.numpy(), BETA * w, rtol=1e-12)
    np.testing.assert_allclose(result.rejected_reward.numpy(), BETA * l, rtol=1e-12)
    assert result.chosen_reward.stop_gradient and result.rejected_reward.stop_gradient


@pytest.mark.parametrize("name", LOSSES)
def test_neutral_value(name):
    same = pairs([-10.0, -4.0], [-6.0, -8.0], [5.0, 2.0], [3.0, 4.0])  # two nats a token on every side
    np.testing.assert_allclose(call(name, same, same, simpo_gamma=0.0).loss.numpy(), NEUTRAL[name], rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_raises_chosen_and_lowers_rejected(name):
    start = pairs(REFERENCE_W, REFERENCE_L, trained=True)
    call(name, start, reference()).loss.sum().backward()
    assert (start.chosen.grad.numpy() < 0).all()
    assert (start.rejected.grad.numpy() > 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_the_slope(name):
    """Central differences in float64; kto_pair with its baseline held, since none flows into it."""
    kind = LOSSES[name]
    held = {"baseline": (0.75, -0.25)} if kind.step_baseline else {}

    def total(chosen, rejected, trained=False):
        given = pairs(chosen, rejected, trained=trained)
        options = {key: OPTIONS[key] for key in kind.keys} | held
        both = (given, reference()) if kind.has_reference else (given,)
        return given, kind.function(*both, **options).loss.sum()

    given, loss = total(POLICY_W, POLICY_L, trained=True)
    loss.backward()
    step = 1e-6
    for i in range(len(POLICY_W)):
        move = np.eye(len(POLICY_W))[i] * step
        slope_w = float(total(POLICY_W + move, POLICY_L)[1] - total(POLICY_W - move, POLICY_L)[1]) / (2 * step)
        slope_l = float(total(POLICY_W, POLICY_L + move)[1] - total(POLICY_W, POLICY_L - move)[1]) / (2 * step)
        assert float(given.chosen.grad[i]) == pytest.approx(slope_w, rel=1e-6, abs=1e-8)
        assert float(given.rejected.grad[i]) == pytest.approx(slope_l, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", [name for name, kind in LOSSES.items() if kind.has_reference])
def test_reference_gets_no_gradient(name):
    ref = reference(trained=True)
    call(name, policy(trained=True), ref).loss.sum().backward()
    assert ref.chosen.grad is None and ref.rejected.grad is None


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_float32_stays_finite_far_out(name, gap):
    given = pairs([gap / 2 - 2e4], [-gap / 2 - 2e4], [10.0], [10.0], dtype="float32", trained=True)
    result = call(name, given, pairs([-2e4], [-2e4], [10.0], [10.0], dtype="float32"))
    result.loss.sum().backward()
    for value in (result.loss, given.chosen.grad, given.rejected.grad):
        assert np.isfinite(value.numpy()).all()


def test_limits():
    won, lost = pairs([1e3], [-1e3], [1.0], [1.0]), pairs([-1e3], [1e3], [1.0], [1.0])
    zero = pairs([0.0], [0.0], [1.0], [1.0])
    # A pair won without doubt costs nothing; one lost without doubt costs its margin
    assert dpo_loss(won, zero, beta=1.0).loss.item() == 0.0
    assert dpo_loss(lost, zero, beta=1.0).loss.item() == pytest.approx(2e3)
    assert hinge_loss(won, zero, beta=1.0).loss.item() == 0.0
    assert kto_pair_loss(won, zero, beta=1.0, baseline=(0.0, 0.0)).loss.item() == 0.0
    assert kto_pair_loss(lost, zero, beta=1.0, baseline=(0.0, 0.0)).loss.item() == 1.0
    # The regressions are zero at their targets
    assert ipo_loss(pairs([2.5], [0.0], [1.0], [1.0]), zero, beta=0.2).loss.item() == pytest.approx(0.0, abs=1e-24)
    assert sppo_hard_loss(pairs([2.5], [-2.5], [1.0], [1.0]), zero, beta=0.2).loss.item() == pytest.approx(0, abs=1e-24)
    # NCA pulls the chosen reward to ln 2 and no further: s(r) = 2/3
    best = pairs([math.log(2)], [-1e3], [1.0], [1.0], trained=True)
    nca_pair_loss(best, zero, beta=1.0).loss.backward()
    assert best.chosen.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_a_pair_well_won_keeps_its_digits_in_float32():
    margin = np.array([5.0, 12.0, 17.0, 40.0, 80.0])
    zero = pairs(np.zeros(5), np.zeros(5), np.ones(5), np.ones(5), dtype="float32")
    won = pairs(margin, np.zeros(5), np.ones(5), np.ones(5), dtype="float32", trained=True)
    loss = dpo_loss(won, zero, beta=1.0).loss
    loss.sum().backward()
    np.testing.assert_allclose(loss.numpy(), softplus(-margin), rtol=1e-6)
    np.testing.assert_allclose(won.chosen.grad.numpy(), -sigmoid(-margin), rtol=1e-6)


def test_dpop_without_penalty_is_dpo():
    plain = dpo_loss(policy(), reference(), beta=BETA).loss.numpy()
    np.testing.assert_array_equal(dpop_loss(policy(), reference(), beta=BETA, dpop_lambda=0.0).loss.numpy(), plain)
    # and with it, only pairs whose chosen response fell below the reference pay more
    more = dpop_loss(policy(), reference(), beta=BETA, dpop_lambda=5.0).loss.numpy() > plain
    np.testing.assert_array_equal(more, R_W < 0)


def test_label_smoothing_is_the_mean_of_both_labels():
    e = 0.2
    swapped = dpo_loss(pairs(POLICY_L, POLICY_W), pairs(REFERENCE_L, REFERENCE_W), beta=BETA).loss.numpy()
    expected = (1 - e) * dpo_loss(policy(), reference(), beta=BETA).loss.numpy() + e * swapped
    smoothed = dpo_loss(policy(), reference(), beta=BETA, label_smoothing=e).loss.numpy()
    np.testing.assert_allclose(smoothed, expected, rtol=1e-12)


def test_kto_baseline_of_the_step_replaces_that_of_the_pairs():
    own = kto_pair_loss(policy(), reference(), beta=BETA).loss.numpy()
    given = kto_pair_loss(policy(), reference(), beta=BETA, baseline=(R_W.mean(), R_L.mean())).loss.numpy()
    np.testing.assert_allclose(own, given, rtol=1e-12)
    other = kto_pair_loss(policy(), reference(), beta=BETA, baseline=(3.0, -3.0)).loss.numpy()
    expected = 0.5 * ((1 - sigmoid(BETA * R_W)) + (1 - sigmoid(BETA * (3.0 - R_L))))
    np.testing.assert_allclose(other, expected, rtol=1e-12)


def test_orpo_keeps_its_digits_and_stays_finite_at_certainty():
    """Per-token probabilities near 1 and near 0, and exactly 1."""
    mean = np.array([-1e-9, -1e-3, -0.6931, -0.6932, -50.0])
    given = pairs(mean, np.full(5, -1.0), np.ones(5), np.ones(5), trained=True)
    odds = mean - np.where(mean > -0.69, np.log(-np.expm1(mean)), np.log1p(-np.exp(mean)))
    expected = -mean + softplus(-(odds - log_odds(-1.0)))
    np.testing.assert_allclose(orpo_loss(given, beta=1.0).loss.numpy(), expected, rtol=1e-12)
    certain = pairs([0.0], [-1.0], [1.0], [1.0], dtype="float32", trained=True)
    loss = orpo_loss(certain, beta=1.0).loss
    loss.backward()
    assert np.isfinite(loss.numpy()).all() and np.isfinite(certain.chosen.grad.numpy()).all()


def test_chosen_nll():
    np.testing.assert_allclose(chosen_nll(policy()).numpy(), -MEAN_W, rtol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_beta_out_of_range(name, beta):
    with pytest.raises(ValueError, match=f"beta must be a positive number, got {beta}"):
        call(name, policy(), reference(), beta=beta)


@pytest.mark.parametrize(
    "name, option, value",
    [
        ("sigmoid", "label_smoothing", 0.5),
        ("sigmoid", "label_smoothing", -0.1),
        ("simpo", "simpo_gamma", -0.5),
        ("simpo", "simpo_gamma", math.nan),
        ("dpop", "dpop_lambda", -1.0),
        ("dpop", "dpop_lambda", math.inf),
    ],
)
def test_options_out_of_range(name, option, value):
    with pytest.raises(ValueError, match=f"{option} must be .*, got {value}"):
        call(name, policy(), reference(), **{option: value})


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"must all be \[P\]"):
        pairs([-1.0, -2.0], [-1.0], [1.0, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"must all be \[P\]"):
        pairs([[-1.0]], [[-1.0]], [[1.0]], [[1.0]])
    one = pairs([-1.0], [-2.0], [1.0], [1.0])
    with pytest.raises(ValueError, match="different numbers of pairs"):
        dpo_loss(one, reference(), beta=0.1)


@pytest.mark.parametrize("name", ["ipo", "simpo", "orpo"])
def test_lengths_are_asked_for(name):
    bare = PairLogps(paddle.to_tensor([-1.0]), paddle.to_tensor([-2.0]))
    with pytest.raises(ValueError, match="chosen_tokens"):
        call(name, bare, bare)


def test_the_recipe_offers_the_losses_of_the_contract():
    from finetune.recipe.schema import DpoSection

    names = "sigmoid hinge ipo kto_pair simpo orpo dpop sppo_hard nca_pair".split()
    assert list(LOSSES) == names
    assert {key for kind in LOSSES.values() for key in kind.keys} <= set(DpoSection.model_fields)
    assert [name for name in names if DpoSection(loss_type=name).reference_free] == ["simpo", "orpo"]
    assert (DpoSection(loss_type="simpo").simpo_gamma, DpoSection(loss_type="dpop").dpop_lambda) == (0.5, 50.0)
    assert DpoSection(loss_type="dpop", dpop_lambda=0.0).dpop_lambda == 0.0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("option, value", [("label_smoothing", 0.1), ("simpo_gamma", 1.0), ("dpop_lambda", 2.0)])
def test_recipe_refuses_options_that_a_loss_does_not_read(name, option, value):
    from finetune.recipe.check import check_tree

    recipe = {"method": "dpo", "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}}
    _, findings = check_tree(recipe | {"dpo": {"loss_type": name, option: value}})
    assert bool(findings) == (option not in LOSSES[name].options)


def test_a_new_loss_is_one_entry_in_one_file(tmp_path):
    """A copy of the package with `exp` and a key of its own added here: recipe, rules and training know it."""
    package = tmp_path / "package"
    shutil.copytree(
        Path(losses.__file__).parents[1], package / "finetune", ignore=shutil.ignore_patterns("__pycache__")
    )
    file = package / "finetune" / "compute" / "losses.py"
    text = file.read_text(encoding="utf-8")
    function = (
        "def exp_loss(policy, reference, *, beta, exp_scale):\n"
        "    chosen, rejected = _log_ratios(policy, reference)\n"
        "    return _with_rewards((-beta * exp_scale * (chosen - rejected)).exp(), beta, chosen, rejected)\n\n\n"
    )
    for place, before, behind in (
        ("LOSSES: dict[str, LossKind] = {\n", function, '    "exp": LossKind(exp_loss, {"exp_scale": 2.0}),\n'),
        ("    beta: Annotated[float, Field(gt=0, le=1000)] = 0.1\n", "", "    exp_scale: float | None = None\n"),
    ):
        assert text.count(place) == 1
        text = text.replace(place, before + place + behind)
    file.write_text(text, encoding="utf-8")
    base, rows, recipe = tiny_model(tmp_path / "base"), tmp_path / "pairs.jsonl", tmp_path / "recipe.yaml"
    rows.write_text('{"prompt": "say one", "chosen": "one", "rejected": "two"}\n' * 2)
    recipe.write_text(f"method: dpo\nmodel: {{path: {base}}}\ndata: {{train: [{{path: {rows}}}], max_length: 128}}\n")
    run, environment = tmp_path / "run", os.environ | {"PYTHONPATH": str(package)}

    def train(*overrides: str) -> str:
        command = [sys.executable, "-m", "finetune", "train", recipe, f"training.output_dir={run}", *overrides]
        return subprocess.run(command, capture_output=True, text=True, cwd=package, env=environment).stderr

    assert "Finished." in train("dpo.loss_type=exp", "training.max_steps=1")
    assert "exp_scale: 2.0" in (run / "recipe.yaml").read_text(encoding="utf-8")
    assert steps(run)[0]["loss"] == 1.0  # policy and reference are equal before the first step, and e^0 is 1
    assert "hinge does not use it. Remove it or write 'loss_type: exp'" in train(
        "dpo.loss_type=hinge", "dpo.exp_scale=1.0"
    )
    assert "Did you mean exp?" in train("dpo.loss_type=exq")
