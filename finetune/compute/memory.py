"""Paddle's tensors on CPU as NumPy arrays, without a copy."""

from __future__ import annotations

import numpy as np

_TYPES = {"paddle.float32": "<f4", "paddle.uint8": "|u1", "paddle.int8": "|i1"}


class _Memory:
    """A tensor's memory, as NumPy's array interface describes it."""

    def __init__(self, tensor):
        self.tensor = tensor  # the array keeps this object, and so the memory, alive
        self.__array_interface__ = {
            "version": 3,
            "typestr": _TYPES[str(tensor.dtype)],
            "shape": tuple(tensor.shape),
            "data": (tensor.data_ptr(), False),
        }


def array_of(tensor) -> np.ndarray:
    """The tensor's own memory as an array of float32, uint8 or int8; writing to it changes the tensor.

    The tensor must be contiguous: pass results of products, `empty`, or `contiguous()`.
    """
    if not tensor.is_contiguous():
        raise ValueError("a strided tensor has no plain memory; call contiguous() first")
    if not tensor.size:
        return np.zeros(tuple(tensor.shape), _TYPES[str(tensor.dtype)])
    return np.asarray(_Memory(tensor))
