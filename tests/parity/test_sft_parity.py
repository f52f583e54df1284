"""`finetune train` against TRL's SFTTrainer: same folder, rows, order and hyperparameters, float32."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.parity.bench import (
    RELATIVE,
    ROOT,
    RUN,
    SHAPE,
    conversations,
    largest_difference,
    needs_reference,
    run_reference,
    steps_of,
    write_adapter,
    write_recipe,
    write_rows,
)
from tests.tiny import CHATML, tiny_model

pytestmark = [needs_reference, pytest.mark.timeout(900)]

# The template of Qwen2 with TRL's markers around what CONTRACT calls a response: its content and its <|im_end|>
MARKED = CHATML.replace(
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}",
)
# bitsandbytes on CPU takes moments' codes from 65,536 points between -1 and 1, so that none is below 1.6e-5 of the
# largest of its block; ours are the nearest, as in its kernel for GPUs (test_adam_parity.py).
LOOSER = {"optim": 3e-3}
CASES = {
    "full": {},
    "full_accumulated": {"accumulation": 4},
    "full_untied": {"untied": True},
    "lora": {"lora": True},
    "qlora": {"lora": True, "quantization": "nf4"},
    "full_8bit": {"optim": "adamw_bnb_8bit"},
    "lora_accumulated": {"lora": True, "accumulation": 4},
    "all_turns": {"mask": "assistant", "chat_template": MARKED, "accumulation": 4},
    "all_turns_lora": {"mask": "assistant", "chat_template": MARKED, "lora": True},
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    assert MARKED != CHATML
    folder = tmp_path_factory.mktemp("sft")
    tied = tiny_model(folder / "tied", shape=SHAPE)
    untied = tiny_model(folder / "untied", shape=SHAPE, tied=False, seed=1)
    adapter = write_adapter(folder / "adapter", tied, started=False)
    rows = write_rows(folder / "rows.jsonl", conversations(160, seed=0))
    found = {}
    for name, case in CASES.items():
        case = dict(case)
        model = untied if case.pop("untied", False) else tied
        job = RUN | {"model": str(model), "rows": str(rows), "mask": "completion"}
        if case.pop("lora", False):
            job["adapter"] = str(adapter)
        found[name] = job | case
    return folder, found


@pytest.fixture(scope="module")
def answers(jobs):
    folder, found = jobs
    return run_reference("ref_trl_sft.py", found, folder)


def recipe_of(folder, name, job):
    train_on = "last_response" if job["mask"] == "completion" else "responses"
    return write_recipe(folder / f"{name}.yaml", job, data={"train_on": train_on})


def finetune(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", CASES)
def test_every_step_agrees(jobs, answers, name, record_property):
    folder, found = jobs
    recipe = recipe_of(folder, name, found[name])
    finetune("train", str(recipe))
    ours, theirs = steps_of(recipe), answers[name]["steps"]
    for key in ("loss", "grad_norm"):
        worst = largest_difference(ours, theirs, key)
        record_property(key, worst)
        print(f"{name}: largest relative difference of {key} {worst:.1e}")
        assert worst <= max([RELATIVE, *(limit for key, limit in LOOSER.items() if key in found[name])])
    assert [row["learning_rate"] for row in ours] == pytest.approx([row["learning_rate"] for row in theirs], rel=1e-12)


@pytest.mark.parametrize("name", ["full", "all_turns"])
def test_trl_tokenizes_and_masks_the_same(jobs, answers, name):
    """TRL makes ids and labels by itself; ours come from `finetune preview`."""
    folder, found = jobs
    recipe = recipe_of(folder, f"{name}_preview", found[name])
    shown = [json.loads(line) for line in finetune("preview", str(recipe), "-n", "160", "--json").splitlines()]
    examples = answers[name]["examples"]
    assert len(shown) == len(examples) == 160
    for mine, other in zip(shown, examples):
        # A completion ends with <|im_end|>; the rendered conversation has the template's newline behind it
        length = len(other["input_ids"])
        assert mine["input_ids"][:length] == other["input_ids"], mine["source"]
        assert mine["labels"][:length] == other["labels"], mine["source"]
        assert len(mine["input_ids"]) - length == (1 if name == "full" else 0)
        assert set(mine["labels"][length:]) <= {-100}
