"""The engine against a slow loop: PaddleNLP's own forward pass over the whole sequence, for every token."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from finetune.errors import DataError, FinetuneError
from finetune.infer.sampling import Sampling
from tests.tiny import Shape, tiny_model

NEW = 40
LENGTHS = (3, 17, 40, 5, 130, 1, 260, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Untied, so that answers do not just repeat one token; four layers, three query heads to a key head."""
    shape = Shape(hidden_size=48, num_hidden_layers=4, num_attention_heads=6, max_position_embeddings=640)
    return tiny_model(tmp_path_factory.mktemp("engine") / "base", shape=shape, tied=False, seed=3)


@pytest.fixture(scope="module")
def model(folder):
    from finetune.model.load import load_model

    return load_model(folder).model


@pytest.fixture(scope="module")
def tokenizer(folder):
    from finetune.chat.tokenizer import Tokenizer

    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    from finetune.infer.engine import Engine

    return Engine(model, tokenizer, stop_token_ids=[])


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 400, length).tolist() for length in LENGTHS]


def slow_logits(model, ids: list[int]) -> np.ndarray:
    import paddle

    with paddle.no_grad():
        return model(paddle.to_tensor([ids]), return_dict=True).logits[0, -1].numpy()


def slow_greedy(model, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(slow_logits(model, ids).argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def expected(model, prompts):
    return [slow_greedy(model, prompt, NEW) for prompt in prompts]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_greedy_equals_the_slow_loop_whatever_the_batch(engine, prompts, expected, batch_size):
    outputs = engine.generate(prompts, Sampling(max_new_tokens=NEW), batch_size=batch_size)
    assert [output.tokens for output in outputs] == expected
    assert max(len(set(tokens)) for tokens in expected) > 5
    assert {output.finish_reason for output in outputs} == {"length"}
    assert [output.prompt_tokens for output in outputs] == list(LENGTHS)


def test_logits_equal_the_models_own(engine, model, prompts):
    cache, logits = engine.decoder.read([np.array(prompt) for prompt in prompts])
    own = np.stack([slow_logits(model, prompt) for prompt in prompts])
    np.testing.assert_allclose(logits.numpy(), own, atol=2e-5)
    after = engine.decoder.step([7] * len(prompts), cache).numpy()
    own = np.stack([slow_logits(model, [*prompt, 7]) for prompt in prompts])
    np.testing.assert_allclose(after, own, atol=2e-5)


def test_prompts_longer_than_one_piece_are_read_alike(engine, model, monkeypatch, prompts, expected):
    monkeypatch.setattr("finetune.compute.decoder._PIECE", 7)
    outputs = engine.generate(prompts, Sampling(max_new_tokens=5))
    assert [output.tokens for output in outputs] == [tokens[:5] for tokens in expected]


@pytest.mark.parametrize("scores", [6 * 7 * 640, 6 * 40, 2**27])
def test_the_memory_of_scores_is_bounded_and_answers_stay(engine, monkeypatch, prompts, expected, scores):
    """The bound splits rows, then the piece of a single row."""
    monkeypatch.setattr("finetune.compute.decoder._SCORES", scores)
    monkeypatch.setattr("finetune.compute.decoder._NARROW", 4)
    largest = []
    mask = engine.decoder._mask

    def watched(positions, capacity):
        largest.append(positions.size * capacity * engine.decoder.heads if positions.shape[1] > 1 else 0)
        return mask(positions, capacity)

    monkeypatch.setattr(engine.decoder, "_mask", watched)
    outputs = engine.generate(prompts, Sampling(max_new_tokens=5))
    assert [output.tokens for output in outputs] == [tokens[:5] for tokens in expected]
    assert max(largest) <= scores


def test_short_prompts_are_not_padded_to_the_longest_that_joins_with_them(engine, model, monkeypatch, prompts):
    read = []
    forward = engine.decoder._forward

    def counted(ids, *arguments):
        read.append(ids.size)
        return forward(ids, *arguments)

    monkeypatch.setattr(engine.decoder, "_forward", counted)
    long = np.random.default_rng(2).integers(0, 400, 620)
    joining = [np.array(prompts[0]), long, *(np.array(prompts[i]) for i in (1, 3, 7))]
    _, logits = engine.decoder.read(joining)
    assert sum(read) == 620 + 4 * 17
    own = np.stack([slow_logits(model, prompt.tolist()) for prompt in joining])
    np.testing.assert_allclose(logits.numpy(), own, atol=2e-5)
    read.clear()
    engine.decoder.read([np.array(prompts[1])] * 8)
    assert read == [8 * 17]


def test_the_cache_shrinks_when_a_long_row_leaves(engine, prompts, expected):
    from finetune.infer.engine import Batch

    batch = Batch(engine)
    long = np.random.default_rng(2).integers(0, 400, 600).tolist()
    batch.join([engine.request(long, Sampling(max_new_tokens=2), 9)])
    batch.join([engine.request(prompts[i], Sampling(max_new_tokens=10), i) for i in (0, 1)])
    assert batch._cache.capacity == 640
    batch.step()
    assert batch._cache.capacity == 128
    done = {}
    while batch.rows:
        done.update({row.request.index: row.tokens for row in batch.step()})
    assert done == {index: expected[index][:10] for index in (0, 1)}


def test_rows_join_and_leave_a_running_batch(engine, prompts, expected):
    from finetune.infer.engine import Batch

    batch = Batch(engine)
    sampling = Sampling(max_new_tokens=10)
    batch.join([engine.request(prompts[0], sampling, 0), engine.request(prompts[4], Sampling(max_new_tokens=3), 4)])
    done = {row.request.index: row for _ in range(4) for row in batch.step()}
    assert list(done) == [4]
    batch.join([engine.request(prompts[i], sampling, i) for i in (6, 1, 2)])
    batch.drop([row for row in batch.rows if row.request.index == 2])
    while batch.rows:
        done.update({row.request.index: row for row in batch.step()})
    assert {index: row.tokens for index, row in done.items()} == {
        4: expected[4][:3],
        **{index: expected[index][:10] for index in (0, 1, 6)},
    }


def test_several_stop_tokens_end_rows_at_different_times(engine, prompts, expected):
    stops = (expected[0][4], expected[1][9])
    outputs = engine.generate(prompts, Sampling(max_new_tokens=NEW, stop_token_ids=stops))
    for output, tokens in zip(outputs, expected):
        first = min((tokens.index(stop) for stop in stops if stop in tokens), default=None)
        assert output.tokens == (tokens if first is None else tokens[: first + 1])
        assert output.finish_reason == ("length" if first is None else "stop")


def test_a_stop_token_is_in_the_tokens_but_not_in_the_text(engine, tokenizer, prompts, expected):
    stop = expected[2][3]
    first = expected[2].index(stop)
    output = engine.generate([prompts[2]], Sampling(stop_token_ids=(stop,)))[0]
    assert output.tokens[-1] == stop
    assert output.text == tokenizer.decode(output.tokens[:first], skip_special_tokens=True)


def test_min_new_tokens_holds_stop_tokens_back(engine, prompts, expected):
    sampling = Sampling(max_new_tokens=12, min_new_tokens=8, stop_token_ids=(expected[0][2],))
    output = engine.generate([prompts[0]], sampling)[0]
    assert expected[0][2] not in output.tokens[:8]
    assert output.tokens[:2] == expected[0][:2]


def test_a_stop_text_cuts_the_text_and_is_never_streamed(engine, prompts):
    whole = engine.generate([prompts[1]], Sampling(max_new_tokens=NEW))[0].text
    stop = whole[6:10]
    sampling = Sampling(max_new_tokens=NEW, stop=("never to be seen", stop))
    output = engine.generate([prompts[1]], sampling)[0]
    assert output.text == whole[: whole.index(stop)]
    assert output.finish_reason == "stop"
    deltas = list(engine.stream(prompts[1], sampling))
    assert "".join(delta.text for delta in deltas) == output.text
    assert deltas[-1].output == output


def test_seeds_make_draws_repeatable_and_free_of_the_neighbours(engine, prompts):
    samplings = [Sampling(max_new_tokens=20, temperature=1.2, top_p=0.95, seed=i) for i in range(len(prompts))]
    together = engine.generate(prompts, samplings, batch_size=8)
    alone = [engine.generate([prompt], s)[0] for prompt, s in zip(prompts, samplings)]
    assert [o.tokens for o in together] == [o.tokens for o in alone]
    other = engine.generate([prompts[0]], Sampling(max_new_tokens=20, temperature=1.2, top_p=0.95, seed=99))[0]
    assert other.tokens != alone[0].tokens


def test_n_samples_of_a_prompt_differ_and_come_in_order(engine, prompts):
    sampling = Sampling(max_new_tokens=12, temperature=1.5, seed=5, n=3)
    outputs = engine.generate(prompts[:2], sampling, batch_size=2)
    assert len(outputs) == 6
    assert len({tuple(output.tokens) for output in outputs}) == 6
    assert [output.prompt_tokens for output in outputs] == [LENGTHS[0]] * 3 + [LENGTHS[1]] * 3
    single = engine.generate([prompts[0]], Sampling(max_new_tokens=12, temperature=1.5, seed=5))[0]
    assert single.tokens == outputs[0].tokens


def test_repetition_penalty_follows_its_definition(engine, model, prompts):
    ids, generated = list(prompts[3]), []
    for _ in range(15):
        logits = slow_logits(model, ids)
        used = list(set(ids))
        logits[used] = np.where(logits[used] < 0, logits[used] * np.float32(1.4), logits[used] / np.float32(1.4))
        generated.append(int(logits.argmax()))
        ids.append(generated[-1])
    sampling = Sampling(max_new_tokens=15, repetition_penalty=1.4)
    assert engine.generate(prompts, sampling)[3].tokens == generated


def test_logprobs_of_every_token(engine, model, prompts, expected):
    output = engine.generate([prompts[0]], Sampling(max_new_tokens=6, logprobs=3))[0]
    assert output.tokens == expected[0][:6]
    for position, entry in enumerate(output.logprobs):
        logits = slow_logits(model, prompts[0] + expected[0][:position]).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum())
        assert entry.token == output.tokens[position]
        assert entry.logprob == pytest.approx(logprobs[entry.token], abs=2e-5)
        assert [token for token, _ in entry.top] == np.argsort(-logprobs)[:3].tolist()


def test_the_context_ends_a_row(engine, expected):
    prompt = list(np.random.default_rng(1).integers(0, 400, 630))
    output = engine.generate([prompt], Sampling(max_new_tokens=100))[0]
    assert (len(output.tokens), output.finish_reason) == (10, "length")
    with pytest.raises(DataError, match="640"):
        engine.generate([prompt + prompt[:10]], Sampling())


@pytest.mark.parametrize(("prompt", "word"), [([], "empty"), ([416], "416"), ([-1], "-1")])
def test_a_bad_prompt_is_refused(engine, prompt, word):
    with pytest.raises(DataError, match=word):
        engine.generate([prompt], Sampling())


def test_damaged_weights_are_said(folder):
    from finetune.infer.engine import Engine
    from finetune.model.load import load_model

    model = load_model(folder).model
    model.qwen2.norm.weight.set_value(np.full(48, np.nan, np.float32))
    with pytest.raises(FinetuneError, match="NaN"):
        Engine(model).generate([[1, 2]], Sampling())


def test_every_thread_decodes_without_gradients(engine, prompts, expected):
    results = {}

    def work(index):
        results[index] = engine.generate([prompts[index]], Sampling(max_new_tokens=8))[0].tokens

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {index: expected[index][:8] for index in range(3)}
    assert all(parameter.grad is None for parameter in engine.model.parameters())


def test_lora_and_merged_models_answer_alike_and_dropout_stays_as_it_was(folder, prompts, expected):
    from finetune.infer.engine import Engine
    from finetune.model.load import load_model
    from finetune.model.lora import LoraSettings, add_lora, lora_layers, merge_lora

    model = add_lora(load_model(folder).model, LoraSettings(rank=4, alpha=8, dropout=0.5, target_modules="all-linear"))
    rng = np.random.default_rng(0)
    for layer in lora_layers(model).values():
        layer.lora_B.set_value((rng.standard_normal(layer.lora_B.shape) * 0.2).astype(np.float32))
    model.train()
    adapted = [output.tokens for output in Engine(model).generate(prompts, Sampling(max_new_tokens=20))]
    assert model.training and all(layer.training for layer in model.sublayers())
    assert adapted != [tokens[:20] for tokens in expected]
    merged = [output.tokens for output in Engine(merge_lora(model)).generate(prompts, Sampling(max_new_tokens=20))]
    assert merged == adapted


@pytest.mark.parametrize("text", ["naïve 😀👩‍👩‍👧 ok", "一个人在路上走。𝕏", "plain"])
def test_streamed_pieces_never_split_a_character(engine, tokenizer, text):
    """Rows are fed the tokens of a known text: byte-level tokens cut its characters apart."""
    from finetune.infer.engine import Batch

    row = Batch(engine)._row(engine.request([1], Sampling(max_new_tokens=500)), 0)
    pieces = []
    for token in tokenizer.encode(text):
        row.accept(token, 0.0)
        pieces.append(row.new_text())
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_is_given_at_the_end(engine, tokenizer):
    from finetune.infer.engine import Batch

    tokens = tokenizer.encode("a😀")[:-1]
    row = Batch(engine)._row(engine.request([1], Sampling(max_new_tokens=len(tokens))), 0)
    pieces = []
    for token in tokens:
        row.accept(token, 0.0)
        pieces.append(row.new_text())
    assert pieces[0] == "a" and row.finish_reason == "length"
    assert "".join(pieces) == row.output().text == tokenizer.decode(tokens)
