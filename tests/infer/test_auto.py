"""The quickstart's interface. Equality with transformers is in tests/parity/test_generate_parity.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from finetune import AutoModelForCausalLM, AutoTokenizer
from finetune.errors import ArgumentError


@pytest.fixture(scope="module")
def model(tiny_untied_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_untied_folder, dtype="auto")


@pytest.fixture(scope="module")
def tokenizer(tiny_untied_folder):
    return AutoTokenizer.from_pretrained(tiny_untied_folder)


def test_the_quickstart_as_printed(model, tokenizer):
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Give me a short introduction to large language model."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    model_inputs = tokenizer([text], return_tensors="pd")
    generated_ids = model.generate(model_inputs.input_ids, max_new_tokens=32)[0]
    generated_ids = [
        output_ids[len(input_ids) :] for input_ids, output_ids in zip(model_inputs.input_ids, generated_ids)
    ]
    response = tokenizer.batch_decode(generated_ids, skip_special_tokens=True)[0]
    assert isinstance(response, str) and len(generated_ids[0]) <= 32


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"decode_strategy": "greedy_search"}),
        ({"repetition_penalty": 1.7}, {"decode_strategy": "greedy_search", "repetition_penalty": 1.7}),
        # Nothing is left to chance, but the scores are those of a draw.
        ({"do_sample": True, "top_k": 1}, {"decode_strategy": "sampling", "top_k": 1}),
    ],
    ids=["greedy", "penalized", "drawn"],
)
def test_paddlenlps_own_generate_gives_the_same_pair(model, tokenizer, ours, theirs):
    inputs = tokenizer(["What is the sum of 12 and 30?"], return_tensors="pd")
    sequences, scores = model.generate(**inputs, max_new_tokens=24, eos_token_id=[], **ours)
    tokens, means = model.paddle_generate(**inputs, max_new_tokens=24, eos_token_id=-1, **theirs)
    assert sequences[0, inputs.input_ids.shape[1] :].tolist() == tokens[0].tolist()
    assert scores.shape == means.shape == [1, 1] and scores.dtype == means.dtype
    np.testing.assert_allclose(scores.numpy(), means.numpy(), rtol=1e-5)


def test_a_score_counts_the_answers_own_tokens(model):
    rows = [[65, 66, 67], [70, 71, 72]]
    ends = model.generate(rows, max_new_tokens=6, eos_token_id=[])[0]
    end = int(ends[0, 5])
    sequences, scores = model.generate(rows, max_new_tokens=12, eos_token_id=end, pad_token_id=400)
    alone, score = model.generate(rows[:1], max_new_tokens=12, eos_token_id=end)
    assert alone.shape[1] < sequences.shape[1]
    np.testing.assert_allclose(scores[0].numpy(), score[0].numpy(), rtol=1e-5)


def test_padding_is_masked_and_answers_are_padded(model, tokenizer):
    texts = ["a", "What is the sum of 12 and 30?"]
    inputs = tokenizer(texts, return_tensors="pd", padding=True)
    width = inputs.input_ids.shape[1]
    single = [tokenizer([text], return_tensors="pd") for text in texts]
    alone = [model.generate(**one, max_new_tokens=9, eos_token_id=[])[0] for one in single]
    tails = [row[0, -9:].tolist() for row in alone]
    end = tails[0][3]
    rows, _ = model.generate(**inputs, max_new_tokens=9, eos_token_id=end, pad_token_id=400)
    assert rows[:, :width].tolist() == inputs.input_ids.tolist()
    for row, tail in zip(rows[:, width:].tolist(), tails):
        kept = tail[: tail.index(end) + 1] if end in tail else tail
        assert row == kept + [400] * (len(row) - len(kept))


def test_without_a_mask_padding_is_inferred_only_when_it_is_no_end_token(model):
    padded = np.array([[400, 400, 65, 66, 67]])
    plain = model.generate([[65, 66, 67]], max_new_tokens=6, eos_token_id=402)[0][0, 3:].tolist()
    inferred = model.generate(padded, max_new_tokens=6, eos_token_id=402, pad_token_id=400)[0][0, 5:].tolist()
    attended = model.generate(padded, max_new_tokens=6, eos_token_id=[402, 400], pad_token_id=400)[0][0, 5:].tolist()
    assert inferred == plain != attended


def test_draws_are_repeatable_by_seed_and_by_paddle_seed(model):
    import paddle

    draw = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.5, "eos_token_id": []}
    first, second = (model.generate([[65, 66]], seed=3, **draw)[0].tolist() for _ in range(2))
    assert first == second
    again = []
    for _ in range(2):
        paddle.seed(7)
        again.append(model.generate([[65, 66]], num_return_sequences=2, **draw)[0].tolist())
    assert again[0] == again[1] and again[0][0] != again[0][1]


def test_generation_config_gives_the_defaults(tiny_untied_folder, tmp_path):
    folder = shutil.copytree(tiny_untied_folder, tmp_path / "model")
    settings = {"do_sample": True, "temperature": 0.01, "repetition_penalty": 1.3, "max_new_tokens": 5}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = AutoModelForCausalLM.from_pretrained(folder)
    greedy = model.generate([[65, 66]], do_sample=False)[0].tolist()
    assert len(greedy[0]) == 7
    assert model.generate([[65, 66]])[0].tolist() == greedy
    assert model.generate([[65, 66]], do_sample=False, max_new_tokens=9)[0].shape == [1, 11]


def test_lengths_as_in_transformers(model):
    assert model.generate([[65, 66]], eos_token_id=[])[0].shape == [1, 22]
    assert model.generate([[65, 66]], max_length=5, eos_token_id=[])[0].shape == [1, 5]
    with pytest.raises(ArgumentError, match="max_length"):
        model.generate([[65, 66]], max_length=2)


def test_stop_strings(model, tokenizer):
    inputs = tokenizer(["What is"], return_tensors="pd")
    width = inputs.input_ids.shape[1]
    whole = model.generate(**inputs, max_new_tokens=12, eos_token_id=[])[0][0, width:]
    stop = tokenizer.decode(whole)[3:5]
    rows, _ = model.generate(**inputs, max_new_tokens=12, eos_token_id=[], stop_strings=stop, tokenizer=tokenizer)
    assert rows.shape[1] < width + 12
    with pytest.raises(ArgumentError, match="tokenizer"):
        model.generate(**inputs, stop_strings="x")


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"num_beams": 4}, "num_beams"), ({"max_tokens": 4}, "max_tokens"), ({"attention_mask": [[1, 1, 1]]}, "shape")],
)
def test_what_is_not_supported_is_refused(model, settings, words):
    with pytest.raises(ArgumentError, match=words):
        model.generate([[65, 66]], **settings)


def test_import_finetune_is_light():
    code = "import sys, finetune; sys.exit('paddle' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    with pytest.raises(AttributeError, match="nonsense"):
        import finetune

        finetune.nonsense  # noqa: B018
