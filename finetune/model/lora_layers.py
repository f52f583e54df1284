"""Layers with an adapter that PaddleNLP does not have: DoRA, embeddings and head.

All have what its LoRALinear has: `weight` [in, out], frozen; `lora_A` [in, r], `lora_B` [r, out], `scaling`; with DoRA
`lora_magnitude` [out] too. An embedding is the product with a one of `in` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.model.runtime import paddle as _bring_up

_bring_up()

import paddle
import paddle.nn.functional as F
from paddlenlp.peft.lora.lora_layers import LoRALinear


def effective_weight(layer: paddle.nn.Layer) -> paddle.Tensor:
    """What the layer multiplies with, [in, out]: W + scaling * A B; with DoRA each column has the length of its
    magnitude. The gradient reaches A, B and magnitude."""
    weight = layer.weight + paddle.matmul(layer.lora_A, layer.lora_B) * layer.scaling
    return weight if layer.lora_magnitude is None else weight * column_scale(layer)


def column_scale(layer: paddle.nn.Layer) -> paddle.Tensor:
    """magnitude / ||W + scaling * A B|| of each column, [out]. The length is a constant to the gradient, as in PEFT
    (Liu et al. 2024, arXiv:2402.09353, section 4.3)."""
    with paddle.no_grad():
        weight = layer.weight + paddle.matmul(layer.lora_A, layer.lora_B) * layer.scaling
        length = weight.astype("float32").square().sum(axis=0).sqrt()
    return layer.lora_magnitude / length.astype(layer.lora_magnitude.dtype)


@dataclass(frozen=True)
class Update:
    """What is added to a weight.

    Attributes:
        rank, scaling: As in LoRA.
        dora: Whether there are magnitudes.
        ratio: How many times faster B learns than A.
    """

    rank: int
    scaling: float
    dora: bool
    ratio: float


def _add_parts(layer: paddle.nn.Layer, update: Update) -> None:
    """Give a layer with a weight [in, out] what an adapter has, unset but for B = 0; see `LoRALinear`."""
    inputs, outputs = layer.weight.shape
    dtype, zero = layer.weight.dtype, paddle.nn.initializer.Constant(0.0)
    layer.r, layer.scaling, layer.merged, layer.disable_lora = update.rank, update.scaling, False, False
    layer.lora_A = layer.create_parameter([inputs, update.rank], dtype=dtype)
    attributes = paddle.ParamAttr(initializer=zero, learning_rate=update.ratio)
    layer.lora_B = layer.create_parameter([update.rank, outputs], attr=attributes, dtype=dtype)
    layer.lora_magnitude = layer.create_parameter([outputs], dtype=dtype) if update.dora else None


class DoraLinear(LoRALinear):
    """x W + b with each output's weights at a length of its own."""

    def __init__(self, *sizes: int, **options: object):
        super().__init__(*sizes, **options)
        self.lora_magnitude = self.create_parameter([self.weight.shape[1]], dtype=self._dtype)

    def forward(self, input: paddle.Tensor) -> paddle.Tensor:
        """[..., in] -> [..., out]. Dropout is on the input of what is added to x W, as in PEFT."""
        plain = F.linear(input, self.weight, self.bias)
        if self.disable_lora:
            return plain
        dropped, scale = self.lora_dropout(input), column_scale(self)
        low = paddle.matmul(paddle.matmul(dropped, self.lora_A), self.lora_B) * self.scaling
        return plain + (scale - 1.0) * paddle.matmul(dropped, self.weight) + scale * low


class LoraEmbedding(paddle.nn.Layer):
    """An embedding with an adapter.

    Args:
        plain: The embedding; its weight is shared.
    """

    def __init__(self, plain: paddle.nn.Layer, update: Update):
        super().__init__()
        self.weight = plain.weight
        _add_parts(self, update)

    def forward(self, ids: paddle.Tensor) -> paddle.Tensor:
        """int64 [...] -> [..., hidden]."""
        found = F.embedding(ids, self.weight)
        if self.disable_lora:
            return found
        found = found + paddle.matmul(F.embedding(ids, self.lora_A), self.lora_B) * self.scaling
        return found if self.lora_magnitude is None else found * column_scale(self)


class LoraHead(paddle.nn.Layer):
    """A head with an adapter, in place of PaddleNLP's Qwen2LMHead.

    Args:
        plain: The head, not tied; its weight is shared.
    """

    transpose_y = False

    def __init__(self, plain: paddle.nn.Layer, update: Update):
        super().__init__()
        self.weight = plain.weight
        _add_parts(self, update)

    def product(self) -> paddle.Tensor:
        """What hidden states are multiplied with, [hidden, vocab]."""
        return self.weight if self.disable_lora else effective_weight(self)

    def forward(self, hidden: paddle.Tensor, tensor_parallel_output: object = None) -> paddle.Tensor:
        """[..., hidden] -> [..., vocab]."""
        return paddle.matmul(hidden, self.product())


ADAPTED = (LoRALinear, LoraEmbedding, LoraHead)
