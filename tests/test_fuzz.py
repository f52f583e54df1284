"""Commands on recipes, rows, templates, model folders and chats that somebody broke, by chance or on purpose.

Each case ends with exit code 0, or with 2 and one message; never with a traceback, and it always ends.
`python -m pytest tests/soak/test_fuzz.py` runs tens of thousands of cases.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune import files
from tests.fuzzing import JSON, damaged_bytes, damaged_json, file_as, json_bytes, judge
from tests.recipe.test_fuzz import KEYS, PIECES
from tests.tiny import CHATML, tiny_model

ROWS = [
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
    },
    {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}],
        "tools": [],
    },
    {
        "messages": [
            {"role": "user", "content": "w?"},
            {
                "role": "assistant",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
            },
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "It is 3."},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    },
    {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": [["q", "r"]]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s", "tools": "[]"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"},
    {
        "conversations": [{"from": "human", "value": "a"}],
        "chosen": {"from": "gpt", "value": "b"},
        "rejected": {"from": "gpt", "value": "c"},
    },
    {"prompt": "a", "system": "b"},
]
ROW_KEYS = (
    "role",
    "content",
    "train",
    "tool_calls",
    "function",
    "name",
    "arguments",
    "from",
    "value",
    "tools",
    "prompt",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, a sharded model, an adapter, rows and a recipe. Files are exchanged and put back."""
    import finetune.infer.engine  # noqa: F401, so that no case has to wait for paddle

    folder = tmp_path_factory.mktemp("fuzz")
    model = tiny_model(folder / "model")
    tiny_model(folder / "sharded", tied=False, max_shard_bytes=60_000)
    (folder / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    _write_adapter(folder / "adapter", model)
    for method, rows in (("sft", "rows.jsonl"), ("dpo", "rows.jsonl")):
        recipe = {
            "method": method,
            "model": {"path": str(model)},
            "data": {"train": [{"path": str(folder / rows)}], "max_length": 96},
            "training": {"output_dir": str(folder / "run"), "max_steps": 1},
        }
        (folder / f"{method}.yaml").write_text(json.dumps(recipe, indent=1))
    return folder


def _write_adapter(folder: Path, model: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    config |= {"base_model_name_or_path": str(model), "bias": "none", "lora_dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{prefix}.lora_A.weight"] = np.ones((2, 32), np.float32)
        tensors[f"{prefix}.lora_B.weight"] = np.ones((32, 2), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    """Nothing here has to outlive a power cut."""
    monkeypatch.setattr(files, "sync", lambda path: None)


# -- recipes ---------------------------------------------------------------------------------------------------

SECTIONS = {
    "model": ["path", "dtype"],
    "lora": ["rank", "alpha", "dropout", "target_modules", "variant"],
    "data": ["train", "eval", "eval_fraction", "max_length", "overlong", "train_on", "packing"],
    "training": [
        "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
        "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "seed", "save_steps", "save_total_limit",
        "shuffle", "recompute", "resume_from_checkpoint", "early_stopping_patience", "load_best_model_at_end",
    ],
    "dpo": ["beta", "loss_type", "label_smoothing", "reference"],
    "distributed": ["tensor_parallel_degree", "sharding"],
}  # fmt: skip
NAMES = tuple({name for names in SECTIONS.values() for name in names} | set(SECTIONS))


@given(st.data())
def test_recipes_of_damaged_values(place, data):
    recipe = json.loads((place / f"{data.draw(st.sampled_from(['sft', 'dpo']))}.yaml").read_text())
    content = json_bytes(data.draw(damaged_json(recipe, NAMES)))
    with file_as(place / "r.yaml", content):
        judge("train", place / "r.yaml", "--dry-run")


@given(st.data())
def test_recipes_of_damaged_text(place, data):
    content = (place / "sft.yaml").read_bytes()
    pieces = data.draw(st.lists(st.sampled_from(PIECES + KEYS), max_size=4).map("".join))
    content = data.draw(damaged_bytes(content + pieces.encode()))
    with file_as(place / "r.yaml", content):
        judge("train", place / "r.yaml", "--dry-run")


# An argument that is not UTF-8 reaches Python with halves of surrogate pairs in it.
ODD_TEXT = st.text(max_size=12) | st.text(st.characters(categories=["Cs", "Ll"]), max_size=4)
VALUES = JSON.map(json.dumps) | ODD_TEXT | st.sampled_from(["1e-4", "all-linear", "null", "[a]", "{", "*a"])


@given(st.lists(st.tuples(st.sampled_from([*SECTIONS, "x"]), st.sampled_from(NAMES), VALUES), max_size=3))
def test_overrides(place, triples):
    judge("train", place / "sft.yaml", *(f"{section}.{name}={value}" for section, name, value in triples), "--dry-run")


@given(st.lists(ODD_TEXT | st.sampled_from(["--nproc", "0", "--master", ":", "-n", "--"]), max_size=4))
def test_arguments(place, words):
    judge("preview", place / "sft.yaml", *words)


# -- rows ------------------------------------------------------------------------------------------------------


@given(st.data())
def test_rows_of_damaged_values(place, data):
    rows = data.draw(st.lists(st.sampled_from(ROWS).flatmap(lambda row: damaged_json(row, ROW_KEYS)), max_size=3))
    method = data.draw(st.sampled_from(["sft", "dpo"]))
    with file_as(place / "rows.jsonl", b"".join(json_bytes(row) + b"\n" for row in [*rows, ROWS[0]])):
        judge("preview", place / f"{method}.yaml", "--json")


@given(st.data())
def test_files_of_rows_with_damage(place, data):
    content = b"".join(json_bytes(row) + b"\n" for row in data.draw(st.lists(st.sampled_from(ROWS), max_size=3)))
    suffix = data.draw(st.sampled_from(["jsonl", "json", "csv", "jsonl.gz", "parquet", "arrow"]))
    path = place / f"r.{suffix}"
    with file_as(path, data.draw(damaged_bytes(content))):
        judge("preview", place / "sft.yaml", f"data.train=[{{path: {path}}}]")


@given(st.data())
def test_arrow_files_with_damage(place, data):
    import pyarrow
    import pyarrow.parquet

    kind = data.draw(st.sampled_from(["parquet", "arrow"]))
    whole = place / f"whole.{kind}"
    if not whole.exists():
        table = pyarrow.Table.from_pylist([ROWS[0], ROWS[1]])
        if kind == "parquet":
            pyarrow.parquet.write_table(table, whole)
        else:
            with pyarrow.ipc.new_stream(str(whole), table.schema) as writer:
                writer.write_table(table)
    path = place / f"r.{kind}"
    with file_as(path, data.draw(damaged_bytes(whole.read_bytes()))):
        judge("preview", place / "sft.yaml", f"data.train=[{{path: {path}}}]")


# -- templates -------------------------------------------------------------------------------------------------

STATEMENTS = [
    "{{ messages }}", "{{ messages[0].content * 99999999 }}", "{{ x }}", "{% for i in range(9**9) %}a{% endfor %}",
    "{{ ''.__class__.__mro__ }}", "{{ messages | tojson }}", "{% include 'x' %}", "{% import 'os' as o %}",
    "{% set a = 1 %}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ raise_exception('no') }}",
    "{{ 1 / 0 }}", "{{ 9**99999 }}", "{{ '%099999999d' % 1 }}", "{{ strftime_now('%Y') }}",
    "{{ cycler.__init__.__globals__ }}", "{% if %}", "{{", "{#", "{{ 'a' | center(999999999) }}",
    "{{ messages | groupby('role') }}", "{{ ('a' * 9999999) ~ ('b' * 9999999) }}",
    "{% for a in messages %}{% for b in messages %}{{ loop.previtem }}{% endfor %}{% endfor %}",
    "{{ namespace(a=1).a }}", "{{ 'a'.format(1) }}", "{{ '{0.__class__}'.format(1) }}",
    "{{ messages | map(attribute='__class__') | list }}", "{% generation %}a{% endgeneration %}", "{% break %}",
    "{{ lipsum(9999999) }}", "{{ [1] * 99999999 }}", "{{ 'abc' | wordwrap(0) }}",
    "{{ range(999999999) | list | length }}", "{{ 'a' | indent(999999999) }}", "{{ 'a'.ljust(999999999) }}",
    "{{ 'a' * 99999 | replace('a', 'b' * 99999) }}", "{{ dict(a=messages) | xmlattr }}",
    "{{ range(99999999) | sum }}", "{{ ('a,' * 9999999).split(',') | length }}",
    "{{ messages | sort(attribute='x') }}",
]  # fmt: skip


@given(st.data())
def test_templates(place, data):
    parts = data.draw(st.lists(st.sampled_from([CHATML, *STATEMENTS]) | st.text(max_size=5), max_size=4))
    content = "".join(parts).encode("utf-8", "surrogatepass")
    if data.draw(st.booleans()):
        content = data.draw(damaged_bytes(content))
    with file_as(place / "model" / "chat_template.jinja", content):
        judge("preview", place / "sft.yaml", "--json")


# -- model folders ---------------------------------------------------------------------------------------------


def export(place: Path, folder: str, *options: str) -> None:
    shutil.rmtree(place / "out", ignore_errors=True)
    judge("export", place / folder, place / "out", *options)


CONFIG_KEYS = ("rope_parameters", "rope_scaling", "head_dim", "layer_types", "quantization_config", "dtype", "auto_map")


@given(st.data())
def test_model_configs(place, data):
    path = place / "model" / data.draw(st.sampled_from(["config.json", "generation_config.json"]))
    value = data.draw(damaged_json(json.loads(path.read_text()), CONFIG_KEYS))
    with file_as(path, json_bytes(value)):
        export(place, "model", "--format", data.draw(st.sampled_from(["hf", "paddle"])))


@given(st.data())
def test_adapter_configs(place, data):
    path = place / "adapter" / "adapter_config.json"
    with file_as(path, json_bytes(data.draw(damaged_json(json.loads(path.read_text()), ("use_dora", "rank_pattern"))))):
        export(place, "adapter", "--format", data.draw(st.sampled_from(["hf", "peft"])))


TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
]


@given(st.data())
def test_tokenizer_files(place, data):
    path = place / "model" / data.draw(st.sampled_from(TOKENIZER_FILES))
    value = json.loads(path.read_text()) if path.exists() else {"<|x|>": 403, "eos_token": "<|im_end|>"}
    content = json_bytes(data.draw(damaged_json(value, ("chat_template", "added_tokens_decoder", "pad_token"))))
    with file_as(path, content):
        command = data.draw(st.sampled_from(["preview", "export"]))
        judge("preview", place / "sft.yaml") if command == "preview" else export(place, "model")


@given(st.data())
def test_files_of_a_model_folder_with_damage(place, data):
    names = [
        f"model/{name}" for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    ]
    names += ["model/merges.txt", "sharded/model.safetensors.index.json", "sharded/model-00001-of-00002.safetensors"]
    names += ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    path = place / data.draw(st.sampled_from(names))
    before = path.read_bytes() if path.exists() else b"{}"
    with file_as(path, data.draw(damaged_bytes(before))):
        export(place, path.parent.name)


@given(st.data())
def test_safetensors_headers(place, data):
    path = place / "model" / "model.safetensors"
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json_bytes(data.draw(damaged_json(json.loads(whole[8 : 8 + length]), ("__metadata__", "data_offsets"))))
    lie = data.draw(st.sampled_from([0, 0, 0, 1, -1, 2**40, 2**63]))
    claimed = min(max(0, len(header) + lie), 2**64 - 1)
    with file_as(path, struct.pack("<Q", claimed) + header + whole[8 + length :]):
        export(place, "model")


@given(st.data())
def test_shard_indexes(place, data):
    path = place / "sharded" / "model.safetensors.index.json"
    with file_as(
        path, json_bytes(data.draw(damaged_json(json.loads(path.read_text()), ("weight_map", "lm_head.weight"))))
    ):
        export(place, "sharded")


# -- chats -----------------------------------------------------------------------------------------------------


@given(st.data())
def test_inputs_of_generate(place, data):
    values = st.sampled_from(ROWS).flatmap(lambda row: damaged_json(row, ROW_KEYS))
    content = b"".join(json_bytes(row) + b"\n" for row in data.draw(st.lists(values, min_size=1, max_size=2)))
    if data.draw(st.booleans()):
        content = data.draw(damaged_bytes(content))
    options = data.draw(st.sampled_from([[], ["--raw"], ["--on-bad-row", "skip"], ["--system", "s"]]))
    with file_as(place / "in.jsonl", content):
        judge("generate", place / "model", "--input", place / "in.jsonl", "--max-new-tokens", 1, *options)


@given(ODD_TEXT, st.sampled_from([[], ["--raw"], ["--system", "\0"], ["--system", "\udcff"], ["--top-p", "0.5"]]))
def test_prompts_of_generate(place, text, options):
    judge("generate", place / "model", "--prompt", text, "--max-new-tokens", 1, *options)
