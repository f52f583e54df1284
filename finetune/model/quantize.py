"""Weights in 4 and 8 bits: codes and scales as bitsandbytes writes them, and back. NumPy only; no paddle here.

nf4   Blocks of 64 consecutive numbers of the flattened [out, in] matrix share one scale, their largest magnitude; a
      number is the nearest of 16 levels times that, two codes a byte, the first in the high half (Dettmers et al. 2023,
      arXiv:2305.14314, section 3). Doubly quantized, the scales are 8-bit codes in blocks of 256 around their mean.
int8  One scale a row (output), its largest magnitude / 127; a number is an integer from -127 to 127 times that. The
      weights of LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339, eq. 4); activations are not quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Coder = Callable[[NDArray[np.float32]], NDArray[np.uint8]]

BLOCK = 64  # numbers that share a scale
NESTED_BLOCK = 256  # scales that share one of their own
_SMALLEST = np.float32(1e-38)  # a block of zeros is divided by this
_GRID = 1 << 16  # points between -1 and 1 of which each has its code
_AT_ONCE = 1 << 20  # numbers in flight, so that temporaries stay in cache

# Quantiles of the normal distribution, 7 below zero, zero, 8 above, scaled to [-1, 1] (arXiv:2305.14314, appendix E).
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


@dataclass(frozen=True)
class Scales:
    """The scales of nf4 blocks, doubly quantized or not.

    Attributes:
        values: float32 [blocks], or uint8 [blocks]: codes of `dynamic_levels()`.
        nested: float32 [ceil(blocks / 256)], the scale of each 256 codes; None where `values` are the scales.
        offset: Added to every scale that was a code.
    """

    values: NDArray[np.float32] | NDArray[np.uint8]
    nested: NDArray[np.float32] | None = None
    offset: np.float32 = np.float32(0.0)

    def read(self) -> NDArray[np.float32]:
        """The scales, float32 [blocks]."""
        if self.nested is None:
            return self.values.astype(np.float32, copy=False)
        levels = dynamic_levels()[self.values]
        return levels * np.repeat(self.nested, NESTED_BLOCK)[: len(levels)] + self.offset


@dataclass(frozen=True)
class Nf4:
    """A matrix in nf4.

    Attributes:
        codes: uint8 [ceil(size / 2)].
        scales: Of its blocks.
        shape: [out, in].
    """

    codes: NDArray[np.uint8]
    scales: Scales
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        nested = 0 if self.scales.nested is None else self.scales.nested.nbytes + 4
        return self.codes.nbytes + self.scales.values.nbytes + nested

    def dequantize(self) -> NDArray[np.float32]:
        """The matrix, float32 [out, in]."""
        size = int(np.prod(self.shape))
        out = np.empty(2 * len(self.codes), np.float32)
        np.take(nf4_pairs(), self.codes, axis=0, out=out.reshape(-1, 2))
        scales = self.scales.read()
        whole = size // BLOCK * BLOCK
        blocks = out[:whole].reshape(-1, BLOCK)
        blocks *= scales[: len(blocks), None]
        out[whole:] *= scales[-1]
        return out[:size].reshape(self.shape)


@dataclass(frozen=True)
class Int8:
    """A matrix in int8.

    Attributes:
        codes: int8 [out, in].
        scales: float32 [out], the largest magnitude of each row.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self) -> NDArray[np.float32]:
        """The matrix, float32 [out, in]."""
        return self.codes * (self.scales * np.float32(1 / 127))[:, None]


def quantize_nf4(weight: NDArray[Any], *, double: bool = True) -> Nf4:
    """Quantize a matrix of any floating dtype, as `bitsandbytes.functional.quantize_4bit` does with blocks of 64.

    Args:
        weight: [out, in].
        double: Quantize the scales too.
    """
    flat = weight.reshape(-1)
    codes = np.empty(flat.size + flat.size % 2, np.uint8)
    codes[flat.size :] = nearest("nf4")(np.zeros(1, np.float32))
    scales = quantize_blocks(flat, BLOCK, nearest("nf4"), codes[: flat.size])
    packed = np.bitwise_or(codes[::2] << np.uint8(4), codes[1::2], dtype=np.uint8)
    if not double:
        return Nf4(packed, Scales(scales), weight.shape)
    offset = np.float32(scales.mean(dtype=np.float64))
    nested_codes = np.empty(len(scales), np.uint8)
    nested = quantize_blocks(scales - offset, NESTED_BLOCK, nearest_on_grid, nested_codes)
    return Nf4(packed, Scales(nested_codes, nested, offset), weight.shape)


def quantize_int8(weight: NDArray[Any]) -> Int8:
    """Quantize a matrix of any floating dtype [out, in], row by row, to the nearest, halves to even."""
    wide = weight.astype(np.float32, copy=False)
    scales = np.abs(wide).max(axis=1)
    codes = np.rint(wide * (np.float32(127) / np.where(scales > 0, scales, np.float32(1)))[:, None])
    return Int8(codes.astype(np.int8), scales)


def quantize_blocks(flat: NDArray[Any], block: int, nearest: Coder, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Write the code of every number, scaled by its block's largest magnitude, into `codes`; return these magnitudes.

    Args:
        flat: [n], any floating dtype.
        block: Numbers of a block; the last one may be shorter.
        nearest: Codes of numbers from -1 to 1.
        codes: uint8 [n].
    """
    scales = np.empty(-(-flat.size // block), np.float32)
    step = _AT_ONCE // block * block
    for start in range(0, flat.size, step):
        part = flat[start : start + step].astype(np.float32)
        cut = part.size // block * block
        for at, piece in ((start, part[:cut]), (start + cut, part[cut:])):  # whole blocks, and what is left at the end
            if piece.size:
                rows = piece.reshape(-1, min(block, piece.size))
                largest = np.abs(rows).max(axis=1)
                scales[at // block : at // block + len(rows)] = largest
                rows *= (np.float32(1.0) / np.maximum(largest, _SMALLEST))[:, None]
        codes[start : start + step] = nearest(np.clip(part, -1.0, 1.0, out=part))
    return scales


class Nearest:
    """The index of the nearest of a few levels; halfway between two, the lower one.

    Instead of a search: the sign, exponent and first 8 bits of a number's fraction say which level is the lowest that
    it can be, and one comparison whether it is the next. Levels are at least 0.7 % apart, cells of the table 0.4 %.

    Args:
        levels: float32, ascending.
    """

    _DROPPED = 15  # bits of the fraction

    def __init__(self, levels: NDArray[np.float32]):
        bounds = (levels[:-1] + levels[1:]) / np.float32(2)
        cells = np.arange(1 << 32 - self._DROPPED, dtype=np.uint32) << np.uint32(self._DROPPED)
        last = np.uint32((1 << self._DROPPED) - 1)
        with np.errstate(invalid="ignore"):
            ends = np.stack([cells, cells | last]).view(np.float32)
            low, high = np.searchsorted(bounds, [np.fmin(*ends), np.fmax(*ends)], side="left")
        if np.any((high > low + 1)[np.isfinite(ends).all(axis=0)]):
            raise ValueError("two levels fall into one cell")
        self._lowest = low.astype(np.uint8)
        self._bounds = np.append(bounds, np.float32(np.inf))

    def __call__(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Codes of finite numbers, uint8, in their shape."""
        codes: NDArray[np.uint8] = self._lowest[values.view(np.uint32) >> np.uint32(self._DROPPED)]
        codes += values > self._bounds[codes]
        return codes


def nearest_on_grid(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Codes of `dynamic_levels()` for numbers from -1 to 1, uint8: of the nearest of 65,536 points the nearest level.

    So bitsandbytes does on CPU, where the two can be compared. Its kernel for GPUs takes the level that is nearest to
    the number itself, which is the next one for 0.1 % of them, those about as near to both.
    """
    points = (values + np.float32(1.0)) * np.float32(0.5) * np.float32(_GRID - 1) + np.float32(0.5)
    return _on_grid()[points.astype(np.int32)]


@lru_cache(maxsize=1)
def _on_grid() -> NDArray[np.uint8]:
    points = -1 + 2 * np.arange(_GRID) / (_GRID - 1)
    return nearest("signed")(points.astype(np.float32))


@lru_cache(maxsize=3)
def nearest(kind: str) -> Nearest:
    """Of the levels nf4, signed or unsigned (`dynamic_levels`)."""
    return Nearest(NF4 if kind == "nf4" else dynamic_levels(signed=kind == "signed"))


@lru_cache(maxsize=1)
def nf4_pairs() -> NDArray[np.float32]:
    """The two levels of every byte of codes, float32 [256, 2]."""
    return np.stack([np.repeat(NF4, 16), np.tile(NF4, 16)], axis=1)


@lru_cache(maxsize=2)
def dynamic_levels(signed: bool = True) -> NDArray[np.float32]:
    """The 256 levels of 8-bit numbers whose exponent takes as many bits as it needs, float32, ascending.

    Seven decades below 1; a decade has half as many levels as the next higher one. Unsigned, for what is never
    negative, a decade has twice as many.

    Source: Dettmers et al. 2021, arXiv:2110.02861, section 2.1 and appendix F.
    """
    values = [np.float32(0.0), np.float32(1.0)]
    for decade in range(7):
        edges = _evenly(2 ** (decade if signed else decade + 1) + 1)
        middles = np.float32(10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2.0))
        values += [*middles, *(-middles if signed else ())]
    return np.array(sorted(values), np.float32)


def _evenly(count: int) -> NDArray[np.float32]:
    """`count` numbers from 0.1 to 1, rounded as torch.linspace does, whose levels these are to the last bit."""
    step = float((np.float32(1.0) - np.float32(0.1)) / np.float32(count - 1))
    at = np.arange(count)
    upward, downward = float(np.float32(0.1)) + step * at, 1.0 - step * (count - 1 - at)
    return np.where(at < count // 2, upward, downward).astype(np.float32)  # one rounding, as of a fused multiply-add


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of the decoder are kept.

    Attributes:
        kind: nf4 or int8.
        double: nf4: quantize the scales too.
    """

    kind: str
    double: bool = True

    @classmethod
    def named(cls, name: str, double: bool = True) -> Quantization | None:
        """nf4 or int8 as recipes and arguments name it; None for `none`."""
        return None if name == "none" else cls(name, double)

    def quantize(self, weight: NDArray[Any]) -> Nf4 | Int8:
        """A matrix [out, in] of any floating dtype."""
        return quantize_int8(weight) if self.kind == "int8" else quantize_nf4(weight, double=self.double)

    def nbytes(self, inputs: int, outputs: int) -> int:
        """Bytes that a matrix takes."""
        size = inputs * outputs
        if self.kind == "int8":
            return size + 4 * outputs
        blocks = -(-size // BLOCK)
        scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if self.double else 4 * blocks
        return -(-size // 2) + scales
