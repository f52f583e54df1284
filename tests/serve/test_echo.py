"""`echo` of /v1/completions: prompts come back with their log-probabilities, as lm-evaluation-harness asks for them."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import openai
import pytest
from lm_eval.models.openai_completions import LocalCompletionsAPI

from finetune.infer.open import open_model
from finetune.model.load import load_model
from finetune.serve.app import Limits
from finetune.serve.echo import Echo
from tests.infer.scripted import serving

TEXTS = ["What is the capital of France? " * 9, "一个 😀 <|im_start|>naïve", "a"]


@pytest.fixture(scope="module", params=["packed", "as stored"])
def server(request, tiny_untied_folder):
    with serving(open_model(str(tiny_untied_folder), pack=request.param == "packed"), Limits(max_batch=8)) as running:
        yield running


@pytest.fixture(scope="module")
def prompts(tiny_untied_folder):
    tokenizer = open_model(str(tiny_untied_folder)).tokenizer
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def logprobs(tiny_untied_folder):
    """Of token ids: what PaddleNLP's own model says of each next token, float64 [L, V], after the tokens before it."""
    import paddle

    model = load_model(tiny_untied_folder).model
    model.eval()

    def of(ids: list[int]) -> np.ndarray:
        with paddle.no_grad():
            scores = model(paddle.to_tensor([ids]), return_dict=True).logits[0].numpy().astype(np.float64)
        return scores - np.log(np.exp(scores).sum(-1, keepdims=True))

    return of


def ask(server, prompt, **settings):
    asked = {"model": "tiny", "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 1, **settings}
    return server.client().completions.create(**asked)


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_prompts_have_the_models_own_log_probabilities(server, prompts, logprobs, max_tokens):
    for _ in range(2):  # what is remembered of a prompt has no log-probabilities
        answer = ask(server, prompts, logprobs=3, max_tokens=max_tokens)
        for choice, ids in zip(answer.choices, prompts, strict=True):
            own, found = logprobs(ids), choice.logprobs
            assert len(found.tokens) == len(found.text_offset) == len(found.top_logprobs) == len(ids) + max_tokens
            assert found.token_logprobs[0] is found.top_logprobs[0] is None
            expected = [own[i, token] for i, token in enumerate(ids[1:])]
            assert found.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
            for i, top in enumerate(found.top_logprobs[1 : len(ids)]):
                assert max(top.values()) == pytest.approx(own[i].max(), abs=1e-4)
        assert answer.usage.completion_tokens == max_tokens * len(prompts)


def test_the_harness_reads_its_scores(server, prompts, logprobs):
    """A greedy continuation of the first prompt, and one that is not."""
    pairs = [(prompts[0], greedy_ids(logprobs, prompts[0], 4)), (prompts[0], prompts[1][:3])]
    answer = ask(server, [context + continuation for context, continuation in pairs]).model_dump()
    read = LocalCompletionsAPI.parse_logprobs(answer, ctxlens=[len(context) for context, _ in pairs])
    for (context, continuation), (score, is_greedy) in zip(pairs, read, strict=True):
        own = logprobs(context + continuation)[len(context) - 1 : -1]
        assert score == pytest.approx(sum(own[i, token] for i, token in enumerate(continuation)), abs=1e-3)
        assert is_greedy == (own.argmax(-1).tolist() == continuation)
    assert [is_greedy for _, is_greedy in read] == [True, False]


def greedy_ids(logprobs, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logprobs(ids)[-1].argmax()))
    return ids[-count:]


def test_the_text_begins_with_the_prompt(server):
    plain = ask(server, TEXTS, echo=False, logprobs=2, max_tokens=6, n=2, temperature=1, seed=3)
    echoed = ask(server, TEXTS, logprobs=2, max_tokens=6, n=2, temperature=1, seed=3)
    for i, (one, other) in enumerate(zip(plain.choices, echoed.choices, strict=True)):
        assert other.text == TEXTS[i // 2] + one.text and other.finish_reason == one.finish_reason
        shifted = [len(TEXTS[i // 2]) + start for start in one.logprobs.text_offset]
        assert other.logprobs.text_offset[-len(shifted) :] == shifted
        assert other.logprobs.tokens[-len(shifted) :] == one.logprobs.tokens
    assert echoed.choices[0].logprobs.text_offset[:4] == [
        0,
        *accumulate(map(len, echoed.choices[0].logprobs.tokens[:3])),
    ]
    without = ask(server, TEXTS, logprobs=None, max_tokens=0).choices
    assert [(choice.text, choice.logprobs, choice.finish_reason) for choice in without] == [
        (text, None, "length") for text in TEXTS
    ]


def test_streaming_equals_not_streaming(server):
    settings = {"logprobs": 2, "max_tokens": 5}
    whole = ask(server, TEXTS, **settings)
    texts, tokens, values = {}, {}, {}
    for chunk in ask(server, TEXTS, stream=True, **settings):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens if choice.logprobs else [])
            values.setdefault(choice.index, []).extend(choice.logprobs.token_logprobs if choice.logprobs else [])
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert tokens == {choice.index: choice.logprobs.tokens for choice in whole.choices}
    for choice in whole.choices:
        assert values[choice.index][1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-4)


def test_what_the_client_did_not_write_has_no_text(tiny_untied_folder, prompts):
    tokenizer = open_model(str(tiny_untied_folder)).tokenizer
    ids = [tokenizer.convert_tokens_to_ids("<|endoftext|>"), *prompts[2]]
    assert Echo.of(tokenizer, ids, unwritten=1) == Echo("a", [0, 0])
    assert Echo.of(tokenizer, ids) == Echo("<|endoftext|>a", [0, 13])


def test_without_echo_an_answer_has_a_token(server):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, "a", echo=False, max_tokens=0)
    assert caught.value.param == "max_tokens"
