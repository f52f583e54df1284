"""Streams of rows: the same whatever the position they are begun from, divided among ranks, and strict about change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest

from finetune.errors import DataError
from finetune.rows.encode import Settings
from finetune.rows.mixstream import open_stream
from finetune.rows.stream import Stream, StreamPacks, StreamPlan, StreamSettings
from tests.chat.cases import said
from tests.chat.conftest import From

SETTINGS = StreamSettings(
    Settings("sft", max_length=200, overlong="truncate", train_on="responses"),
    room=None,
    seed=7,
    shuffle=True,
    share=(0, 1),
    block_bytes=3000,
)


def lines(count: int) -> str:
    return "".join(
        json.dumps({"messages": said("q" * (i % 7 + 1), f"answer {i} " + "x" * (i % 23))}) + "\n" for i in range(count)
    )


@contextmanager
def stream(tokenizer, *paths: str | From, start: dict | None = None, **settings) -> Iterator[Stream]:
    sources = [path if isinstance(path, From) else From(path) for path in paths]
    made = open_stream(sources, tokenizer, replace(SETTINGS, **settings))
    made.start(start)
    try:
        yield made
    finally:
        made.close()


def taken(made: Stream, count: int) -> list[list[str]]:
    """The names of the rows of each of the next units."""
    units, _ = made.take(count)
    return [[made[row].source for row in made.pack(unit)] for unit in units]


def number(name: str) -> int:
    return int(name.rpartition(":")[2])


def test_each_epoch_has_every_row_once_in_another_order(tokenizer, write):
    path = write("a.jsonl", lines(100))
    with stream(tokenizer, path) as made:
        epochs = [[number(name) for (name,) in taken(made, 100)] for _ in range(3)]
        assert made.position.epoch == 2
        assert made.report.kept == 100
    assert all(sorted(epoch) == list(range(1, 101)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # Shuffled within blocks only
    assert sorted(epochs[0][:20]) != list(range(1, 21)) and max(epochs[0][:20]) < 40
    with stream(tokenizer, path, shuffle=False) as made:
        assert [number(name) for (name,) in taken(made, 150)] == [*range(1, 101), *range(1, 51)]


def test_tokens_are_those_of_the_dataset(tokenizer, write):
    from finetune.rows.dataset import build_dataset

    path = write("a.jsonl", lines(40))
    rows, _ = build_dataset([From(path)], tokenizer, data=SETTINGS.encode, method="sft")
    expected = {row.source: (row.input_ids.tolist(), row.labels.tolist()) for row in rows}
    with stream(tokenizer, path) as made:
        for unit in made.take(40)[0]:
            (example,) = (made[row] for row in made.pack(unit))
            assert (example.input_ids.tolist(), example.labels.tolist()) == expected.pop(example.source)
    assert not expected


def test_the_epoch_of_parquet_moves(tokenizer, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    rows = [json.loads(line) for line in lines(3000).splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with stream(tokenizer, str(tmp_path / "a.parquet")) as made:
        epochs = [made.take(750)[1] for _ in range(4)]
    assert epochs == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=0.01)


@pytest.mark.parametrize("room", [None, 300])
def test_a_stream_goes_on_from_any_position(tokenizer, write, room):
    sources = write("a.jsonl", lines(60)), From(write("b.json", json.dumps([{"instruction": "q", "output": "a"}] * 30)))
    with stream(tokenizer, *sources, room=room) as made:
        whole, positions = [], []
        for _ in range(20):
            whole += taken(made, 7)
            positions.append(made.position)
    assert positions[-1].epoch >= 1 and any(len(unit) > 1 for unit in whole) == bool(room)
    for at in (0, 3, 4, 11, 16):
        saved = json.loads(json.dumps(asdict(positions[at])))
        with stream(tokenizer, *sources, room=room, start=saved) as again:
            assert taken(again, 14) == whole[7 * (at + 1) :][:14]


def test_ranks_share_the_rows(tokenizer, write):
    path = write("a.jsonl", lines(90))
    seen = []
    for rank in range(3):
        with stream(tokenizer, path, share=(rank, 3)) as made:
            seen.append([number(name) for (name,) in taken(made, 30)])
            assert made.position.epoch == 0
    assert sorted(sum(seen, [])) == list(range(1, 91))


def test_pairs_and_samples(tokenizer, write):
    rows = [{"prompt": "p", "chosen": "c" * (i + 1), "rejected": "r"} for i in range(20)]
    path = write("p.json", json.dumps(rows))
    encode = replace(SETTINGS.encode, method="dpo")
    with stream(tokenizer, From(path, samples=5), encode=encode, room=400, shuffle=False) as made:
        names = [name for unit in taken(made, 6) for name in unit]
        pair = made[made.pack(made.take(1)[0][0])[0]]
    assert {number(name) for name in names} == {1, 2, 3, 4, 5}
    assert len(pair.prompt_ids) < len(pair.chosen.input_ids)


def test_steps_of_a_plan(tokenizer, write):
    with stream(tokenizer, write("a.jsonl", lines(30)), shuffle=False) as made:
        plan, packs = StreamPlan(made, batch_size=4, accumulation=2, total_steps=5), StreamPacks(made)
        seen, ends = [], []
        for step in plan.steps():
            assert [len(batch) for batch in step.batches] == [4, 4]
            seen += [number(made[row].source) for batch in step.batches for unit in batch for row in packs[unit]]
            ends.append(step.epoch_end)
    assert seen == [*range(1, 31), *range(1, 11)]
    assert ends == sorted(ends) and ends[0] == pytest.approx(8 / 30, abs=0.05) and 1 < ends[-1] < 1.5


def test_a_bad_row_ends_the_stream_where_its_block_is_needed(tokenizer, write):
    text = lines(100)
    path = write("a.jsonl", text + "{]\n" + text)
    with stream(tokenizer, path, shuffle=False) as made:
        plan = StreamPlan(made, batch_size=10, accumulation=1, total_steps=30)
        steps = list(plan.steps())
        assert 5 <= len(steps) - 1 <= 10 and steps[-1].failed and not steps[-1].batches
        assert "a.jsonl:101: not valid JSON" in str(made.fault)
        before = asdict(made.position)
    # The row is mended: what was trained on before is what it was.
    write("a.jsonl", text + text)
    with stream(tokenizer, path, shuffle=False, start=before) as made:
        first = 10 * (len(steps) - 1) + 1
        assert [number(name) for (name,) in taken(made, 60)] == list(range(first, first + 60))
    # A row that was used is another one now.
    write("a.jsonl", text.replace("answer 3 ", "answer 4 ", 1) + text)
    with stream(tokenizer, path, start=before) as made:
        with pytest.raises(DataError, match="before the checkpoint are no longer what they were"):
            made.take(1)


def test_a_file_that_changes_is_named(tokenizer, write):
    path = write("a.jsonl", lines(3000))
    with stream(tokenizer, path) as made:
        made.take(1)
        with open(path, "a") as file:
            file.write(lines(1))
        with pytest.raises(DataError, match="a.jsonl: the file changed while it was being streamed"):
            made.take(3000)


def test_a_stream_without_a_row_to_train_on_ends(tokenizer, write):
    with stream(tokenizer, write("a.jsonl", json.dumps({"messages": said("q")}) + "\n")) as made:
        with pytest.raises(DataError, match="no row of the stream can be trained on"):
            made.take(1)


# -- mixed by weight ---------------------------------------------------------------------------------------------


def mixed_sources(write) -> list[From]:
    return [
        From(write("many.jsonl", lines(300)), weight=6),
        From(write("some.jsonl", lines(50)), weight=3),
        From(write("few.jsonl", lines(7)), weight=1),
    ]


@pytest.mark.parametrize("room", [None, 300])
def test_sources_are_mixed_by_weight_and_go_on_from_any_position(tokenizer, write, room):
    sources = mixed_sources(write)
    with stream(tokenizer, *sources, room=room) as made:
        whole, positions, units = [], [], []
        for _ in range(40):
            units.append(taken(made, 10))
            whole += units[-1]
            positions.append(made.position)
        rows = [name.rpartition("/")[2].partition(".")[0] for unit in whole for name in unit]
        assert 100 < made.report.read <= 357 and made.report.kept == made.report.read  # of the first passes
    # After any number of units each source has given its share, to within a unit.
    most = max(map(len, whole))
    for count in range(1, len(rows)):
        for name, share in (("many", 0.6), ("some", 0.3), ("few", 0.1)):
            assert abs(rows[:count].count(name) - share * count) <= 2 * most
    for at in (0, 5, 17, 31):
        saved = json.loads(json.dumps(asdict(positions[at])))
        with stream(tokenizer, *sources, room=room, start=saved) as again:
            assert taken(again, 60) == whole[10 * (at + 1) :][:60]
            assert again.position == positions[at + 6]


def test_what_a_mixed_step_took_is_put_back(tokenizer, write):
    with stream(tokenizer, *mixed_sources(write)) as made:
        made.take(30)
        before = made.position
        made.take(10)
        assert made.position != before
        made.put_back()
        assert made.position == before


def test_a_fault_in_one_source_ends_a_mixed_step_before_anything_is_taken(tokenizer, write):
    good, bad = From(write("a.jsonl", lines(200)), weight=1), From(write("b.jsonl", lines(90) + "{]\n"), weight=1)
    with stream(tokenizer, good, bad, shuffle=False) as made:
        steps = list(StreamPlan(made, batch_size=10, accumulation=1, total_steps=30).steps())
        assert steps[-1].failed and "b.jsonl:91: not valid JSON" in str(made.fault)
        assert made.position.taken == (5 * (len(steps) - 1),) * 2
