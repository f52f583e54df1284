"""The optimizer's state split over processes: the same bits as unsplit, before and after a resumption."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from finetune.errors import ArgumentError
from finetune.model.runtime import paddle as bring_up
from finetune.recipe.load import load_recipe
from finetune.train.preflight import settle
from finetune.train.prepare import prepare
from finetune.train.processes.parallel import World
from finetune.train.processes.sharding import Shards, share_out
from tests.runs import finetune, finetune_process, steps, write_recipe

SIZES = {"embed.weight": 40, "norm.weight": 4, "up.weight": 24, "down.weight": 24, "up.bias": 6}


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_are_about_even(parts):
    owners = share_out(SIZES, parts)
    loads = [sum(SIZES[name] for name, part in owners.items() if part == number) for number in range(parts)]
    assert set(owners) == set(SIZES) and min(loads) > 0
    assert max(loads) <= max(max(SIZES.values()), 1.25 * sum(SIZES.values()) / parts)


def tensors(seed: int) -> dict:
    draw = np.random.default_rng(seed)
    return {name: bring_up().to_tensor(draw.normal(size=size).astype(np.float32)) for name, size in SIZES.items()}


def stepped(training, shards=None) -> dict[str, np.ndarray]:
    from finetune.train.optimizer import Optimizer

    parameters = tensors(0)
    for parameter in parameters.values():
        parameter.stop_gradient = False
    optimizer = Optimizer(parameters, training, shards)
    for seed in (1, 2):
        for name, gradient in tensors(seed).items():
            parameters[name].grad = gradient
        optimizer.step(0.01, max_norm=1.0)
    return {name: parameter.numpy() for name, parameter in parameters.items()}


def test_each_process_steps_its_own_tensors_and_no_others(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(Shards, "send", lambda self, name, tensor: None)  # nobody is there
    training = load_recipe(write_recipe(tmp_path, tiny_folder)).training
    start = {name: tensor.numpy() for name, tensor in tensors(0).items()}
    whole = stepped(training)
    stepped_by = dict.fromkeys(SIZES, 0)
    for rank in range(2):
        for name, value in stepped(training, Shards(World(rank, 2), 2, SIZES)).items():
            if not np.array_equal(value, start[name]):
                stepped_by[name] += 1
                assert np.array_equal(value, whole[name])
    assert set(stepped_by.values()) == {1}


def digests(run: Path) -> dict[str, str]:
    """The final model, and the optimizer's state as the last checkpoint has it."""
    files = [*sorted((run / "final").glob("*.safetensors")), run / "checkpoints/step-4/optimizer.safetensors"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


LORA = ["lora={rank: 4, alpha: 8, dropout: 0.3}"]
SHARDED = ["distributed.sharding=stage1"]


@pytest.mark.parametrize(
    ("overrides", "processes", "first", "then"),
    [
        ([], 2, SHARDED, []),
        (LORA, 4, [], [*SHARDED, "distributed.sharding_parallel_degree=2"]),
    ],
    ids=["full, sharded at first", "lora in two groups, sharded at last"],
)
def test_a_run_sharded_for_half_its_steps_ends_with_the_same_bits(
    tmp_path, tiny_folder, overrides, processes, first, then
):
    recipe = write_recipe(tmp_path, tiny_folder, lr_scheduler_type="constant", per_device_train_batch_size=2)

    def train(run: str, steps: int, *more: str) -> Path:
        output = tmp_path / run
        goes_on = output.exists()
        settings = [f"training.output_dir={output}", f"training.max_steps={steps}", *overrides, *more]
        done = finetune_process("train", recipe, *settings, "--nproc", str(processes))
        assert done.returncode == 0, done.stderr
        assert ("resumed after step" in done.stderr) == goes_on
        return output

    plain = train("plain", 4, "training.save_steps=2")
    if first:
        train("sharded", 2, *first)
    else:  # half of it is half of the plain one
        shutil.copytree(plain, tmp_path / "sharded")
        shutil.rmtree(tmp_path / "sharded/final")
        shutil.rmtree(tmp_path / "sharded/checkpoints/step-4")
    sharded = train("sharded", 4, *then)
    assert digests(sharded) == digests(plain)
    numbers = [[(row["step"], row["loss"], row["grad_norm"]) for row in steps(run)] for run in (sharded, plain)]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 4


def test_the_estimate_of_memory_splits_the_state(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path, tiny_folder)
    whole = prepare(settle(load_recipe(recipe), 2)).estimate
    split = prepare(settle(load_recipe(recipe, SHARDED), 2)).estimate
    assert split.optimizer == whole.optimizer / 2
    assert split.gradients == whole.gradients and split.weights == whole.weights


def test_more_processes_than_tensors_are_refused():
    with pytest.raises(ArgumentError, match="over 6 processes: 5 tensors are trained.*at most 5"):
        Shards(World(0, 6), 6, SIZES)


def test_what_is_not_split_is_refused(tmp_path, tiny_folder, capsys):
    recipe = write_recipe(tmp_path, tiny_folder)
    assert finetune("train", recipe, "distributed.sharding=stage3", "--dry-run") == 2
    assert "distributed.sharding: 'stage3' was asked for" in (said := capsys.readouterr().err)
    assert "Set it to stage1" in said
