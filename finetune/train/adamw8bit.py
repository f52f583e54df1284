"""AdamW whose moments are kept in 8 bits: Dettmers et al. 2021, arXiv:2110.02861; bitsandbytes' AdamW8bit.

A moment is a code for every number and a scale for every block of 256, the block's largest magnitude; the first has
`dynamic_levels` with sign, the second without. A step makes the moments of a block whole, in float32, applies them, and
quantizes them again. Tensors of fewer than 4,096 numbers keep moments in float32, as there. Unlike there, weights of
half precision keep a float32 master, as with Paddle's AdamW: rounding them to 8 bits of fraction would eat the updates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from finetune.compute import cpu
from finetune.model.quantize import dynamic_levels, nearest
from finetune.model.runtime import paddle as _bring_up
from finetune.model.tensors import as_numpy, set_parameter
from finetune.train.adamw import MASTER, Slot, decays

_bring_up()
import paddle

if TYPE_CHECKING:
    from finetune.recipe.schema import TrainingSection

BLOCK = 256
SMALLEST = 4096  # numbers of a tensor whose moments are quantized
_KINDS = (("signed", "moment1", "scale1"), ("unsigned", "moment2", "scale2"))
_LEVELS = {kind: dynamic_levels(signed=kind == "signed") for kind, _, _ in _KINDS}
_TINY = np.float32(1e-38)  # a block of zeros is divided by this


@dataclass(frozen=True)
class _Rule:
    """The constants of one step.

    Attributes:
        fresh1, fresh2: 1 - beta, rounded once: 1 - float32(0.999) is off by 1e-5 of itself.
        rate: Learning rate over the first moment's bias correction.
        decay: What weights are multiplied by before the update.
        root: Square root of the second moment's bias correction.
    """

    beta1: np.float32
    beta2: np.float32
    fresh1: np.float32
    fresh2: np.float32
    epsilon: np.float32
    rate: np.float32
    decay: np.float32
    root: np.float32

    def apply(self, weight: np.ndarray, gradient: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
        """Renew moments and weights, all float32 of one shape, in place."""
        first *= self.beta1
        first += self.fresh1 * gradient
        second *= self.beta2
        second += self.fresh2 * gradient * gradient
        weight *= self.decay
        weight -= self.rate * first / (np.sqrt(second) / self.root + self.epsilon)


class _Moments:
    """Moments of one tensor, float32 or 8 bits, with its master where it is of half precision; on CPU by NumPy.

    Attributes:
        arrays: By slot.
    """

    def __init__(self, parameter: paddle.Tensor):
        size = int(parameter.size)
        self.coded = size >= SMALLEST
        self.arrays: dict[str, np.ndarray] = {}
        for kind, moment, scale in _KINDS:
            if self.coded:
                self.arrays[moment] = np.full(size, nearest(kind)(np.zeros(1, np.float32))[0], np.uint8)
                self.arrays[scale] = np.zeros(-(-size // BLOCK), np.float32)
            else:
                self.arrays[moment] = np.zeros(size, np.float32)

    def step(self, rule: _Rule, weight: np.ndarray, gradient: np.ndarray) -> None:
        """Renew moments and weights float32 [n], in place."""
        moments = [self.arrays[moment] for _, moment, _ in _KINDS]
        if not self.coded:
            rule.apply(weight, gradient, *moments)
            return
        scales = [self.arrays[scale] for _, _, scale in _KINDS]
        whole = len(weight) // BLOCK
        cut = whole * BLOCK
        rows = [array[:cut].reshape(whole, BLOCK) for array in (weight, gradient, *moments)]

        def work(blocks: slice) -> None:
            _step_blocks(rule, *(array[blocks] for array in (*rows, *scales)))

        cpu.by_rows(whole, BLOCK * 4, work)
        if cut < len(weight):
            rest = [array[cut:].reshape(1, -1) for array in (weight, gradient, *moments)]
            _step_blocks(rule, *rest, *(scale[whole:] for scale in scales))


def _step_blocks(
    rule: _Rule,
    weight: np.ndarray,
    gradient: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    first_scales: np.ndarray,
    second_scales: np.ndarray,
) -> None:
    """Weights, gradients and codes [blocks, n], scales [blocks]; in place."""
    state = (("signed", first, first_scales), ("unsigned", second, second_scales))
    moments = [_LEVELS[kind][codes] * scales[:, None] for kind, codes, scales in state]
    rule.apply(weight, gradient, *moments)
    for moment, (kind, codes, scales) in zip(moments, state):
        scales[:] = np.abs(moment).max(axis=1)
        moment *= (np.float32(1.0) / np.maximum(scales, _TINY))[:, None]
        codes[:] = nearest(kind)(np.clip(moment, -1.0, 1.0, out=moment))


class AdamW8bit:
    """See the module. The state lies in main memory and is stepped there, wherever the model is."""

    def __init__(self, parameters: dict[str, paddle.Tensor], training: TrainingSection):
        self._parameters, self._training = parameters, training
        self._steps = 0
        self._moments = {name: _Moments(parameter) for name, parameter in parameters.items()}
        halves = {name: p for name, p in parameters.items() if p.dtype != paddle.float32}
        self._masters = {name: as_numpy(p).astype(np.float32).reshape(-1) for name, p in halves.items()}

    def step(self, learning_rate: float) -> None:
        """See `Moments`."""
        self._steps += 1
        for name, parameter in self._parameters.items():
            self._step(name, parameter, self._rule(name, parameter, learning_rate))

    def _rule(self, name: str, parameter: paddle.Tensor, learning_rate: float) -> _Rule:
        training = self._training
        rate = learning_rate * parameter.optimize_attr["learning_rate"]
        decay = 1.0 - rate * training.weight_decay if decays(name) else 1.0
        return _Rule(
            beta1=np.float32(training.adam_beta1),
            beta2=np.float32(training.adam_beta2),
            fresh1=np.float32(1.0 - training.adam_beta1),
            fresh2=np.float32(1.0 - training.adam_beta2),
            epsilon=np.float32(training.adam_epsilon),
            rate=np.float32(rate / (1.0 - training.adam_beta1**self._steps)),
            decay=np.float32(decay),
            root=np.float32(math.sqrt(1.0 - training.adam_beta2**self._steps)),
        )

    def _step(self, name: str, parameter: paddle.Tensor, rule: _Rule) -> None:
        in_place = name not in self._masters and cpu.fits(parameter)
        if in_place:
            weight = cpu.array_of(parameter).reshape(-1)
        else:
            weight = self._masters[name] if name in self._masters else as_numpy(parameter).reshape(-1)
        gradient = as_numpy(parameter.grad).astype(np.float32, copy=False).reshape(-1)
        self._moments[name].step(rule, weight, gradient)
        if not in_place:
            set_parameter(parameter, weight.reshape(parameter.shape))

    def slots(self, parameter: paddle.Tensor) -> dict[str, Slot]:
        """See `Moments`."""
        size = int(parameter.size)
        slots = {"step": Slot((1,)), "moment1": Slot((size,)), "moment2": Slot((size,))}
        if size >= SMALLEST:
            blocks = Slot((-(-size // BLOCK),))
            codes = Slot((size,), "uint8")
            slots |= {"moment1": codes, "moment2": codes, "scale1": blocks, "scale2": blocks}
        return slots if parameter.dtype == paddle.float32 else slots | {MASTER: Slot((size,))}

    def read(self) -> dict[str, dict[str, np.ndarray]]:
        """See `Moments`."""
        found = {}
        for name, moments in self._moments.items():
            masters = {MASTER: self._masters[name]} if name in self._masters else {}
            found[name] = {"step": np.array([self._steps], np.float32)} | moments.arrays | masters
        return found

    def write(self, state: dict[str, dict[str, np.ndarray]]) -> None:
        """See `Moments`."""
        for name, slots in state.items():
            self._steps = int(slots["step"][0])
            for slot, array in self._moments[name].arrays.items():
                array[:] = slots[slot]
            if name in self._masters:
                self._masters[name][:] = slots[MASTER]
