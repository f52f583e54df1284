"""A GGUF file is a MODEL: weights in every number format, tokenizer, several files; and what is wrong is one error."""

from __future__ import annotations

import json
import shutil
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from finetune.chat.tokenizer import Tokenizer
from finetune.errors import ArgumentError, CheckpointError
from finetune.model.family import FAMILIES
from finetune.model.gguf import tensors as gguf_tensors
from finetune.model.gguf.container import read_header
from finetune.model.identity import model_digest
from finetune.model.resolve import resolve_model
from finetune.model.weights import base_weights, open_tensors
from tests import fuzzing  # noqa: F401, how many cases
from tests.model.ggufs import TYPES, copied, exported, random_bytes
from tests.model.test_resolve import adapter
from tests.runs import finetune, write_recipe
from tests.tiny import CHATML, Shape, tiny_model, tiny_weights, write_json

READABLE = [kind for kind in TYPES if kind.name not in ("F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K", "Q1_0")]
WIDE = Shape(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
TEXTS = ["Hello, it's 12345!", "  two\n\n lines 世界 é́", "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>", ""]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def file(tiny_folder, tmp_path_factory) -> Path:
    """The tied tiny model in float32."""
    return exported(tiny_folder, tmp_path_factory.mktemp("gguf") / "tied")


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A model whose rows are whole blocks of every type."""
    place = tmp_path_factory.mktemp("wide")
    return exported(tiny_model(place / "m", shape=WIDE), place / "gguf")


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_tensors(resolve_model(path))
    return str(caught.value)


# -- what it holds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_folder_there_and_back(tied, dtype, tmp_path):
    folder = tiny_model(tmp_path / "m", tied=tied, dtype=dtype, rope_theta=10000.0)
    back = tmp_path / "back"
    assert finetune("export", exported(folder, tmp_path / "gguf", dtype), back) == 0
    stored, expected = load_file(back / "model.safetensors"), tiny_weights(tied=tied, dtype=dtype)
    assert stored.keys() == expected.keys()
    assert all(stored[name].tobytes() == expected[name].tobytes() for name in expected)
    assert resolve_model(back).config == replace(resolve_model(folder).config, pad_token_id=400)
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == [402, 400]
    ours, theirs = Tokenizer.from_folder(back), Tokenizer.from_folder(folder)
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert ours.chat_template == theirs.chat_template
    assert (ours.special_tokens, ours.stop_token_ids) == (theirs.special_tokens, theirs.stop_token_ids)
    assert ours.decode(range(403)) == theirs.decode(range(403))


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_every_type_of_tensor(kind, wide, tmp_path):
    """As the package's own reader and dequantization have it, of the whole tensor at once."""
    data = random_bytes((256, 256), kind)
    path = copied(wide, tmp_path / "m.gguf", tensors={"blk.0.ffn_down.weight": (data, kind)})
    [stored] = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.0.ffn_down.weight"]
    expected = gguf.dequantize(stored.data, kind).reshape(256, 256)
    weight = base_weights(resolve_model(path))["model.layers.0.mlp.down_proj.weight"]
    found = weight.read()
    assert found.dtype == weight.dtype and found.shape == weight.shape == (256, 256)
    np.testing.assert_array_equal(found.astype(np.float32), expected)
    tensors = open_tensors(resolve_model(path))
    np.testing.assert_array_equal(tensors.read("model.layers.0.mlp.down_proj.weight", slice(7, 30)), found[7:30])


@pytest.mark.parametrize("kind", [TYPES.I32, TYPES.Q8_K, 99], ids=str)
def test_types_that_are_no_weights(kind, wide, tmp_path):
    path = copied(
        wide, tmp_path / "m.gguf", tensors={"blk.0.ffn_down.weight": (random_bytes((256, 256), TYPES.F32), TYPES.F32)}
    )
    raw = bytearray(path.read_bytes())
    at = raw.index(b"blk.0.ffn_down.weight") + len("blk.0.ffn_down.weight") + 4 + 16
    raw[at : at + 4] = int(kind).to_bytes(4, "little")
    path.write_bytes(raw)
    assert "cannot be read" in refused(path) and "blk.0.ffn_down.weight" in refused(path)


def test_answers_are_those_of_the_folder(tiny_folder, file, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("one two", "What is", "again")))
    for name, model in (("folder", tiny_folder), ("gguf", file)):
        out = tmp_path / f"{name}.jsonl"
        assert finetune("generate", model, "--input", prompts, "--output", out, "--max-new-tokens", "8") == 0
    assert (tmp_path / "gguf.jsonl").read_text() == (tmp_path / "folder.jsonl").read_text()


def test_an_adapter_is_trained_on_it(file, tmp_path):
    recipe = write_recipe(tmp_path, file, max_steps=2)
    assert finetune("train", recipe, "lora.rank=4") == 0
    final = tmp_path / "run" / "final"
    named = json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(file.resolve())
    assert finetune("export", tmp_path / "run", tmp_path / "merged", "--verify") == 0
    assert finetune("generate", final, "--prompt", "one", "--max-new-tokens", "4") == 0


def test_an_adapter_finds_it_beside_itself(file, tmp_path):
    shutil.copy(file, tmp_path / "base.gguf")
    source = resolve_model(adapter(tmp_path / "a", "../base.gguf"))
    assert source.base.gguf == tmp_path / "a" / "../base.gguf"
    assert source.tokenizer_folder == source.base.folder


def test_it_is_another_model_when_its_weights_are(file, tiny_folder, tmp_path):
    same = shutil.copy(file, tmp_path / "same.gguf")
    other = exported(tiny_model(tmp_path / "m", seed=1), tmp_path / "gguf")
    digests = [model_digest(resolve_model(path)) for path in (file, other, same)]
    assert digests[0] != digests[1]
    assert resolve_model(file).folder == resolve_model(same).folder


def test_memory_holds_one_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_tensors, "_CHUNK_NUMBERS", 1 << 14)
    folder = tiny_model(tmp_path / "m", shape=Shape(vocab_size=20_000, hidden_size=256, num_hidden_layers=1))
    weight = base_weights(resolve_model(exported(folder, tmp_path / "gguf", "q4_0")))["model.embed_tokens.weight"]
    tracemalloc.start()
    array = weight.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert array.nbytes <= peak <= 1.05 * array.nbytes


# -- parts -------------------------------------------------------------------------------------------------------------


def test_several_files(file, tiny_folder, tmp_path):
    copied(file, tmp_path / "m.gguf", split_max_tensors=10)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert [part.name for part in parts] == [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for part in parts:
        source = resolve_model(part)
        assert source.weight_files == parts
        weights = base_weights(source)
        assert all(np.array_equal(weights[name].read(), array) for name, array in tiny_weights().items())
    parts[1].rename(tmp_path / "elsewhere.gguf")
    assert "has 3 parts, and one is missing" in refused(parts[0]) and parts[1].name in refused(parts[2])
    shutil.copy(parts[0], parts[1])
    assert "is in another part too" in refused(parts[0])


# -- what is not read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata, words",
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer is 'llama'"),
        ({"tokenizer.ggml.pre": "deepseek-r1-qwen"}, "cuts text as 'deepseek-r1-qwen' does"),
        ({"tokenizer.ggml.merges": ["a"]}, "tokenizer cannot be used"),
        ({"tokenizer.ggml.merges": None}, "no lists"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "of like length"),
        ({"tokenizer.ggml.tokens": ["a"] * 416}, "same text"),
        ({"tokenizer.ggml.eos_token_id": 5000}, "eos_token_id is 5000"),
        ({"qwen2.block_count": None}, "does not say num_hidden_layers"),
        ({"qwen2.block_count": 3}, "3 layers, the weights have 2"),
        ({"qwen2.embedding_length": 64}, "has shape"),
        ({"qwen2.attention.head_count": 3}, "3 heads"),
        ({"qwen2.attention.head_count": [4, 4]}, "num_attention_heads is '[4, 4]'"),
        ({"qwen2.attention.sliding_window": 64}, "sliding window"),
        ({"qwen2.attention.key_length": 16}, "head_dim 16"),
        ({"qwen2.attention.value_length": 16}, "value_length 16"),
        ({"qwen2.rope.dimension_count": 4}, "dimension_count 4"),
        ({"qwen2.rope.scaling.type": "longrope", "qwen2.rope.scaling.factor": 4.0}, "longrope"),
        ({"general.alignment": 3}, "general.alignment is 3"),
    ],
)
def test_metadata_that_is_not_supported(metadata, words, file, tmp_path):
    assert words in refused(copied(file, tmp_path / "m.gguf", metadata=metadata))


def test_another_architecture(file, tmp_path):
    message = refused(copied(file, tmp_path / "m.gguf", arch="bloom"))
    assert "architecture is 'bloom'" in message and FAMILIES["qwen2"].GGUF in message


def test_tensors_that_are_missing_or_too_many(file, tmp_path):
    assert "'model.norm.weight' is missing" in refused(
        copied(file, tmp_path / "a.gguf", tensors={"output_norm.weight": None})
    )
    extra = {"rope_freqs.weight": (np.ones(4, np.float32), TYPES.F32)}
    assert "'rope_freqs.weight' is unexpected" in refused(copied(file, tmp_path / "b.gguf", tensors=extra))
    assert "no embeddings" in refused(copied(file, tmp_path / "c.gguf", tensors={"token_embd.weight": None}))


def test_files_that_are_none(file, tmp_path, monkeypatch):
    (tmp_path / "text.gguf").write_bytes(b"hello, this is no model")
    assert "does not begin with 'GGUF'" in refused(tmp_path / "text.gguf")
    (tmp_path / "empty.gguf").touch()
    assert "cut short" in refused(tmp_path / "empty.gguf")
    for version in (1, 4, 3 << 24):
        path = tmp_path / f"{version}.gguf"
        path.write_bytes(b"GGUF" + version.to_bytes(4, "little") + file.read_bytes()[8:])
        assert f"GGUF of version {version}" in refused(path)
    with pytest.raises(CheckpointError, match="Did you mean .*model-F32.gguf"):
        resolve_model(file.parent)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ArgumentError, match=r"pip install 'paddle-finetune\[gguf\]'"):
        resolve_model(file)


def test_one_message_by_command(file, tmp_path, capsys):
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-1000])
    assert finetune("generate", tmp_path / "cut.gguf", "--prompt", "Hi") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/cut.gguf: the file is damaged") and "cut short" in error
    assert error.count("\n") == 1


def test_every_cut_is_noticed(file, tmp_path):
    raw = file.read_bytes()
    start = read_header(file).data_start
    path = tmp_path / "m.gguf"
    for size in [*range(0, start, 997), start, start + 5, len(raw) - 1]:
        path.write_bytes(raw[:size])
        assert "cut short" in refused(path)
    path.write_bytes(raw + b"\0" * 64)
    assert "where its tensors end" in refused(path)


@given(place=st.floats(0, 1), value=st.integers(0, 255), width=st.sampled_from([1, 4, 8]))
def test_damaged_headers_are_errors_or_still_models(file, tmp_path, place, value, width):
    raw = bytearray(file.read_bytes())
    start = int(place * (read_header(file).data_start - width))
    raw[start : start + width] = bytes([value]) * width
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    try:
        tensors = open_tensors(resolve_model(path))
    except CheckpointError:
        return
    assert tensors.read("model.norm.weight").shape == (32,)


# -- tokens ------------------------------------------------------------------------------------------------------------


def tokenizer_of(file: Path, tmp_path: Path, **changes: list) -> Tokenizer:
    """Of a copy with other lists."""
    metadata = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    source = resolve_model(copied(file, tmp_path / "m.gguf", metadata=metadata))
    return Tokenizer.from_folder(source.tokenizer_folder)


def test_tokens_are_what_their_types_say(file, tmp_path):
    reader = gguf.GGUFReader(file)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    assert tokens[403:] == [f"[PAD{number}]" for number in range(403, 416)]
    tokens[403], kinds[403] = "<tool_call>", gguf.TokenType.USER_DEFINED
    tokens[404], kinds[404] = "<|fim|>", gguf.TokenType.CONTROL
    kinds[405] = gguf.TokenType.CONTROL  # a filler all the same, as in early files
    path = copied(
        file, tmp_path / "m.gguf", metadata={"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    )
    tokenizer = Tokenizer.from_folder(resolve_model(path).tokenizer_folder)
    assert tokenizer.encode("<tool_call><|fim|>") == [403, 404]
    assert 405 not in tokenizer.encode("[PAD405]")
    assert tokenizer.all_special_ids == [400, 401, 402, 404]
    assert tokenizer.decode([403, 404], skip_special_tokens=True) == "<tool_call>"


def test_more_tokens_than_embeddings(file, tmp_path):
    reader = gguf.GGUFReader(file)
    tokens, kinds = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    with pytest.raises(CheckpointError, match="ids up to 416, and 416 tokens have an embedding"):
        tokenizer_of(file, tmp_path, tokens=[*tokens, "more"], token_type=[*kinds, 1])


def test_markers_amid_the_words(file, tmp_path):
    reader = gguf.GGUFReader(file)
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    tokens[399], tokens[401] = tokens[401], "~~~"  # the last word gives way to a marker
    kinds[399], kinds[401] = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    merges = reader.fields["tokenizer.ggml.merges"].contents()[:-1]
    changes = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": merges}
    tokenizer = Tokenizer.from_folder(
        resolve_model(copied(file, tmp_path / "m.gguf", metadata=changes)).tokenizer_folder
    )
    assert tokenizer.encode("<|im_start|><|im_end|>") == [399, 402]
    assert tokenizer.all_special_ids == [399, 400, 402]


def test_named_templates_and_ends(file, tmp_path):
    changes = {
        "tokenizer.chat_template.tool_use": "{{ tools }}",
        "tokenizer.ggml.eot_token_id": 401,
        "tokenizer.ggml.add_bos_token": True,
    }
    source = resolve_model(copied(file, tmp_path / "m.gguf", metadata=changes))
    tokenizer = Tokenizer.from_folder(source.tokenizer_folder)
    assert tokenizer.templates["tool_use"].source == "{{ tools }}" and tokenizer.chat_template == CHATML
    assert json.loads(source.generation_file.read_text())["eos_token_id"] == [402, 401]
    assert tokenizer.special_tokens["bos_token"] == "<|endoftext|>"


@pytest.mark.parametrize(
    "template, end",
    [(CHATML, 402), (CHATML.replace("<|im_end|>", "<|endoftext|>"), 400), ("{{ messages[0]['content'] }}", 402)],
)
def test_exports_end_where_the_template_ends_a_turn(template, end, tmp_path):
    folder = tiny_model(tmp_path / "m")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", config | {"chat_template": template})
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    fields = gguf.GGUFReader(exported(folder, tmp_path / "gguf")).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == end
