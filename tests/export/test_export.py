"""`finetune export`: every format, merged where there is an adapter, verified, refused with a fix."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.errors import ArgumentError, CheckpointError, FinetuneError
from finetune.export.export import export
from finetune.export.formats import QUANTIZED
from finetune.model.adapters import LoraSettings
from finetune.model.quantize import Quantization
from tests.model.compute import logits, shake
from tests.model.test_resolve import adapter as adapter_folder
from tests.runs import finetune
from tests.tiny import Shape, tiny_model, tiny_tokenizer, tiny_weights, write_json


@pytest.fixture(scope="module", params=["lora", "rslora", "pissa"])
def adapter(request, tiny_folder, tmp_path_factory):
    """(adapter folder, the logits it had in memory)."""
    from finetune.model.load import load_model
    from finetune.model.lora import add_lora
    from finetune.model.save import save_peft

    folder = tmp_path_factory.mktemp(request.param) / "a"
    model = add_lora(load_model(tiny_folder).model, LoraSettings(rank=4, alpha=8, variant=request.param), seed=1)
    shake(model, size=0.02)
    model.eval()
    save_peft(model, folder, base=str(tiny_folder), tokenizer=tiny_folder)
    return folder, logits(model)


def load(folder):
    from finetune.model.load import load_model

    return load_model(folder).model


@pytest.mark.parametrize("format", ["hf", "paddle", "peft"])
def test_an_adapter_in_every_format(format, adapter, tmp_path):
    folder, expected = adapter
    lines = []
    written = export(folder, tmp_path / "out", format=format, verify=True, say=lines.append)
    assert np.abs(logits(load(tmp_path / "out")) - expected).max() < 1e-4
    assert written.likeness.difference < 5e-5 and written.likeness.limits is None and written.dtype == "float32"
    assert len(lines) == 2 and "Verified" in lines[1]
    assert ("merged" in lines[0]) == (format != "peft")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merged_into_what_the_codes_stand_for_it_answers_as_beside_them(kind, adapter, tmp_path, capsys):
    from finetune.compute.layers import prepare_linears
    from finetune.model.load import load_model

    folder, beside_the_original = adapter
    assert finetune("export", folder, tmp_path / "out", "--quantization", kind, "--verify") == 0
    assert f"as its {kind} codes have it" in capsys.readouterr().out
    model = load_model(folder, quantization=Quantization(kind)).model
    prepare_linears(model)
    beside = logits(model)
    assert np.abs(logits(load(tmp_path / "out")) - beside).max() < 1e-5 * np.abs(beside).max()
    assert np.abs(beside - beside_the_original).max() > 1e-3
    assert not (tmp_path / "none").exists()
    assert finetune("export", folder, tmp_path / "none", "--quantization", kind, "--format", "peft") == 2
    assert f"--quantization: is {kind}, but nothing is merged here." in capsys.readouterr().err


@pytest.mark.parametrize("dtype, item", [("bfloat16", 2), ("float16", 2), ("float32", 4)])
def test_dtypes(dtype, item, adapter, tmp_path):
    written = export(adapter[0], tmp_path / "out", dtype=dtype, verify=True, say=lambda line: None)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {array.dtype.name for array in stored.values()} == {dtype}
    assert written.parameters == sum(array.size for array in stored.values())
    assert not written.likeness.faults


def test_auto_keeps_the_dtype_and_the_bits(tmp_path):
    folder = tiny_model(tmp_path / "m", tied=False, dtype="bfloat16", max_shard_bytes=40_000)
    written = export(folder, tmp_path / "out", verify=True, say=lambda line: None)
    assert (written.dtype, written.likeness.difference, written.likeness.divergence) == ("bfloat16", 0.0, 0.0)
    stored, expected = load_file(tmp_path / "out" / "model.safetensors"), tiny_weights(tied=False, dtype="bfloat16")
    assert stored.keys() == expected.keys()
    assert all(stored[name].tobytes() == expected[name].tobytes() for name in expected)


def test_paddle_and_back_is_bit_equal(tiny_untied_folder, tmp_path):
    export(tiny_untied_folder, tmp_path / "paddle", format="paddle", say=lambda line: None)
    export(tmp_path / "paddle", tmp_path / "hf", format="hf", verify=True, say=lambda line: None)
    stored, expected = load_file(tmp_path / "hf" / "model.safetensors"), tiny_weights(tied=False, seed=1)
    assert all(stored[name].tobytes() == expected[name].tobytes() for name in expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_gguf(tied, dtype, tmp_path):
    gguf = pytest.importorskip("gguf")
    folder = tiny_model(tmp_path / "m", tied=tied)
    written = export(folder, tmp_path / "out", format="gguf", dtype=dtype, verify=True, say=lambda line: None)
    assert not written.likeness.faults
    reader = gguf.GGUFReader(next((tmp_path / "out").glob("*.gguf")))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    expected = tiny_weights(tied=tied)
    assert len(tensors) == len(expected) and ("output.weight" in tensors) == (not tied)
    query = gguf.dequantize(tensors["blk.0.attn_q.weight"].data, tensors["blk.0.attn_q.weight"].tensor_type)
    weight = expected["model.layers.0.self_attn.q_proj.weight"]
    if dtype == "q8_0":
        assert np.abs(query - weight).max() <= np.abs(weight).max() / 127
    else:
        assert np.array_equal(query, tiny_weights(dtype=dtype, tied=tied)["model.layers.0.self_attn.q_proj.weight"])
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 416 and tokens[402] == "<|im_end|>" and tokens[415] == "[PAD415]"
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == 402
    assert reader.fields["tokenizer.ggml.bos_token_id"].contents() == 400
    assert reader.fields["qwen2.rope.freq_base"].contents() == 1e6


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [name for name in QUANTIZED if name != "q8_0"])
def test_four_and_five_bits(dtype, tied, tmp_path):
    """Matrices as the package rounds them, what gives the logits in 8 bits, vectors whole, odd rows in float16."""
    gguf = pytest.importorskip("gguf")
    folder = tiny_model(tmp_path / "m", tied=tied)
    export(folder, tmp_path / "out", format="gguf", dtype=dtype, say=lambda line: None)
    reader = gguf.GGUFReader(next((tmp_path / "out").glob("*.gguf")))
    kinds = gguf.GGMLQuantizationType
    expected = {
        "blk.0.attn_q.weight": ("model.layers.0.self_attn.q_proj.weight", kinds[dtype.upper()]),
        "blk.1.ffn_down.weight": ("model.layers.1.mlp.down_proj.weight", kinds.F16),  # rows of 48
        "blk.1.attn_norm.weight": ("model.layers.1.input_layernorm.weight", kinds.F32),
        "token_embd.weight": ("model.embed_tokens.weight", kinds.Q8_0 if tied else kinds[dtype.upper()]),
    } | ({} if tied else {"output.weight": ("lm_head.weight", kinds.Q8_0)})
    weights, found = tiny_weights(tied=tied), {tensor.name: tensor for tensor in reader.tensors}
    for name, (original, kind) in expected.items():
        assert found[name].tensor_type == kind
        assert found[name].data.tobytes() == gguf.quantize(weights[original], kind).tobytes()
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{dtype.upper()}"]


@pytest.mark.parametrize("bos", [401, None])
def test_gguf_has_a_first_token(bos, tmp_path):
    gguf = pytest.importorskip("gguf")
    folder = tiny_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"bos_token_id": bos})
    export(folder, tmp_path / "out", format="gguf", say=lambda line: None)
    reader = gguf.GGUFReader(next((tmp_path / "out").glob("*.gguf")))
    assert reader.fields["tokenizer.ggml.bos_token_id"].contents() == (bos or 400)


@pytest.mark.parametrize("format", ["hf", "paddle", "peft"])
def test_an_adapter_with_a_tokenizer_of_its_own_keeps_the_bases_generation_config(format, tiny_folder, tmp_path):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    asked = {"do_sample": True, "temperature": 0.6, "top_p": 0.7, "eos_token_id": [401], "pad_token_id": 400}
    write_json(base / "generation_config.json", asked)
    folder = adapter_folder(tmp_path / "a", base)
    tiny_tokenizer(folder)

    def exported(name: str) -> dict:
        export(folder, tmp_path / name, format=format, say=lambda line: None)
        return json.loads((tmp_path / name / "generation_config.json").read_text())

    found = exported("of the base")
    assert found["temperature"] == 0.6 and found["do_sample"] and found["eos_token_id"] == [402, 400, 401]
    write_json(folder / "generation_config.json", asked | {"temperature": 0.1})
    assert exported("its own")["temperature"] == 0.1


def test_every_number_format_of_gguf_by_command(tiny_untied_folder, tmp_path, capsys):
    pytest.importorskip("gguf")
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"} | {name: name.upper() for name in QUANTIZED}
    for dtype, name in names.items():
        out = tmp_path / dtype
        assert finetune("export", tiny_untied_folder, out, "--format", "gguf", "--dtype", dtype, "--verify") == 0
        assert [path.name for path in out.iterdir()] == [f"model-{name}.gguf"]
        assert "Verified: 27 tensors as they should be" in capsys.readouterr().out
    assert finetune("export", tiny_untied_folder, tmp_path / "hf", "--dtype", "q8_0") == 2
    assert "--dtype" in capsys.readouterr().err


def test_what_goes_wrong_is_found_by_verify(adapter, tmp_path, monkeypatch):
    import finetune.export.export as module

    write = module._WRITERS["hf"]

    def spoiled(config, weights, folder, **keywords):
        write(config, weights, folder, **keywords)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] += np.float32(0.01)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setitem(module._WRITERS, "hf", spoiled)
    with pytest.raises(FinetuneError, match="model.norm.weight is not the model's; the largest logit difference"):
        export(adapter[0], tmp_path / "out", verify=True, say=lambda line: None)


def test_refusals(tiny_folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ArgumentError, match="whole model"):
        export(tiny_folder, out, format="peft")
    with pytest.raises(ArgumentError, match="--format"):
        export(tiny_folder, out, format="onnx")
    with pytest.raises(ArgumentError, match="--dtype"):
        export(tiny_folder, out, dtype="q8_0")
    with pytest.raises(ArgumentError, match="--dtype"):
        export(tiny_folder, out, dtype="int4")
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="not empty"):
        export(tiny_folder, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    with pytest.raises(CheckpointError, match="not empty"):
        export(tiny_folder, tiny_folder)


def test_the_source_folder_is_not_touched(adapter, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in adapter[0].iterdir()}
    export(adapter[0], tmp_path / "out", verify=True, say=lambda line: None)
    assert {path: path.stat().st_mtime_ns for path in adapter[0].iterdir()} == before


def test_the_base_of_an_exported_adapter_is_an_absolute_folder(adapter, tiny_folder, tmp_path):
    export(adapter[0], tmp_path / "out", format="peft", say=lambda line: None)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_folder.resolve())


def test_without_verify_no_paddle_is_loaded(adapter, tmp_path):
    code = (
        "import sys; from finetune.export.export import export;"
        f"export({str(adapter[0])!r}, {str(tmp_path / 'out')!r}); assert 'paddle' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.startswith("Wrote ")


@pytest.mark.parametrize("format", ["hf", "paddle", "gguf"])
def test_memory_does_not_grow_with_the_model(format, tmp_path):
    """Peak of a process that exports 4 layers and of one that exports 16 of 8 MB each; half a model of room is left."""
    if format == "gguf":
        pytest.importorskip("gguf")

    def peak(layers: int) -> int:
        shape = Shape(hidden_size=256, intermediate_size=2400, num_hidden_layers=layers)
        folder = tiny_model(tmp_path / f"m{layers}", shape=shape)
        code = (
            "import sys; from finetune.export.export import export;"
            f"export(sys.argv[1], sys.argv[2], format={format!r}, say=lambda line: None);"
            "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        command = [sys.executable, "-c", code, folder, tmp_path / f"out{layers}"]
        return int(subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout)

    assert peak(16) - peak(4) < 48_000  # KiB; 12 layers are 96,000
