"""Paddle's tensors on CPU as NumPy arrays, without a copy."""

from __future__ import annotations

import numpy as np


class _Memory:
    """A tensor's memory, as NumPy's array interface describes it."""

    def __init__(self, tensor):
        self.tensor = tensor  # the array keeps this object, and so the memory, alive
        self.__array_interface__ = {
            "version": 3,
            "typestr": "<f4",
            "shape": tuple(tensor.shape),
            "data": (tensor.data_ptr(), False),
        }


def array_of(tensor) -> np.ndarray:
    """The tensor's own memory as a float32 array; writing to it changes the tensor.

    The tensor must be contiguous: pass results of products, `empty`, or `contiguous()`.
    """
    if not tensor.is_contiguous():
        raise ValueError("a strided tensor has no plain memory; call contiguous() first")
    return np.asarray(_Memory(tensor)) if tensor.size else np.zeros(tuple(tensor.shape), np.float32)
