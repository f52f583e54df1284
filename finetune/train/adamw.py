"""AdamW's rule and state over named parameters: what any form of it has, and Paddle's, in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from finetune.model.runtime import paddle as _bring_up

_bring_up()
import paddle

if TYPE_CHECKING:
    from finetune.recipe.schema import TrainingSection

_SLOTS = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")
MASTER = "master"


@dataclass(frozen=True)
class Slot:
    """One array of a parameter's state.

    Attributes:
        shape, dtype: The dtype by name.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"


class Moments(Protocol):
    """An optimizer's rule with its state, over some of the trained parameters."""

    def __init__(self, parameters: dict[str, paddle.Tensor], training: TrainingSection):
        """Start with zero moments; weight decay leaves out what `decays` says."""

    def step(self, learning_rate: float) -> None:
        """Apply the gradients that the parameters hold."""

    def slots(self, parameter: paddle.Tensor) -> dict[str, Slot]:
        """What the state of any parameter, of this process or not, consists of."""

    def read(self) -> dict[str, dict[str, np.ndarray]]:
        """The state: parameter name -> slot -> array."""

    def write(self, state: dict[str, dict[str, np.ndarray]]) -> None:
        """Restore what `read` returned."""


def decays(name: str) -> bool:
    """Whether weight decay applies: not to biases and norm weights, as in transformers' Trainer."""
    return not (name.endswith("bias") or "norm" in name.rsplit(".", 2)[-2])


class PaddleAdamW:
    """Paddle's AdamW, its moments in float32.

    Paddle keys its state by generated names ("linear_3.w_0_moment1_0"), which differ from process to process as soon as
    anything else was built first; here it is keyed by the parameter's name in the model.
    """

    def __init__(self, parameters: dict[str, paddle.Tensor], training: TrainingSection):
        self._parameters = parameters
        decayed = {p.name for name, p in parameters.items() if decays(name)}
        self._inner = paddle.optimizer.AdamW(
            learning_rate=training.learning_rate,
            beta1=training.adam_beta1,
            beta2=training.adam_beta2,
            epsilon=training.adam_epsilon,
            parameters=list(parameters.values()),
            weight_decay=training.weight_decay,
            apply_decay_param_fun=decayed.__contains__,
            multi_precision=any(p.dtype != paddle.float32 for p in parameters.values()),
        )

    def step(self, learning_rate: float) -> None:
        """See `Moments`."""
        self._inner.set_lr(learning_rate)
        # The state is made, and named, in the first step; a counter of the process would be part of the names.
        with paddle.utils.unique_name.guard():
            self._inner.step()

    def slots(self, parameter: paddle.Tensor) -> dict[str, Slot]:
        """See `Moments`."""
        whole = Slot(tuple(parameter.shape))
        slots = {name: whole if name.startswith("moment") else Slot((1,)) for name in _SLOTS}
        return slots if parameter.dtype == paddle.float32 else slots | {MASTER: whole}

    def read(self) -> dict[str, dict[str, np.ndarray]]:
        """See `Moments`."""
        inner = self._inner.state_dict()
        masters = inner.get("master_weights", {})
        found: dict[str, dict[str, np.ndarray]] = {}
        for name, parameter in self._parameters.items():
            found[name] = {
                slot: (masters[parameter.name] if slot == MASTER else inner[_state_key(parameter, slot)]).numpy()
                for slot in self.slots(parameter)
            }
        return found

    def write(self, state: dict[str, dict[str, np.ndarray]]) -> None:
        """See `Moments`."""
        inner: dict = {}
        masters: dict = {}
        for name, slots in state.items():
            parameter = self._parameters[name]
            for slot, value in slots.items():
                if slot == MASTER:
                    masters[parameter.name] = paddle.to_tensor(value)
                    masters[parameter.name].name = _state_prefix(parameter)  # Paddle looks the moments up under it
                else:
                    inner[_state_key(parameter, slot)] = paddle.to_tensor(value)
        if masters:
            inner["master_weights"] = masters
        self._inner.set_state_dict(inner)


def _state_key(parameter: paddle.Tensor, slot: str) -> str:
    """Paddle's name of a parameter's state."""
    return f"{_state_prefix(parameter)}_{slot}_0"


def _state_prefix(parameter: paddle.Tensor) -> str:
    """Paddle's name of what is stepped: the parameter, or its float32 master where it is of half precision."""
    return parameter.name if parameter.dtype == paddle.float32 else f"{parameter.name}_fp32_master_0"
