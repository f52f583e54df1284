from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from finetune.errors import DataError, Fault
from finetune.rows.block import Block
from finetune.rows.datafiles import DataFile, find_files
from finetune.rows.sources import read_blocks, rows_of
from tests.chat.cases import said
from tests.chat.conftest import From
from tests.rows.reading import read_rows

ROWS = [{"messages": said("q", f"a{i}")} for i in range(3)]
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"city": "Rom"}}}]}
OTHER = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"days": 2}}}]}


def lines(rows=ROWS) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(path: str, **kw) -> list:
    return list(read_rows(From(path, **kw)))


def names(rows) -> list[str]:
    return [os.path.basename(name) for _, name in rows]


def test_jsonl_is_named_by_line(write):
    path = write("a.jsonl", "\ufeff" + lines(ROWS[:1]).replace("\n", "\r\n") + "\r\n\n  \n" + lines(ROWS[1:]).rstrip())
    rows = read(path)
    assert [row for row, _ in rows] == ROWS
    assert names(rows) == ["a.jsonl:1", "a.jsonl:5", "a.jsonl:6"]


def test_unusual_line_separators_do_not_split_rows(write):
    text = "a\u2028b\u2029c\u0085d\x0be"
    assert read(write("a.jsonl", json.dumps({"t": text}, ensure_ascii=False)))[0][0] == {"t": text}


@pytest.mark.parametrize(
    "content", [json.dumps(ROWS), "\ufeff \n" + json.dumps(ROWS, indent=1), json.dumps({"data": ROWS}), lines()]
)
def test_json_forms(write, content):
    rows = read(write("a.json", content))
    assert [row for row, _ in rows] == ROWS
    assert names(rows) == ["a.json:1", "a.json:2", "a.json:3"]


def test_one_object_is_one_row(write):
    assert [row for row, _ in read(write("a.json", json.dumps(ROWS[0], indent=1)))] == ROWS[:1]


def test_gzip(write):
    assert [row for row, _ in read(write("a.jsonl.gz", gzip.compress(lines().encode())))] == ROWS
    with pytest.raises(DataError, match="b.jsonl.gz: the file cannot be read"):
        read(write("b.jsonl.gz", b"plain"))
    with pytest.raises(DataError, match="c.jsonl.gz: the file cannot be read"):
        read(write("c.jsonl.gz", gzip.compress(lines().encode())[:-12]))


def test_gzip_with_a_flipped_byte(write):
    content = bytearray(gzip.compress(lines().encode(), mtime=0))
    for place in range(10, len(content)):
        content[place] ^= 0xFF
        with pytest.raises(DataError, match="a.jsonl.gz: the file cannot be read"):
            read(write("a.jsonl.gz", bytes(content)))
        content[place] ^= 0xFF


def test_missing_keys_stay_missing_in_json(write):
    rows = read(write("a.jsonl", lines([{"messages": [CALL]}, {"messages": [OTHER]}])))
    assert [row["messages"] for row, _ in rows] == [[CALL], [OTHER]]


def test_csv_keeps_text(write):
    content = '\ufeffinstruction,output,history\n"a, ""b""\nc",42,"[[""q"", ""a""]]"\r\n007,null,\n'
    rows = read(write("a.csv", content))
    assert [row for row, _ in rows] == [
        {"instruction": 'a, "b"\nc', "output": "42", "history": [["q", "a"]]},
        {"instruction": "007", "output": "null"},
    ]
    assert names(rows) == ["a.csv:1", "a.csv:2"]


@pytest.mark.parametrize(
    "text, value",
    [
        ("", ""),
        ('{"capital": "Rome"}', '{"capital": "Rome"}'),
        ("[]", "[]"),
        ("[1, 2]", "[1, 2]"),
        ("[" + "9" * 5000 + "]", "[" + "9" * 5000 + "]"),
        ("[" * 100_000, "[" * 100_000),
        (json.dumps(said("q")[0]), said("q")[0]),
        ('[{"from": "gpt", "value": "a"}]', [{"from": "gpt", "value": "a"}]),
    ],
)
def test_csv_answers_are_text_unless_they_are_messages(write, text, value):
    quoted = text.replace('"', '""')
    assert read(write("a.csv", f'prompt,chosen\nq,"{quoted}"\n'))[0][0] == {"prompt": "q", "chosen": value}


def test_space_in_a_csv_header_is_no_part_of_a_name(write):
    assert read(write("a.csv", "a, b ,\n1, 2,3\n"))[0][0] == {"a": "1", "b": " 2", "": "3"}


def test_csv_of_numbers_too_large_for_python_is_still_read(write):
    rows = read(write("a.csv", "messages\n[" + "9" * 5000 + "]\n"))
    assert rows[0][0] == {"messages": "[" + "9" * 5000 + "]"}


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_parquet_and_arrow_lose_the_nulls_arrow_put_in(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    table = pyarrow.Table.from_pylist([{"messages": [CALL]}, {"messages": [OTHER]}])
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table)
    rows = read(str(path))
    assert [row["messages"] for row, _ in rows] == [[CALL], [OTHER]]
    assert names(rows) == [f"{path.name}:1", f"{path.name}:2"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=f"{path.name}: the file is damaged"):
        read(str(path))


@pytest.mark.parametrize("nested", [False, True])
def test_columns_that_stand_twice(tmp_path, nested):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    twice = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    names = ["text", "text"]
    if nested:
        twice, names = [pyarrow.StructArray.from_arrays(twice, names=names), pyarrow.array(["c"])], ["row", "text"]
    pyarrow.parquet.write_table(pyarrow.table(twice, names=names), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet: the column text stands twice. Keep one of the two"):
        read(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name", [b"messages", b"role"])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_with_names_that_are_not_utf8(tmp_path, kind, name):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    table = pyarrow.Table.from_pylist([{"messages": [CALL]}])
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, store_schema=False)
    else:
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    content = path.read_bytes()
    assert name in content
    path.write_bytes(content.replace(name, b"\xf2" + name[1:]))
    with pytest.raises(DataError, match=f"{path.name}: the file is damaged .* byte 0xf2"):
        read(str(path))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "json"])
def test_blocks_of_whole_files_share_their_size_by_rows(tmp_path, write, kind):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    many, path = ROWS * 1000, tmp_path / f"a.{kind}"
    table = pyarrow.Table.from_pylist(many)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == "arrow":
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=700)
    else:
        write("a.json", json.dumps({"data": many}))
    (file,) = find_files(From(str(path)))
    blocks = list(read_blocks(file))
    assert len(blocks) > 2 and sum(block.count for block in blocks) == 3000
    for block in blocks:
        assert block.size == pytest.approx(file.text_bytes() * block.count / 3000, abs=1)
    assert file.text_bytes() == path.stat().st_size * (4 if kind == "parquet" else 1)


def test_folder_of_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "d")
    assert [row for row, _ in read(str(tmp_path / "d"))] == ROWS
    assert len(read(str(tmp_path / "d"), split="test")) == 1
    with pytest.raises(DataError, match="there is no split 'dev'. It has test, train"):
        read(str(tmp_path / "d"), split="dev")


def test_caches_of_datasets_library_are_not_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "d")
    (saved,) = (tmp_path / "d").glob("data-*.arrow")
    (tmp_path / "d/cache-0123456789abcdef.arrow").write_bytes(saved.read_bytes())
    assert [row for row, _ in read(str(tmp_path / "d"))] == ROWS
    with pytest.raises(DataError, match="there is no split 'test'. Its files are not named after splits"):
        read(str(tmp_path / "d"), split="test")
    saved.unlink()
    with pytest.raises(DataError, match=f"{saved.name}, which state.json names, is missing"):
        read(str(tmp_path / "d"))


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"_data_files": [1]}'])
def test_a_state_of_something_else_says_nothing(write, tmp_path, state):
    write("d/state.json", state)
    write("d/a.jsonl", lines())
    assert [row for row, _ in read(str(tmp_path / "d"))] == ROWS


HUB = ["data/train_prefs-00000-of-00001.jsonl", "data/test_prefs-00000-of-00001.jsonl"]


@pytest.mark.parametrize(
    "files, split, found",
    [
        (HUB, "train_prefs", [0]),
        (HUB, "test_prefs", [1]),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation.jsonl"], "train", [0, 1]),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation.jsonl"], "validation", [2]),
        (["a/test.jsonl", "a/train.jsonl", "b/train.jsonl"], "train", [1, 2]),
        (["dev/0.jsonl", "other.jsonl", "training/0.jsonl"], "train", [2]),
        (["dev/0.jsonl", "other.jsonl", "training/0.jsonl"], "validation", [0]),
        (["dev/0.jsonl", "other.jsonl", "training/0.jsonl"], "dev", [0]),
        (["test.jsonl", "train_a.jsonl", "train_b.jsonl"], "train", [1, 2]),
        (["good.jsonl", "mine-1.jsonl"], "mine", [1]),
        # Not named after `train` and another split: all, as they are
        (["extra.jsonl", "train.jsonl"], "train", [0, 1]),
        (["test.jsonl", "validation.jsonl"], "train", [0, 1]),
        (["a.jsonl", "tests.jsonl", "trainer.jsonl"], "train", [0, 1, 2]),
    ],
)
def test_splits_of_a_folder_by_the_names_of_its_files(write, tmp_path, files, split, found):
    for name in files:
        write(f"test/{name}", lines())
    folder = tmp_path / "test"
    chosen = [str(file.path.relative_to(folder)) for file in find_files(From(str(folder), split=split))]
    assert chosen == [files[i] for i in found]


def test_splits_that_a_folder_does_not_have(write, tmp_path):
    for name in HUB:
        write(f"d/{name}", lines())
    given = "there is no split '{}'. Its files are named after test_prefs, train_prefs: give one of these as split"
    for split in ("train", "test"):
        with pytest.raises(DataError, match=given.format(split)):
            read(str(tmp_path / "d"), split=split)
    write("e/a.jsonl", lines())
    with pytest.raises(DataError, match="there is no split 'test'. Its files are not named after splits"):
        read(str(tmp_path / "e"), split="test")


def test_files_have_no_splits_but_those_of_their_names(write, tmp_path):
    path, named = write("d/x.jsonl", lines()), write("d/test-1.jsonl", lines(ROWS[:1]))
    for given in (path, str(tmp_path / "d/x*")):
        with pytest.raises(DataError, match="no file of split 'test': files have no splits. Leave split out"):
            read(given, split="test")
    assert len(read(named, split="test")) == len(read(str(tmp_path / "d/*"), split="test")) == 1
    assert len(read(named)) == 1 and len(read(str(tmp_path / "d/*"))) == 4


def test_hidden_folders_are_left_out(write, tmp_path):
    write(".d/.ipynb_checkpoints/train-checkpoint.jsonl", lines())
    write(".d/sub/.git/a.jsonl", lines())
    write(".d/sub/a.jsonl", lines(ROWS[:1]))
    assert [row for row, _ in read(str(tmp_path / ".d"))] == ROWS[:1]


def test_folders_and_globs_are_in_order_of_name(write, tmp_path):
    for name in ("d/b.jsonl", "d/a.jsonl", "d/sub/c.json", "d/.hidden.jsonl", "d/README.md"):
        write(name, lines(ROWS[:1]))
    assert names(read(str(tmp_path / "d"))) == ["a.jsonl:1", "b.jsonl:1", "c.json:1"]
    assert names(read(str(tmp_path / "d/*.jsonl"))) == ["a.jsonl:1", "b.jsonl:1"]
    assert names(read(str(tmp_path / "d/**/*.json"))) == ["c.json:1"]


def test_relative_to_current_folder_then_recipe(write, tmp_path, monkeypatch):
    write("recipes/data.jsonl", lines())
    write("work/x", "")
    monkeypatch.chdir(tmp_path / "work")
    assert find_files(From("data.jsonl"), tmp_path / "recipes")[0].path == tmp_path / "recipes/data.jsonl"
    write("work/data.jsonl", lines())
    assert find_files(From("data.jsonl"), tmp_path / "recipes")[0].name == "data.jsonl"


def test_hub_ids_go_to_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, revision, split):
        asked.append((name, revision, split))
        return [{"instruction": "q", "output": "a", "input": None}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("tatsu-lab/alpaca", split="train[:1]") == [({"instruction": "q", "output": "a"}, "tatsu-lab/alpaca:1")]
    read("hf:tatsu-lab/alpaca@v1")
    assert asked == [("tatsu-lab/alpaca", None, "train[:1]"), ("tatsu-lab/alpaca", "v1", "train")]

    def fail(name, revision, split):
        raise ValueError("Unknown split\nlong text")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="tatsu-lab/alpaca: split 'train' cannot be loaded from the hub: Unknown split"):
        read("tatsu-lab/alpaca")

    def unreachable(name, revision, split):
        raise ConnectionError("no network\nlong text")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="hf:tatsu-lab/alpaca: .*Hugging Face cannot be reached .no network"):
        read("tatsu-lab/alpaca")


def test_missing_files_name_the_nearest(write, tmp_path):
    write("d/train.jsonl", lines())
    write("d/other.csv", "")
    with pytest.raises(DataError, match=r"there is no file .*trian.jsonl. Did you mean .*/d/train.jsonl\?"):
        read(str(tmp_path / "d/trian.jsonl"))
    with pytest.raises(DataError, match="/d has other.csv, train.jsonl"):
        read(str(tmp_path / "d/zzz"))
    with pytest.raises(DataError, match="The folder .*/e is not there either"):
        read(str(tmp_path / "e/train.jsonl"))
    with pytest.raises(DataError, match="there is no file .*nothing"):
        read(str(tmp_path / "d/nothing*.jsonl"))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", "", "a.jsonl: the file has no rows"),
        ("a.json", " \n", "a.json: the file has no rows"),
        ("a.json", "[]", "a.json: the file has no rows"),
        ("a.csv", "instruction,output\n", "a.csv: the file has no rows"),
        ("a.json", "3", "a.json: the file holds a int. It must be a list of rows"),
        ("a.json", '[{"a": 1},\n {"a": }]', "a.json: not valid JSON at line 2 column 8"),
        ("a.json", "[" * 100_000, "a.json: JSON nested too deeply"),
        ("a.json", b"[\xff\xfe]", "a.json: byte 0xff at position 1 is not UTF-8"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "a.jsonl: the file is UTF-16. Save it as UTF-8"),
        ("a.csv", b"a,b\n1,\xe9\n", "a.csv, line 2: byte 0xe9 is not UTF-8"),
        ("a.csv", 'a,b\n1,"x', "a.csv, line 2: not valid csv"),
        (
            "a.csv",
            "q;a\n1;2\n",
            "a.csv, line 1: the header is one column, 'q;a'. Part the columns by commas, not by ';'",
        ),
        ("a.csv", "q\ta\n1\t2\n", "Part the columns by commas, not by '\\t'"),
        ("a.csv", "q,a, a\n1,2,3\n", "a.csv, line 1: the header has the column a twice"),
        ("a.json", '[{"a": 1},\n {"a": 1, "b": {"c": 1, "c": 2}}]', "a.json, line 2: the key 'c' stands twice"),
        ("a.json", '{"a": 1, "a": 2}', "a.json: the key 'a' stands twice in an object. Keep one of the two"),
        ("a.jsonl", '{\n "a": 1\n}\n{\n "a": 2\n}', "a.jsonl:1: an object that goes over several lines"),
        ("a.txt", "x", "a.txt: a file of kind '.txt'. Known are .jsonl"),
        ("a.parquet", b"PAR1", "a.parquet: the file is damaged or of another kind"),
        ("d/README.md", "x", "no data file in this folder"),
    ],
)
def test_files_that_cannot_be_read(write, tmp_path, name, content, message):
    path = write(name, content)
    with pytest.raises(DataError) as caught:
        read(os.path.dirname(path) if name.startswith("d/") else path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "path, message",
    [
        ("~nosuchuser/x.jsonl", "data.train[3].path: there is no file ~nosuchuser/x.jsonl"),
        (f"{'x' * 300}.jsonl", f"data.train[3].path: {'x' * 300}.jsonl cannot be read: File name too long"),
        (f"{'x' * 300}/*.jsonl", "data.train[3].path: "),
        (f"{'x' * 300}/y", "data.train[3].path: "),
    ],
)
def test_paths_that_cannot_be(path, message):
    with pytest.raises(DataError) as caught:
        find_files(From(path), key="data.train[3].path")
    assert str(caught.value).startswith(message)


def test_a_file_that_cannot_be_opened_has_no_hash(tmp_path):
    with pytest.raises(DataError, match="d: the file cannot be read: .*Is a directory"):
        DataFile("d", tmp_path).sha256()
    with pytest.raises(DataError, match="gone: the file cannot be read: .*No such file"):
        DataFile("gone", tmp_path / "gone").text_bytes()


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"a": }', "a.jsonl:2: not valid JSON at column 7: Expecting value"),
        (b'{"a": 1', "a.jsonl:2: not valid JSON at column 8"),
        (b"[1, 2]", "a.jsonl:2: found [1, 2], which is not an object"),
        (b'"text"', 'a.jsonl:2: found "text", which is not an object'),
        (b"null", "a.jsonl:2: found null"),
        (b'{"a": "\xe9"}', "a.jsonl:2: byte 0xe9 at position 7 is not UTF-8"),
        (b'{"a": "\x00"}', "a.jsonl:2: a NUL byte"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a.jsonl:2: not valid JSON: Exceeds the limit"),
        (b'{"a":' * 100_000, "a.jsonl:2: JSON nested too deeply"),
        (b'{"a": [{"b": 1, "c": 2, "b": 3}]}', "a.jsonl:2: the key 'b' stands twice in an object"),
    ],
)
def test_a_bad_line_is_a_fault_and_reading_goes_on(write, line, message):
    good = json.dumps(ROWS[0]).encode()
    rows = read(write("a.jsonl", good + b"\n" + line + b"\n" + good + b"\n"))
    assert [type(row) for row, _ in rows] == [dict, Fault, dict]
    assert message in str(rows[1][0])


def test_csv_rows_of_wrong_width(write):
    rows = read(write("a.csv", "a,b\n1,2,3\n1\n1,2\n"))
    assert "3 fields where the header has 2" in str(rows[0][0])
    assert "1 fields where the header has 2" in str(rows[1][0])
    assert rows[2][0] == {"a": "1", "b": "2"}


def test_rows_that_are_no_objects_in_an_array(write):
    rows = read(write("a.json", '[{"a": 1}, 5]'))
    assert rows[0][0] == {"a": 1}
    assert "a.json:2: found 5, which is not an object" in str(rows[1][0])


def test_hash_is_of_the_bytes(write):
    import hashlib

    path = write("a.jsonl", lines())
    assert find_files(From(path))[0].sha256() == hashlib.sha256(lines().encode()).hexdigest()


# -- arrays called jsonl, and columns -----------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson"])
def test_a_json_array_in_a_jsonl_is_read(write, name, indent):
    rows = [{"text": f"row {i}"} for i in range(5)]
    path = write(name, " \n" + json.dumps(rows, indent=indent))
    assert read(path) == [(row, f"{path}:{i}") for i, row in enumerate(rows, 1)]


def test_lines_that_are_arrays_are_rows_that_are_none(write):
    ((fault, _), (second, _)) = read(write("a.jsonl", '[1, 2]\n{"text": "x"}\n'))
    assert "which is not an object" in fault.what and second == {"text": "x"}


QA = [{"question": f"q{i}", "answer": f"a{i}", "output": "another", "n": i} for i in range(3)]
COLUMNS = {"instruction": "question", "output": "answer"}


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_columns_map_a_files_names_onto_a_forms_keys(write, tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "csv":
        write(path.name, "question,answer,output,n\n" + "".join(f"q{i},a{i},another,{i}\n" for i in range(3)))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(QA), path)
    else:
        write(path.name, json.dumps(QA) if kind == "json" else "".join(json.dumps(row) + "\n" for row in QA))
    file = DataFile(str(path), path)
    rows = [row for block in read_blocks(file) for _, row in rows_of(block, "a", COLUMNS)]
    assert [{key: row[key] for key in COLUMNS} for row in rows] == [
        {"instruction": f"q{i}", "output": f"a{i}"} for i in range(3)
    ]
    assert all(set(row) == {"instruction", "output", "n"} for row in rows)


def test_columns_may_change_places_and_cells_of_csv_hold_json_by_the_forms_key(write):
    path = write("a.csv", 'dialog,better,worse\n"[{""role"": ""user"", ""content"": ""q""}]",b,c\n')
    (block,) = read_blocks(DataFile(path, Path(path)))
    columns = {"prompt": "dialog", "chosen": "worse", "rejected": "better"}
    assert list(rows_of(block, "a", columns)) == [
        (1, {"prompt": [{"role": "user", "content": "q"}], "chosen": "c", "rejected": "b"})
    ]
    swapped = Block(1, 1, "rows", [{"chosen": "b", "rejected": "c"}])
    assert list(rows_of(swapped, "a", {"chosen": "rejected", "rejected": "chosen"})) == [
        (1, {"chosen": "c", "rejected": "b"})
    ]
