"""Data that goes to other processes and to the cache gives what it gives in this process."""

from __future__ import annotations

import ast
import json
import os
import threading
import time
from pathlib import Path

import pytest

from finetune import console
from finetune.errors import DataError
from finetune.rows import cache, dataset, inputs
from finetune.rows.dataset import build_dataset
from finetune.rows.sources import read_blocks
from tests.chat.cases import WEATHER, said
from tests.chat.conftest import From, Settings

ROOT = Path(__file__).resolve().parents[2]


def chat(*texts: str, **kw) -> dict:
    return {"messages": said(*texts, **kw)}


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def many(count: int, start: int = 0) -> list[dict]:
    return [chat("q" * (i % 7 + 1), f"answer {i} " + "x" * (i % 23)) for i in range(start, start + count)]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


@pytest.fixture
def said_lines(monkeypatch) -> list[str]:
    """What was said and warned of."""
    texts: list[str] = []
    monkeypatch.setattr(console, "say", texts.append)
    monkeypatch.setattr(console, "warn", texts.append)
    return texts


def outcome(tokenizer, sources, *, method="sft", **data):
    """Rows and report of a build, or its message."""
    given = [source if isinstance(source, From) else From(source) for source in sources]
    try:
        rows, report = build_dataset(given, tokenizer, data=Settings(**data), method=method)
    except DataError as error:
        return str(error), [str(fault) for fault in error.faults]
    sides = (lambda r: (r,)) if method == "sft" else (lambda r: (r.chosen, r.rejected))
    tokens = [(row.source, [(side.input_ids.tolist(), side.labels.tolist()) for side in sides(row)]) for row in rows]
    arrays = [getattr(rows, name).tolist() for name in ("lengths", "num_supervised")]
    pairs = [(len(row.prompt_ids), row.header_length) for row in rows] if method == "dpo" else []
    return tokens, arrays, pairs, report.to_dict()


def large(monkeypatch, workers: int, block: int = 2000) -> None:
    """From now on all data counts as large, in blocks of this size, done by so many processes."""
    monkeypatch.setattr(dataset, "LARGE_BYTES", 0)
    monkeypatch.setattr(dataset, "worker_count", lambda: workers)
    monkeypatch.setattr(inputs, "read_blocks", lambda file, size: read_blocks(file, block))


# -- the same rows -----------------------------------------------------------------------------------------------


def test_rows_report_and_notes_are_the_same_from_any_number_of_processes_and_from_the_cache(
    tokenizer, write, monkeypatch, said_lines, place
):
    long = [chat("q", "a" * (150 + i)) for i in range(12)]
    odd = [chat("q" * 150, "a")] + [chat("q")] * 7 + [{**chat("q", "a"), "tools": [WEATHER]}]
    sources = [
        write("a.jsonl", lines(*many(60)) + "\n \n" + lines(*long, *many(60, 60))),
        From(write("b.json", json.dumps(many(70, 200) + odd, indent=1)), samples=75),
        From(write("c.csv", "instruction,output\n" + "".join(f'"q, {i}",a{i}\n' for i in range(80)))),
    ]
    settings = {"max_length": 200}
    here = outcome(tokenizer, sources, **settings)
    assert isinstance(here[0], list) and len(here[0]) > 250
    assert here[3]["truncated"] == 12 and here[3]["unsupervised"] == 5 and len(here[3]["notes"]) == 3
    # Blocks of another size: nothing may depend on where they are cut.
    for workers, block in ((1, 2000), (3, 900)):
        with monkeypatch.context() as patch:
            large(patch, workers, block)
            patch.setenv("FINETUNE_CACHE", str(place / str(workers)))
            assert outcome(tokenizer, sources, **settings) == here
            assert said_lines == []
            assert outcome(tokenizer, sources, **settings) == here
            assert [text.startswith("Opened 2") for text in said_lines] == [True]
            said_lines.clear()


def test_pairs_too(tokenizer, write, monkeypatch):
    rows = [{"prompt": "p" * (i % 9 + 1), "chosen": "c" * i, "rejected": "r" * (30 - i % 30)} for i in range(90)]
    path = write("p.jsonl", lines(*rows))
    settings = {"method": "dpo", "max_length": 70}
    here = outcome(tokenizer, [path], **settings)
    assert isinstance(here[0], list) and here[3]["responses_cut"] > 0 and here[3]["notes"]
    large(monkeypatch, 2)
    assert outcome(tokenizer, [path], **settings) == here
    assert outcome(tokenizer, [path], **settings) == here  # from the cache


def test_faults_are_named_in_order_with_their_number(tokenizer, write, monkeypatch):
    rows = [json.dumps(row) for row in many(200)]
    for place in (9, 50, 51, 120):
        rows[place] = "{]"
    for place in (20, 52, 130, 131, 132, 133, 190):
        rows[place] = json.dumps({"messages": [{"role": "x", "content": ""}]})
    rows[80] = json.dumps({"instruction": "q", "output": "a"})
    sources = [
        write("a.jsonl", "\n".join(rows)),
        "missing.jsonl",
        write("b.csv", "instruction,output\n" + "q,a\n" * 200 + 'q,"x'),
    ]
    here = outcome(tokenizer, sources, max_length=50, overlong="error")
    # Four rows are no JSON, and seven have the same wrong role: these are a line each.
    places = [fault.rpartition("/")[2].split(": ")[0] for fault in here[1]]
    assert places == [
        "a.jsonl:10 and 3 more",
        "a.jsonl:21, key messages[0].role and 6 more",
        "a.jsonl:81",
        "data.train[1].path",
        "b.csv, line 202",
    ]
    for workers in (1, 3):
        with monkeypatch.context() as patch:
            large(patch, workers)
            assert outcome(tokenizer, sources, max_length=50, overlong="error") == here


def test_too_long_rows_are_all_counted(tokenizer, write, monkeypatch):
    path = write("a.jsonl", lines(*many(40), *[chat("q", "a" * 300)] * 30, *many(40)))
    here = outcome(tokenizer, [path], max_length=200, overlong="error")
    assert "a.jsonl:41 and 29 more: 3" in here[0]
    large(monkeypatch, 2)
    assert outcome(tokenizer, [path], max_length=200, overlong="error") == here


def test_the_form_of_the_first_row_holds_for_blocks_that_were_begun_before_it_was_known(tokenizer, write, monkeypatch):
    other = [{"instruction": "q" * 50, "output": f"a{i}"} for i in range(60)]
    path = write("a.jsonl", lines(*many(3), *other))
    here = outcome(tokenizer, [path])
    assert "a.jsonl:4 and 59 more: a row of form alpaca, but the rows before it are messages" in here[0]
    large(monkeypatch, 3)
    assert outcome(tokenizer, [path]) == here


def test_a_fault_of_the_tokenizer_comes_back_as_it_is(write, monkeypatch):
    from tests.chat.conftest import byte_tokenizer

    large(monkeypatch, 1)
    with pytest.raises(Exception, match="the model has no chat template") as caught:
        outcome(byte_tokenizer(template=None), [write("a.jsonl", lines(chat("q", "a")))])
    assert type(caught.value).__name__ == "CheckpointError"


# -- the cache ---------------------------------------------------------------------------------------------------


def entries(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir())


def test_what_is_in_the_key(tokenizer, tooled, write, monkeypatch, place):
    large(monkeypatch, 1)
    text = lines(*many(5))
    first = write("a.jsonl", text)
    base = outcome(tokenizer, [first])
    assert len(entries(place)) == 1
    # Another name and the same content: the same entry, with rows named as they are called now.
    second = write("b.jsonl", text)
    renamed = outcome(tokenizer, [second])
    assert len(entries(place)) == 1
    assert renamed[0][0][0] == f"{second}:1" and renamed[0][0][1] == base[0][0][1]
    others = [
        lambda: outcome(tokenizer, [first], max_length=100),
        lambda: outcome(tokenizer, [first], train_on="all"),
        lambda: outcome(tokenizer, [From(first, samples=3)]),
        lambda: outcome(tokenizer, [first, second]),
        lambda: outcome(tooled, [first]),
        lambda: outcome(tokenizer, [write("a.jsonl", text + lines(*many(1, 50)))]),
    ]
    for count, other in enumerate(others, 2):
        other()
        assert len(entries(place)) == count


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "no record", "other record"])
def test_a_damaged_entry_is_made_again(tokenizer, write, monkeypatch, place, said_lines, damage):
    large(monkeypatch, 1)
    path = write("a.jsonl", lines(*many(50)))
    first = outcome(tokenizer, [path])
    (entry,) = entries(place)
    rows, record = entry / "rows.arrow", entry / "entry.json"
    content = bytearray(rows.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 4
        rows.write_bytes(content)
    elif damage in ("cut", "emptied"):
        rows.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text(record.read_text().replace('"rows"', '"sowr"'))
    assert outcome(tokenizer, [path]) == first
    assert [("is damaged" in text) for text in said_lines] == [True]
    assert outcome(tokenizer, [path]) == first
    assert "Opened 50 rows" in said_lines[-1]


def test_a_cache_that_cannot_be_written_or_is_full_does_not_stop_anything(
    tokenizer, write, monkeypatch, said_lines, tmp_path
):
    path = write("a.jsonl", lines(*many(50)))
    here = outcome(tokenizer, [path])
    large(monkeypatch, 1)
    monkeypatch.setenv("FINETUNE_CACHE", write("a file", ""))
    assert outcome(tokenizer, [path]) == here
    assert len(said_lines) == 1 and "FINETUNE_CACHE names another folder" in said_lines[0]
    said_lines.clear()
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    usage = dataset.shutil.disk_usage("/")
    monkeypatch.setattr(dataset.shutil, "disk_usage", lambda folder: usage._replace(free=100))
    assert outcome(tokenizer, [path]) == here
    assert "GiB are free" in said_lines[0] and "so memory must" in said_lines[1]


def test_a_disk_that_fills_up_while_rows_are_written(tokenizer, write, monkeypatch, said_lines, place):
    path = write("a.jsonl", lines(*many(50)))
    here = outcome(tokenizer, [path])
    large(monkeypatch, 1, 500)
    add, calls = cache.Store.add, []

    def full(self, part):
        calls.append(part)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        add(self, part)

    monkeypatch.setattr(cache.Store, "add", full)
    assert outcome(tokenizer, [path]) == here
    assert "No space left on device" in said_lines[0]
    assert entries(place) == [] and list(place.glob(".*")) == []


def test_the_entries_used_longest_ago_go_first(tmp_path):
    for age, name in enumerate(("new", "middle", "old", "kept")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.arrow").write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / ".half.partial").mkdir()
    cache.sweep(tmp_path, "kept", limit=250)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["kept", "new"]


def test_one_process_makes_an_entry_and_others_wait_for_it(tokenizer, write, monkeypatch, said_lines, place):
    large(monkeypatch, 1)
    path = write("a.jsonl", lines(*many(50)))
    first = outcome(tokenizer, [path])
    (entry,) = entries(place)
    aside = place.parent / "aside"
    entry.rename(aside)
    found = []
    with cache.locked(place, entry.name, lambda: None):
        thread = threading.Thread(target=lambda: found.append(outcome(tokenizer, [path])))
        thread.start()
        for _ in range(200):
            if said_lines:
                break
            time.sleep(0.05)
        assert said_lines == ["Waiting for a run that prepares the same rows."] and not found
        aside.rename(entry)
    thread.join(60)
    assert found == [first] and "Opened 50 rows" in said_lines[-1]


def in_thread(function) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_a_lock_file_that_was_removed_is_no_lock(tmp_path):
    """Two processes would otherwise hold the lock of an entry, one of a file that is gone."""
    waiting, inside = threading.Event(), threading.Event()

    def wait() -> None:
        with cache.locked(tmp_path, "k", waiting.set):
            inside.set()

    with cache.locked(tmp_path, "k", lambda: None):
        thread = in_thread(wait)
        assert waiting.wait(60)
        (tmp_path / "k.lock").unlink()  # as `sweep` does, with the lock
        second = open(tmp_path / "k.lock", "a")
        cache.fcntl.flock(second, cache.fcntl.LOCK_EX)
    assert not inside.wait(0.3)
    second.close()
    assert inside.wait(60)
    thread.join()


def test_a_sweep_leaves_entries_whose_lock_is_another_file_by_now(tmp_path, monkeypatch):
    (tmp_path / "k").mkdir()
    flock = cache.fcntl.flock

    def late(file, how) -> None:
        (tmp_path / "k.lock").unlink()
        (tmp_path / "k.lock").touch()
        flock(file, how)

    monkeypatch.setattr(cache.fcntl, "flock", late)
    cache.sweep(tmp_path, "kept", limit=-1)
    assert (tmp_path / "k").is_dir() and (tmp_path / "k.lock").is_file()


def test_a_sweep_passes_over_what_others_remove_meanwhile(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.arrow").write_bytes(b"x")
    listdir = os.listdir

    def slow(folder):
        found = listdir(folder)
        if Path(folder).name == "a":
            (tmp_path / "a/rows.arrow").unlink()
            (tmp_path / "a").rmdir()
        return found

    monkeypatch.setattr(os, "listdir", slow)
    cache.sweep(tmp_path, "kept", limit=-1)
    assert not (tmp_path / "b").exists()
    cache.sweep(tmp_path / "gone", "kept")


def test_a_home_that_is_not_there_is_no_crash(monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", "~nosuchuser/cache")
    assert cache.cache_folder() == Path("~nosuchuser/cache/rows")
    monkeypatch.delenv("FINETUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "~nosuchuser")
    assert cache.cache_folder() == Path("~nosuchuser/paddle-finetune/rows")


def test_a_file_that_changes_meanwhile_is_named(tokenizer, write, monkeypatch, place):
    large(monkeypatch, 1)
    path = write("a.jsonl", lines(*many(50)))

    def growing(file, size):
        yield from read_blocks(file)
        with open(path, "a") as more:
            more.write(lines(*many(1)))

    monkeypatch.setattr(inputs, "read_blocks", growing)
    message, _ = outcome(tokenizer, [path])
    assert "a.jsonl: the file changed while it was being read" in message
    assert entries(place) == []


def test_all_code_that_decides_what_a_token_is_is_in_the_key():
    package = Path(cache.__file__).parent.parent
    waiting, seen = [package / "rows/encode.py", package / "rows/sources.py"], set()
    while waiting:
        file = waiting.pop()
        seen.add(file)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.module.split(".")[0] != "finetune":
                continue
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            # Where a file of a hub lies is model's to know; what is in the file is hashed itself.
            names = [name.replace(".", "/") for name in names if not name.startswith("finetune.model")]
            paths = {package.parent / f"{name}.py" for name in names}
            waiting += [path for path in paths if path.is_file() and path not in seen]
    assert package / "chat/render.py" in seen and package / "errors.py" in seen and len(seen) > 12
    assert seen <= set(cache.code_files())
