"""CONTRIBUTING.md says which files to touch to add something: done here in a scratch copy of the package, and run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.runs import steps, write_recipe

ROOT = Path(__file__).parents[1]

# What a contributor writes: by file, what stands there and what it becomes.
Patch = Mapping[str, tuple[str, str]]

FORM: Patch = {
    "finetune/rows/formats.py": (
        """FORMS: dict[str, Form] = {
    form.name: form
    for form in (
""",
        """def _questions(row: Row) -> Conversation:
    question = {"role": "user", "content": row.text("question")}
    return Conversation([question, {"role": "assistant", "content": row.text("answer")}], None, row.source)


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("questions", CONVERSATION, (("question", "answer"),), (), _questions, '{"question", "answer"}'),
""",
    )
}
# Llama is Qwen2 without biases; PaddleNLP has a model of its own for it.
FAMILY: Patch = {
    "finetune/model/family.py": (
        "FAMILIES: dict[str, type[Architecture]] = {family.MODEL_TYPE: family for family in (Qwen2,)}\n",
        """@dataclass(frozen=True, kw_only=True)
class Llama(Qwen2):
    MODELS: ClassVar[str] = "Llama models"
    MODEL_TYPE: ClassVar[str] = "llama"
    ARCHITECTURE: ClassVar[str] = "LlamaForCausalLM"
    PADDLE_BODY: ClassVar[str] = "llama"
    GGUF: ClassVar[str] = "llama"
    GGUF_TOKENIZER: ClassVar[str] = "gpt-2"

    def layer_linears(self) -> dict[str, Linear]:
        return {name: Linear(linear.inputs, linear.outputs) for name, linear in super().layer_linears().items()}

    def refused(self, raw: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
        if raw.get("attention_bias") or raw.get("mlp_bias"):
            yield "biases", None


FAMILIES: dict[str, type[Architecture]] = {family.MODEL_TYPE: family for family in (Qwen2, Llama)}
""",
    ),
    "finetune/model/build.py": (
        "    settings = Qwen2Config(**known)\n",
        """    from paddlenlp.transformers import LlamaConfig

    settings = {"qwen2": Qwen2Config, "llama": LlamaConfig}[config.MODEL_TYPE](**known)
""",
    ),
    "finetune/compute/attention.py": (
        """use_cache,
                      attn_mask_startend_row_indices=None):  # fmt: skip
""",
        """use_cache,
                      alibi=None, attn_mask_startend_row_indices=None, npu_is_casual=False):  # fmt: skip
    self.attention_dropout = 0.0
""",
    ),
}
LAYOUT: Patch = {
    "finetune/export/formats.py": ('    "hf": NUMBERS,\n', '    "hf": NUMBERS,\n    "halves": ("float16",),\n'),
    "finetune/export/export.py": ('_WRITERS = {"hf": write_hf,', '_WRITERS = {"halves": write_hf, "hf": write_hf,'),
}


class Scratch:
    """A copy of the package with patches, and its command."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(ROOT / "finetune", folder / "finetune", ignore=shutil.ignore_patterns("__pycache__"))

    def apply(self, patch: Patch) -> None:
        for file, (old, new) in patch.items():
            text = (self.folder / file).read_text(encoding="utf-8")
            assert text.count(old) == 1, f"{file} has not one {old!r}"
            (self.folder / file).write_text(text.replace(old, new), encoding="utf-8")

    def finetune(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "finetune", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(self.folder)},
        )


@pytest.fixture()
def scratch(tmp_path) -> Scratch:
    return Scratch(tmp_path)


# What may be touched at most, and where it is shown to be enough.
LIMITS = {
    "a loss over pairs": (1, "tests/compute/test_losses.py", "test_a_new_loss_is_one_entry_in_one_file"),
    "a form of rows": (1, "tests/test_contributing.py", "test_a_form_of_rows"),
    "a family of models": (4, "tests/test_contributing.py", "test_a_family_of_models"),
    "a layout of `export`": (2, "tests/test_contributing.py", "test_a_layout"),
}


@pytest.mark.parametrize("what", LIMITS)
def test_the_page_names_few_files_and_a_test_shows_them(what):
    most, file, name = LIMITS[what]
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    ((touch, _),) = re.findall(rf"^\| {re.escape(what)} \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    assert 0 < len(re.findall(r"`finetune/.*?`", touch)) <= most
    assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")
    assert file in page


def test_a_form_of_rows(scratch, tiny_folder):
    scratch.apply(FORM)
    question, answer = "Name a prime number.", "7"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rows = {"new": {"question": question, "answer": answer}, "old": {"messages": messages}}
    for name, row in rows.items():
        (scratch.folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    recipe = {"method": "sft", "model": {"path": str(tiny_folder)}, "data": {"train": "new.jsonl", "max_length": 128}}
    (scratch.folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    shown = {}
    for name, format in (("new", "questions"), ("new", "auto"), ("old", "messages")):
        source = f"data.train=[{{path: {name}.jsonl, format: {format}}}]"
        run = scratch.finetune("preview", "recipe.yaml", source, "--json")
        assert run.returncode == 0, run.stderr
        shown[name, format] = {key: value for key, value in json.loads(run.stdout).items() if key != "source"}
    assert shown["new", "questions"] == shown["new", "auto"] == shown["old", "messages"]
    run = scratch.finetune("train", "recipe.yaml", "data.train.0.format=qestions", "--dry-run")
    assert run.returncode == 2 and "Did you mean questions?" in run.stderr


def test_a_family_of_models(scratch, tiny_folder):
    """Llama gives the losses of a Qwen2 whose biases are 0: training, merging and GGUF, to the last bit."""
    scratch.apply(FAMILY)
    qwen, llama = scratch.folder / "qwen", scratch.folder / "llama"
    for folder in (qwen, llama):
        shutil.copytree(tiny_folder, folder)
    tensors = load_file(qwen / "model.safetensors")
    zeroed = {name: 0 * tensor if name.endswith(".bias") else tensor for name, tensor in tensors.items()}
    save_file(zeroed, qwen / "model.safetensors", metadata={"format": "pt"})
    without = {name: tensor for name, tensor in zeroed.items() if not name.endswith(".bias")}
    save_file(without, llama / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (llama / "config.json").write_text(json.dumps(config), encoding="utf-8")
    recipe = write_recipe(scratch.folder, qwen, max_steps=2)
    lora = "lora={rank: 4, alpha: 8}"  # the biases of the other stay 0
    losses = []
    for folder in (qwen, llama):
        run = scratch.finetune("train", recipe, f"model.path={folder}", f"training.output_dir={folder.name}-run", lora)
        assert run.returncode == 0, run.stderr
        losses.append([row["loss"] for row in steps(scratch.folder / f"{folder.name}-run")])
    assert losses[0] == losses[1]
    run = scratch.finetune("export", "llama-run", "out", "--format", "gguf", "--verify")
    assert run.returncode == 0 and "Verified" in run.stdout, run.stderr


def test_a_layout(scratch, tiny_folder):
    scratch.apply(LAYOUT)
    run = scratch.finetune("export", tiny_folder, "out", "--format", "halves", "--dtype", "float16", "--verify")
    assert run.returncode == 0 and "Verified" in run.stdout, run.stderr
    run = scratch.finetune("export", tiny_folder, "out", "--format", "halves", "--dtype", "float32")
    assert run.returncode == 2 and "--dtype" in run.stderr
