"""Pickled weights: refused everywhere but in `export --allow-pickle`, which takes tensors and runs nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.errors import CheckpointError
from finetune.model.pickled import read_pickle
from tests.runs import finetune
from tests.tiny import Shape, tiny_config, tiny_model, tiny_tokenizer, tiny_weights, write_json

REFERENCE = os.environ.get("FINETUNE_REFERENCE_PYTHON")
STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


class _Global:
    """Pickled as the name of a function that is not there."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class _Call:
    def __init__(self, function: _Global, *arguments: object):
        self.parts = function, arguments


class _Storage(tuple):
    pass


class _Pickler(pickle._Pickler):
    """Writes the opcodes of torch.save without torch: names by hand, storages as persistent ids."""

    def persistent_id(self, value):
        return tuple(value) if isinstance(value, _Storage) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, _Global):
            self.write(b"c" + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, _Call):
            self.save(value.parts[0])
            self.save(value.parts[1])
            self.write(b"R")
        else:
            super().save(value, save_persistent_id)


def torch_bytes(value: object, storages: list[bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A torch archive with this pickle and these storages."""
    data, out = io.BytesIO(), io.BytesIO()
    _Pickler(data, 2).dump(value)
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data.getvalue())
        archive.writestr("archive/byteorder", b"little")
        for number, content in enumerate(storages):
            archive.writestr(f"archive/data/{number}", content)
    return out.getvalue()


def tensor(number: int, count: int, shape, strides, offset: int = 0, kind: str = "FloatStorage") -> _Call:
    storage = _Storage(("storage", _Global("torch", kind), str(number), "cpu", count))
    hooks = _Call(_Global("collections", "OrderedDict"))
    return _Call(_Global("torch._utils", "_rebuild_tensor_v2"), storage, offset, shape, strides, False, hooks)


def write_torch(path: Path, weights: dict[str, np.ndarray]) -> None:
    """What `torch.save(weights, path)` writes."""
    storages = [array.tobytes() for array in weights.values()]
    tensors = {}
    for number, (name, array) in enumerate(weights.items()):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        tensors[name] = tensor(number, array.size, array.shape, strides, kind=STORAGES[array.dtype.name])
    path.write_bytes(torch_bytes(tensors, storages))


class Payload:
    """Makes a file when it is unpickled by a reader that runs what it is told."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def read(path: Path, content: bytes) -> dict[str, np.ndarray]:
    path.write_bytes(content)
    return {name: promise.make() for name, promise in read_pickle(path).items()}


def test_views_of_a_storage(tmp_path):
    whole = np.arange(24, dtype=np.float32)
    parts = {
        "whole": tensor(0, 24, (4, 6), (6, 1)),
        "turned": tensor(0, 24, (6, 4), (1, 6)),
        "part": tensor(0, 24, (2, 3), (6, 1), 8),
        "scalar": tensor(0, 24, (), (), 5),
        "empty": tensor(0, 24, (0, 3), (3, 1)),
        "expanded": tensor(0, 24, (3, 2), (0, 1)),
        "parameter": _Call(_Global("torch._utils", "_rebuild_parameter"), tensor(0, 24, (24,), (1,)), True, {}),
    }
    found = read(tmp_path / "x.bin", torch_bytes(parts, [whole.tobytes()]))
    expected = {
        "whole": whole.reshape(4, 6),
        "turned": whole.reshape(4, 6).T,
        "part": whole.reshape(4, 6)[1:3, 2:5],
        "scalar": whole[5],
        "empty": np.zeros((0, 3), np.float32),
        "expanded": np.stack([whole[:2]] * 3),
        "parameter": whole,
    }
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


STATE = {"x": tensor(0, 4, (4,), (1,))}
DAMAGED = {
    "empty": b"",
    "text": b"hello",
    "a cut archive": torch_bytes(STATE, [b"\0" * 16])[:-30],
    "another archive": (lambda out: (zipfile.ZipFile(out, "w").writestr("a", "b"), out.getvalue())[1])(io.BytesIO()),
    "compressed": torch_bytes(STATE, [b"\0" * 16], zipfile.ZIP_DEFLATED),
    "a storage too short": torch_bytes(STATE, [b"\0" * 12]),
    "no storage": torch_bytes(STATE, []),
    "beyond the storage": torch_bytes({"x": tensor(0, 4, (5,), (1,))}, [b"\0" * 16]),
    "before the storage": torch_bytes({"x": tensor(0, 4, (2,), (1,), -1)}, [b"\0" * 16]),
    "negative strides": torch_bytes({"x": tensor(0, 4, (2,), (-1,), 3)}, [b"\0" * 16]),
    "a huge shape": torch_bytes({"x": tensor(0, 4, (2**50,), (0,))}, [b"\0" * 16]),
    "strides and shape differ": torch_bytes({"x": tensor(0, 4, (2, 2), (1,))}, [b"\0" * 16]),
    "a number for a tensor": torch_bytes({"x": 3}, []),
    "a list": torch_bytes([1, 2], []),
    "a number for a name": torch_bytes({1: tensor(0, 4, (4,), (1,))}, [b"\0" * 16]),
    "torch before 1.6": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.",
    "endless": b"\x80\x04" + b"(" * 100_000,
    "more than there is": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b"x",
    "an array of objects": pickle.dumps({"x": np.array([{}], dtype=object)}, 4),
    "a big-endian array": pickle.dumps({"x": np.arange(3, dtype=">f4")}, 4),
    "a complex array": pickle.dumps({"x": np.zeros(2, np.complex64)}, 4),
    "an array in a list": pickle.dumps({"x": [np.zeros(2)]}, 4),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_file_of_weights_is_refused_by_name(name, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / "x.bin", DAMAGED[name])
    assert str(tmp_path / "x.bin") in str(caught.value)


def test_every_cut_and_flip_of_a_file_is_read_or_refused(tmp_path):
    whole = pickle.dumps({"a": np.arange(4, dtype=np.float32), "b": np.zeros((2, 2))}, 4)
    archive = torch_bytes(STATE, [b"\0" * 16])
    for content in (whole, archive):
        for place in range(len(content)):
            for changed in (content[:place], content[:place] + bytes([content[place] ^ 0x24]) + content[place + 1 :]):
                try:
                    read(tmp_path / "x.bin", changed)
                except CheckpointError:
                    pass


@pytest.mark.parametrize("protocol", [2, 4])
def test_arrays_as_paddle_pickles_them(tmp_path, protocol):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "t": np.arange(6.0).reshape(2, 3).T,
        "h": np.float16([1]),
    }
    bits = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    pickled = pickle.dumps(arrays | {"b": bits.view(np.uint16), "StructuredToParameterName@@": {"a": "w_0"}}, protocol)
    found = read(tmp_path / "x.pdparams", pickled)
    assert found.keys() == arrays.keys() | {"b"}
    for name, array in (arrays | {"b": bits}).items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


def test_what_paddle_saves(tmp_path):
    from finetune.model.runtime import paddle

    state = paddle().nn.Linear(3, 2).state_dict() | {"half": paddle().ones([2]).astype("bfloat16")}
    paddle().save(state, str(tmp_path / "x.pdparams"))
    found = {name: promise.make() for name, promise in read_pickle(tmp_path / "x.pdparams").items()}
    assert found.keys() == state.keys()
    assert all(np.array_equal(found[name], state[name].numpy()) for name in ("weight", "bias"))
    assert found["half"].dtype == ml_dtypes.bfloat16 and found["half"].tolist() == [1, 1]


@pytest.fixture
def planted(tmp_path):
    """A folder whose weights hold a program, and the file that the program would make."""
    folder, marker = tmp_path / "planted", tmp_path / "marker"
    tiny_tokenizer(folder)
    write_json(folder / "config.json", tiny_config())

    def plant(file: str, inside_archive: bool = False) -> Path:
        content = pickle.dumps({"x": Payload(marker)})
        if inside_archive:
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w") as archive:
                archive.writestr("archive/data.pkl", content)
            content = out.getvalue()
        (folder / file).write_bytes(content)
        return folder

    plant.marker = marker
    return plant


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model_state.pdparams"])
@pytest.mark.parametrize("inside_archive", [False, True])
def test_even_with_the_flag_a_payload_does_not_run(planted, tmp_path, file, inside_archive, capsys):
    folder = planted(file, inside_archive)
    assert finetune("export", folder, tmp_path / "out", "--allow-pickle") == 2
    assert f"{file}: asks for 'posix.system', which weights do not need" in capsys.readouterr().err
    assert not planted.marker.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["planted"]
    pickle.loads((folder / file).read_bytes()) if not inside_archive else os.system(f"touch {planted.marker}")
    assert planted.marker.exists()  # the payload works where a reader lets it


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_torch_weights_export_to_the_same_bits(tmp_path, capsys, dtype, sharded):
    weights = tiny_weights(dtype=dtype)
    folder = tmp_path / "old"
    tiny_tokenizer(folder)
    write_json(folder / "config.json", tiny_config(dtype=dtype))
    if sharded:
        names = list(weights)
        parts = {"pytorch_model-1.bin": names[:9], "pytorch_model-2.bin": names[9:]}
        for file, part in parts.items():
            write_torch(folder / file, {name: weights[name] for name in part})
        where = {name: file for file, part in parts.items() for name in part}
        write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": where})
    else:
        write_torch(folder / "pytorch_model.bin", weights)
    assert finetune("generate", folder, "--prompt", "a") == 2
    refusal = capsys.readouterr().err
    assert "pickle" in refusal and f"finetune export {folder} NEW_FOLDER --allow-pickle" in refusal
    assert finetune("export", folder, tmp_path / "new") == 2
    assert finetune("export", folder, tmp_path / "new", "--allow-pickle") == 0
    found = load_file(tmp_path / "new" / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(found[name].tobytes() == weights[name].tobytes() for name in weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_a_pickled_adapter_finds_its_base(tiny_folder, tmp_path, capsys):
    shape = Shape()
    tensors = {}
    for layer in range(shape.num_hidden_layers):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{prefix}.lora_A.weight"] = np.full((4, 32), 0.5, np.float32)
        tensors[f"{prefix}.lora_B.weight"] = np.full((32, 4), 0.25, np.float32)
    folder = tmp_path / "adapter"
    folder.mkdir()
    os.symlink(tiny_folder, tmp_path / "base")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": "../base", "bias": "none"})
    write_torch(folder / "adapter_model.bin", tensors)
    assert finetune("export", folder, tmp_path / "new", "--format", "peft", "--allow-pickle") == 0
    found = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)


def test_an_index_cannot_leave_the_folder(tmp_path):
    folder = tmp_path / "old"
    tiny_tokenizer(folder)
    write_json(folder / "config.json", tiny_config())
    write_torch(tmp_path / "x.bin", tiny_weights())
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": dict.fromkeys(tiny_weights(), "../x.bin")})
    assert finetune("export", folder, tmp_path / "new", "--allow-pickle") == 2


def test_the_flag_reads_safetensors_where_they_are(tmp_path, capsys):
    folder = tiny_model(tmp_path / "old")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert finetune("export", folder, tmp_path / "new", "--allow-pickle") == 0


@pytest.mark.skipif(not REFERENCE, reason="FINETUNE_REFERENCE_PYTHON names no Python with torch (make parity)")
def test_what_torch_itself_saves(tmp_path):
    code = f"""
import torch
torch.manual_seed(0)
w = torch.randn(4, 6)
state = dict(a=w, turned=w.t(), part=w[1:3, 2:], half=w.half(), bf16=w.bfloat16(), ints=torch.arange(3), empty=w[:0],
             parameter=torch.nn.Parameter(w), scalar=torch.tensor(2.5))
torch.save(state, {str(tmp_path / "x.pth")!r})
torch.save(torch.nn.Linear(3, 2).state_dict(), {str(tmp_path / "module.bin")!r})
torch.save(state, {str(tmp_path / "legacy.bin")!r}, _use_new_zipfile_serialization=False)
from safetensors.torch import save_file
plain = {{name: tensor.detach().clone().contiguous() for name, tensor in state.items()}}
save_file(plain, {str(tmp_path / "x.safetensors")!r})
"""
    subprocess.run([REFERENCE, "-c", code], check=True, timeout=120)
    found = {name: promise.make() for name, promise in read_pickle(tmp_path / "x.pth").items()}
    expected = load_file(tmp_path / "x.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes(), name
    assert read_pickle(tmp_path / "module.bin").keys() == {"weight", "bias"}
    with pytest.raises(CheckpointError, match="torch before 1.6"):
        read_pickle(tmp_path / "legacy.bin")
    assert json.dumps(sorted(found))
