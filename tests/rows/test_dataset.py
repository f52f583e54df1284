from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from finetune.chat.example import IGNORE
from finetune.errors import DataError
from finetune.rows.dataset import build_dataset
from finetune.rows.encode import cut_pair
from finetune.rows.formats import parse_row
from finetune.rows.table import split_dataset
from tests.chat.cases import WEATHER, said
from tests.chat.conftest import From, Settings, marked
from tests.chat.encoding import encode_preference


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def chat(*texts: str, **kw) -> dict:
    return {"messages": said(*texts, **kw)}


def pair(prompt="q", chosen="good", rejected="bad") -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def build(tokenizer, *sources: From | str, method: str = "sft", progress=None, limit=None, **data):
    given = [source if isinstance(source, From) else From(source) for source in sources]
    return build_dataset(given, tokenizer, data=Settings(**data), method=method, progress=progress, limit=limit)


BARE = len(
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
) - (
    # special tokens count once
    3 * (len("<|im_start|>") - 1) + 2 * (len("<|im_end|>") - 1)
)


# -- what is built -----------------------------------------------------------------------------------------------


def test_rows_in_order_with_counts_and_hashes(tokenizer, write):
    a, b = lines(chat("q", "a1"), chat("q", "a2", "r", "a3")), json.dumps([{"instruction": "q", "output": "a4"}])
    first, second = write("a.jsonl", a), write("b.json", b)
    done = []
    dataset, report = build(tokenizer, first, second, progress=lambda rows, total: done.append(rows))
    assert [example.source for example in dataset] == [f"{first}:1", f"{first}:2", f"{second}:1"]
    assert marked(tokenizer, dataset[0]).endswith("⟦a1<|im_end|>⟧\n")
    assert len(dataset) == 3 and sum(done) == 3
    assert dataset.lengths.tolist() == [len(example.input_ids) for example in dataset]
    assert dataset.num_supervised.tolist() == [3, 6, 3]
    assert (report.read, report.kept, report.truncated, report.dropped, report.unsupervised) == (3, 3, 0, 0, 0)
    assert (report.tokens, report.supervised_tokens) == (dataset.lengths.sum(), 12)
    assert [(file.path, file.rows, file.sha256) for file in report.files] == [
        (first, 2, hashlib.sha256(a.encode()).hexdigest()),
        (second, 1, hashlib.sha256(b.encode()).hexdigest()),
    ]
    assert report.notes == []
    assert json.loads(json.dumps(report.to_dict()))["files"][0]["rows"] == 2


def test_indexing(tokenizer, write):
    dataset, _ = build(tokenizer, write("a.jsonl", lines(chat("q", "a1"), chat("q", "a2"))))
    assert dataset[-1].source == dataset[1].source
    with pytest.raises(IndexError, match="row 2 of 2"):
        dataset[2]
    swapped = dataset.select([1, 0])
    assert [example.source for example in swapped] == [dataset[1].source, dataset[0].source]
    assert swapped.lengths.tolist() == dataset.lengths[[1, 0]].tolist()
    assert len(dataset.select([])) == 0


def test_many_rows_cross_the_batch_border(tokenizer, write):
    rows = [chat("q", f"answer {i}") for i in range(2500)]
    dataset, report = build(tokenizer, write("a.jsonl", lines(*rows)))
    assert report.kept == len(dataset) == 2500
    assert [marked(tokenizer, dataset[i]).endswith(f"⟦answer {i}<|im_end|>⟧\n") for i in (0, 1023, 1024, 2499)] == [
        True
    ] * 4


def test_samples_take_the_first_rows_over_files(tokenizer, write, tmp_path):
    for name in ("d/a.jsonl", "d/b.jsonl", "d/c.jsonl"):
        write(name, lines(chat("q", name), chat("q", name)))
    dataset, report = build(tokenizer, From(str(tmp_path / "d"), samples=3))
    assert [example.source[-9:] for example in dataset] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]
    assert [file.rows for file in report.files] == [2, 1]


def test_limit_stops_early(tokenizer, write):
    rows = [chat("q")] + [chat("q", f"a{i}") for i in range(9)] + [{"bad": 1}]
    dataset, report = build(tokenizer, write("a.jsonl", lines(*rows)), limit=2)
    assert len(dataset) == 2
    assert report.read < len(rows)


def test_train_on_all_never_counts_the_first_token(tokenizer, write):
    dataset, report = build(tokenizer, write("a.jsonl", lines(chat("q", "a"))), train_on="all")
    assert dataset[0].num_supervised == len(dataset[0].input_ids)
    assert report.supervised_tokens == report.tokens - 1


def test_split_is_deterministic_and_complete(tokenizer, write):
    dataset, _ = build(tokenizer, write("a.jsonl", lines(*[chat("q", str(i)) for i in range(40)])))
    train, held = split_dataset(dataset, 0.1, seed=3)
    assert (len(train), len(held)) == (36, 4)
    names = [example.source for example in train] + [example.source for example in held]
    assert sorted(names) == sorted(example.source for example in dataset)
    assert [e.source for e in split_dataset(dataset, 0.1, seed=3)[1]] == [e.source for e in held]
    assert [e.source for e in split_dataset(dataset, 0.1, seed=4)[1]] != [e.source for e in held]
    assert [len(part) for part in split_dataset(dataset, 0.0, seed=3)] == [40, 0]
    assert [len(part) for part in split_dataset(dataset, 0.001, seed=3)] == [39, 1]
    with pytest.raises(DataError, match="data.eval_fraction: 1 row cannot be split"):
        split_dataset(dataset.select([0]), 0.5, seed=3)


# -- length ------------------------------------------------------------------------------------------------------


def test_truncate_cuts_the_end_and_says_so(tokenizer, write):
    path = write("a.jsonl", lines(chat("q", "abcdef"), chat("q", "a")))
    dataset, report = build(tokenizer, path, max_length=BARE + 3)
    assert dataset.lengths.tolist() == [BARE + 3, BARE + 3]
    assert marked(tokenizer, dataset[0]).endswith("assistant\n⟦abc⟧")
    assert marked(tokenizer, dataset[1]).endswith("assistant\n⟦a<|im_end|>⟧\n")
    assert (report.truncated, report.kept, report.longest) == (1, 2, BARE + 8)
    assert report.notes == [f"1 row cut to data.max_length ({BARE + 3} tokens; the longest row has {BARE + 8})."]


def test_rows_without_supervised_tokens_are_counted_and_named(tokenizer, write):
    path = write("a.jsonl", lines(chat("q"), chat("a long question", "a"), chat("q", "a")))
    dataset, report = build(tokenizer, path, max_length=BARE + 3)
    assert [example.source for example in dataset] == [f"{path}:3"]
    assert (report.read, report.kept, report.unsupervised, report.truncated) == (3, 1, 2, 0)
    assert report.notes == [
        f"1 row left out for having no supervised token: {path}:1.",
        f"1 row left out because nothing of the responses lies within max_length: {path}:2.",
    ]


def test_drop_and_error(tokenizer, write):
    path = write("a.jsonl", lines(chat("q", "abcdef"), chat("q", "a")))
    dataset, report = build(tokenizer, path, max_length=BARE + 3, overlong="drop")
    assert (len(dataset), report.dropped, report.truncated) == (1, 1, 0)
    assert report.notes[0].startswith("1 row dropped for being longer than data.max_length")
    with pytest.raises(DataError, match=f"a.jsonl:1: {BARE + 8} tokens, but data.max_length is {BARE + 3}"):
        build(tokenizer, path, max_length=BARE + 3, overlong="error")


def test_nothing_left_is_an_error(tokenizer, write):
    with pytest.raises(DataError, match="of 1 row none can be trained on.*for having no supervised token"):
        build(tokenizer, write("a.jsonl", lines(chat("q"))))


# -- faults ------------------------------------------------------------------------------------------------------


def test_faults_of_all_sources_at_once(tokenizer, write):
    first = write("a.jsonl", lines(chat("q", "a")) + "{]\n" + lines({"messages": [{"role": "x", "content": ""}]}))
    second = write("b.jsonl", lines({"instruction": "q"}))
    with pytest.raises(DataError) as caught:
        build(tokenizer, first, second)
    text = str(caught.value).split("\n")
    assert [place in line for place, line in zip(("a.jsonl:2", "a.jsonl:3", "b.jsonl:1"), text, strict=True)] == [
        True
    ] * 3


def test_missing_files_do_not_hide_other_faults(tokenizer, write):
    path = write("a.jsonl", "[]\n")
    with pytest.raises(DataError) as caught:
        build(tokenizer, path + "x", path)
    assert [
        place in line
        for place, line in zip(("there is no file", "a.jsonl:1"), str(caught.value).split("\n"), strict=True)
    ] == [True] * 2


def test_missing_files_name_their_recipe_key(tokenizer, write):
    data = Settings()
    data.train = [From(write("a.jsonl", lines(chat("q", "a")))), From("missing")]
    data.eval = [From("missing")]
    for sources, key in ((data.train, "data.train[1].path"), (data.eval, "data.eval[0].path")):
        with pytest.raises(DataError, match="there is no file missing") as caught:
            build_dataset(sources, tokenizer, data=data, method="sft")
        assert [fault.where for fault in caught.value.faults] == [key]


def test_csv_rows_with_empty_cells_and_answers_that_are_json(tokenizer, write):
    path = write("a.csv", 'instruction,output,history\nq,a,\nq,b,"[[""r"", ""s""]]"\n')
    assert [row.num_supervised for row in build(tokenizer, path)[0]] == [2, 4]
    answers = 'prompt,chosen,rejected\nq,"{""capital"": ""Rome""}",[]\n'
    dataset, _ = build(tokenizer, write("b.csv", answers), method="dpo")
    assert marked(tokenizer, dataset[0].chosen).endswith('⟦{"capital": "Rome"}<|im_end|>⟧\n')
    assert marked(tokenizer, dataset[0].rejected).endswith("⟦[]<|im_end|>⟧\n")


def test_a_mistake_of_all_rows_is_one_line_with_their_number(tokenizer, write):
    with pytest.raises(DataError) as caught:
        build(tokenizer, write("a.jsonl", "[]\n" * 1500))
    (fault,) = caught.value.faults
    assert fault.where.endswith("a.jsonl:1 and 1,499 more")


def test_ten_faults_and_the_total(tokenizer, write):
    with pytest.raises(DataError) as caught:
        build(tokenizer, write("a.jsonl", "".join(json.dumps({"messages": i}) + "\n" for i in range(1500))))
    assert len(caught.value.faults) == 10
    assert str(caught.value).endswith("1,500 faults in all; these are the first.")


def test_faults_found_while_rendering(tokenizer, write):
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]},
        ]
    }
    with pytest.raises(DataError, match="a.jsonl:2: the row has tool_calls"):
        build(tokenizer, write("a.jsonl", lines(chat("q", "a"), row)))


def test_other_form_in_one_source(tokenizer, write):
    path = write("a.jsonl", lines(chat("q", "a"), {"instruction": "q", "output": "a"}))
    with pytest.raises(DataError, match="a.jsonl:2: a row of form alpaca, but the rows before it are messages"):
        build(tokenizer, path)


def test_named_form_is_not_guessed(tokenizer, write):
    path = write("a.jsonl", lines({"instruction": "q", "output": "a", "messages": []}))
    dataset, _ = build(tokenizer, From(path, format="alpaca"))
    assert len(dataset) == 1


def test_form_and_method_must_fit(tokenizer, write):
    pairs, chats = write("p.jsonl", lines(pair())), write("c.jsonl", lines(chat("q", "a")))
    with pytest.raises(
        DataError, match="p.jsonl:1: a preference row, but method sft trains on conversations. Use method: dpo"
    ):
        build(tokenizer, pairs)
    with pytest.raises(
        DataError, match="c.jsonl:1: a conversation row, but method dpo trains on preferences. Use method: sft"
    ):
        build(tokenizer, chats, method="dpo")


def test_tools_that_vanish_are_said(tokenizer, tooled, write):
    path = write("a.jsonl", lines({**chat("q", "a"), "tools": [WEATHER]}, chat("q", "a")))
    _, report = build(tokenizer, path)
    assert report.notes == [
        f"1 row with tools that the model's chat template does not show: {path}:1. "
        "Use a model whose template knows tools, such as Qwen2.5-Instruct."
    ]
    assert build(tooled, path)[1].notes == []


# -- preferences -------------------------------------------------------------------------------------------------


def test_pairs(tokenizer, write):
    path = write("p.jsonl", lines(pair(), pair(chosen="longer", rejected="x")))
    dataset, report = build(tokenizer, path, method="dpo")
    first = dataset[0]
    assert marked(tokenizer, first.chosen).endswith("⟦good<|im_end|>⟧\n")
    assert marked(tokenizer, first.rejected).endswith("⟦bad<|im_end|>⟧\n")
    assert tokenizer.decode(first.prompt_ids).endswith("<|im_start|>assistant\n")
    assert dataset.prompt_lengths.tolist() == [BARE, BARE]
    assert dataset.chosen_lengths.tolist() == [BARE + 6, BARE + 8]
    assert dataset.rejected_lengths.tolist() == [BARE + 5, BARE + 3]
    assert dataset.lengths.tolist() == [BARE + 11, BARE + 11]
    assert dataset.num_supervised.tolist() == [5 + 4, 7 + 2]
    assert (report.read, report.kept, report.notes) == (2, 2, [])
    assert [p.source for p in dataset.select([1])] == [f"{path}:2"]


def test_data_check_names_equal_and_empty_answers(tokenizer, write):
    path = write("p.jsonl", lines(pair(rejected="good"), pair(rejected=" "), pair(chosen="")))
    _, report = build(tokenizer, path, method="dpo")
    assert report.kept == 3
    assert report.notes == [
        f"1 row with chosen equal to rejected, which teaches nothing: {path}:1.",
        f"1 row with an empty rejected answer: {path}:2.",
        f"1 row with an empty chosen answer: {path}:3.",
    ]


def encoded(tokenizer, **row):
    return encode_preference(tokenizer, parse_row(pair(**row), "preference", "f:1"))


def test_prompt_goes_before_the_response(tokenizer):
    whole = encoded(tokenizer)
    cut = cut_pair(whole, BARE + 6 - 10)
    assert marked(tokenizer, cut.chosen) == marked(tokenizer, whole.chosen)[len("<|im_start|>system\nYo") :]
    assert len(whole.prompt_ids) - len(cut.prompt_ids) == 10
    assert marked(tokenizer, cut.rejected).endswith("⟦bad<|im_end|>⟧\n")
    assert len(cut.rejected.input_ids) == len(whole.rejected.input_ids) - 10


def test_header_is_never_cut_and_then_the_response_loses_its_end(tokenizer):
    header = len(tokenizer.encode("<|im_start|>assistant\n"))
    cut = cut_pair(encoded(tokenizer, chosen="abcdef"), header + 3)
    assert marked(tokenizer, cut.chosen) == "<|im_start|>assistant\n⟦abc⟧"
    assert marked(tokenizer, cut.rejected) == "<|im_start|>assistant\n⟦bad⟧"
    assert tokenizer.decode(cut.prompt_ids) == "<|im_start|>assistant\n"


@pytest.mark.parametrize("max_length", range(2, BARE + 12))
def test_any_cut_keeps_the_invariants(tokenizer, max_length):
    cut = cut_pair(encoded(tokenizer, chosen="abcdef"), max_length)
    shared = len(cut.prompt_ids)
    for side in (cut.chosen, cut.rejected):
        assert len(side.input_ids) <= max_length
        assert side.input_ids[:shared].tolist() == cut.prompt_ids.tolist()
        assert (side.labels[:shared] == IGNORE).all()
        assert np.isin(side.labels[side.labels != IGNORE], side.input_ids).all()


def test_pairs_cut_and_cut_to_nothing_are_counted(tokenizer, write):
    header = len(tokenizer.encode("<|im_start|>assistant\n"))
    path = write("p.jsonl", lines(pair(), pair(chosen="", rejected="")))
    dataset, report = build(tokenizer, path, method="dpo", max_length=header + 2)
    assert (report.truncated, report.prompts_cut, report.responses_cut) == (2, 2, 1)
    assert ": 2 in the prompt, 1 in a response." in report.notes[0]
    with pytest.raises(DataError, match="nothing of the chosen answer is within max_length: .*p.jsonl:1"):
        build(tokenizer, path, method="dpo", max_length=header)
    assert build(tokenizer, path, method="dpo", max_length=2048)[1].truncated == 0


def test_pair_policies(tokenizer, write):
    path = write("p.jsonl", lines(pair(), pair(chosen="x" * 50)))
    assert build(tokenizer, path, method="dpo", max_length=BARE + 9, overlong="drop")[1].dropped == 1
    with pytest.raises(DataError, match="p.jsonl:2: .* tokens, but data.max_length"):
        build(tokenizer, path, method="dpo", max_length=BARE + 9, overlong="error")


def test_columns_are_taken_by_every_path_and_named_where_they_are_missing(tokenizer, write):
    rows = [{"question": "q", "answer": "a"}, {"question": "p", "answer": "b"}]
    path = write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    columns = {"instruction": "question", "output": "answer"}
    mapped, _ = build(tokenizer, From(path, columns=columns))
    alpaca = [{"instruction": row["question"], "output": row["answer"]} for row in rows]
    plain = write("b.jsonl", "".join(json.dumps(row) + "\n" for row in alpaca))
    expected, _ = build(tokenizer, plain)
    assert [row.input_ids.tolist() for row in mapped] == [row.input_ids.tolist() for row in expected]
    # The form must read all of the keys, whatever else the row has.
    text = write("c.jsonl", json.dumps({"messages": said("x", "y"), **rows[0]}) + "\n")
    chosen, _ = build(tokenizer, From(text, columns={"query": "question", "response": "answer"}))
    assert chosen[0].input_ids.tolist() == expected[0].input_ids.tolist()
    with pytest.raises(DataError, match="there is no column answr, which `columns` takes for output.*mean answer"):
        build(tokenizer, From(path, columns={"instruction": "question", "output": "answr"}))
