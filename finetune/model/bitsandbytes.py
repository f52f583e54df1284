"""Folders that bitsandbytes quantized to nf4, as transformers writes them: their tensors, and the codes as they are.

A matrix NAME is its codes, two a byte, and beside it `NAME.absmax` (scales, or their codes), `NAME.quant_map` (the
levels), `NAME.quant_state.bitsandbytes__nf4` (JSON in bytes: shape, sizes of blocks) and, doubly quantized,
`NAME.nested_absmax` and `NAME.nested_quant_map`. What stands without these is whole. No paddle here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from finetune.errors import CheckpointError
from finetune.model.quantize import BLOCK, NESTED_BLOCK, NF4, Nf4, Scales, dynamic_levels
from finetune.model.tensorfile import Array, TensorFolder

_STATE = ".quant_state.bitsandbytes__nf4"
_PARTS = (_STATE, ".absmax", ".quant_map")
_NESTED = (".nested_absmax", ".nested_quant_map")


class BitsandbytesTensors:
    """The tensors of one folder, as `TensorFolder` gives those of one that is whole.

    bitsandbytes rounds what codes stand for to the dtype that the model had; here it stays float32.

    Args:
        stored: The folder.

    Attributes:
        entries: By name; a quantized matrix is a float32 [out, in].
        quantized: Names of these.

    Raises:
        CheckpointError: a matrix has parts missing, or other blocks or levels than nf4's usual ones.
    """

    def __init__(self, stored: TensorFolder):
        self._stored = stored
        self._states: dict[str, dict[str, Any]] = {}
        self.entries = dict(stored.entries)
        for name in [name.removesuffix(_STATE) for name in stored.entries if name.endswith(_STATE)]:
            self._states[name] = state = self._checked_state(name)
            shape = tuple(state["shape"])
            self.entries[name] = replace(stored.entries[name], dtype=np.dtype(np.float32), shape=shape)
            for part in (*_PARTS, *_NESTED):
                self.entries.pop(name + part, None)
        self.quantized = frozenset(self._states)

    def read(self, name: str, rows: slice = slice(None)) -> Array:
        """The tensor, or some rows of it, as its entry says."""
        return self.codes(name).dequantize()[rows] if name in self.quantized else self._stored.read(name, rows)

    def codes(self, name: str) -> Nf4:
        """A quantized matrix as it is stored.

        Raises:
            CheckpointError: its levels are not nf4's.
        """
        state, read = self._states[name], self._stored.read
        if not np.array_equal(read(f"{name}.quant_map"), NF4):
            raise self._odd(name, "its levels are not those of nf4")
        values, codes = read(f"{name}.absmax"), read(name).reshape(-1).view(np.uint8)
        if "nested_blocksize" not in state:
            return Nf4(codes, Scales(values), tuple(state["shape"]))
        if not np.array_equal(read(f"{name}.nested_quant_map"), dynamic_levels()):
            raise self._odd(name, "the levels of its scales are not those of bitsandbytes")
        scales = Scales(values, read(f"{name}.nested_absmax"), np.float32(state["nested_offset"]))
        return Nf4(codes, scales, tuple(state["shape"]))

    def _checked_state(self, name: str) -> dict[str, Any]:
        """What stands beside the codes, held against the sizes of all parts."""
        state = self._state(name)
        nested = "nested_blocksize" in state
        if state["blocksize"] != BLOCK or (nested and state["nested_blocksize"] != NESTED_BLOCK):
            raise self._odd(name, f"its blocks are not of {BLOCK} numbers and {NESTED_BLOCK} scales")
        size = prod(state["shape"])
        blocks = -(-size // BLOCK)
        expected = {"": -(-size // 2), ".absmax": blocks * (1 if nested else 4), ".quant_map": 4 * len(NF4)}
        if nested:
            expected |= {".nested_absmax": 4 * -(-blocks // NESTED_BLOCK), ".nested_quant_map": 4 * 256}
        for part, nbytes in expected.items():
            entry = self._stored.entries.get(name + part)
            kind = np.uint8 if part == ".absmax" and nested else np.float32
            if entry is None or entry.nbytes != nbytes or (part and entry.dtype != kind):
                raise self._odd(name, f"{name[:150] + part!r} is missing or does not have the size of the others")
        return state

    def _state(self, name: str) -> dict[str, Any]:
        try:
            state = json.loads(self._stored.read(name + _STATE).tobytes())
            numbers = [*state["shape"], state["blocksize"], state.get("nested_blocksize", NESTED_BLOCK)]
            good = len(state["shape"]) == 2 and all(type(number) is int and 0 < number < 2**31 for number in numbers)
            good &= np.isfinite(float(state["nested_offset"] if "nested_blocksize" in state else 0.0))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            good, state = False, {}
        if not good:
            raise self._odd(name, "what is said of its blocks is not readable")
        return dict(state)

    def _odd(self, name: str, what: str) -> CheckpointError:
        fix = "Copy the folder again, or quantize the original model: model.quantization (--quantization) nf4."
        return CheckpointError(f"of tensor {name[:150]!r}, {what}", where=str(self._stored.folder), fix=fix)


def open_folder(folder: TensorFolder) -> TensorFolder | BitsandbytesTensors:
    """The tensors of a folder, quantized or not."""
    return BitsandbytesTensors(folder) if any(name.endswith(_STATE) for name in folder.entries) else folder
