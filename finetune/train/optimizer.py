"""AdamW over named parameters, with a state that outlives the process.

Paddle keys its optimizer state by generated names ("linear_3.w_0_moment1_0"), which differ from process to process as
soon as anything else was built first. Here the state is keyed by the parameter's name in the model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from finetune.errors import CheckpointError
from finetune.model.runtime import paddle as _bring_up

_bring_up()
import paddle  # noqa: E402

if TYPE_CHECKING:
    from finetune.recipe.schema import TrainingSection

_SLOTS = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")
_MASTER = "master"


def trainable_parameters(model) -> dict[str, paddle.Tensor]:
    """Name -> parameter of all that is trained, each shared tensor once, in the model's order."""
    found: dict[str, paddle.Tensor] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if not parameter.stop_gradient and id(parameter) not in seen:
            seen.add(id(parameter))
            found[name] = parameter
    return found


def decays(name: str) -> bool:
    """Whether weight decay applies: not to biases and norm weights, as in transformers' Trainer."""
    return not (name.endswith("bias") or "norm" in name.rsplit(".", 2)[-2])


class NamedAdamW:
    """paddle's AdamW (Loshchilov and Hutter, arXiv:1711.05101), driven by an explicit learning rate each step."""

    def __init__(self, parameters: dict[str, paddle.Tensor], training: TrainingSection):
        self.parameters = parameters
        half = any(p.dtype != paddle.float32 for p in parameters.values())
        decayed = {p.name for name, p in parameters.items() if decays(name)}
        self._inner = paddle.optimizer.AdamW(
            learning_rate=training.learning_rate,
            beta1=training.adam_beta1,
            beta2=training.adam_beta2,
            epsilon=training.adam_epsilon,
            parameters=list(parameters.values()),
            weight_decay=training.weight_decay,
            apply_decay_param_fun=decayed.__contains__,
            multi_precision=half,
        )

    def step(self, learning_rate: float) -> None:
        """Apply the gradients held by the parameters, then drop them."""
        self._inner.set_lr(learning_rate)
        # The state is made, and named, in the first step; a counter of the process would be part of the names.
        with paddle.utils.unique_name.guard():
            self._inner.step()
        self._inner.clear_grad()

    def state(self) -> dict[str, np.ndarray]:
        """Everything but the parameters: "<parameter name>/<slot>" -> float32 array."""
        inner = self._inner.state_dict()
        masters = inner.get("master_weights", {})
        out: dict[str, np.ndarray] = {}
        for name, parameter in self.parameters.items():
            for slot in _SLOTS:
                out[f"{name}/{slot}"] = inner[_state_key(parameter, slot)].numpy()
            if parameter.name in masters:
                out[f"{name}/{_MASTER}"] = masters[parameter.name].numpy()
        return out

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Restore what `state` returned.

        Raises:
            CheckpointError: the names are not those of this model's trainable parameters.
        """
        names = {key.rsplit("/", 1)[0] for key in state}
        if names != set(self.parameters):
            odd = sorted(names ^ set(self.parameters))
            raise CheckpointError(
                f"the optimizer state is of other parameters: {len(odd)} names differ, the first is {odd[0]!r}",
                fix="Resume with the recipe that wrote it, or start again with training.resume_from_checkpoint=never.",
            )
        inner: dict = {}
        masters: dict = {}
        for key, value in state.items():
            name, slot = key.rsplit("/", 1)
            parameter = self.parameters[name]
            if slot == _MASTER:
                masters[parameter.name] = paddle.to_tensor(value)
                continue
            inner[_state_key(parameter, slot)] = paddle.to_tensor(value)
        if masters:
            inner["master_weights"] = masters
        self._inner.set_state_dict(inner)


def _state_key(parameter: paddle.Tensor, slot: str) -> str:
    """Paddle's name of a parameter's state; of its float32 master where the parameter is of half precision."""
    prefix = parameter.name if parameter.dtype == paddle.float32 else f"{parameter.name}_fp32_master_0"
    return f"{prefix}_{slot}_0"


def clip_gradients(parameters: dict[str, paddle.Tensor], max_norm: float) -> float:
    """Scale all gradients so that their joint L2 norm is at most `max_norm`; 0 switches clipping off.

    Returns:
        The norm before clipping. Not finite when any gradient is not; nothing is scaled then.

    Source:
        Pascanu et al. 2013, arXiv:1211.5063; coefficient max_norm / (norm + 1e-6) as torch.nn.utils.clip_grad_norm_.
    """
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    squares = paddle.stack([g.astype("float32").square().sum() for g in gradients])
    norm = math.sqrt(float(squares.sum()))
    if max_norm > 0 and math.isfinite(norm):
        coefficient = max_norm / (norm + 1e-6)
        if coefficient < 1.0:
            with paddle.no_grad():
                for gradient in gradients:
                    gradient.scale_(coefficient)
    return norm
