"""What samples.json says of a prompt, whatever the template's tags are."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.train.samples import without_tags
from tests.chat.test_lost import LLAMA, QWEN25, R1, tokenizer_with


@pytest.mark.parametrize(
    ("template", "plain"),
    [
        (R1, "Be kind.\nWhy?\n<think>"),  # a plain text to this tokenizer
        (QWEN25, "system\nBe kind.\nuser\nWhy?\nassistant"),
        (LLAMA, "system\n\nBe kind.\nuser\n\nWhy?\nassistant"),
    ],
)
def test_a_prompt_without_the_tags_of_its_template(template, plain):
    tokenizer = tokenizer_with(template)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    assert without_tags(tokenizer, np.array(ids)) == plain
