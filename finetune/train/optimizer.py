"""AdamW over named parameters, with a state that outlives the process."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from finetune.compute import cpu
from finetune.errors import CheckpointError
from finetune.model.runtime import paddle as _bring_up

_bring_up()
import paddle

if TYPE_CHECKING:
    from finetune.recipe.schema import TrainingSection
    from finetune.train.processes.sharding import Shards

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
    """Paddle's AdamW (Loshchilov and Hutter, arXiv:1711.05101), driven by an explicit learning rate each step.

    Paddle keys its state by generated names ("linear_3.w_0_moment1_0"), which differ from process to process as soon as
    anything else was built first; here it is keyed by the parameter's name in the model.
    """

    def __init__(self, parameters: dict[str, paddle.Tensor], training: TrainingSection, shards: Shards | None = None):
        """Start with zero moments.

        Args:
            parameters: What is trained, by name.
            training: Betas, epsilon and weight decay.
            shards: Which process steps which of them; None: this one all.
        """
        self.parameters = parameters
        self.shards = shards
        self._own = {name: p for name, p in parameters.items() if shards is None or shards.is_own(name)}
        decayed = {p.name for name, p in parameters.items() if decays(name)}
        self._inner = paddle.optimizer.AdamW(
            learning_rate=training.learning_rate,
            beta1=training.adam_beta1,
            beta2=training.adam_beta2,
            epsilon=training.adam_epsilon,
            parameters=list(self._own.values()),
            weight_decay=training.weight_decay,
            apply_decay_param_fun=decayed.__contains__,
            multi_precision=any(p.dtype != paddle.float32 for p in parameters.values()),
        )

    def step(self, learning_rate: float, max_norm: float) -> float:
        """Clip the gradients held by the parameters, apply them, and drop them. With shards, all processes call it.

        Args:
            learning_rate: Of this step.
            max_norm: Gradients are scaled so that their joint L2 norm is at most this; 0 switches clipping off. The
                coefficient is max_norm / (norm + 1e-6), as torch.nn.utils.clip_grad_norm_ (Pascanu et al. 2013,
                arXiv:1211.5063).

        Returns:
            The norm before clipping. Where it is not finite, nothing was applied.

        Raises:
            RuntimeError: a parameter has no gradient, so it would stay as it is without anyone noticing.
        """
        untouched = [name for name, p in self.parameters.items() if p.grad is None]
        if untouched:
            raise RuntimeError(f"no gradient reached {len(untouched)} trainable tensors, {untouched[0]} among them")
        norm = gradient_norm(self.parameters)
        if math.isfinite(norm):
            if 0 < max_norm < norm + 1e-6:
                _scale_gradients(self.parameters, max_norm / (norm + 1e-6))
            self._inner.set_lr(learning_rate)
            # The state is made, and named, in the first step; a counter of the process would be part of the names.
            with paddle.utils.unique_name.guard():
                self._inner.step()
            if self.shards is not None:
                with paddle.no_grad():
                    for name, parameter in self.parameters.items():
                        self.shards.send(name, parameter)
        for parameter in self.parameters.values():
            parameter.grad = None
        return norm

    def state(self) -> dict[str, np.ndarray]:
        """Everything but the parameters: "<parameter name>/<slot>" -> float32 array.

        With shards, all processes call it, and rank 0 gets it; the others get nothing.
        """
        if self.shards is not None and not self.shards.holds_checkpoint:
            return {}
        inner = self._inner.state_dict()
        masters = inner.get("master_weights", {})
        out: dict[str, np.ndarray] = {}
        for name, parameter in self.parameters.items():
            for slot, shape in _slot_shapes(parameter).items():
                array = None
                if name in self._own:
                    held = masters[parameter.name] if slot == _MASTER else inner[_state_key(parameter, slot)]
                    array = held.numpy()
                if self.shards is not None:
                    array = self.shards.collect(name, array, shape)
                if array is not None:
                    out[f"{name}/{slot}"] = array
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
            if name not in self._own:
                continue
            parameter = self.parameters[name]
            if slot == _MASTER:
                masters[parameter.name] = paddle.to_tensor(value)
                masters[parameter.name].name = _state_prefix(parameter)  # Paddle looks the moments up under it
            else:
                inner[_state_key(parameter, slot)] = paddle.to_tensor(value)
        if masters:
            inner["master_weights"] = masters
        self._inner.set_state_dict(inner)


def _slot_shapes(parameter: paddle.Tensor) -> dict[str, list[int]]:
    """Shape of each slot of a parameter's state, float32 all."""
    shapes = {slot: parameter.shape if slot.startswith("moment") else [1] for slot in _SLOTS}
    return shapes if parameter.dtype == paddle.float32 else shapes | {_MASTER: parameter.shape}


def _state_key(parameter: paddle.Tensor, slot: str) -> str:
    """Paddle's name of a parameter's state."""
    return f"{_state_prefix(parameter)}_{slot}_0"


def _state_prefix(parameter: paddle.Tensor) -> str:
    """Paddle's name of what is stepped: the parameter, or its float32 master where it is of half precision."""
    return parameter.name if parameter.dtype == paddle.float32 else f"{parameter.name}_fp32_master_0"


def gradient_norm(parameters: dict[str, paddle.Tensor]) -> float:
    """Joint L2 norm of all gradients; not finite when any of them is not."""
    gradients = [p.grad for p in parameters.values()]
    if cpu.fits(*gradients):
        return math.sqrt(sum(cpu.squared_norm(cpu.array_of(g.contiguous()).reshape(-1)) for g in gradients))
    return math.sqrt(float(paddle.stack([g.astype("float32").square().sum() for g in gradients]).sum()))


def _scale_gradients(parameters: dict[str, paddle.Tensor], factor: float) -> None:
    with paddle.no_grad():
        for parameter in parameters.values():
            parameter.grad.scale_(factor)
