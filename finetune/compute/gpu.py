"""Which of Paddle's fused GPU kernels a run uses. Chosen automatically; there is no switch.

No GPU was at hand when this was written, so no kernel is trusted: on first use each is compared, values and gradients,
with the composed form that it replaces, and is left out, with a warning, where it fails or differs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from finetune.console import warn
from finetune.model.runtime import device
from finetune.model.runtime import paddle as _bring_up

_bring_up()
import paddle

# Largest difference from the composed form, as a share of its largest value.
_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2}
# FlashMask runs on FlashAttention-2 or -3, whose kernels need Ampere or later (compute capability 8.0), half precision
# and heads of at most 256 in steps of 8; the backward pass of heads above 192 needs the shared memory of an A100 or a
# H100 (github.com/PaddlePaddle/flash-attention, csrc/capi/flash_attn.cu).
_FLASH_CAPABILITY = (8, 0)
_FLASH_HEAD_DIM = 192


def applies(kernel: str, *, device: str, capability: tuple[int, int], dtype: str, head_dim: int) -> bool:
    """Whether a kernel is made for this.

    Args:
        kernel: flashmask, rotary or rms_norm.
        device: Paddle's name, `cpu`, `gpu:0`, ...
        capability: Compute capability of the GPU, (major, minor).
        dtype: Of the activations: float32, float16 or bfloat16.
        head_dim: Size of an attention head; counts for flashmask and rotary.
    """
    if not device.startswith("gpu") or dtype not in _TOLERANCE:
        return False
    if kernel == "flashmask":
        fits = head_dim % 8 == 0 and head_dim <= _FLASH_HEAD_DIM
        return fits and dtype != "float32" and capability >= _FLASH_CAPABILITY
    if kernel == "rotary":
        return head_dim % 2 == 0
    return kernel == "rms_norm"


@cache
def chosen(
    kernel: str, dtype: paddle.dtype, shapes: tuple[tuple[int, ...], ...], fused: Callable, composed: Callable
) -> bool:
    """Whether to call a fused kernel: it applies here, and gives what the composed form gives.

    Args:
        kernel: As in `applies`.
        dtype: Of the inputs.
        shapes: Of the random inputs that are tried; the last axis of the first is the head's size.
        fused, composed: Take these inputs and return a sequence of tensors.
    """
    place = device()
    if not place.startswith("gpu"):
        return False
    dtype = str(dtype).removeprefix("paddle.")
    capability = paddle.device.cuda.get_device_capability()
    if not applies(kernel, device=place, capability=capability, dtype=dtype, head_dim=shapes[0][-1]):
        return False
    fault = disagreement(fused, composed, shapes, dtype)
    if fault:
        warn(f"Paddle's fused kernel for {kernel} is left out on {place}: {fault}")
    return not fault


def disagreement(fused: Callable, composed: Callable, shapes: tuple[tuple[int, ...], ...], dtype: str) -> str:
    """What is wrong with a kernel, "" if nothing: outputs and gradients of both forms on the same random inputs."""
    # Not Paddle's generator: a run's random state must not depend on which kernels were tried.
    draw = np.random.default_rng(0).standard_normal
    arrays = [draw(shape).astype(np.float32) for shape in shapes]
    try:
        results = [_outputs_and_gradients(form, arrays, dtype) for form in (composed, fused)]
    except Exception as error:  # whatever a kernel that is missing or does not fit may raise
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"
    for want, got in zip(*results):
        if want.shape != got.shape:
            return f"shape {got.shape} for {want.shape}"
        share = np.abs(want - got).max() / np.abs(want).max()
        if not share <= _TOLERANCE[dtype]:
            return f"off by {share:.1e} of the largest value"
    return ""


def _outputs_and_gradients(form: Callable, arrays: list[np.ndarray], dtype: str) -> list[np.ndarray]:
    with paddle.enable_grad():
        inputs = [paddle.to_tensor(array).astype(dtype).detach() for array in arrays]
        for tensor in inputs:
            tensor.stop_gradient = False
        outputs = form(*inputs)
        # Squares, so that the gradient that comes in differs from place to place.
        sum(output.astype("float32").square().sum() for output in outputs).backward()
    return [tensor.astype("float32").numpy() for tensor in (*outputs, *(tensor.grad for tensor in inputs))]
