"""Everything that makes training cheap, on, against a loop that has none of it: the same losses, step by step.

The plain loop is PaddleNLP's forward as it comes over right-padded batches with an attention mask, logits of all
positions, cross-entropy or DPO's loss by its formula with a live reference model, and Paddle's own AdamW and clipping.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from finetune.model.adapters import LoraSettings
from finetune.model.load import load_model
from finetune.model.lora import add_lora
from finetune.model.runtime import paddle as bring_up
from tests.runs import finetune, steps, write_recipe, write_rows

ROWS, STEPS, BETA, SEED = 12, 10, 0.1, 42
SETTINGS = {
    "max_steps": STEPS,
    "shuffle": False,
    "lr_scheduler_type": "constant",
    "learning_rate": 3e-4,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "seed": SEED,
}
LORA = LoraSettings(rank=4, alpha=8.0)
TUNINGS = {"full": "null", "lora": f"{{rank: {LORA.rank}, alpha: {LORA.alpha}}}"}
# The rows of a micro-batch, the micro-batches of a step, and what is on besides what always is.
PARTS = "training.per_device_train_batch_size=3", "training.gradient_accumulation_steps=2"
WHOLE = f"training.per_device_train_batch_size={ROWS}", "data.packing=true"
VARIANTS = {"rows": (3, 2, PARTS), "packed, recompute": (ROWS, 1, (*WHOLE, "training.recompute=true"))}

Batch = list[dict]


def padded(sequences: list[dict]):
    """input_ids, attention_mask and labels (not shifted), int64 [B, L]."""
    paddle = bring_up()
    shape = len(sequences), max(len(s["input_ids"]) for s in sequences)
    ids, mask, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -100, np.int64)
    for row, sequence in enumerate(sequences):
        size = len(sequence["input_ids"])
        ids[row, :size], mask[row, :size], labels[row, :size] = sequence["input_ids"], 1, sequence["labels"]
    return tuple(paddle.to_tensor(x) for x in (ids, mask, labels))


def nll(model, sequences: list[dict]):
    """-log p of each token, float32 [B, L - 1], 0 where it is not trained on."""
    ids, mask, labels = padded(sequences)
    logits = model(input_ids=ids, attention_mask=mask)[0][:, :-1]
    return (
        bring_up().nn.functional.cross_entropy(logits, labels[:, 1:], ignore_index=-100, reduction="none").squeeze(-1)
    )


def sft_loss(model, reference) -> Callable[[Batch, Batch], object]:
    def loss(batch: Batch, step: Batch):
        tokens = sum(label != -100 for row in step for label in row["labels"])
        return nll(model, batch).sum() / tokens

    return loss


def dpo_loss(model, reference) -> Callable[[Batch, Batch], object]:
    paddle = bring_up()

    def margins(lm, batch: Batch):
        # Summed in float64: a sum of many tokens in float32 is already off by 1e-5 of the loss.
        sides = ([pair[side] for pair in batch] for side in ("chosen", "rejected"))
        chosen, rejected = (-nll(lm, side).astype("float64").sum(-1) for side in sides)
        return chosen - rejected

    def loss(batch: Batch, step: Batch):
        with paddle.no_grad():
            baseline = margins(reference, batch)
        advantage = BETA * (margins(model, batch) - baseline)
        # -log sigmoid; Paddle's log_sigmoid loses digits where a pair is far ahead (docs/log.md).
        return paddle.log1p(paddle.exp(-advantage)).sum() / len(step)

    return loss


def plain_losses(folder, rows: list[dict], make_loss, *, lora: bool, batch_size: int, accumulation: int) -> list[float]:
    paddle = bring_up()
    model, reference = (load_model(folder, training=True).model for _ in range(2))
    if lora:
        model = add_lora(model, LORA, seed=SEED)
    loss_of = make_loss(model, reference)
    trained = [p for p in model.parameters() if not p.stop_gradient]
    decayed = {
        p.name for n, p in model.named_parameters() if not n.endswith(("bias", "norm.weight", "layernorm.weight"))
    }
    optimizer = paddle.optimizer.AdamW(
        learning_rate=SETTINGS["learning_rate"],
        parameters=trained,
        weight_decay=SETTINGS["weight_decay"],
        apply_decay_param_fun=decayed.__contains__,
        grad_clip=paddle.nn.ClipGradByGlobalNorm(SETTINGS["max_grad_norm"]),
    )
    losses, size = [], batch_size * accumulation
    for number in range(STEPS):
        step = [rows[(number * size + i) % len(rows)] for i in range(size)]
        total = 0.0
        for start in range(0, size, batch_size):
            part = loss_of(step[start : start + batch_size], step)
            part.backward()
            total += float(part)
        optimizer.step()
        optimizer.clear_grad()
        losses.append(total)
    return losses


def write_pairs(path) -> None:
    draw = np.random.default_rng(0)
    words = "one two three four five six seven eight nine ten".split()
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(ROWS):
            prompt, chosen, rejected = (" ".join(draw.choice(words, draw.integers(1, 12))) for _ in range(3))
            row = {"prompt": f"say {prompt}", "chosen": chosen, "rejected": f"no {rejected}"}
            file.write(json.dumps(row) + "\n")


@pytest.fixture(params=["sft", "dpo"])
def job(request, tmp_path, tiny_folder, capsys):
    """(recipe, its rows as `finetune preview` shows them, the plain loss)."""
    path = write_recipe(tmp_path, tiny_folder, **SETTINGS)
    write_rows(tmp_path / "train.jsonl", ROWS)
    if request.param == "dpo":
        write_pairs(tmp_path / "train.jsonl")
        recipe = json.loads(path.read_text()) | {"method": "dpo", "dpo": {"beta": BETA}}
        path.write_text(json.dumps(recipe), encoding="utf-8")
    assert finetune("preview", path, "-n", ROWS, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == ROWS
    return path, rows, {"sft": sft_loss, "dpo": dpo_loss}[request.param]


@pytest.mark.parametrize("tuning", TUNINGS)
def test_all_on_equals_all_off(job, tuning, tmp_path, tiny_folder, monkeypatch):
    from finetune.compute import attention, forward

    # So that heads are cut into chunks and attention weights made anew, as only larger models need it.
    monkeypatch.setattr(forward, "CHUNK_ELEMENTS", 50 * 416)
    monkeypatch.setattr(attention, "KEPT_ATTENTION_BYTES", 20_000)
    recipe, rows, make_loss = job
    differences, plain = {}, {}
    for number, (name, (batch_size, accumulation, overrides)) in enumerate(VARIANTS.items()):
        size = batch_size, accumulation
        if size not in plain:
            options = {"lora": tuning == "lora", "batch_size": batch_size, "accumulation": accumulation}
            plain[size] = plain_losses(tiny_folder, rows, make_loss, **options)
        run = tmp_path / f"run-{number}"
        assert finetune("train", recipe, f"training.output_dir={run}", f"lora={TUNINGS[tuning]}", *overrides) == 0
        losses = [row["loss"] for row in steps(run)]
        assert len(losses) == STEPS and losses[-1] < losses[0]
        differences[name] = max(abs(a - b) / b for a, b in zip(losses, plain[size], strict=True))
    assert max(differences.values()) <= 1e-5, differences
