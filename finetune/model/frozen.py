"""Weights that are not trained and kept quantized: a parameter without memory that carries its codes.

The parameter keeps its name, shape and place in PaddleNLP's model, so that adapters wrap its layer as any other; what
reads its value has to ask for the codes first (finetune/compute/frozen.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.model.quantize import Int8, Nf4, Scales
from finetune.model.runtime import paddle as _bring_up

_bring_up()

import paddle


@dataclass(frozen=True)
class Frozen:
    """A quantized matrix on the model's device.

    Attributes:
        shape: [out, in], as Hugging Face stores it: blocks run along its rows.
        codes: uint8 [ceil(size / 2)] for nf4, int8 [out, in] for int8.
        scales: float32 [blocks], or uint8 [blocks] if doubly quantized; float32 [out] for int8.
        nested: float32, the scales of the scales; None where they are not quantized.
        offset: See `quantize.Scales`.
    """

    shape: tuple[int, ...]
    codes: paddle.Tensor
    scales: paddle.Tensor
    nested: paddle.Tensor | None = None
    offset: float = 0.0

    @classmethod
    def of(cls, matrix: Nf4 | Int8) -> Frozen:
        """Put a quantized matrix onto the current device."""
        if isinstance(matrix, Int8):
            return cls(matrix.shape, paddle.to_tensor(matrix.codes), paddle.to_tensor(matrix.scales))
        scales = matrix.scales
        nested = None if scales.nested is None else paddle.to_tensor(scales.nested)
        values = paddle.to_tensor(scales.values)
        return cls(matrix.shape, paddle.to_tensor(matrix.codes), values, nested, float(scales.offset))

    def dequantize(self) -> NDArray[np.float32]:
        """The matrix in main memory, float32 [out, in]."""
        codes, scales = self.codes.numpy(), self.scales.numpy()
        if not self.is_nf4:
            return Int8(codes, scales).dequantize()
        nested = None if self.nested is None else self.nested.numpy()
        return Nf4(codes, Scales(scales, nested, np.float32(self.offset)), self.shape).dequantize()

    @property
    def is_nf4(self) -> bool:
        """Otherwise it is int8."""
        return bool(self.codes.dtype == paddle.uint8)


def freeze(parameter: paddle.Tensor, matrix: Nf4 | Int8) -> None:
    """Let a parameter that has no memory yet carry a quantized matrix."""
    if tuple(parameter.shape) != matrix.shape[::-1]:
        raise ValueError(f"codes of {matrix.shape} for a weight of {tuple(parameter.shape)}")
    parameter.stop_gradient = True
    parameter.frozen = Frozen.of(matrix)


def frozen_of(parameter: paddle.Tensor) -> Frozen | None:
    """What a parameter carries; None where it holds its value itself."""
    found: Frozen | None = getattr(parameter, "frozen", None)
    return found


def is_frozen(model: paddle.nn.Layer) -> bool:
    """Whether a model has quantized weights."""
    return any(frozen_of(parameter) is not None for parameter in model.parameters())
