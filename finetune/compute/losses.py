"""Losses over preference pairs: pure functions of log-probabilities, unreduced, each with its paper and equation.

A loss is its function and its row in `LOSSES`, both here: the recipe's `dpo.loss_type`, its rules, its defaults and the
reference of its keys derive from them. So this loads neither paddle nor numpy, and paddle is brought up by the few
helpers at the end that need it. Means over pairs, over micro-batches and over ranks are the trainer's business
(`finetune.train.preference.task`).

Notation in the docstrings: w is the chosen response and l the rejected one, |w| its tokens, pi the policy and ref the
reference, r_w = log pi(w) - log ref(w), and s(x) the logistic function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from finetune.model.runtime import paddle as bring_up

if TYPE_CHECKING:
    import paddle


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of the two responses of each pair.

    Attributes:
        chosen: Floating [P], nats, summed over the response's scored tokens.
        rejected: The same for the rejected response.
        chosen_tokens: Scored tokens of each chosen response, floating [P], >= 1; None where no loss reads lengths.
        rejected_tokens: The same for the rejected response.

    Raises:
        ValueError: the tensors are not all one-dimensional and of one length.
    """

    chosen: paddle.Tensor
    rejected: paddle.Tensor
    chosen_tokens: paddle.Tensor | None = None
    rejected_tokens: paddle.Tensor | None = None

    def __post_init__(self) -> None:
        given = (self.chosen, self.rejected, self.chosen_tokens, self.rejected_tokens)
        shapes = [list(tensor.shape) for tensor in given if tensor is not None]
        if len(shapes[0]) != 1 or any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"log-probabilities and token counts must all be [P], got shapes {shapes}")

    def averaged(self) -> PairLogps:
        """Log-probabilities per token in place of sums.

        Raises:
            ValueError: the token counts are missing.
        """
        if self.chosen_tokens is None or self.rejected_tokens is None:
            raise ValueError("this loss averages over response tokens and needs chosen_tokens and rejected_tokens")
        return PairLogps(
            self.chosen / self.chosen_tokens,
            self.rejected / self.rejected_tokens,
            self.chosen_tokens,
            self.rejected_tokens,
        )


@dataclass(frozen=True)
class PairLoss:
    """What a loss says of each pair.

    Attributes:
        loss: Floating [P], unreduced, carries gradient to the policy.
        chosen_reward: Floating [P], detached; what TRL logs as rewards/chosen.
        rejected_reward: Floating [P], detached.
    """

    loss: paddle.Tensor
    chosen_reward: paddle.Tensor
    rejected_reward: paddle.Tensor


def dpo_loss(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> PairLoss:
    """Score each preference pair by how far the policy beats the reference.

    loss = -(1-e) log s(beta d) - e log s(-beta d), e = label_smoothing, d = r_w - r_l.

    Args:
        policy: Response log-probabilities [P], nats, summed over response tokens. Receives gradient.
        reference: The same from the frozen model. Treated as constant.
        beta: Strength of the pull to the reference, dimensionless, > 0.
        label_smoothing: Chance that a label is flipped, in [0, 0.5).

    Returns:
        loss [P], unreduced; rewards beta r, detached.

    Raises:
        ValueError: beta or label_smoothing out of range, or shapes differ; the message gives the value received.

    Source:
        Rafailov et al. 2023, arXiv:2305.18290, eq. 7; smoothing (cDPO): Mitchell 2023, "A note on DPO with noisy
        preferences". Equal policy and reference give ln 2. TRL 1.16 ignores label_smoothing for `sigmoid`; its `aot`
        at one pair a batch is this formula.
    """
    _check_beta(beta)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    chosen, rejected = _log_ratios(policy, reference)
    logits = beta * (chosen - rejected)
    loss = (1.0 - label_smoothing) * _softplus(-logits)
    if label_smoothing > 0.0:
        loss = loss + label_smoothing * _softplus(logits)
    return _with_rewards(loss, beta, chosen, rejected)


def hinge_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> PairLoss:
    """Ask for a margin of 1/beta nats and nothing beyond it.

    loss = max(0, 1 - beta (r_w - r_l)).

    Args:
        policy: Response log-probabilities [P], nats, summed over response tokens. Receives gradient.
        reference: The same from the frozen model. Treated as constant.
        beta: The inverse of the margin, > 0.

    Returns:
        loss [P], unreduced, >= 0; rewards beta r, detached.

    Raises:
        ValueError: beta out of range, or shapes differ.

    Source:
        Liu et al. 2023 (RSO), arXiv:2309.06657, the "hinge-norm" loss, with the hinge of SLiC-HF, Zhao et al. 2023,
        arXiv:2305.10425; TRL's `hinge`. Equal policy and reference give 1.
    """
    _check_beta(beta)
    chosen, rejected = _log_ratios(policy, reference)
    return _with_rewards(_relu(1.0 - beta * (chosen - rejected)), beta, chosen, rejected)


def ipo_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> PairLoss:
    """Regress the per-token margin to 1/(2 beta), so that certain preferences do not drive it to infinity.

    loss = (r_w / |w| - r_l / |l| - 1 / (2 beta))^2.

    Args:
        policy: Response log-probabilities [P], nats, summed, with token counts. Receives gradient.
        reference: The same from the frozen model; its counts are not read. Treated as constant.
        beta: The paper's tau, > 0.

    Returns:
        loss [P], unreduced, >= 0; rewards beta r of the summed log-ratios, detached.

    Raises:
        ValueError: beta out of range, counts missing, or shapes differ.

    Source:
        Azar et al. 2023, arXiv:2310.12036, eq. 17. The average over tokens is not in the paper; its authors confirmed
        it to TRL, which has it too. PaddleNLP's `ipo` averages as well. Equal policy and reference give 1/(4 beta^2).
    """
    _check_beta(beta)
    chosen, rejected = _log_ratios(policy, reference)
    per_token = PairLogps(chosen, rejected, policy.chosen_tokens, policy.rejected_tokens).averaged()
    loss = (per_token.chosen - per_token.rejected - 1.0 / (2.0 * beta)).square()
    return _with_rewards(loss, beta, chosen, rejected)


def kto_pair_loss(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    baseline: tuple[float, float] | None = None,
) -> PairLoss:
    """Judge each response by itself against how far the policy has drifted on the opposite ones.

    loss = (1 - s(beta (r_w - z_l)) + 1 - s(beta (z_w - r_l))) / 2, z_w = max(0, mean r_w), z_l = max(0, mean r_l).

    Args:
        policy: Response log-probabilities [P], nats, summed over response tokens. Receives gradient.
        reference: The same from the frozen model. Treated as constant.
        beta: Strength of the pull to the reference, > 0.
        baseline: (mean r_w, mean r_l) over the pairs of a whole optimizer step; None takes the means of these P pairs.

    Returns:
        loss [P], unreduced, in (0, 1); rewards beta r, detached.

    Raises:
        ValueError: beta out of range, or shapes differ.

    Source:
        Ethayarajh et al. 2024, arXiv:2402.01306, the KTO loss with both desirability weights 1, its drift estimated
        from the other half of the pairs as in PaddleNLP's and older TRL's `kto_pair`. Two deviations from those two:
        they list 2P losses whose mean is that of these P, and they let gradient into z, which the paper does not.
        Equal policy and reference give 1/2.
    """
    _check_beta(beta)
    chosen, rejected = _log_ratios(policy, reference)
    if baseline is None:
        drift_chosen, drift_rejected = (r.detach().mean().clip(min=0.0) for r in (chosen, rejected))
    else:
        drift_chosen, drift_rejected = (max(0.0, mean) for mean in baseline)
    # 1 - s(x) = s(-x), which keeps its digits when x is large
    loss = 0.5 * (_sigmoid(-beta * (chosen - drift_rejected)) + _sigmoid(-beta * (drift_chosen - rejected)))
    return _with_rewards(loss, beta, chosen, rejected)


def simpo_loss(policy: PairLogps, *, beta: float, simpo_gamma: float) -> PairLoss:
    """Compare per-token log-probabilities, with a target margin and no reference.

    loss = -log s(beta (log pi(w) / |w| - log pi(l) / |l|) - gamma).

    Args:
        policy: Response log-probabilities [P], nats, summed, with token counts. Receives gradient.
        beta: Scale of the reward difference, > 0; 2.0 to 2.5 in the paper.
        simpo_gamma: Target reward margin, >= 0.

    Returns:
        loss [P], unreduced; rewards beta log pi(y) / |y|, detached.

    Raises:
        ValueError: beta or simpo_gamma out of range, or counts missing.

    Source:
        Meng et al. 2024, arXiv:2405.14734, eq. 6; TRL's CPOTrainer with loss_type simpo and cpo_alpha 0. Equal
        per-token log-probabilities and gamma 0 give ln 2.
    """
    _check_beta(beta)
    if not (simpo_gamma >= 0.0 and math.isfinite(simpo_gamma)):
        raise ValueError(f"simpo_gamma must be at least 0, got {simpo_gamma}")
    mean = policy.averaged()
    loss = _softplus(simpo_gamma - beta * (mean.chosen - mean.rejected))
    return _with_rewards(loss, beta, mean.chosen, mean.rejected)


def orpo_loss(policy: PairLogps, *, beta: float) -> PairLoss:
    """Supervised learning on the chosen response, plus a push on the odds of chosen over rejected; no reference.

    loss = -log pi(w) / |w| - beta log s(log odds(w) - log odds(l)), odds(y) = p / (1 - p), p = exp(log pi(y) / |y|).

    Args:
        policy: Response log-probabilities [P], nats, summed, with token counts. Receives gradient.
        beta: Weight of the odds term, the paper's lambda, > 0.

    Returns:
        loss [P], unreduced; rewards beta log pi(y) / |y|, detached.

    Raises:
        ValueError: beta out of range, or counts missing.

    Source:
        Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7. TRL's ORPOTrainer takes the supervised term over prompt and
        response together; here it is over the response, as everywhere else in this package. Equal per-token
        log-probabilities give the supervised term plus beta ln 2.
    """
    _check_beta(beta)
    mean = policy.averaged()
    log_odds = (mean.chosen - mean.rejected) - (_log1mexp(mean.chosen) - _log1mexp(mean.rejected))
    loss = -mean.chosen + beta * _softplus(-log_odds)
    return _with_rewards(loss, beta, mean.chosen, mean.rejected)


def dpop_loss(policy: PairLogps, reference: PairLogps, *, beta: float, dpop_lambda: float) -> PairLoss:
    """DPO that also refuses to make the chosen response less likely than the reference makes it.

    loss = -log s(beta (r_w - r_l - lambda max(0, -r_w))).

    Args:
        policy: Response log-probabilities [P], nats, summed over response tokens. Receives gradient.
        reference: The same from the frozen model. Treated as constant.
        beta: Strength of the pull to the reference, > 0.
        dpop_lambda: Weight of the penalty, >= 0; 50 in the paper. 0 is DPO.

    Returns:
        loss [P], unreduced; rewards beta r, detached.

    Raises:
        ValueError: beta or dpop_lambda out of range, or shapes differ.

    Source:
        Pal et al. 2024 (Smaug), arXiv:2402.13228, eq. 3: the penalty stands inside the logarithm of the sigmoid.
        PaddleNLP adds lambda max(0, -r_w) outside it, without beta. Equal policy and reference give ln 2.
    """
    _check_beta(beta)
    if not (dpop_lambda >= 0.0 and math.isfinite(dpop_lambda)):
        raise ValueError(f"dpop_lambda must be at least 0, got {dpop_lambda}")
    chosen, rejected = _log_ratios(policy, reference)
    loss = _softplus(-beta * (chosen - rejected - dpop_lambda * _relu(-chosen)))
    return _with_rewards(loss, beta, chosen, rejected)


def sppo_hard_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> PairLoss:
    """Regress the log-ratio of the chosen response to +1/(2 beta) and of the rejected one to -1/(2 beta).

    loss = (r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2.

    Args:
        policy: Response log-probabilities [P], nats, summed over response tokens. Receives gradient.
        reference: The same from the frozen model. Treated as constant.
        beta: The inverse of the paper's eta, > 0.

    Returns:
        loss [P], unreduced, >= 0; rewards beta r, detached.

    Raises:
        ValueError: beta out of range, or shapes differ.

    Source:
        Wu et al. 2024, arXiv:2405.00675, eq. 4.7 with win rates 1 and 0 in place of a judge's estimate; TRL's and
        PaddleNLP's `sppo_hard`. Equal policy and reference give 1/(2 beta^2).
    """
    _check_beta(beta)
    chosen, rejected = _log_ratios(policy, reference)
    target = 0.5 / beta
    loss = (chosen - target).square() + (rejected + target).square()
    return _with_rewards(loss, beta, chosen, rejected)


def nca_pair_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> PairLoss:
    """Raise the chosen response absolutely while keeping both from drifting up without bound.

    loss = -log s(beta r_w) - log s(-beta r_w) / 2 - log s(-beta r_l) / 2.

    Args:
        policy: Response log-probabilities [P], nats, summed over response tokens. Receives gradient.
        reference: The same from the frozen model. Treated as constant.
        beta: Strength of the pull to the reference, > 0.

    Returns:
        loss [P], unreduced; rewards beta r, detached.

    Raises:
        ValueError: beta out of range, or shapes differ.

    Source:
        Chen et al. 2024, arXiv:2402.05369, the NCA loss for two responses with rewards 1 and 0 in the limit of zero
        temperature; TRL's and PaddleNLP's `nca_pair`. Equal policy and reference give 2 ln 2.
    """
    _check_beta(beta)
    chosen, rejected = _log_ratios(policy, reference)
    up, down = beta * chosen, beta * rejected
    loss = _softplus(-up) + 0.5 * _softplus(up) + 0.5 * _softplus(down)
    return _with_rewards(loss, beta, chosen, rejected)


def chosen_nll(policy: PairLogps) -> paddle.Tensor:
    """The supervised term that `sft_loss_ratio` weighs: negative log-probability per token of each chosen response.

    Args:
        policy: Response log-probabilities [P], nats, summed, with token counts. Receives gradient.

    Returns:
        Floating [P], unreduced, nats per token.

    Raises:
        ValueError: counts missing.

    Source:
        Pang et al. 2024 (RPO), arXiv:2404.19733, eq. 1. TRL's `sft` and PaddleNLP's term average over all chosen tokens
        of a micro-batch instead, which weighs a pair by its length; at one pair a micro-batch they are this.
    """
    return -policy.averaged().chosen


@dataclass(frozen=True)
class LossKind:
    """What the trainer and the recipe must know of a loss.

    Attributes:
        function: The loss. Called with the policy, the reference if there is one, and `keys` by name.
        options: The keys of `LossOptions` that it reads and not every loss does, with what each is where the recipe
            does not say; None: what the section says for all.
        has_reference: Whether it compares with a reference model.
        may_drop_reference: Whether it still means something with the reference's log-probabilities taken as 0.
        has_sft: Whether it holds a supervised term already, so that `sft_loss_ratio` would add it twice.
        per_token: Whether its rewards, and the log-probabilities TRL logs beside it, are averages over tokens.
        step_baseline: Whether it needs the mean log-ratios of a whole optimizer step before any gradient.
    """

    function: Callable[..., PairLoss]
    options: Mapping[str, float | None] = field(default_factory=dict)
    has_reference: bool = True
    may_drop_reference: bool = False
    has_sft: bool = False
    per_token: bool = False
    step_baseline: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of `LossOptions` that its function takes."""
        return ("beta", *self.options)


LOSSES: dict[str, LossKind] = {
    "sigmoid": LossKind(dpo_loss, {"label_smoothing": None}, may_drop_reference=True),
    "hinge": LossKind(hinge_loss, may_drop_reference=True),
    "ipo": LossKind(ipo_loss, may_drop_reference=True),
    "kto_pair": LossKind(kto_pair_loss, step_baseline=True),
    "simpo": LossKind(simpo_loss, {"simpo_gamma": 0.5}, has_reference=False, per_token=True),
    "orpo": LossKind(orpo_loss, has_reference=False, has_sft=True, per_token=True),
    "dpop": LossKind(dpop_loss, {"dpop_lambda": 50.0}),
    "sppo_hard": LossKind(sppo_hard_loss),
    "nca_pair": LossKind(nca_pair_loss),
}


if TYPE_CHECKING:  # a type checker takes no names that are computed
    LossType = str
else:
    LossType = Literal[tuple(LOSSES)]


class LossOptions(BaseModel):
    """The keys of the recipe's `dpo` section that choose a loss, and that losses read; `LOSSES` says which reads which.

    Attributes:
        beta: Strength of the pull to the reference (in `simpo` the scale, in `orpo` the weight of the odds term).
        loss_type: How a pair is scored; the page on preference training has a table of the losses.
        label_smoothing: Chance that a pair is labelled the wrong way round; `sigmoid` only.
        sft_loss_ratio: Weight of an added supervised loss on the chosen response.
        simpo_gamma: Target margin, `simpo` only; there 0.5 when not given, as in TRL's CPOConfig.
        dpop_lambda: Weight of the penalty, `dpop` only (Pal et al. 2024, arXiv:2402.13228); there 50 when not given.
    """

    beta: Annotated[float, Field(gt=0, le=1000)] = 0.1
    loss_type: LossType = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    sft_loss_ratio: Annotated[float, Field(ge=0, le=1000)] = 0.0
    simpo_gamma: Annotated[float, Field(ge=0, le=1000)] | None = None
    dpop_lambda: Annotated[float, Field(ge=0, le=1e6)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_options(cls, data: Any) -> Any:
        name = data.get("loss_type") if isinstance(data, dict) else None
        if not isinstance(name, str) or name not in LOSSES:
            return data
        given = {key for key in data if data[key] is not None}
        options = LOSSES[name].options
        return {**data, **{key: value for key, value in options.items() if value is not None and key not in given}}


def _check_beta(beta: float) -> None:
    if not (beta > 0.0 and math.isfinite(beta)):
        raise ValueError(f"beta must be a positive number, got {beta}")


def _log_ratios(policy: PairLogps, reference: PairLogps) -> tuple[paddle.Tensor, paddle.Tensor]:
    if policy.chosen.shape != reference.chosen.shape:
        raise ValueError(
            f"policy and reference hold different numbers of pairs: {policy.chosen.shape} and {reference.chosen.shape}"
        )
    return policy.chosen - reference.chosen.detach(), policy.rejected - reference.rejected.detach()


def _with_rewards(loss: paddle.Tensor, beta: float, chosen: paddle.Tensor, rejected: paddle.Tensor) -> PairLoss:
    return PairLoss(loss, beta * chosen.detach(), beta * rejected.detach())


def _relu(x: paddle.Tensor) -> paddle.Tensor:
    return bring_up().nn.functional.relu(x)


def _sigmoid(x: paddle.Tensor) -> paddle.Tensor:
    return bring_up().nn.functional.sigmoid(x)


def _softplus(x: paddle.Tensor) -> paddle.Tensor:
    """log(1 + exp(x)) = -log s(-x), to full precision on both sides.

    Paddle's log_sigmoid and softplus take log(1 + y) where log1p(y) is meant: in float32 the loss of a pair won by 12
    nats is off by 1%, by 17 nats it is 0.
    """
    paddle = bring_up()
    # Each branch sees only its own half, so that neither overflows; at 0 the clipped gradient is whole
    low = paddle.log1p(paddle.exp(x.clip(max=0.0)))
    high = x + paddle.log1p(paddle.exp(-x.clip(min=0.0)))
    return paddle.where(x <= 0.0, low, high)


def _log1mexp(x: paddle.Tensor) -> paddle.Tensor:
    """log(1 - exp(x)) for x <= 0, finite at 0 and with finite gradient.

    Source: Maechler 2012, "Accurately computing log(1 - exp(-|a|))": expm1 above -ln 2, log1p below.
    """
    paddle = bring_up()
    half = math.log(2.0)
    tiny = float(paddle.finfo(x.dtype).tiny)
    # Each branch sees only its own half: the gradient of a branch not taken would be nan at its edge
    near = paddle.log(-paddle.expm1(x.clip(min=-half, max=-tiny)))
    far = paddle.log1p(-paddle.exp(x.clip(max=-half)))
    return paddle.where(x > -half, near, far)
