"""Runs over a stream of rows, by the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from finetune import console
from finetune.rows import stream
from finetune.rows.sources import Block
from finetune.train import prepare
from tests.invariants.test_sft import final_digest, losses_and_norms, train
from tests.runs import finetune, write_recipe, write_rows

STREAMED = ("data.streaming=true", "training.num_train_epochs=null")


def write_pairs(path: Path) -> Path:
    rows = [{"prompt": f"say {i}", "chosen": "yes " * (i % 5 + 1), "rejected": f"no {i}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_streamed_rows_train_as_prepared_ones_and_on_two_processes_as_on_one(tmp_path, tiny_folder):
    # 24 rows, 6 steps of 4 an epoch, in the order of the file
    recipe = write_recipe(tmp_path, tiny_folder, shuffle=False, max_steps=8)
    prepared = train(recipe, tmp_path / "prepared")
    streamed = train(recipe, tmp_path / "streamed", *STREAMED)
    assert final_digest(streamed) == final_digest(prepared)
    assert losses_and_norms(streamed) == losses_and_norms(prepared)
    # Each rank takes every second row.
    two = train(recipe, tmp_path / "two", *STREAMED, "training.per_device_train_batch_size=2", "--nproc", "2")
    assert losses_and_norms(two) == pytest.approx(losses_and_norms(prepared), rel=1e-5)


def test_pairs_go_on_where_a_run_ended(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=6, save_steps=3, lr_scheduler_type="constant")
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    overrides = [*STREAMED, "method=dpo", f"data.train.0.path={pairs}", "data.packing=true", "lora={rank: 4}"]
    whole = train(recipe, tmp_path / "whole", *overrides)
    parts = train(recipe, tmp_path / "parts", *overrides, "training.max_steps=3")
    train(recipe, parts, *overrides)
    assert final_digest(parts) == final_digest(whole)
    assert losses_and_norms(parts) == losses_and_norms(whole)


@pytest.mark.parametrize("options", [(), STREAMED, ("data.packing=true", "training.num_train_epochs=null")])
def test_a_mix_goes_on_where_a_run_ended(tmp_path, tiny_folder, options):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=6, save_steps=3, lr_scheduler_type="constant")
    few = write_rows(tmp_path / "few.jsonl", 5, seed=1)
    rows = tmp_path / "train.jsonl"
    overrides = [*options, f"data.train=[{{path: {rows}, weight: 3}}, {{path: {few}, weight: 1}}]", "lora={rank: 4}"]
    whole = train(recipe, tmp_path / "whole", *overrides)
    parts = train(recipe, tmp_path / "parts", *overrides, "training.max_steps=3")
    train(recipe, parts, *overrides)
    assert final_digest(parts) == final_digest(whole)
    assert losses_and_norms(parts) == losses_and_norms(whole)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=10, save_steps=3, per_device_train_batch_size=2)
    overrides = [*STREAMED, "data.packing=true", "lora={rank: 4, alpha: 8, dropout: 0.3}"]
    undisturbed = train(recipe, tmp_path / "undisturbed", *overrides)
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "finetune", "train", str(recipe), f"training.output_dir={killed}", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "step-3").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "final").exists()
    train(recipe, killed, *overrides)
    assert final_digest(killed) == final_digest(undisturbed)
    assert losses_and_norms(killed) == losses_and_norms(undisturbed)


def test_a_bad_row_stops_the_run_with_a_checkpoint_and_a_mended_one_lets_it_go_on(
    tmp_path, tiny_folder, monkeypatch, capsys
):
    monkeypatch.setattr(prepare, "StreamSettings", partial(prepare.StreamSettings, block_bytes=600))
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=8)
    undisturbed = train(recipe, tmp_path / "undisturbed", *STREAMED)
    rows = tmp_path / "train.jsonl"
    whole = rows.read_text(encoding="utf-8")
    lines = whole.splitlines(keepends=True)
    rows.write_text("".join([*lines[:16], "{]\n", *lines[17:]]), encoding="utf-8")
    run = tmp_path / "run"
    capsys.readouterr()
    assert finetune("train", recipe, f"training.output_dir={run}", *STREAMED) == 2
    message = capsys.readouterr().err
    assert f"{rows}:17: not valid JSON" in message and "Traceback" not in message
    (saved,) = (run / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert 1 <= step < 5 and f"stopped at step {step} of 8; a checkpoint is saved" in message
    assert json.loads((run / "manifest.json").read_text(encoding="utf-8"))["status"] == "stopped"
    rows.write_text(whole, encoding="utf-8")
    train(recipe, run, *STREAMED)
    assert final_digest(run) == final_digest(undisturbed)
    assert losses_and_norms(run) == losses_and_norms(undisturbed)


def test_a_bad_row_of_one_process_leaves_the_other_where_the_run_stopped(tmp_path, tiny_folder, capfd):
    # Blocks of 42 rows: the bad row is in the second one, of which the other process has rows when it is found.
    rows = tmp_path / "train.jsonl"
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=12)
    # They are long by spaces after the JSON, which fill a block and are no tokens.
    messages = [[{"role": "user", "content": f"{n} " + "word " * 100}] for n in range(200)]
    objects = [json.dumps({"messages": [*said, {"role": "assistant", "content": "yes"}]}) for said in messages]
    lines = [said.ljust(100_000) + "\n" for said in objects]
    rows.write_text("".join(lines), encoding="utf-8")
    overrides = [*STREAMED, "data.max_length=64", "data.train_on=all", "--nproc", "2"]
    undisturbed = train(recipe, tmp_path / "undisturbed", *overrides)
    rows.write_text("".join([*lines[:59], "{]\n", *lines[60:]]), encoding="utf-8")
    run = tmp_path / "run"
    assert finetune("train", recipe, f"training.output_dir={run}", *overrides) == 2
    assert f"{rows}:60: not valid JSON" in capfd.readouterr().err
    assert json.loads((run / "manifest.json").read_text(encoding="utf-8"))["status"] == "stopped"
    rows.write_text("".join(lines), encoding="utf-8")
    train(recipe, run, *overrides)
    assert final_digest(run) == final_digest(undisturbed)
    assert losses_and_norms(run) == losses_and_norms(undisturbed)


def test_a_row_of_another_process_may_be_mended_in_the_block_that_a_process_is_at():
    blocks = [Block(1, 4, "lines", content) for content in (b"a\n\nb\nc\nd\n", b"a\nB\nc\nd")]
    even, odd = ([stream._digest(block, (rank, 2)) for block in blocks] for rank in range(2))
    assert even[0] == even[1] and odd[0] != odd[1]


def test_rows_that_were_used_may_not_change_before_a_run_goes_on(tmp_path, tiny_folder, capsys):
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=2, lr_scheduler_type="constant")
    run = train(recipe, tmp_path / "run", *STREAMED)
    rows = tmp_path / "train.jsonl"
    rows.write_text(rows.read_text(encoding="utf-8").replace("say", "tell", 1), encoding="utf-8")
    assert finetune("train", recipe, f"training.output_dir={run}", *STREAMED, "training.max_steps=4") == 2
    assert "before the checkpoint are no longer what they were" in capsys.readouterr().err


def test_keys_that_do_not_go_with_a_stream(tmp_path, tiny_folder, capsys):
    recipe = write_recipe(tmp_path, tiny_folder)
    overrides = ["data.streaming=true", "training.max_steps=null", "data.eval_fraction=0.1", "method=dpo"]
    assert finetune("train", recipe, *overrides, "dpo.precompute_ref_log_probs=true") == 2
    message = capsys.readouterr().err
    for key in ("training.max_steps is not set", "data.eval_fraction is above 0", "precompute_ref_log_probs is true"):
        assert key in message


def test_what_a_dry_run_says(tmp_path, tiny_folder, capsys):
    recipe = write_recipe(tmp_path, tiny_folder)
    assert finetune("train", recipe, *STREAMED, "--dry-run") == 0
    assert "streamed: tokenized as the run goes" in capsys.readouterr().err
    rows = tmp_path / "train.jsonl"
    rows.write_text("{]\n" + rows.read_text(encoding="utf-8"), encoding="utf-8")
    assert finetune("train", recipe, *STREAMED, "--dry-run") == 2
    assert "train.jsonl:1: not valid JSON" in capsys.readouterr().err


def test_rows_of_a_stream_are_named_in_the_same_words_as_prepared_ones(tmp_path, tiny_folder, capsys):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": chat}, {"messages": chat, "tools": [tool]}, {"messages": chat[:1]}]
    data = tmp_path / "tools.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = write_recipe(tmp_path, tiny_folder, max_steps=1)
    told = []
    for streaming in ("false", "true"):
        console._warned.clear()  # a process says the same only once
        run = f"training.output_dir={tmp_path / streaming}"
        assert finetune("train", recipe, f"data.train={data}", f"data.streaming={streaming}", run) == 0
        told.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")])
    assert told[0] == told[1] and f"{data}:3" in "".join(told[0])
