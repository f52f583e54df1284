"""One optimizer step: gradients clipped by their joint norm and applied, and a state that outlives the process."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from finetune.compute import cpu
from finetune.errors import CheckpointError
from finetune.model.runtime import paddle as _bring_up
from finetune.train.adamw import Moments, PaddleAdamW
from finetune.train.adamw8bit import AdamW8bit

_bring_up()
import paddle

if TYPE_CHECKING:
    from finetune.recipe.schema import TrainingSection
    from finetune.train.processes.sharding import Shards

# By training.optim
RULES: dict[str, type[Moments]] = {"adamw": PaddleAdamW, "adamw_8bit": AdamW8bit}


def trainable_parameters(model) -> dict[str, paddle.Tensor]:
    """Name -> parameter of all that is trained, each shared tensor once, in the model's order."""
    found: dict[str, paddle.Tensor] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if not parameter.stop_gradient and id(parameter) not in seen:
            seen.add(id(parameter))
            found[name] = parameter
    return found


class Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) over named parameters, each step with a rate of its own."""

    def __init__(self, parameters: dict[str, paddle.Tensor], training: TrainingSection, shards: Shards | None = None):
        """Start with zero moments.

        Args:
            parameters: What is trained, by name.
            training: Which rule, betas, epsilon and weight decay.
            shards: Which process steps which of them; None: this one all.
        """
        self.parameters = parameters
        self.shards = shards
        own = {name: p for name, p in parameters.items() if shards is None or shards.is_own(name)}
        self._moments: Moments = RULES[training.optim](own, training)

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
            self._moments.step(learning_rate)
            if self.shards is not None:
                with paddle.no_grad():
                    for name, parameter in self.parameters.items():
                        self.shards.send(name, parameter)
        for parameter in self.parameters.values():
            parameter.grad = None
        return norm

    def state(self) -> dict[str, np.ndarray]:
        """Everything but the parameters: "<parameter name>/<slot>" -> array.

        With shards, all processes call it, and rank 0 gets it; the others get nothing.
        """
        if self.shards is not None and not self.shards.holds_checkpoint:
            return {}
        held = self._moments.read()
        out: dict[str, np.ndarray] = {}
        for name, parameter in self.parameters.items():
            for key, slot in self._moments.slots(parameter).items():
                array = held[name][key] if name in held else None
                if self.shards is not None:
                    array = self.shards.collect(name, array, slot.shape, slot.dtype)
                if array is not None:
                    out[f"{name}/{key}"] = array
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
        parts: dict[str, dict[str, np.ndarray]] = {}
        for key, value in state.items():
            name, slot = key.rsplit("/", 1)
            if self.shards is None or self.shards.is_own(name):
                parts.setdefault(name, {})[slot] = value
        self._moments.write(parts)


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
