"""GGUF files for tests, written by the gguf package: a copy of one with other metadata, tensors or number formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from finetune.export.export import export

TYPES = gguf.GGMLQuantizationType


def exported(folder: Path, target: Path, dtype: str = "float32") -> Path:
    """A model folder as a GGUF file."""
    written = export(folder, target, format="gguf", dtype=dtype, say=lambda line: None)
    return next(written.folder.glob("*.gguf"))


def copied(
    source: Path,
    target: Path,
    *,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, tuple[np.ndarray, TYPES] | None] | None = None,
    arch: str = "qwen2",
    **split: int,
) -> Path:
    """A copy of a file.

    Args:
        metadata: What is other in it; None leaves a key out.
        tensors: The same for tensors: bytes uint8 [..., bytes of a row] or numbers, and their type.
        split: `split_max_tensors`, for several files.
    """
    reader = gguf.GGUFReader(source)
    changes = metadata or {}
    writer = gguf.GGUFWriter(target, arch, **split)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in changes:
            kinds = [*field.types, None][:2]
            writer.add_key_value(name.replace("qwen2.", f"{arch}."), field.contents(), kinds[0], kinds[1])
    for name, value in changes.items():
        if value is not None:
            _add(writer, name, value)
    stored = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
    for name, found in (stored | (tensors or {})).items():
        if found is not None:
            writer.add_tensor(name, found[0], raw_dtype=found[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    if isinstance(value, list):
        writer.add_array(name, value)
    else:
        add[type(value)](name, value)


def random_bytes(shape: tuple[int, ...], kind: TYPES, seed: int = 0) -> np.ndarray:
    """Any bytes are a tensor of a quantized type: uint8 [..., bytes of a row]. Scales stay finite."""
    size = gguf.quant_shape_to_byte_shape(shape, kind)
    return np.random.default_rng(seed).integers(0, 0x70, size, np.uint8)
