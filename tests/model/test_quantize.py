"""Codes and scales against a search of all levels in float64, and against the definition of each format."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from finetune.model.quantize import BLOCK, NF4, dynamic_levels, quantize_int8, quantize_nf4


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of different size, one of zeros."""
    draw = np.random.default_rng(seed)
    found = draw.standard_normal([rows, columns]) * draw.uniform(0, 1, [rows, 1])
    found[rows // 2] = 0
    return found.astype(np.float32)


def distances(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Of every value to every level, float64 [n, levels]."""
    return np.abs(values.astype(np.float64)[:, None] - levels.astype(np.float64))


def unpacked(codes: np.ndarray) -> np.ndarray:
    """The first of two codes of a byte stands in its high half."""
    return np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)


@pytest.mark.parametrize("shape", [(48, 64), (8, 65), (7, 33), (1, 1)])
def test_nf4_takes_the_nearest_level_of_each_block(shape):
    weight = matrix(*shape)
    found = quantize_nf4(weight, double=False)
    flat = weight.reshape(-1)
    starts = range(0, flat.size, BLOCK)
    scales = np.array([np.abs(flat[start : start + BLOCK]).max() for start in starts], np.float32)
    assert np.array_equal(found.scales.values, scales)
    scaled = flat / np.maximum(np.repeat(scales, BLOCK)[: flat.size], 1e-38)
    far = distances(scaled, NF4)
    chosen = far[np.arange(flat.size), unpacked(found.codes)[: flat.size]]
    assert (chosen <= far.min(axis=1) + 1e-7).all()


@pytest.mark.parametrize("double", [False, True])
def test_nf4_gives_back_level_times_scale(double):
    weight = matrix(96, 200)
    found = quantize_nf4(weight, double=double)
    expected = NF4[unpacked(found.codes)] * np.repeat(found.scales.read(), BLOCK)[: weight.size]
    assert np.array_equal(found.dequantize(), expected.reshape(weight.shape))
    # Half the widest gap between levels, of the largest number of its block; the scale itself is 8 bits if doubled.
    limit = 0.16 * np.abs(weight).max() if double else 0.152 * np.abs(weight).max()
    assert np.abs(found.dequantize() - weight).max() < limit


def test_doubly_quantized_scales_are_codes_around_their_mean():
    weight = matrix(300, 128)  # 600 blocks: two full nested ones and a part
    plain, double = (quantize_nf4(weight, double=choice).scales for choice in (False, True))
    assert double.values.dtype == np.uint8 and len(double.nested) == 3
    assert double.offset == pytest.approx(plain.values.mean(dtype=np.float64), rel=1e-7)
    centred = plain.values - double.offset
    for start, nested in zip(range(0, 600, 256), double.nested):
        part = centred[start : start + 256]
        assert nested == np.abs(part).max()
        far = distances(part / nested, dynamic_levels())
        chosen = far[np.arange(len(part)), double.values[start : start + 256]]
        assert (chosen <= far.min(axis=1) + 1e-7).all()
    assert double.read() == pytest.approx(plain.values, abs=0.0071 * float(np.abs(centred).max()))


def test_bits_per_number():
    weight = matrix(512, 512)
    assert quantize_nf4(weight, double=False).nbytes * 8 / weight.size == 4.5
    assert quantize_nf4(weight).nbytes * 8 / weight.size == pytest.approx(4.127, abs=0.001)  # arXiv:2305.14314, 3


def test_levels_of_eight_bits():
    signed, unsigned = dynamic_levels(), dynamic_levels(signed=False)
    assert len(signed) == len(unsigned) == 256
    assert (np.diff(signed) > 0).all() and (np.diff(unsigned) > 0).all()
    assert signed[-1] == unsigned[-1] == 1 and 0 in signed and unsigned[0] == 0
    assert np.array_equal(signed[signed < 0], -signed[(signed > 0) & (signed < 1)][::-1])
    # A level stands in the middle of an even share of its decade; the highest has 64 signed, 128 unsigned.
    assert unsigned[-2] == pytest.approx(1 - 0.9 / 128 / 2) and signed[-2] == pytest.approx(1 - 0.9 / 64 / 2)
    assert unsigned[1] == pytest.approx(1e-6 * (0.1 + 0.45 / 2))


def test_int8_rounds_each_row_by_its_largest():
    weight = matrix(20, 50)
    found = quantize_int8(weight)
    assert np.array_equal(found.scales, np.abs(weight).max(axis=1))
    assert (np.abs(found.codes).max(axis=1)[found.scales > 0] == 127).all() and found.codes.min() >= -127
    assert (np.abs(found.dequantize() - weight) <= found.scales[:, None] / 254 * (1 + 1e-5)).all()
    assert not found.dequantize()[10].any()


@pytest.mark.parametrize("quantize", [quantize_nf4, quantize_int8])
def test_half_precision_is_quantized_as_the_same_numbers_in_float32(quantize):
    half = matrix(32, 64).astype(ml_dtypes.bfloat16)
    assert np.array_equal(quantize(half).dequantize(), quantize(half.astype(np.float32)).dequantize())
