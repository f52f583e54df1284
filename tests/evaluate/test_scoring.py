"""Scores of continuations against PaddleNLP's own forward pass, one sequence at a time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from finetune.evaluate import scoring
from finetune.evaluate.scoring import score_continuations
from finetune.model.load import load_model
from finetune.model.resolve import resolve_model
from tests.chat.test_lost import tokenizer_with
from tests.tiny import CHATML, tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two of the same: scoring sets its model up for rows of spans."""
    source = resolve_model(str(tiny_model(tmp_path_factory.mktemp("score") / "tiny")))
    both = load_model(source).model, load_model(source).model
    for model in both:
        model.eval()
    return both


def _pairs() -> list[tuple[list[int], list[int]]]:
    """Few-shot questions with answers of one and of several tokens, and some that share nothing."""
    draw = np.random.default_rng(0)

    def tokens(least: int, most: int) -> list[int]:
        return draw.integers(0, 400, draw.integers(least, most)).tolist()

    examples = tokens(50, 51)
    pairs = []
    for _ in range(6):
        question = examples + tokens(3, 20)
        pairs += [(question, [letter]) for letter in (10, 11, 12, 13)]
        pairs += [(question, tokens(1, 6)) for _ in range(3)]
    pairs += [([5], [6, 7]), (examples, [6]), (examples[:20], [examples[20]]), (tokens(9, 10), tokens(4, 5))]
    return [pairs[i] for i in draw.permutation(len(pairs))]


def _logits(model, ids: list[int]) -> np.ndarray:
    """float64 [L, V]."""
    import paddle

    ids = paddle.to_tensor([ids])
    with paddle.no_grad():
        logits = model(input_ids=ids, attention_mask=paddle.ones_like(ids))
    return (logits[0] if isinstance(logits, tuple) else logits)[0].astype("float64").numpy()


def _alone(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    rows = _logits(model, context + continuation)[len(context) - 1 : -1]
    logps = (
        rows - np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True)) - rows.max(-1, keepdims=True)
    )
    chosen = logps[np.arange(len(rows)), continuation]
    return float(chosen.sum()), bool((rows.argmax(-1) == continuation).all())


@pytest.mark.parametrize("row_tokens", [4096, 100, 1])
def test_equals_one_sequence_at_a_time(models, monkeypatch, row_tokens):
    monkeypatch.setattr(scoring, "ROW_TOKENS", row_tokens)
    shared, plain = models
    pairs = _pairs()
    context = pairs[0][0]
    pairs.append((context, [int(_logits(plain, context)[-1].argmax())]))
    seen = []
    scores = score_continuations(shared, pairs, on_scored=seen.append)
    assert sum(seen) == len(pairs)
    for pair, score in zip(pairs, scores):
        logprob, greedy = _alone(plain, *pair)
        assert score.logprob == pytest.approx(logprob, abs=2e-5)
        assert score.greedy == greedy
    assert scores[-1].greedy


def test_a_shared_beginning_is_read_once(models, monkeypatch):
    read = []
    lay_out = scoring.lay_out_continuations
    monkeypatch.setattr(scoring, "lay_out_continuations", lambda groups: read.append(lay_out(groups)) or read[-1])
    examples = list(range(100))
    questions = [examples + [200 + q, 201 + q, 202 + q] for q in range(10)]
    score_continuations(models[0], [(question, [letter]) for question in questions for letter in (1, 2, 3, 4)])
    assert [layout.num_tokens for layout in read] == [100 + 10 * 3]
    assert read[0].num_targets == 40


def test_texts_begin_with_bos_as_lm_evals_own_model_has_them():
    harness = pytest.importorskip("finetune.evaluate.harness")
    tokenizer = tokenizer_with(CHATML, bos=True)
    bos, plain = tokenizer.convert_tokens_to_ids("<s>"), tokenizer.encode("hi", add_special_tokens=False)
    model = harness.EvaluatedModel(SimpleNamespace(tokenizer=tokenizer), 1)
    assert model.prefix_token_id == bos
    assert model.tok_encode("hi") == [bos, *plain]
    assert model.tok_encode("hi", add_special_tokens=False) == plain
    # What begins with BOS already, as a rendered chat may, gets no other.
    assert model.tok_encode("<s>hi") == [bos, *plain]
