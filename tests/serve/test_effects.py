"""Parameters beyond OpenAI's do what they say: each changes the answer as it must."""

from __future__ import annotations

import pytest

from finetune.chat.tokenizer import Tokenizer
from finetune.infer.open import open_model
from finetune.infer.sampling import Sampling
from tests.infer.scripted import scripted, serving

TEMPLATE = "{{ '<think>' if enable_thinking else '' }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def opened(tiny_untied_folder):
    return open_model(str(tiny_untied_folder))


@pytest.fixture(scope="module")
def client(opened):
    with serving(opened) as running:
        yield running.client()


def ask(client, **settings):
    """The choice, and how many tokens it has."""
    extra = {key: settings.pop(key) for key in ("min_tokens", "ignore_eos") if key in settings}
    asked = {"model": "tiny", "prompt": "What is", "max_tokens": 9, "temperature": 0, **settings}
    answer = client.completions.create(**asked, extra_body=extra)
    return answer.choices[0], answer.usage.completion_tokens


def test_a_bias_makes_a_token_certain_or_impossible(client, opened):
    token = opened.tokenizer.encode("b")[0]
    certain, _ = ask(client, logit_bias={token: 100})
    assert certain.text == "b" * 9
    likeliest = opened.engine.generate([opened.tokenizer.encode("What is")], Sampling(max_new_tokens=1))[0].tokens[0]
    plain, _ = ask(client, logprobs=2)
    never, _ = ask(client, logprobs=2, logit_bias={likeliest: -100})
    second = list(plain.logprobs.top_logprobs[0])[1]
    assert (plain.logprobs.tokens[0], never.logprobs.tokens[0]) == (list(plain.logprobs.top_logprobs[0])[0], second)


def test_the_end_is_where_the_parameters_put_it(client, opened):
    """With the end token made certain, nothing but the parameters keeps an answer going."""
    ends = {token: 100 for token in opened.engine.stop_token_ids}
    for settings, tokens, reason in (
        ({}, 1, "stop"),
        ({"min_tokens": 5}, 6, "stop"),
        ({"min_tokens": 9}, 9, "length"),
        ({"ignore_eos": True}, 9, "length"),
        ({"ignore_eos": False}, 1, "stop"),
    ):
        choice, count = ask(client, logit_bias=ends, **settings)
        assert (count, choice.finish_reason) == (tokens, reason), settings


def test_variables_reach_the_template(opened, tmp_path):
    opened.tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    with serving(scripted(opened, "x", tokenizer=Tokenizer.from_folder(tmp_path))) as running:
        counts = [
            running.client()
            .chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "Hello"}],
                max_tokens=1,
                extra_body={"chat_template_kwargs": {"enable_thinking": thinking}},
            )
            .usage.prompt_tokens
            for thinking in (True, False)
        ]
    assert counts == [len(opened.tokenizer.encode(text)) for text in ("<think>Hello", "Hello")]
