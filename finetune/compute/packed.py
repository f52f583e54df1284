"""Decoding in float32 on CPU: weights in the layout that MKL multiplies with, and NumPy for all that is not a product.

A token reads every weight once, so that its speed is the memory's. `paddle.matmul` falls short of it: with one row MKL
uses one core, and with a few rows it copies the weights into its own layout at every call. MKL keeps that layout when
asked (`cblas_sgemm_pack`); one packed copy then serves one row as well as a prompt of thousands, on all cores, and
Paddle's copy is given back. Figures: docs/log.md.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from pathlib import Path

import numpy as np

from finetune.compute import cpu
from finetune.compute.cache import KVCache
from finetune.compute.memory import array_of
from finetune.model.runtime import paddle as _bring_up

_bring_up()

import paddle

from finetune.model.build import body_of, config_of
from finetune.model.family import ATTENTION, MLP
from finetune.model.frozen import is_frozen

# Queries of a row that are taken together while it is read. Of the keys they do not see, only those among them are
# computed.
_QUERIES = 128
# Values of MKL's enumerations (mkl_cblas.h).
_ROW_MAJOR, _AS_IS, _TURNED, _PACKED, _B_MATRIX = 101, 111, 112, 151, 162
_ALIGNMENT = 64  # bytes


@lru_cache(maxsize=1)
def _found_mkl() -> ctypes.CDLL | None:
    """The MKL that Paddle brings and has loaded; none on processors other than x86-64."""
    try:
        library = ctypes.CDLL(str(Path(paddle.__file__).parent / "libs" / "libmklml_intel.so"))
        library.cblas_sgemm_pack_get_size.restype = ctypes.c_size_t
    except (OSError, AttributeError):
        return None
    return library


def _mkl() -> ctypes.CDLL:
    library = _found_mkl()
    if library is None:
        raise RuntimeError("there is no MKL here: what needs it is not reached without")
    return library


def pack(model) -> None:
    """Replace the projections and the head of a Qwen2ForCausalLM by packed ones, freeing Paddle's as it goes.

    The model can answer afterwards, and neither be trained nor saved. Left as it is: anything but float32 on CPU, LoRA
    layers, and a machine without MKL. A tied head is packed beside the embedding, which stays for looking tokens up:
    vocabulary x hidden size x 4 bytes more.
    """
    body = body_of(model)
    owners = [(layer.self_attn, name) for layer in body.layers for name in ATTENTION]
    owners += [(layer.mlp, name) for layer in body.layers for name in MLP]
    weight = body.embed_tokens.weight
    plain = all(type(getattr(owner, name)) is paddle.nn.Linear for owner, name in owners)
    plain = plain and not is_frozen(model)
    if not (plain and weight.place.is_cpu_place() and weight.dtype == paddle.float32 and _found_mkl()):
        return
    proven: set[tuple[int, int]] = set()
    with paddle.no_grad():
        for owner, name in [*owners, (model, "lm_head")]:
            module = getattr(owner, name)
            packed = PackedLinear(module)
            if (packed.inputs, packed.outputs) not in proven:
                if not packed.agrees_with(module):
                    return
                proven.add((packed.inputs, packed.outputs))
            setattr(owner, name, packed)


class PackedLinear(paddle.nn.Layer):
    """x W + b with W as MKL packs it.

    Args:
        module: `paddle.nn.Linear`, or PaddleNLP's `Qwen2LMHead`; float32 on CPU. Not kept.

    Attributes:
        inputs, outputs: W is [inputs, outputs].
        bias: float32 [outputs], or None.
    """

    def __init__(self, module):
        super().__init__()
        turned = getattr(module, "transpose_y", False)  # a tied head is the embedding, [outputs, inputs]
        weight = array_of(module.weight)
        self.inputs, self.outputs = weight.shape[::-1] if turned else weight.shape
        bias = getattr(module, "bias", None)
        self.bias = None if bias is None else array_of(bias).copy()
        # What is packed does not depend on the number of rows given here, as `agrees_with` makes sure.
        sizes = [ctypes.c_int(size) for size in (8, self.outputs, self.inputs)]
        size = _mkl().cblas_sgemm_pack_get_size(_B_MATRIX, *sizes)
        self._memory = np.empty(size + _ALIGNMENT, np.uint8)
        self._packed = ctypes.c_void_p(self._memory.ctypes.data + -self._memory.ctypes.data % _ALIGNMENT)
        _mkl().cblas_sgemm_pack(
            _ROW_MAJOR, _B_MATRIX, _TURNED if turned else _AS_IS, *sizes, ctypes.c_float(1.0), _pointer(weight),
            ctypes.c_int(weight.shape[1]), self._packed,
        )  # fmt: skip
        self._outputs, self._inputs, self._zero = sizes[1], sizes[2], ctypes.c_float(0.0)

    def forward(self, x, tensor_parallel_output=None) -> paddle.Tensor:
        """x float32 [..., inputs] -> [..., outputs], without a gradient. A head is called with both arguments."""
        out = paddle.empty([*x.shape[:-1], self.outputs], dtype="float32")
        self.multiply(array_of(x.contiguous()).reshape(-1, self.inputs), array_of(out).reshape(-1, self.outputs))
        return out

    def multiply(self, x: np.ndarray, out: np.ndarray) -> np.ndarray:
        """out [T, outputs] = x [T, inputs] W + b; both contiguous."""
        _mkl().cblas_sgemm_compute(
            _ROW_MAJOR, _AS_IS, _PACKED, ctypes.c_int(len(x)), self._outputs, self._inputs, _pointer(x), self._inputs,
            self._packed, self._outputs, self._zero, _pointer(out), self._outputs,
        )  # fmt: skip
        if self.bias is not None:
            out += self.bias
        return out

    def agrees_with(self, module) -> bool:
        """Whether one row and nine give what the module gives.

        MKL's manual does not say that a packed matrix may meet any number of rows. Every code path that could be tried
        allows it (SSE, AVX, AVX2); those of other processors are tried here, where they run.
        """
        x = paddle.to_tensor(np.random.default_rng(0).standard_normal([9, self.inputs], dtype=np.float32))
        expected = module(x).numpy()
        limit = 1e-4 * max(float(np.abs(expected).max()), 1e-30)
        return all(np.abs(self(x[:rows]).numpy() - expected[:rows]).max() <= limit for rows in (1, 9))


class Steps:
    """Passes through a packed model: one token per row, or pieces of prompts.

    Args:
        model: Qwen2ForCausalLM after `pack`.
    """

    def __init__(self, model):
        config, body = config_of(model), body_of(model)
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = config.head_dim
        self._width, self._inner = config.hidden_size, config.intermediate_size
        self._epsilon = body.norm.variance_epsilon
        self._embedding, self._last_norm, self._head = (
            array_of(body.embed_tokens.weight),
            _norm(body.norm),
            model.lm_head,
        )
        self._layers = [
            (
                _norm(layer.input_layernorm),
                *(getattr(layer.self_attn, name) for name in ATTENTION),
                _norm(layer.post_attention_layernorm),
                *(getattr(layer.mlp, name) for name in MLP),
            )
            for layer in body.layers
        ]

    def __call__(self, tokens: np.ndarray, cache, turns: tuple[np.ndarray, np.ndarray]) -> paddle.Tensor:
        """Write the tokens' keys and values behind each row's; the caller counts the rows' lengths up.

        Args:
            tokens: int64 [B].
            cache: `KVCache` with room for one position more.
            turns: cos and sin at each row's position, float32 [B, 1, head_dim], the first half of sin negated.

        Returns:
            Logits float32 [B, V].
        """
        rows = len(tokens)
        attention = _Attention(rows, self._heads, self._kv_heads, self._head_dim, cache)
        hidden = self._embedding[tokens]
        x, out = np.empty_like(hidden), np.empty_like(hidden)
        q = np.empty([rows, self._heads * self._head_dim], np.float32)
        k, v = np.empty([2, rows, self._kv_heads * self._head_dim], np.float32)
        gate, up, share = np.empty([3, rows, self._inner], np.float32)
        with np.errstate(over="ignore"):  # exp of a large negative gate is inf, and the gate 0, as it should be
            for layer, keys, values in zip(self._layers, cache.keys, cache.values):
                input_norm, q_proj, k_proj, v_proj, o_proj, middle_norm, gate_proj, up_proj, down_proj = layer
                self._normalize(hidden, input_norm, x)
                turned = self._rotate(q_proj.multiply(x, q), turns)
                attention.write(keys, self._rotate(k_proj.multiply(x, k), turns))
                attention.write(values, v_proj.multiply(x, v))
                hidden += o_proj.multiply(attention.mix(turned, keys, values), out)
                self._normalize(hidden, middle_norm, x)
                gate_proj.multiply(x, gate)
                up_proj.multiply(x, up)
                np.negative(gate, out=share)
                np.exp(share, out=share)
                share += 1.0
                gate /= share
                gate *= up
                hidden += down_proj.multiply(gate, out)
        return self.logits(hidden)

    def read(
        self, ids: np.ndarray, parts: list[tuple[int, int, int]], cache: KVCache, cos: np.ndarray, sin: np.ndarray
    ) -> list[np.ndarray]:
        """Read pieces of rows behind what the cache holds of them, without padding: they lie end to end.

        Products are MKL's, the rest training's own kernels (finetune/compute/cpu.py).

        Args:
            ids: int64 [B, L].
            parts: (row, start, stop), of ids and of the cache, which has room for them.
            cos, sin: Of all positions, float32 [C, head_dim], the first half of sin negated.

        Returns:
            Hidden states of each part, float32 [stop - start, H].
        """
        positions = np.concatenate([np.arange(start, stop) for _, start, stop in parts])
        hidden = self._embedding[np.concatenate([ids[row, start:stop] for row, start, stop in parts])]
        tokens, half = len(hidden), self._head_dim // 2
        turns = cos[positions, :half], sin[positions, half:]
        x, out = np.empty_like(hidden), np.empty_like(hidden)
        inverse = np.empty(tokens, np.float32)
        q, turned = np.empty([2, tokens, self._heads * self._head_dim], np.float32)
        k, v, turned_k = np.empty([3, tokens, self._kv_heads * self._head_dim], np.float32)
        gate, up, gated = np.empty([3, tokens, self._inner], np.float32)
        by_head = tokens, -1, self._head_dim
        shape = len(cache.lengths), self._kv_heads, cache.capacity, self._head_dim
        for layer, keys, values in zip(self._layers, cache.keys, cache.values):
            input_norm, q_proj, k_proj, v_proj, o_proj, middle_norm, gate_proj, up_proj, down_proj = layer
            cpu.rms_norm(hidden, input_norm, self._epsilon, x, inverse)
            cpu.rotate(q_proj.multiply(x, q).reshape(by_head), *turns, turned.reshape(by_head))
            cpu.rotate(k_proj.multiply(x, k).reshape(by_head), *turns, turned_k.reshape(by_head))
            v_proj.multiply(x, v)
            stored = [array_of(s).reshape(shape) for s in (keys, values)]
            at = 0
            for row, start, stop in parts:
                own = slice(at, at + stop - start)
                for held, new in zip(stored, (turned_k, v)):
                    held[row, :, start:stop] = new.reshape(by_head)[own].transpose(1, 0, 2)
                self._attend(
                    turned.reshape(by_head)[own], stored[0][row], stored[1][row], start, q.reshape(by_head)[own]
                )
                at = own.stop
            hidden += o_proj.multiply(q, out)
            cpu.rms_norm(hidden, middle_norm, self._epsilon, x, inverse)
            cpu.swiglu(gate_proj.multiply(x, gate), up_proj.multiply(x, up), gated)
            hidden += down_proj.multiply(gated, out)
        return np.split(hidden, np.cumsum([stop - start for _, start, stop in parts])[:-1])

    def _attend(self, q: np.ndarray, keys: np.ndarray, values: np.ndarray, first: int, out: np.ndarray) -> None:
        """Causal attention of one row's new positions, the first of which is `first`.

        Args:
            q, out: [T, heads, head_dim].
            keys, values: [kv_heads, capacity, head_dim], the new positions' among them.
        """
        groups, scale = self._heads // self._kv_heads, 1.0 / math.sqrt(self._head_dim)
        steps = np.arange(self._kv_heads, dtype=np.uint64)
        kv_steps = steps * np.uint64(keys.shape[1] * self._head_dim * 4)
        for start in range(0, len(q), _QUERIES):
            block = np.ascontiguousarray(q[start : start + _QUERIES].transpose(1, 0, 2))  # [heads, l, head_dim]
            length = block.shape[1]
            seen = first + start + length
            scores, mixed = np.empty([self._heads, length, seen], np.float32), np.empty_like(block)
            q_places, s_places, m_places = (
                steps * np.uint64(groups * length * array.shape[2] * 4) + np.uint64(array.ctypes.data)
                for array in (block, scores, mixed)
            )
            products = len(steps), groups * length
            _batch(*products, seen, self._head_dim, True, scale)(q_places, kv_steps + _place(keys), s_places)
            cpu.causal_softmax(scores)
            _batch(*products, self._head_dim, seen, False, 1.0)(s_places, kv_steps + _place(values), m_places)
            out[start : start + length] = mixed.transpose(1, 0, 2)

    def logits(self, hidden: np.ndarray) -> paddle.Tensor:
        """Logits, float32 [N, V], of hidden states [N, H] behind the last layer."""
        logits = paddle.empty([len(hidden), self._head.outputs], dtype="float32")
        self._head.multiply(self._normalize(hidden, self._last_norm, np.empty_like(hidden)), array_of(logits))
        return logits

    def _normalize(self, hidden: np.ndarray, weight: np.ndarray, out: np.ndarray) -> np.ndarray:
        squares = np.einsum("bh,bh->b", hidden, hidden)
        np.multiply(hidden, (1.0 / np.sqrt(squares / self._width + self._epsilon))[:, None], out=out)
        out *= weight
        return out

    def _rotate(self, x: np.ndarray, turns: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """x [B, heads * head_dim] turned, as [B, heads, head_dim]."""
        x, half = x.reshape(len(x), -1, self._head_dim), self._head_dim // 2
        cos, sin = turns
        turned = x * cos
        turned[:, :, :half] += x[:, :, half:] * sin[:, :, :half]
        turned[:, :, half:] += x[:, :, :half] * sin[:, :, half:]
        return turned


class _Attention:
    """Attention of one new position per row, the same for all layers but for keys and values."""

    def __init__(self, rows: int, heads: int, kv_heads: int, head_dim: int, cache):
        groups, capacity = heads // kv_heads, cache.capacity
        longest = int(cache.lengths.max()) + 1
        self._rows, self._places = np.arange(rows), cache.lengths
        self._stored = (rows, kv_heads, capacity, head_dim)
        self._scores = np.empty([rows, kv_heads * groups, longest], np.float32)
        self._mixed = np.empty([rows, heads * head_dim], np.float32)
        hidden = np.arange(longest) > cache.lengths[:, None]
        self._hidden = hidden[:, None] if hidden.any() else None
        # One small product per row and key head, all of them in one call.
        products = np.arange(rows * kv_heads, dtype=np.uint64)
        self._q_steps = products * np.uint64(groups * head_dim * 4)
        self._kv_steps = products * np.uint64(capacity * head_dim * 4)
        self._score_places = products * np.uint64(groups * longest * 4) + np.uint64(self._scores.ctypes.data)
        self._mixed_places = self._q_steps + np.uint64(self._mixed.ctypes.data)
        self._to_scores = _batch(len(products), groups, longest, head_dim, True, 1.0 / math.sqrt(head_dim))
        self._to_mixed = _batch(len(products), groups, head_dim, longest, False, 1.0)

    def write(self, stored: paddle.Tensor, new: np.ndarray) -> None:
        """Put keys or values of the new positions, [B, kv_heads, head_dim] in any shape, into the cache."""
        _, kv_heads, _, head_dim = self._stored
        array_of(stored).reshape(self._stored)[self._rows, :, self._places] = new.reshape(-1, kv_heads, head_dim)

    def mix(self, q: np.ndarray, keys: paddle.Tensor, values: paddle.Tensor) -> np.ndarray:
        """q [B, heads, head_dim] -> [B, heads * head_dim], overwritten by the next call."""
        scores = self._scores
        self._to_scores(
            self._q_steps + np.uint64(q.ctypes.data), self._kv_steps + np.uint64(keys.data_ptr()), self._score_places
        )
        if self._hidden is not None:
            np.copyto(scores, -np.inf, where=self._hidden)
        scores -= scores.max(axis=2, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=2, keepdims=True)
        self._to_mixed(self._score_places, self._kv_steps + np.uint64(values.data_ptr()), self._mixed_places)
        return self._mixed


def _batch(count: int, m: int, n: int, k: int, turned: bool, scale: float):
    """A call that takes addresses of `count` A, B and C: C [m, n] = scale * A [m, k] B, B [k, n] or, turned, [n, k]."""

    def one(kind, value):
        return (kind * 1)(value)

    integer = ctypes.c_int
    before = (
        _ROW_MAJOR, one(integer, _AS_IS), one(integer, _TURNED if turned else _AS_IS), one(integer, m),
        one(integer, n), one(integer, k), one(ctypes.c_float, scale),
    )  # fmt: skip
    a_step, b_step, c_step = one(integer, k), one(integer, k if turned else n), one(integer, n)
    zero, size = one(ctypes.c_float, 0.0), one(integer, count)

    def call(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
        _mkl().cblas_sgemm_batch(
            *before, _pointer(a), a_step, _pointer(b), b_step, zero, _pointer(c), c_step, integer(1), size
        )

    return call


def _norm(module) -> np.ndarray:
    return array_of(module.weight)


def _place(array: np.ndarray) -> np.uint64:
    return np.uint64(array.ctypes.data)


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
