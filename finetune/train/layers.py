"""PaddleNLP's Qwen2 set up for training by spans, with cheaper layers on CPU. The mathematics is unchanged.

Only the `forward` of single layers is replaced, on the instance; parameters, names and structure stay PaddleNLP's.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from finetune.model.runtime import paddle as _bring_up
from finetune.train import cpu
from finetune.train.attention import attention_forward

_bring_up()
import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer
from paddlenlp.peft.lora.lora_layers import LoRALinear


def prepare_layers(lm) -> None:
    """Replace what training computes in another way. Does nothing the second time.

    Args:
        lm: Qwen2ForCausalLM, its adapter (if any) already in place.
    """
    if isinstance(lm.qwen2.norm.forward, partial):
        return
    for layer in lm.qwen2.layers:
        layer.self_attn.forward = partial(attention_forward, layer.self_attn)
        layer.mlp.act_fn = swiglu
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = partial(rms_norm, norm)
    for module in lm.sublayers():
        if isinstance(module, LoRALinear):
            module.forward = partial(lora_linear, module)
    lm.qwen2.norm.forward = partial(rms_norm, lm.qwen2.norm)


def rms_norm(norm, x):
    """x / rms(x) * weight, as PaddleNLP's Qwen2RMSNorm: [1, T, hidden]."""
    if cpu.fits(x, norm.weight):
        return _RmsNorm.apply(x, norm.weight, norm.variance_epsilon)
    return type(norm).forward(norm, x)


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
        out = paddle.empty(gate.shape, dtype="float32")
        cpu.swiglu(_rows(gate), _rows(up), _rows(out))
        ctx.save_for_backward(gate, up)
        ctx.wants = wants(gate, up)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensor()
        grad_gate, grad_up = paddle.empty(gate.shape, dtype="float32"), paddle.empty(up.shape, dtype="float32")
        cpu.swiglu_backward(_rows(gate), _rows(up), _rows(grad.contiguous()), _rows(grad_gate), _rows(grad_up))
        return given(ctx.wants, grad_gate, grad_up)


def lora_linear(layer, x):
    """x W + b + scaling * dropout(x) A B, as PaddleNLP's LoRALinear: [1, T, in] -> [1, T, out]."""
    if layer.disable_lora or layer.merged or isinstance(layer.lora_dropout, paddle.nn.Dropout):
        return type(layer).forward(layer, x)
    return _LoraLinear.apply(x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling)


class _LoraLinear(PyLayer):
    """In one node, so that the low-rank product is added inside the matrix product and not in passes of its own."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scaling):
        shape, ctx.x_wants = x.shape[:-1], not x.stop_gradient
        x = x.reshape([-1, x.shape[-1]])
        low = paddle.matmul(x, A).scale_(scaling)
        out = F.linear(x, weight, bias).addmm_(low, B)
        ctx.save_for_backward(x, weight, A, B, low)
        ctx.scaling, ctx.biased = scaling, bias is not None
        return out.reshape([*shape, -1])

    @staticmethod
    def backward(ctx, grad):
        x, weight, A, B, low = ctx.saved_tensor()
        shape = grad.shape[:-1]
        grad = grad.reshape([-1, grad.shape[-1]])
        d_low = paddle.matmul(grad, B, transpose_y=True).scale_(ctx.scaling)
        d_A = paddle.matmul(x, d_low, transpose_x=True)
        d_B = paddle.matmul(low, grad, transpose_x=True)
        d_x = None
        if ctx.x_wants:  # not below the first adapter
            d_x = paddle.matmul(grad, weight, transpose_y=True).addmm_(d_low, A.t()).reshape([*shape, -1])
        return (d_x, None, *[None] * ctx.biased, d_A, d_B)  # the weight and its bias are frozen


def wants(*inputs) -> list[bool]:
    """Which inputs of a PyLayer take a gradient. Asked in the forward pass: tensors that were saved say otherwise."""
    return [not x.stop_gradient for x in inputs]


def given(wants: list[bool], *gradients) -> tuple:
    """Gradients as Paddle wants them from a PyLayer: None where the input takes none."""
    return tuple(gradient if wanted else None for wanted, gradient in zip(wants, gradients))


def _rows(tensor) -> np.ndarray:
    return cpu.array_of(tensor).reshape(-1, tensor.shape[-1])
