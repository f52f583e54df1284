"""Safetensors: written like the package, read with every claim of the header checked."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.errors import CheckpointError
from finetune.model.tensorfile import Promise, TensorFolder, write_shards, write_tensors
from tests.tiny import write_json, write_weights

RANDOM = np.random.default_rng(0)
TENSORS = {
    "b": RANDOM.standard_normal((3, 4)).astype(np.float32),
    "a": RANDOM.standard_normal((5, 2)).astype(ml_dtypes.bfloat16),
    "c": np.arange(7, dtype=np.int64),
    "d": np.float16(RANDOM.standard_normal((2, 2, 2))),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(3.5, np.float64),
}


def equal(left, right) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def test_the_package_reads_what_we_write(tmp_path):
    promises = {name: Promise.of(array) for name, array in TENSORS.items()}
    write_tensors(tmp_path / "model.safetensors", promises, {"format": "pt"})
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(equal(loaded[name], TENSORS[name]) for name in TENSORS)


def test_we_read_what_the_package_writes(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    folder = TensorFolder(tmp_path, "model")
    assert all(equal(folder.read(name), TENSORS[name]) for name in TENSORS)
    assert folder.metadata == {"format": "pt"}
    assert equal(folder.read("b", slice(1, 3)), TENSORS["b"][1:3])


@pytest.mark.parametrize("metadata", [{"format": "np"}, None])
def test_u16_of_numpys_format_is_bfloat16(metadata, tmp_path):
    save_file({"a": TENSORS["a"].view(np.uint16)}, tmp_path / "model.safetensors", metadata=metadata)
    folder = TensorFolder(tmp_path, "model")
    assert folder.entries["a"].dtype == ml_dtypes.bfloat16
    assert equal(folder.read("a"), TENSORS["a"])
    assert equal(folder.read("a", slice(1, 3)), TENSORS["a"][1:3])


def test_u16_of_another_format_stays_and_bfloat16_is_written_as_such(tmp_path):
    save_file({"a": TENSORS["a"].view(np.uint16)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert TensorFolder(tmp_path, "model").entries["a"].dtype == np.uint16
    write_tensors(tmp_path / "ours.safetensors", {"a": Promise.of(TENSORS["a"])}, {"format": "np"})
    assert b'"dtype":"BF16"' in (tmp_path / "ours.safetensors").read_bytes()


def test_shards_are_split_by_size_and_read_as_one(tmp_path):
    promises = {name: Promise.of(array) for name, array in TENSORS.items()}
    write_shards(tmp_path, "model", promises, 60, {"format": "pt"})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in TENSORS.values())
    folder = TensorFolder(tmp_path, "model")
    assert all(equal(folder.read(name), TENSORS[name]) for name in TENSORS)


def test_a_promise_is_made_when_its_turn_comes(tmp_path):
    alive = []

    def promise(number: int) -> Promise:
        def make() -> np.ndarray:
            alive.append(number)
            return np.full(4, number, np.float32)

        return Promise(np.dtype(np.float32), (4,), make)

    promises = {str(number): promise(number) for number in range(3)}
    assert alive == []
    write_tensors(tmp_path / "model.safetensors", promises, {})
    assert alive == [0, 1, 2]


def test_a_broken_promise_is_a_fault_of_the_program(tmp_path):
    wrong = Promise(np.dtype(np.float32), (2,), lambda: np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="promised"):
        write_tensors(tmp_path / "model.safetensors", {"x": wrong}, {})


def header(value, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(start=0, end=16, shape=(4,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


DAMAGED = {
    "empty file": b"",
    "seven bytes": b"\1" * 7,
    "length beyond the file": header({"a": tensor()}, length=10**6),
    "length beyond everything": struct.pack("<Q", 2**64 - 1) + b"{}",
    "not JSON": header(b"{'a': 1}"),
    "not UTF-8": header(b"\xff\xfe{}"),
    "not an object": header([1, 2]),
    "nested too deep": header(b"[" * 100_000),
    "key given twice": header(b'{"a": 1, "a": 2}'),
    "entry is a number": header({"a": 1}),
    "entry is null": header({"a": None}),
    "no shape": header({"a": {"dtype": "F32", "data_offsets": [0, 16]}}),
    "negative shape": header({"a": tensor(shape=(-4,))}),
    "shape of floats": header({"a": tensor(shape=(4.0,))}),
    "shape of booleans": header({"a": tensor(shape=(True,), end=4)}, data=b"\0" * 4),
    "huge shape": header({"a": tensor(shape=(2**40, 2**40))}),
    "too many dimensions": header({"a": tensor(shape=(1,) * 5000 + (4,))}),
    "offsets backwards": header({"a": tensor(16, 0)}),
    "size and shape disagree": header({"a": tensor(0, 12)}),
    "three offsets": header({"a": tensor() | {"data_offsets": [0, 8, 16]}}),
    "unknown dtype": header({"a": tensor(dtype="F8_E4M3", shape=(16,))}),
    "dtype is a list": header({"a": tensor(dtype=["F32"])}),
    "data cut short": header({"a": tensor()}, data=b"\0" * 15),
    "data too long": header({"a": tensor()}, data=b"\0" * 17),
    "overlap": header({"a": tensor(), "b": tensor(8, 24)}, data=b"\0" * 24),
    "gap": header({"a": tensor(), "b": tensor(20, 36)}, data=b"\0" * 36),
    "same bytes twice": header({"a": tensor(), "b": tensor()}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named_with_the_file(name, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(DAMAGED[name])
    with pytest.raises(CheckpointError) as caught:
        TensorFolder(tmp_path, "model")
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def test_every_cut_of_a_real_file_is_found(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in range(0, len(whole), 5):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            TensorFolder(tmp_path, "model")


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/../../x", "", "x\0y", "..", "a\\b"])
def test_an_index_cannot_leave_the_folder(file, tmp_path):
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": file}})
    with pytest.raises(CheckpointError):
        TensorFolder(tmp_path, "model")


def test_links_out_of_the_folder_are_refused_and_hub_snapshots_open(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    save_file({"a": TENSORS["b"]}, elsewhere / "w.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(elsewhere / "w.safetensors")
    with pytest.raises(CheckpointError, match="outside of the folder"):
        TensorFolder(folder, "model")

    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (elsewhere / "w.safetensors").rename(blobs / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert equal(TensorFolder(snapshot, "model").read("a"), TENSORS["b"])


def sharded(folder):
    write_weights(folder, {"a": TENSORS["b"], "z": TENSORS["b"]}, max_shard_bytes=50)
    return json.loads((folder / "model.safetensors.index.json").read_text())


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors"):
        TensorFolder(tmp_path, "model")


@pytest.mark.parametrize("change", ["claims more", "claims less", "no map", "map of lists"])
def test_index_and_shards_must_agree(change, tmp_path):
    index = sharded(tmp_path)
    if change == "claims more":
        index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    elif change == "claims less":
        index["weight_map"].pop("a")
        index["weight_map"]["b"] = "model-00001-of-00002.safetensors"
    elif change == "no map":
        index.pop("weight_map")
    else:
        index["weight_map"]["a"] = ["x"]
    write_json(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError):
        TensorFolder(tmp_path, "model")
