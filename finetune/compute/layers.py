"""PaddleNLP's Qwen2 set up for training by spans, with cheaper layers on CPU. The mathematics is unchanged.

Only the `forward` of single layers is replaced, on the instance; parameters, names and structure stay PaddleNLP's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from finetune.compute import cpu, frozen, gpu
from finetune.compute.attention import attention_forward
from finetune.model.build import body_of
from finetune.model.frozen import frozen_of
from finetune.model.lora_layers import DoraLinear
from finetune.model.runtime import paddle as _bring_up

_bring_up()
import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer
from paddlenlp.peft.lora.lora_layers import LoRALinear

_EPSILON = 1e-6  # in the trial of a norm kernel


def prepare_layers(lm) -> None:
    """Replace what training computes in another way. Does nothing the second time.

    Args:
        lm: Qwen2ForCausalLM, its adapter (if any) already in place.
    """
    body = body_of(lm)
    if isinstance(body.norm.forward, partial):
        return
    for layer in body.layers:
        layer.self_attn.forward = partial(attention_forward, layer.self_attn)
        layer.mlp.forward = partial(mlp_forward, layer.mlp)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = partial(rms_norm, norm)
    prepare_linears(lm)
    body.norm.forward = partial(rms_norm, body.norm)


def prepare_linears(lm) -> None:
    """Replace the products with weights, adapted or quantized; PaddleNLP's forward of the whole stays as it is."""
    for module in lm.sublayers():
        if type(module) is LoRALinear:
            module.forward = partial(lora_linear, module)
        elif isinstance(module, paddle.nn.Linear) and frozen_of(module.weight) is not None:
            module.forward = frozen_product(module)


def frozen_product(module: paddle.nn.Linear) -> Callable[[paddle.Tensor], paddle.Tensor]:
    """What a linear layer, adapted or not, makes of [..., in] with its weight kept quantized."""
    if isinstance(module, DoraLinear):
        return partial(frozen.frozen_dora, module)
    return partial(lora_linear if isinstance(module, LoRALinear) else frozen.frozen_linear, module)


def rms_norm(norm, x):
    """x / rms(x) * weight, as PaddleNLP's Qwen2RMSNorm: [1, T, hidden]."""
    if cpu.fits(x, norm.weight):
        return _RmsNorm.apply(x, norm.weight, norm.variance_epsilon)
    shapes = (8, x.shape[-1]), tuple(norm.weight.shape)
    if x.dtype == norm.weight.dtype and gpu.chosen("rms_norm", x.dtype, shapes, _try_rms_norm_fused, _try_rms_norm):
        return _rms_norm_fused(x, norm.weight, norm.variance_epsilon)
    return type(norm).forward(norm, x)


def _rms_norm_fused(x, weight, epsilon):
    return F.rms_norm(x, [x.shape[-1]], weight, epsilon)[0]


def _try_rms_norm_fused(x, weight):
    return [_rms_norm_fused(x, weight, _EPSILON)]


def _try_rms_norm(x, weight):
    wide = x.astype("float32")
    return [(wide * paddle.rsqrt(wide.square().mean(-1, keepdim=True) + _EPSILON)).astype(x.dtype) * weight]


class _RmsNorm(PyLayer):
    @staticmethod
    def forward(ctx, x, weight, epsilon):
        x = x.contiguous()
        out = paddle.empty(x.shape, dtype="float32")
        inverse = np.empty(x.size // x.shape[-1], np.float32)
        cpu.rms_norm(_rows(x), cpu.array_of(weight), epsilon, _rows(out), inverse)
        ctx.save_for_backward(x, weight)
        ctx.inverse, ctx.wants = inverse, wants(x, weight)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensor()
        grad = grad.contiguous()
        out = paddle.empty(x.shape, dtype="float32")
        cpu.rms_norm_backward(_rows(x), cpu.array_of(weight), ctx.inverse, _rows(grad), _rows(out))
        grad_weight = None
        if ctx.wants[1]:
            grad_weight = paddle.to_tensor(np.einsum("th,th,t->h", _rows(grad), _rows(x), ctx.inverse))
        return given(ctx.wants, out, grad_weight)


def swiglu(gate, up):
    """silu(gate) * up: [1, T, intermediate]."""
    if cpu.fits(gate, up):
        return _Swiglu.apply(gate, up)
    return F.swiglu(gate, up)


class _Swiglu(PyLayer):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        ctx.wants = wants(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensor()
        return given(ctx.wants, *_gated_backward(gate, up, grad.contiguous()))


def _gated(gate, up):
    out = paddle.empty(gate.shape, dtype="float32")
    cpu.swiglu(_rows(gate), _rows(up), _rows(out))
    return out


def _gated_backward(gate, up, grad):
    d_gate, d_up = paddle.empty(gate.shape, dtype="float32"), paddle.empty(up.shape, dtype="float32")
    cpu.swiglu_backward(_rows(gate), _rows(up), _rows(grad), _rows(d_gate), _rows(d_up))
    return d_gate, d_up


def mlp_forward(mlp, x):
    """down(silu(gate(x)) * up(x)), as PaddleNLP's Qwen2MLP: [1, T, hidden]."""
    gate, up, down = mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj
    if isinstance(down, LoRALinear) and _is_plain(down) and cpu.fits(gate, up):
        return _GatedLoraLinear.apply(gate, up, down, down.lora_A, down.lora_B)
    return down(swiglu(gate, up))


def lora_linear(layer, x):
    """x W + b + scaling * dropout(x) A B, as PaddleNLP's LoRALinear: [1, T, in] -> [1, T, out]."""
    if _is_plain(layer):
        return _LoraLinear.apply(x, layer, layer.lora_A, layer.lora_B)
    if frozen_of(layer.weight) is None:
        return type(layer).forward(layer, x)
    out = frozen.frozen_linear(layer, x)
    if layer.disable_lora:
        return out
    return out + paddle.matmul(paddle.matmul(layer.lora_dropout(x), layer.lora_A), layer.lora_B) * layer.scaling


def _is_plain(layer) -> bool:
    """Whether an adapter of the common kind is at work: without dropout, and nothing else of the layer is trained."""
    idle = layer.disable_lora or layer.merged or isinstance(layer.lora_dropout, paddle.nn.Dropout)
    bias_rests = layer.bias is None or layer.bias.stop_gradient
    return type(layer) is LoRALinear and bias_rests and not idle


class _LoraLinear(PyLayer):
    """In one node, so that the low-rank product is added inside the matrix product and not in passes of its own.

    The layer comes as it is: its weight and bias take no gradient, and the weight may be no tensor but codes.
    """

    @staticmethod
    def forward(ctx, x, layer, A, B):
        ctx.x_wants, ctx.layer = not x.stop_gradient, layer
        out, low = _adapted(x, layer, A, B)
        ctx.save_for_backward(x, A, B, low)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, A, B, low = ctx.saved_tensor()
        return _adapted_backward(grad, x, A, B, low, ctx.layer, ctx.x_wants)


class _GatedLoraLinear(PyLayer):
    """The same of silu(gate) * up, which is the widest tensor of a layer: made again in the backward pass, not kept."""

    @staticmethod
    def forward(ctx, gate, up, layer, A, B):
        ctx.wants, ctx.layer = wants(gate, up), layer
        out, low = _adapted(_gated(gate, up), layer, A, B)
        ctx.save_for_backward(gate, up, A, B, low)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up, A, B, low = ctx.saved_tensor()
        d_x, d_A, d_B = _adapted_backward(grad, _gated(gate, up), A, B, low, ctx.layer, any(ctx.wants))
        d_gate, d_up = None, None
        if d_x is not None:
            d_gate, d_up = given(ctx.wants, *_gated_backward(gate, up, d_x))
        return d_gate, d_up, d_A, d_B


def _adapted(x, layer, A, B):
    """(x W + b + scaling * x A B, scaling * x A): [..., in] -> [..., out] and [T, rank]."""
    rows = x.reshape([-1, x.shape[-1]])
    low = paddle.matmul(rows, A).scale_(layer.scaling)
    out = frozen.linear(layer.weight, rows, layer.bias).addmm_(low, B)
    return out.reshape([*x.shape[:-1], -1]), low


def _adapted_backward(grad, x, A, B, low, layer, x_wants):
    """Gradients of x (None unless wanted), A and B."""
    rows, x = grad.reshape([-1, grad.shape[-1]]), x.reshape([-1, x.shape[-1]])
    d_low = paddle.matmul(rows, B, transpose_y=True).scale_(layer.scaling)
    d_A = paddle.matmul(x, d_low, transpose_x=True)
    d_B = paddle.matmul(low, rows, transpose_x=True)
    if not x_wants:  # below the first adapter
        return None, d_A, d_B
    d_x = frozen.linear_backward(layer.weight, rows).addmm_(d_low, A.t())
    return d_x.reshape([*grad.shape[:-1], -1]), d_A, d_B


def wants(*inputs) -> list[bool]:
    """Which inputs of a PyLayer take a gradient. Asked in the forward pass: tensors that were saved say otherwise."""
    return [not x.stop_gradient for x in inputs]


def given(wants: list[bool], *gradients) -> tuple:
    """Gradients as Paddle wants them from a PyLayer: None where the input takes none."""
    return tuple(gradient if wanted else None for wanted, gradient in zip(wants, gradients))


def _rows(tensor) -> np.ndarray:
    return cpu.array_of(tensor).reshape(-1, tensor.shape[-1])
