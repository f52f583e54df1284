"""Checkpoints damaged between two runs of one command. `tests/soak` tries every damage on every file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from finetune import console
from tests.runs import finetune, metrics, steps, write_recipe

DAMAGES = ("truncated", "emptied", "bit flipped", "deleted")
MODEL_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "generation_config.json")
FILES = [
    "complete.json",
    "state.json",
    "optimizer.safetensors",
    "extra.safetensors",
    "model/adapter_model.safetensors",
    "model/adapter_config.json",
    *(f"model/{name}" for name in MODEL_FILES),
]
SOME = [(name, DAMAGES[number % len(DAMAGES)]) for number, name in enumerate(FILES[:5])]
KIND = (
    "lora={rank: 2, alpha: 4, dropout: 0.1, variant: dora, modules_to_save: [embed_tokens]}",
    "model.quantization=nf4",
    "training.optim=adamw_8bit",
)


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    if how == "deleted":
        path.unlink()
    elif how == "bit flipped":
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])
    else:
        path.write_bytes(b"" if how == "emptied" else data[:middle])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_folder) -> tuple[Path, Path]:
    """A recipe and its finished run of three steps with a checkpoint each: all that a checkpoint can hold."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(
        folder, tiny_folder, max_steps=3, save_steps=1, save_total_limit=3, per_device_train_batch_size=2
    )
    assert finetune("train", recipe, *KIND) == 0
    files = (folder / "run" / "checkpoints" / "step-3").rglob("*")
    assert {str(p.relative_to(folder / "run" / "checkpoints" / "step-3")) for p in files if p.is_file()} == set(FILES)
    return recipe, folder / "run"


def again(trained, run: Path, *overrides: str) -> int:
    console._warned.clear()
    return finetune("train", trained[0], *KIND, f"training.output_dir={run}", *overrides)


def copied(trained, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[1], tmp_path / "run"))


def check(trained, tmp_path, capsys, name: str, how: str) -> None:
    run = copied(trained, tmp_path)
    damage(run / "checkpoints" / "step-3" / name, how)
    capsys.readouterr()
    assert again(trained, run) == 0
    said = capsys.readouterr().err.splitlines()
    passed_over = [line for line in said if "passed over" in line]
    assert len(passed_over) == 1 and "step-3 is damaged" in passed_over[0]
    assert Path(name).name in passed_over[0]
    assert any(line.split() == ["resumed", "after", "step", "2"] for line in said)
    final = "final/adapter_model.safetensors"
    assert (run / final).read_bytes() == (trained[1] / final).read_bytes()
    assert [row["step"] for row in steps(run)] == [1, 2, 3]


@pytest.mark.parametrize("name, how", SOME)
def test_damage_is_said_in_one_line_and_the_checkpoint_before_is_used(trained, tmp_path, capsys, name, how):
    check(trained, tmp_path, capsys, name, how)


def test_with_all_damaged_the_run_stops_and_keeps_what_there_is(trained, tmp_path, capsys):
    run = copied(trained, tmp_path)
    for step in (1, 2, 3):
        damage(run / "checkpoints" / f"step-{step}" / "optimizer.safetensors", "bit flipped")
    before = metrics(run)
    assert again(trained, run) == 2
    said = capsys.readouterr().err
    assert said.count("passed over") == 3 and "no good checkpoint is left" in said and "=never" in said
    assert metrics(run) == before and (run / "final").is_dir() and len(list((run / "checkpoints").iterdir())) == 3
    assert again(trained, run, "training.resume_from_checkpoint=never") == 0


def test_a_damaged_or_missing_checkpoint_asked_for_is_an_error(trained, tmp_path, capsys):
    run = copied(trained, tmp_path)
    step = run / "checkpoints" / "step-2"
    damage(step / "state.json", "truncated")
    assert again(trained, run, f"training.resume_from_checkpoint={step}") == 2
    assert f"{step / 'state.json'}: holds" in capsys.readouterr().err
    assert again(trained, run, f"training.resume_from_checkpoint={step}-old") == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert again(trained, run, f"training.resume_from_checkpoint={run / 'checkpoints' / 'step-1'}") == 0
    assert [row["step"] for row in steps(run)] == [1, 2, 3]


def test_the_best_and_the_last_are_kept_and_a_damaged_best_is_not_made_the_final_model(tmp_path, tiny_folder, capsys):
    recipe = write_recipe(
        tmp_path, tiny_folder, max_steps=4, learning_rate=1e-9, save_steps=1, eval_steps=1, save_total_limit=1,
        load_best_model_at_end=True,
    )  # fmt: skip
    # Nothing is learned, so that the first evaluation stays the best.
    assert finetune("train", recipe, "data.eval_fraction=0.2", "training.warmup_steps=3") == 0
    run = tmp_path / "run"
    best = min((row for row in metrics(run) if "eval_loss" in row), key=lambda row: row["eval_loss"])["step"]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"step-{best}", "step-4"}
    shutil.rmtree(run / "final")
    damage(run / "checkpoints" / f"step-{best}" / "model" / "model.safetensors", "bit flipped")
    options = ["data.eval_fraction=0.2", "training.warmup_steps=3"]
    if best != 4:
        assert finetune("train", recipe, *options) == 2
        assert "the best checkpoint cannot become the final model" in capsys.readouterr().err
        assert not (run / "final").exists()
        assert finetune("train", recipe, *options, "training.load_best_model_at_end=false") == 0
        assert (run / "final").is_dir()


def test_a_base_model_that_changed_is_not_resumed_silently(tmp_path, tiny_folder, capsys):
    from tests.tiny import tiny_weights, write_weights

    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    recipe = write_recipe(tmp_path, model, max_steps=2, save_steps=1)
    lora = "lora={rank: 2, alpha: 4}"
    assert finetune("train", recipe, lora) == 0
    write_weights(model, tiny_weights(seed=5))
    assert finetune("train", recipe, lora) == 2
    assert "model: the base model or its tokenizer changed" in capsys.readouterr().err
    assert finetune("train", recipe, lora, "data.train_on=all") == 2
    assert "data.train_on is" in capsys.readouterr().err.replace(": is", " is")
