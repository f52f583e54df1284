from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.chat.tokenizer import StreamDecoder, Tokenizer
from finetune.errors import CheckpointError, DataError
from tests.chat.cases import PLAIN, said
from tests.chat.conftest import QWEN25, byte_tokenizer
from tests.tiny import CHATML

TEXTS = [text for messages in PLAIN.values() for text in (message["content"] for message in messages)]


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "saved")
    return tmp_path / "saved"


def test_ids_of_the_real_vocabulary(real):
    # Known ids: transformers' documentation of Qwen2 and tests/parity.
    assert real.encode("Hello world") == [9707, 1879]
    assert real.encode("<|im_start|>user\n") == [151644, 872, 198]
    assert real.encode("1234") == [16, 17, 18, 19]
    assert (real.vocab_size, len(real)) == (151643, 151646)
    assert real.stop_token_ids == [151643, 151645]
    assert (real.eos_token_id, real.pad_token_id) == (151645, 151643)
    assert real.apply_chat_template(said("Hi"), tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_saved_folder_opens_the_same(tokenizer, folder):
    again = Tokenizer.from_folder(folder)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert again.chat_template == tokenizer.chat_template == CHATML
    assert (again.eos_token_id, again.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    again.save(folder.parent / "twice")
    for file in folder.iterdir():
        assert (folder.parent / "twice" / file.name).read_bytes() == file.read_bytes(), file.name


def test_vocabulary_and_merges_equal_tokenizer_json(folder):
    whole = Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").unlink()
    parts = Tokenizer.from_folder(folder)
    assert [parts.encode(text) for text in TEXTS] == [whole.encode(text) for text in TEXTS]


def test_real_vocabulary_survives_saving(real, tmp_path):
    real.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    parts = Tokenizer.from_folder(tmp_path)
    for text in TEXTS:
        assert real.encode(text) == again.encode(text) == parts.encode(text)


def edit(folder, **changes):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.update(changes)
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)


@pytest.mark.parametrize("way", ["text", "named list", "jinja file", "json file"])
def test_every_place_of_a_chat_template(folder, way):
    edit(folder, chat_template=...)
    if way == "text":
        edit(folder, chat_template=QWEN25)
    elif way == "named list":
        edit(folder, chat_template=[{"name": "tool_use", "template": "T"}, {"name": "default", "template": QWEN25}])
    elif way == "jinja file":
        edit(folder, chat_template="outvoted by the file")
        (folder / "chat_template.jinja").write_text(QWEN25)
    else:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": QWEN25}))
    opened = Tokenizer.from_folder(folder)
    assert opened.chat_template == QWEN25
    assert opened.render(said("q"), tools=[{"a": 1}]) == "T" if way == "named list" else True


def test_no_chat_template_says_how_to_add_one(folder):
    edit(folder, chat_template=...)
    opened = Tokenizer.from_folder(folder)
    assert opened.chat_template is None
    with pytest.raises(CheckpointError, match="no chat template.*chat_template.jinja"):
        opened.apply_chat_template(said("q"))


def test_older_folders_added_tokens_and_special_map(folder):
    (folder / "tokenizer.json").unlink()
    edit(folder, added_tokens_decoder=..., eos_token=..., pad_token=...)
    names = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258, "<tool>": 259}
    (folder / "added_tokens.json").write_text(json.dumps(names))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"})
    )
    opened = Tokenizer.from_folder(folder)
    assert opened.encode("<|im_end|><tool>") == [258, 259]
    assert opened.decode([258, 259], skip_special_tokens=True) == "<tool>"
    assert opened.eos_token_id == 258


def test_padding_and_truncation_of_the_file_are_switched_off(folder):
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    ids = {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    whole["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, **ids}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    assert len(Tokenizer.from_folder(folder).encode("abcd")) == 4


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: shutil.rmtree(f), "there is no such folder"),
        (lambda f: [x.unlink() for x in f.iterdir()], "there is no tokenizer in this folder.*merges.txt"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json: the tokenizer cannot be read"),
        (lambda f: (f / "tokenizer_config.json").write_text("{,"), "tokenizer_config.json: is not valid JSON"),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), "holds a JSON list"),
        (lambda f: (f / "tokenizer_config.json").write_bytes(b"\xff"), "is not UTF-8 text"),
        (lambda f: edit(f, eos_token="<nope>"), "eos_token is '<nope>', which is not in the vocabulary"),
        (lambda f: edit(f, added_tokens_decoder={"7": {"content": "<|im_end|>"}}), "should have id 7"),
        (lambda f: edit(f, chat_template="{% if %}"), "not valid Jinja"),
    ],
)
def test_damaged_folders(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(folder)


def test_calls_like_transformers(tokenizer):
    one = tokenizer("ab")
    assert one["input_ids"] == one.input_ids == tokenizer.encode("ab")
    assert one.attention_mask == [1, 1]
    batch = tokenizer(["a", "bcd"], return_tensors="np", padding=True)
    pad = tokenizer.pad_token_id
    assert batch.input_ids.dtype == np.int64
    assert batch.input_ids[0].tolist() == [pad, pad, *tokenizer.encode("a")]
    assert batch.attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    right = tokenizer(["a", "bcd"], padding=True, padding_side="right")
    assert right.attention_mask[0] == [1, 0, 0]
    assert tokenizer("ab", return_tensors="np").input_ids.shape == (1, 2)
    with pytest.raises(ValueError, match="padding=True"):
        tokenizer(["a", "bcd"], return_tensors="np")
    with pytest.raises(ValueError, match="'pt'"):
        tokenizer("a", return_tensors="pt")


def test_apply_chat_template(tokenizer):
    messages = said("q", "a")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.apply_chat_template(messages) == tokenizer.encode(text)
    assert tokenizer.apply_chat_template([messages, messages], tokenize=False) == [text, text]
    assert tokenizer.apply_chat_template(messages, return_dict=True).attention_mask == [1] * len(tokenizer.encode(text))
    assert tokenizer.apply_chat_template(messages, return_tensors="np").shape == (1, len(tokenizer.encode(text)))
    with pytest.raises(DataError, match="no messages"):
        tokenizer.apply_chat_template([])
    with pytest.raises(DataError, match="refused the messages.*content"):
        tokenizer.apply_chat_template([{"role": "user"}])


def test_decoding(tokenizer):
    ids = tokenizer.encode("é<|im_end|>")
    assert tokenizer.decode(np.array(ids)) == "é<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "é"
    assert tokenizer.batch_decode([ids, ids[:1]]) == ["é<|im_end|>", "\ufffd"]
    assert tokenizer.decode(tokenizer.encode(" a  , b ' s")) == " a  , b ' s"  # nothing cleaned up


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_offsets_count_the_original_text(text):
    encoding = byte_tokenizer().backend.encode(text, add_special_tokens=False)
    assert all(0 <= start < end <= len(text) for start, end in encoding.offsets)


@given(st.one_of(st.text().map(lambda t: list(t.encode())), st.lists(st.integers(0, 255))))
@settings(max_examples=200, deadline=None)
def test_stream_joins_to_the_whole_and_never_splits_a_character(data):
    tokenizer = byte_tokenizer()
    table = {tokenizer.backend.decode([i]): i for i in range(128)}
    ids = [table.get(chr(byte), byte) for byte in data] + [tokenizer.eos_token_id]
    decoder = StreamDecoder(tokenizer, skip_special_tokens=False)
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids)


def test_stream_of_an_emoji(tokenizer):
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(token) for token in tokenizer.encode("a👍b<|im_end|>")] == ["a", "", "", "", "👍", "b", ""]
    assert decoder.finish() == ""
    assert decoder.push(tokenizer.encode("👍")[0]) == ""
    assert decoder.finish() == "\ufffd"


def test_texts_in_nfc_and_others_are_encoded_as_one_by_one(real):
    texts = [
        "plain",
        "caf\u00e9 \u00fc",
        "cafe\u0301 a\u0308",
        "<|im_start|>user\n\u1100\u1161<|im_end|>",
        "",
        "天气 \ufb01",
    ]
    texts += [text + "e\u0301" * 3 for text in texts]
    together = real.encode_batch(texts)
    alone = [real.backend.encode(text, add_special_tokens=False) for text in texts]
    assert [(e.ids, e.offsets) for e in together] == [(e.ids, e.offsets) for e in alone]
    assert type(real.backend.normalizer).__name__ == "NFC"
