"""The benchmarks' own parts: folders, rows, arithmetic and tables. Nothing here looks at a clock."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks import folders, processes
from benchmarks.chart import bars, write_chart
from benchmarks.figures import exponents, fitted_law, largest_difference, per_step, row_flops, spread, step_rates
from benchmarks.rounds import Settings, in_turn
from benchmarks.scaling import filled_rows
from benchmarks.tables import conditions, plain_table, ratio_table, speed_table, update_page, variant_table
from benchmarks.training import base_job, write_recipe
from finetune.chat.tokenizer import Tokenizer
from finetune.model.resolve import resolve_model
from finetune.recipe.load import load_recipe
from tests.tiny import Shape

SMALL = Shape(hidden_size=32, intermediate_size=48, max_position_embeddings=1024)
GIB = 2**30


@pytest.fixture
def own_data(monkeypatch, tmp_path):
    """The project's data and the tiny tokenizer, as on a machine without ../shared."""
    monkeypatch.setattr(folders, "SHARED", tmp_path / "nowhere")
    own = {method: (tmp_path / "nowhere", paths[1]) for method, paths in folders.DATA.items()}
    monkeypatch.setattr(folders, "DATA", own)


# -- folders ---------------------------------------------------------------------------------------------------


def test_a_model_folder_is_whole_and_made_once(own_data, tmp_path):
    folder = folders.make_model(tmp_path / "model", SMALL)
    assert resolve_model(str(folder)).config.num_hidden_layers == 2
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert embedding.shape == (416, 32) and embedding.std() == pytest.approx(0.02, rel=0.1)
    (folder / "mark").touch()
    assert (folders.make_model(folder, SMALL) / "mark").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_fresh_adapter_changes_nothing_and_is_read_as_one(own_data, tmp_path):
    model = folders.make_model(tmp_path / "model", SMALL)
    adapter = folders.make_adapter(tmp_path / "adapter", model, SMALL)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    assert all(not value.any() for name, value in tensors.items() if "lora_B" in name)
    assert resolve_model(str(adapter)).lora.rank == folders.LORA.rank


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_rows_fit_and_are_counted(own_data, tmp_path, method):
    tokenizer = Tokenizer.from_folder(folders.make_model(tmp_path / "model", SMALL))
    rows = folders.make_rows(tmp_path / "rows", method, tokenizer, steps=4, batch_size=3)
    assert len(rows.path.read_text(encoding="utf-8").splitlines()) == len(rows.tokens) == 12
    assert [sum(parts) for parts in rows.lengths] == rows.tokens
    assert all(0 < targets < tokens < 2 * folders.MAX_LENGTH for targets, tokens in zip(rows.targets, rows.tokens))
    assert {len(parts) for parts in rows.lengths} == ({1} if method == "sft" else {3})
    batches = [sorted(rows.tokens[at : at + 3]) for at in range(0, 12, 3)]
    assert all(a[-1] <= b[0] for a, b in zip(sorted(batches), sorted(batches)[1:]))  # like lengths together
    again = folders.make_rows(tmp_path / "again", method, tokenizer, steps=4, batch_size=3)
    assert again.path.read_text(encoding="utf-8") == rows.path.read_text(encoding="utf-8")


def test_token_counts_end_with_the_last_supervised_token(own_data, tmp_path):
    tokenizer = Tokenizer.from_folder(folders.make_model(tmp_path / "model", SMALL))
    rows = folders.make_rows(tmp_path / "rows", "sft", tokenizer, steps=1, batch_size=2)
    messages = json.loads(rows.path.read_text(encoding="utf-8").splitlines()[0])["messages"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rows.tokens[0] == len(tokenizer.encode(text.removesuffix("\n")))


def test_numbered_rows_are_all_different(own_data, tmp_path):
    lines = folders.numbered_rows(tmp_path / "new" / "rows.jsonl", 1000).read_text(encoding="utf-8").splitlines()
    assert len(set(lines)) == 1000


def test_batches_of_like_length():
    lengths = [9, 1, 8, 2, 7, 3]
    order = folders.grouped_by_length(list(range(6)), lengths, 2, seed=0)
    assert sorted(sorted(lengths[i] for i in order[at : at + 2]) for at in (0, 2, 4)) == [[1, 2], [3, 7], [8, 9]]


def test_filled_rows_fill_the_length(own_data, tmp_path):
    tokenizer = Tokenizer.from_folder(folders.make_model(tmp_path / "model", SMALL))
    (row,) = filled_rows(256, 1)
    assert len(tokenizer.encode(tokenizer.apply_chat_template(row["messages"], tokenize=False))) > 256


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_recipe_of_a_job_is_valid(tmp_path, method):
    job = base_job(method, tmp_path, steps=5, batch_size=4) | {"rows": "rows.jsonl", "adapter": str(tmp_path)}
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", job))
    assert (recipe.method, recipe.lora.rank, recipe.training.max_steps) == (method, 16, 5)
    assert not recipe.training.shuffle and not recipe.data.packing


# -- figures ---------------------------------------------------------------------------------------------------


def test_rates_leave_out_the_first_steps_and_take_in_the_reference():
    steps = [{"step": i + 1, "wall": 10.0 + 2 * i, "cpu": 20.0 + 4 * i} for i in range(4)]
    rates = step_rates({"steps": steps, "reference": {"wall": 4.0, "cpu": 8.0}}, {"pairs": [100, 100, 6, 6]})
    assert rates["pairs_per_second_of_steps"] == 12 / 4
    assert rates["pairs_per_second"] == 12 / 6  # half of the steps bear half of the reference pass
    assert rates["pairs_per_cpu_second"] == 12 / 12
    with pytest.raises(ValueError, match="too few"):
        step_rates({"steps": steps[:2]}, {})


def test_losses_are_compared_relatively_and_must_exist():
    assert largest_difference([1.0, 2.0, 3.0, 9.0], [1.0, 2.0002, 3.0, 1.0]) == pytest.approx(1e-4, rel=1e-3)
    assert largest_difference([1.0], [1.0]) == np.inf
    assert largest_difference([1.0, np.nan, 1.0], [1.0] * 3) == np.inf


def test_flops_of_a_row_follow_the_matrix_products():
    kv, tokens, targets = 16, 10, 4
    layer = 32 * 32 * 2 + 2 * 32 * kv + 3 * 32 * 48
    linear, head = 2 * 2 * layer * tokens, 2 * 32 * 416 * targets
    attention = 2 * 2 * 32 * tokens**2
    assert row_flops(SMALL, [tokens], targets, lora=False) == 3 * (linear + attention + head)
    ratio = row_flops(folders.QWEN2_05B, [500], 250, lora=True) / row_flops(folders.QWEN2_05B, [500], 250, lora=False)
    assert 2 / 3 < ratio < 0.75  # no gradients of the weights, but those of the adapters
    # A pair as long as two samples without a prompt: the same, and the reference's forward pass
    pair, alone = (
        row_flops(SMALL, [0, tokens, tokens], 2 * targets, lora=False),
        row_flops(SMALL, [tokens], targets, lora=False),
    )
    assert pair == pytest.approx(2 * alone * 4 / 3)


def test_small_statistics():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert per_step([1, 2, 3, 4, 5], 2) == [3, 7, 5]
    assert exponents([1, 2, 4], [1, 2, 8]) == pytest.approx([1.0, 2.0])


def test_fitted_law_finds_its_terms():
    sizes = [256, 512, 1024, 2048, 4096]
    law, deviation = fitted_law(sizes, [0.5 + 4e-3 * n + 3e-7 * n**2 for n in sizes])
    assert law == pytest.approx([0.5, 4e-3, 3e-7]) and deviation < 1e-9
    law, deviation = fitted_law(sizes, [4e-3 * n - 0.1 for n in sizes])  # a negative term is none
    assert min(law) == 0.0 and 0.01 < deviation < 0.2
    law, deviation = fitted_law([1, 10, 100], [2.0, 2.0, 2.2])
    assert law[2] == 0.0 and deviation < 0.05


# -- turns and processes ---------------------------------------------------------------------------------------


def answers(rate: float, turns: list[str], name: str):
    def run() -> dict:
        turns.append(name)
        return {"rate": rate, "process": {"load_before": 0.0}}

    return run


@pytest.mark.parametrize("all_variants", [False, True])
def test_sides_alternate_and_only_the_fastest_variant_goes_on(tmp_path, all_variants):
    turns: list[str] = []
    peers = {"slow": answers(1.0, turns, "slow"), "fast": answers(2.0, turns, "fast")}
    settings = Settings(tmp_path, rounds=2, all_variants=all_variants)
    sides, fastest = in_turn("case", settings, answers(3.0, turns, "ours"), peers, lambda answer: answer["rate"])
    rest = ["fast", "slow", "ours"] if all_variants else ["fast", "ours"]
    assert turns == ["ours", "slow", "fast", *rest]
    assert fastest == "fast" and len(sides.ours) == len(sides.peers["fast"]) == 2


def test_only_the_variants_asked_for_are_run(tmp_path):
    turns: list[str] = []
    peers = {"slow": answers(1.0, turns, "slow"), "fast": answers(2.0, turns, "fast")}
    settings = Settings(tmp_path, rounds=1, variants=("slow", "of another case"))
    _, fastest = in_turn("case", settings, answers(3.0, turns, "ours"), peers, lambda answer: answer["rate"])
    assert turns == ["ours", "slow"] and fastest == "slow"


def test_a_process_is_timed_to_its_first_line_and_its_end(tmp_path):
    watch = tmp_path / "lines"
    code = f"open({str(watch)!r}, 'w').write('first\\n')"
    found = processes.run_process([sys.executable, "-c", code], tmp_path, watch)
    assert 0 < found["first"] <= found["wall"] and found["cpu"] > 0 and "peak" not in found


def test_memory_is_watched_where_asked_for(tmp_path):
    code = "import time; held = b'x' * 2**26; time.sleep(1)"
    assert processes.run_process([sys.executable, "-c", code], tmp_path, memory=True)["peak"] > 2**26


def test_a_failing_process_says_what_it_printed(tmp_path):
    with pytest.raises(processes.WorkerError, match="(?s)code 3.*the reason"):
        processes.run_process([sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)"], tmp_path)


def test_workers_choose_their_own_threads(monkeypatch, tmp_path):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    assert "OMP_NUM_THREADS" not in processes.environment(tmp_path)


def test_our_worker_notes_each_step_and_the_reference_pass(own_data, tmp_path):
    model = folders.make_model(tmp_path / "model", SMALL)
    adapter = folders.make_adapter(tmp_path / "adapter", model, SMALL)
    rows = folders.make_rows(tmp_path / "rows", "dpo", Tokenizer.from_folder(model), steps=3, batch_size=2)
    job = base_job("dpo", model, steps=3, batch_size=2) | {"adapter": str(adapter), "rows": str(rows.path)}
    answer = processes.run_worker("ours", job | {"recipe": str(write_recipe(tmp_path / "recipe.yaml", job))})
    assert [step["step"] for step in answer["steps"]] == [1, 2, 3]
    assert answer["steps"][0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert answer["reference"]["wall"] > 0 and answer["matmul_gflops"] > 0
    assert all(step["peak"] > 2**20 for step in answer["steps"])


# -- tables ----------------------------------------------------------------------------------------------------


def record() -> dict:
    side = {
        "rate": spread([100.0, 120.0, 110.0]),
        "peak": GIB,
        "flop_utilisation": spread([0.5]),
        "versions": {"trl": "1"},
    }
    case = {
        "shape": "6l",
        "unit": "tokens/s",
        "ratio": spread([2.0, 1.8, 2.2]),
        "cpu_ratio": spread([1.0]),
        "memory_ratio": spread([0.5]),
        "peer_variant": "plain",
        "variants": {"plain": side | {"peak": 2 * GIB}, "defaults": side | {"rate": spread([55.0]), "peak": 4 * GIB}},
        "settings": {"steps": 8},
        "rounds_run": 3,
        "ours": side,
        "peer": side | {"peak": 2 * GIB},
        "rounds": {"ours": [{"process": {"load_before": 0.7}}], "peers": {}},
        "passed": True,
    }
    sizes = (10, 100, 1000)
    points = [{"size": n, "seconds": n / 100, "cpu_seconds": n / 50, "work": n, "peak": GIB} for n in sizes]
    machine = {"date": "2026-01-01 00:00 UTC", "processor": "P", "cores": 2, "memory": 8 * GIB, "python": "3.11"}
    machine |= {"load_before": 0.1}
    return {
        "machine": machine,
        "cases": {"sft_lora": case, "broken": {"shape": "6l", "passed": False, "error": "WorkerError: no\nmore"}},
        "scaling": {"length": {"label": "tokens", "unit": "tokens", "shape": "6l", "points": points}},
    }


def test_tables_hold_figures_and_failures():
    text = plain_table(record())
    assert "2.00 (1.80 to 2.20)" in text and "at least 1.5" in text and "1.00 GiB / 2.00 GiB" in text
    assert "failed: WorkerError: no" in text
    assert ratio_table([record(), record()]).count("sft_lora") == 1
    assert "| sft_lora | 6l | defaults | 55 tokens/s | 4.00 GiB | 2.00 | 0.25 |" in variant_table([record()])
    assert "| SFT LoRA, tokens/s | 2.0 | 0.50 |" in speed_table([record()])
    assert "sft_lora (3 rounds x 6 counted steps), broken, length: 2026-01-01" in conditions([record()])


def test_one_round_has_no_range():
    once = record()
    once["cases"]["sft_lora"]["ratio"] = spread([2.0])
    assert "2.00  " in plain_table(once) and "2.00 (" not in plain_table(once)


def test_a_case_with_other_losses_is_shown_as_failed():
    wrong = record()
    wrong["cases"]["sft_lora"]["passed"] = False
    assert "FAILED" in plain_table(wrong)
    assert bars([wrong]) == []


def test_the_page_is_filled_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin growth_length -->\nold\n<!-- end growth_length -->\nafter\n", encoding="utf-8")
    update_page(page, [record()])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| 1,000 | 10 | 20 | 100 | 1.00 GiB | 1.00 |" in text
    assert "Law: seconds = 0.01 n, which no point misses by more than 0 %." in text
    update_page(page, [record()])
    assert page.read_text(encoding="utf-8") == text


def test_the_page_of_the_documentation_has_only_known_tables(tmp_path):
    copy = tmp_path / "performance.md"
    copy.write_text((folders.ROOT / "docs" / "performance.md").read_text(encoding="utf-8"), encoding="utf-8")
    update_page(copy, [record()])
    assert "not measured yet" in copy.read_text(encoding="utf-8")  # series that this record lacks
    assert "2.00 (1.80 to 2.20)" in copy.read_text(encoding="utf-8")


def test_the_chart_turns_startup_over(tmp_path):
    start = record()
    start["cases"] = {"startup": {"shape": "tiny", "unit": "s", "ratio": spread([0.5, 0.4, 0.8]), "passed": True}}
    ((_, ratio, target),) = bars([start])
    assert ratio == {"median": 2.0, "min": 1.25, "max": 2.5} and target == 1.25
    write_chart(tmp_path / "chart.svg", [record(), start])
    assert Path(tmp_path / "chart.svg").read_text(encoding="utf-8").count("<svg") == 1
