"""Arrays between NumPy and Paddle. bfloat16, which NumPy has not, is ml_dtypes' there and bits in uint16 on the way."""

from __future__ import annotations

import numpy as np

from finetune.model.runtime import paddle as _bring_up
from finetune.model.tensorfile import Array
from finetune.model.weights import numpy_dtype

_bring_up()

import paddle


def name_of(dtype: paddle.dtype) -> str:
    """`paddle.float32` -> `float32`."""
    return str(dtype).removeprefix("paddle.")


def set_parameter(parameter: paddle.Tensor, array: Array) -> None:
    """Give a parameter a value of any floating dtype; float32 to bfloat16 rounds to the nearest even."""
    parameter.set_value(as_paddle(array.astype(numpy_dtype(name_of(parameter.dtype)), copy=False)))


def as_paddle(array: Array) -> Array:
    """The array as paddle takes it: bfloat16 as its bits in uint16."""
    return array.view(np.uint16) if array.dtype == numpy_dtype("bfloat16") else array


def as_numpy(tensor: paddle.Tensor) -> Array:
    """The tensor as a numpy array, bfloat16 as ml_dtypes' and not as uint16."""
    array: Array = tensor.numpy()
    return array.view(numpy_dtype("bfloat16")) if tensor.dtype == paddle.bfloat16 else array


def copy_of(parameter: paddle.Tensor) -> paddle.Tensor:
    """A constant copy that can take the parameter's place in its layer."""
    copy = parameter.detach().clone()
    copy.is_distributed = getattr(parameter, "is_distributed", False)  # PaddleNLP's head asks for it
    return copy
