"""Products with weights that are kept quantized: made whole for one product, and dropped.

A frozen weight is a parameter without memory that carries its codes (`model.build.fill`). The matrix [out, in] that
they stand for is made when a layer needs it, for its forward pass and again for its backward pass, so that one is alive
at a time. On CPU NumPy looks up the levels on all cores; elsewhere Paddle does, and gives the same numbers.
"""

from __future__ import annotations

import numpy as np

from finetune.compute import cpu
from finetune.model.frozen import Frozen, frozen_of
from finetune.model.quantize import BLOCK, NESTED_BLOCK, Scales, dynamic_levels, nf4_pairs
from finetune.model.runtime import paddle as _bring_up

_bring_up()
import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer


def linear(weight: paddle.Tensor, x: paddle.Tensor, bias: paddle.Tensor | None = None) -> paddle.Tensor:
    """x W + b, without a gradient of its own: [T, in] -> [T, out].

    Args:
        weight: W [in, out], or the parameter that carries its codes.
    """
    frozen = frozen_of(weight)
    if frozen is None:
        return F.linear(x, weight, bias)
    out = paddle.matmul(x, dequantized(frozen, x), transpose_y=True)
    return out if bias is None else out.add_(bias)


def linear_backward(weight: paddle.Tensor, grad: paddle.Tensor) -> paddle.Tensor:
    """The gradient of x: [T, out] -> [T, in]."""
    frozen = frozen_of(weight)
    if frozen is None:
        return paddle.matmul(grad, weight, transpose_y=True)
    return paddle.matmul(grad, dequantized(frozen, grad))


def frozen_linear(layer: paddle.nn.Linear, x: paddle.Tensor) -> paddle.Tensor:
    """`layer.forward` of a layer whose weight is kept quantized: [..., in] -> [..., out]."""
    return _FrozenLinear.apply(x, layer)


def frozen_dora(layer: paddle.nn.Layer, x: paddle.Tensor) -> paddle.Tensor:
    """`DoraLinear.forward` of such a layer: [..., in] -> [..., out]."""
    if layer.disable_lora:
        return frozen_linear(layer, x)
    plain = _FrozenLinear.apply(x, layer, False)
    dropped = layer.lora_dropout(x) if layer.training else x
    product = plain if dropped is x else _FrozenLinear.apply(dropped, layer, False)
    scale = layer.lora_magnitude / _column_lengths(layer, x)
    low = paddle.matmul(paddle.matmul(dropped, layer.lora_A), layer.lora_B) * layer.scaling
    out = plain + (scale - 1.0) * product + scale * low
    return out if layer.bias is None else out + layer.bias


@paddle.no_grad()
def _column_lengths(layer: paddle.nn.Layer, like: paddle.Tensor) -> paddle.Tensor:
    """||W + scaling * A B|| of each column, [out], a constant to the gradient; see `lora_layers.column_scale`."""
    rows = dequantized(layer.weight.frozen, like).addmm_(layer.lora_B.t(), layer.lora_A.t(), alpha=layer.scaling)
    return rows.astype("float32").square().sum(axis=1).sqrt().astype(like.dtype)


class _FrozenLinear(PyLayer):
    @staticmethod
    def forward(ctx, x, layer, with_bias=True):
        ctx.layer = layer
        bias = layer.bias if with_bias else None
        return linear(layer.weight, x.reshape([-1, x.shape[-1]]), bias).reshape([*x.shape[:-1], -1])

    @staticmethod
    def backward(ctx, grad):
        rows = grad.reshape([-1, grad.shape[-1]])
        return linear_backward(ctx.layer.weight, rows).reshape([*grad.shape[:-1], -1])


def dequantized(frozen: Frozen, like: paddle.Tensor) -> paddle.Tensor:
    """The matrix [out, in], of the dtype and on the device of another tensor."""
    if not cpu.fits(like):
        return composed(frozen).astype(like.dtype)
    out = paddle.empty(list(frozen.shape), dtype="float32")
    if frozen.is_nf4:
        _nf4_blocks(frozen, cpu.array_of(out).reshape(-1))
    else:
        _int8_rows(frozen, cpu.array_of(out))
    return out


def composed(frozen: Frozen) -> paddle.Tensor:
    """The same by Paddle's operations, on any device: float32 [out, in]."""
    if not frozen.is_nf4:
        return frozen.codes.astype("float32") * (frozen.scales * (1 / 127)).unsqueeze(1)
    size = int(np.prod(frozen.shape))
    levels = _looked_up(nf4_pairs(), frozen.codes).reshape([-1])[:size]
    scales = frozen.scales
    if frozen.nested is not None:
        spread = paddle.repeat_interleave(frozen.nested, NESTED_BLOCK)[: scales.shape[0]]
        scales = _looked_up(dynamic_levels()[:, None], scales).reshape([-1]) * spread + frozen.offset
    return (levels * paddle.repeat_interleave(scales, BLOCK)[:size]).reshape(list(frozen.shape))


def _looked_up(table: np.ndarray, codes: paddle.Tensor) -> paddle.Tensor:
    """Rows of a table [256, n] for codes uint8 [m]: float32 [m, n]."""
    return F.embedding(codes.astype("int32"), paddle.to_tensor(table))


def _int8_rows(frozen: Frozen, out: np.ndarray) -> None:
    codes, scales = cpu.array_of(frozen.codes), cpu.array_of(frozen.scales) * np.float32(1 / 127)

    def work(rows: slice) -> None:
        np.multiply(codes[rows], scales[rows, None], out=out[rows])

    cpu.by_rows(len(out), out.shape[1] * 4, work)


def _nf4_blocks(frozen: Frozen, out: np.ndarray) -> None:
    """Two levels a byte, times the scale of their block; what is left behind the last whole block by itself."""
    codes, pairs = cpu.array_of(frozen.codes), nf4_pairs()
    nested = None if frozen.nested is None else cpu.array_of(frozen.nested)
    scales = Scales(cpu.array_of(frozen.scales), nested, np.float32(frozen.offset)).read()
    whole = out.size // BLOCK
    packed, blocks = codes[: whole * BLOCK // 2].reshape(whole, -1), out[: whole * BLOCK].reshape(whole, -1)

    def work(rows: slice) -> None:
        # clip: every code has its place in the table, and unlike `raise` it needs no copy
        np.take(pairs, packed[rows], axis=0, out=blocks[rows].reshape(-1, BLOCK // 2, 2), mode="clip")
        blocks[rows] *= scales[rows, None]

    cpu.by_rows(whole, BLOCK * 4, work)
    rest = out[whole * BLOCK :]
    if rest.size:
        rest[:] = pairs[codes[whole * BLOCK // 2 :]].reshape(-1)[: rest.size] * scales[whole]
