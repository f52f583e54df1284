"""Reading recipes: defaults of the contract, all faults at once with their places, overrides, and where data is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune.errors import RecipeError
from finetune.recipe.load import MAX_BYTES, dump_recipe, load_recipe
from finetune.recipe.shipped import SHIPPED

MINIMAL = "method: sft\nmodel: {path: base}\ndata: {train: [{path: rows.jsonl}]}\n"
CONTRACT = """\
method: sft                      # sft | dpo
model:
  path: Qwen/Qwen2-1.5B-Instruct # as MODEL above; the base model
  dtype: auto
lora:
  rank: 16
  alpha: 32
  dropout: 0.0
  target_modules: all-linear     # or a list: [q_proj, v_proj]
  variant: lora
data:
  train:
    - path: data/train.jsonl
      format: auto
  eval: []
  max_length: 2048
  overlong: truncate
  train_on: responses
  packing: false
training:
  output_dir: outputs/my-run
  max_steps: 100
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 1
  learning_rate: 1.0e-4
  lr_scheduler_type: cosine
  warmup_steps: 0
  weight_decay: 0.0
  max_grad_norm: 1.0
  seed: 42
  logging_steps: 1
  save_steps: 50
  save_total_limit: 2
  shuffle: true
  recompute: false
  resume_from_checkpoint: auto
distributed:
  tensor_parallel_degree: 1
  pipeline_parallel_degree: 1
  sharding: ""
  sharding_parallel_degree: 1
"""
DPO = "dpo:\n  beta: 0.1\n  loss_type: sigmoid\n  label_smoothing: 0.0\n  precompute_ref_log_probs: true\n"


@pytest.fixture(autouse=True)
def in_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def load(text: str | bytes, *overrides: str):
    file = Path("r.yaml")
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe("r.yaml", overrides)


def faults(text: str | bytes, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load(text, *overrides)
    assert error.value.exit_code == 2
    return [str(fault) for fault in error.value.faults]


def test_the_contract_example_is_all_defaults():
    full = load(CONTRACT)
    short = load(
        "method: sft\nmodel: {path: Qwen/Qwen2-1.5B-Instruct}\nlora: {}\ndata: {train: data/train.jsonl}\n"
        "training: {output_dir: outputs/my-run, max_steps: 100}\n"
    )
    assert full == short
    assert full.training.learning_rate == 1e-4 and full.dpo is None


def test_the_contract_example_as_dpo():
    recipe = load(CONTRACT.replace("method: sft ", "method: dpo ") + DPO)
    assert recipe.dpo.beta == 0.1
    without = load(CONTRACT.replace("method: sft ", "method: dpo "))
    assert without.dpo == recipe.dpo


def test_what_a_minimal_recipe_is_filled_with():
    recipe = load(MINIMAL)
    assert recipe.lora is None and recipe.training.max_steps is None
    assert recipe.training.num_train_epochs == 3.0
    assert recipe.training.output_dir == "outputs/r"
    assert recipe.training.per_device_eval_batch_size == 2 and recipe.training.eval_steps is None


def test_defaults_that_follow_other_keys():
    recipe = load(MINIMAL, "training.per_device_train_batch_size=8", "data.eval_fraction=0.1")
    assert recipe.training.per_device_eval_batch_size == 8
    assert recipe.training.eval_steps == recipe.training.save_steps == 50
    assert load(MINIMAL, "lora.variant=lora_plus").lora.loraplus_lr_ratio == 16
    simpo = load(MINIMAL, "method=dpo", "dpo.loss_type=simpo").dpo
    assert (simpo.simpo_gamma, simpo.reference_free, simpo.precompute_ref_log_probs) == (0.5, True, False)
    assert load(MINIMAL, "method=dpo", "dpo.loss_type=dpop").dpo.dpop_lambda == 50
    assert load(MINIMAL, "distributed.sharding=stage1").distributed.sharding_parallel_degree == -1


def test_all_faults_at_once_in_the_order_of_the_file():
    text = CONTRACT.replace("rank: 16", "rank: 0").replace("max_length: 2048", "max_length: 2048.5")
    text = text.replace("  learning_rate: 1.0e-4", "  learnig_rate: 1.0e-4").replace("seed: 42", "seed: -1")
    text = text.replace("cosine", "cosin") + "rank: 3\n"
    found = faults(text, "model.dtype=bf16")
    assert [fault.split(":")[1] for fault in found[:-1]] == ["6", "16", "25", "26", "30", "42"]
    for fault, words in zip(found, ("lora.rank is 0", "2048.5", "training.learning_rate?", "Did you mean cosine?")):
        assert words in fault
    assert found[-1].startswith("argument 'model.dtype=bf16': model.dtype is 'bf16'")


def test_single_and_joint_faults_come_together():
    found = faults(MINIMAL + "training: {max_steps: 1, num_train_epochs: 1, seed: x}\ndpo: {}\n")
    assert len(found) == 3
    assert any("both set" in fault for fault in found) and any("dpo is set" in fault for fault in found)


def test_a_joint_rule_is_silent_on_a_faulty_key():
    assert len(faults(MINIMAL + "training: {max_steps: 0, num_train_epochs: 1}\n")) == 1


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "r.yaml: the recipe is empty"),
        ("# only a comment\n", "r.yaml: the recipe is empty"),
        ("- a\n", "r.yaml:1: this is not a mapping"),
        ("just text\n", "r.yaml:1: this is not a mapping"),
        ("a: b: c\n", "r.yaml:1: this is not valid YAML"),
        (b"method: sft\n# \xff\n", "r.yaml:2: byte 0xFF is not UTF-8"),
        ("a: 1".encode("utf-16"), "r.yaml:1: byte 0xFF is not UTF-8"),
        (b"#" * (MAX_BYTES + 1), f"r.yaml: is larger than {MAX_BYTES} bytes"),
        (MINIMAL + "lora:\n", "r.yaml:4: lora is empty. Write 'lora: {}'"),
        (MINIMAL + "training:\n", "r.yaml:4: training has no value"),
        (MINIMAL + "training:\n  seed:\n", "r.yaml:5: training.seed has no value"),
        (MINIMAL + "training: {per_device_train_batch_size: x}\n", "r.yaml:4: training.per_device_train_batch_size"),
        (MINIMAL + "training: 5\n", "r.yaml:4: training is 5. It must be a section"),
        (MINIMAL + "training.seed: 5\n", "r.yaml:4: training.seed is not a recipe key. Keys are nested"),
        (MINIMAL + 'training: {learning_rate: "1e-4"}\n', "r.yaml:4: training.learning_rate is the text '1e-4'"),
        (MINIMAL + "training: {shuffle: yes}\n", "r.yaml:4: training.shuffle is 'yes'. It must be true or false"),
        (MINIMAL + "training: {learning_rate: .nan}\n", "r.yaml:4: training.learning_rate is nan"),
        (
            MINIMAL + "training: {resume_from_checkpoint: true}\n",
            "r.yaml:4: training.resume_from_checkpoint is true. It must be auto, never, or a checkpoint folder.",
        ),
        (MINIMAL + "training: {max_steps: 1e3}\n", "r.yaml:4: training.max_steps is 1000.0. It must be a whole number"),
        (MINIMAL.replace("[{path: rows.jsonl}]", "[]"), "r.yaml:3: data.train is an empty list"),
        (MINIMAL.replace("path: rows", "pth: rows"), "r.yaml:3: data.train[0].path is missing"),
        (MINIMAL.replace("method: sft\n", ""), "r.yaml: method is missing. Write 'method: sft' or"),
        (MINIMAL.replace("{path: base}", "{}"), "r.yaml:2: model.path is missing"),
        (MINIMAL.replace("rows.jsonl", "*.jsonl"), "r.yaml:3: this is not valid YAML"),
        (MINIMAL + "method: sft\n", "r.yaml:4: method is given twice, first in line 1"),
    ],
)
def test_messages_name_place_finding_and_fix(text, fault):
    (first, *more) = faults(text)
    assert first.startswith(fault)
    assert not more or "pth:" in text


def test_byte_order_mark_and_windows_line_ends():
    assert load(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode()) == load(MINIMAL)


def test_files_that_are_none(tmp_path):
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text(MINIMAL)
    with pytest.raises(RecipeError, match="Did you mean run/recipe.yaml"):
        load_recipe("run")
    for name in ("", "a\0b", "x" * 300, "no/such/file.yaml"):
        with pytest.raises(RecipeError):
            load_recipe(name)


def test_overrides_win_and_the_last_one_most():
    recipe = load(CONTRACT, "training.learning_rate=2e-4", "lora.rank=8", "lora.rank=32", "training.seed=7")
    assert (recipe.training.learning_rate, recipe.lora.rank, recipe.training.seed) == (2e-4, 32, 7)


def test_overrides_take_yaml_values():
    recipe = load(CONTRACT, "lora.target_modules=[q_proj, v_proj]", "data={train: [{path: a}], packing: true}")
    assert recipe.lora.target_modules == ["q_proj", "v_proj"] and recipe.data.packing
    assert load(CONTRACT, "model.path='1e-4'").model.path == "1e-4"
    assert load(CONTRACT, "model.path=a=b").model.path == "a=b"


@pytest.mark.parametrize(
    ("value", "paths"), [("a.jsonl", ["a.jsonl"]), ("[a, b]", ["a", "b"]), ("{path: a}", ["a"]), ("[{path: a}]", ["a"])]
)
def test_sources_may_be_short(value, paths):
    assert [source.path for source in load(CONTRACT, f"data.train={value}").data.train] == paths
    assert [source.path for source in load(CONTRACT, f"data.eval={value}").data.eval] == paths


@pytest.mark.parametrize("value", ["a", "[a]", "{path: a}", "[{path: a}]"])
def test_overrides_reach_into_short_sources(value):
    text = MINIMAL.replace("[{path: rows.jsonl}]", value)
    assert [source.path for source in load(text, "data.train.0.path=b").data.train] == ["b"]
    assert load(MINIMAL, f"data.train={value}", "data.train.0.samples=5").data.train[0].samples == 5
    for override in ("data.train.1.path=b", "data.train.5.0=b", "data.train.x.path=b"):
        (fault,) = faults(text, override)
        item = override.split(".")[2]
        assert fault == f"argument {override!r}: data.train is a list of 1, which has no item {item!r}"


def test_null_makes_no_section():
    recipe = load(MINIMAL, "lora.rank=null", "dpo.beta=null", "training.seed=null")
    assert recipe == load(MINIMAL)
    assert recipe.lora is None
    assert load(MINIMAL, "training.save_total_limit=null").training.save_total_limit is None
    assert faults(MINIMAL + "lora:\n", "lora.rank=null") == faults(MINIMAL + "lora:\n")
    assert load(MINIMAL + "lora:\n", "lora.rank=4").lora.rank == 4
    assert load(MINIMAL + "lora:\n", "lora=null").lora is None


def test_overrides_reach_into_lists_and_take_keys_out():
    recipe = load(CONTRACT, "data.train.0.samples=5", "lora=null", "training.save_total_limit=null")
    assert recipe.data.train[0].samples == 5 and recipe.lora is None and recipe.training.save_total_limit is None
    assert load(CONTRACT, "training.seed=").training.seed == 42


def test_overrides_displace_what_they_exclude():
    assert load(CONTRACT, "training.num_train_epochs=1").training.max_steps is None
    epochs = MINIMAL + "training: {num_train_epochs: 2, warmup_ratio: 0.1}\n"
    training = load(epochs, "training.max_steps=3", "training.warmup_steps=1").training
    assert (training.num_train_epochs, training.warmup_ratio) == (None, 0.0)
    found = faults(epochs, "training.max_steps=3", "training.num_train_epochs=1")
    assert len(found) == 1 and found[0].startswith("argument 'training.num_train_epochs=1'")


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("nonsense", "this is not KEY=VALUE"),
        ("=3", "this is not KEY=VALUE"),
        (".a=3", "this is not KEY=VALUE"),
        ("0=3", "this is not KEY=VALUE"),
        ("lr=1", "Did you mean training.learning_rate?"),
        ("training.lr=1", "Did you mean training.learning_rate?"),
        ("traning.seed=1", "Did you mean training?"),
        ("training.seed.x=1", "training.seed is a value"),
        ("data.train.7.path=x", "is a list of 1"),
        ("training.seed=[1", "not valid YAML"),
        ("training.seed=!!int 3", "tag"),
        ("training.seed=abc", "the text 'abc'"),
        ("data.train=[{pth: x}]", "data.train[0].path is missing"),
        ("model.path=a\udcffb", "not text"),
        ("model.path=a\nb", "not text"),
        (f"a.{'9' * 5000}=1", "a is not a recipe key"),
        (f"data.train.{'9' * 5000}.path=x", "data.train is a list of 1, which has no item '9999"),
    ],
)
def test_wrong_overrides_name_the_argument(override, fault):
    found = faults(CONTRACT, override)
    assert all(text.startswith("argument ") for text in found) and fault in found[0]


def test_data_is_looked_for_here_then_beside_the_recipe(tmp_path):
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "r.yaml").write_text(MINIMAL)
    assert load_recipe("sub/r.yaml").data.train[0].path == "rows.jsonl"
    (folder / "rows.jsonl").write_text("{}\n")
    assert load_recipe("sub/r.yaml").data.train[0].path == "sub/rows.jsonl"
    assert load_recipe("sub/r.yaml", ["data.train=*.jsonl"]).data.train[0].path == "sub/*.jsonl"
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert load_recipe("sub/r.yaml").data.train[0].path == "rows.jsonl"
    assert load_recipe("sub/r.yaml", ["data.train=/abs/x"]).data.train[0].path == "/abs/x"


def test_example_data_is_found_from_anywhere_and_written_without_this_installation():
    recipe = load_recipe("qwen2-0.5b_sft_lora")
    assert recipe.data.train[0].path == str(SHIPPED / "data/examples/sft.jsonl")
    written = dump_recipe(recipe)
    assert "path: data/examples/sft.jsonl" in written and str(SHIPPED) not in written
    assert load(written) == recipe


def test_dump_has_the_order_of_the_contract():
    text = CONTRACT.replace("method: sft ", "method: dpo ").replace("distributed:", DPO + "distributed:")
    dumped = dump_recipe(load(text))

    def keys(yaml: str) -> list[tuple[str, str]]:
        section, found = "", []
        for indent, key in re.findall(r"^( *)(?:- )?(\w+):", yaml, re.MULTILINE):
            section = section if indent else key
            found.append((section, key))
        return found

    contract = keys(text)
    assert [key for key in keys(dumped) if key in contract] == contract
    assert load(dumped) == load(text)


def test_frozen_and_strict():
    recipe = load(MINIMAL)
    with pytest.raises(ValueError):
        recipe.training.seed = 3
