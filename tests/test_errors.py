"""What a mistyped word was probably meant to be."""

from __future__ import annotations

import pytest

from finetune.errors import did_you_mean, nearest


@pytest.mark.parametrize(
    ("word", "choices", "right"),
    [
        ("Sigmiod", ("sigmoid", "hinge"), "sigmoid"),
        ("sigmiod", ("Sigmoid", "hinge"), "Sigmoid"),
        (" HINGE ", ("sigmoid", "hinge"), "hinge"),
        ("banana", ("sigmoid", "hinge"), None),
        ("gtp", ("gpt", "human"), "gpt"),
        ("alfa", ("alpha", "rank"), "alpha"),
        ("tail", ("test", "rank"), None),  # letters in common are not enough
        ("hinge", ("sigmoid", "hinge"), None),  # what is right is not suggested instead of itself
        ("Qwen/Qwen2-7B-Instruct", ("Qwen/Qwen2-7B", "Qwen/Qwen2-7B-Instruct"), None),
        ("Qwen/Qwen2-7B-Instrct", ("Qwen/Qwen2-7B", "Qwen/Qwen2-7B-Instruct"), "Qwen/Qwen2-7B-Instruct"),
        ("x" * 1_000_000, ("sigmoid",), None),
        ("", ("sigmoid",), None),
        ("sigmoid", (), None),
    ],
)
def test_nearest(word, choices, right):
    assert nearest(word, choices) == right


def test_the_hint_stands_before_what_else_there_is_to_say():
    assert did_you_mean("hing", ("hinge",)) == "Did you mean hinge?"
    assert did_you_mean("hing", ("hinge",), "There is hinge.") == "Did you mean hinge? There is hinge."
    assert did_you_mean("banana", ("hinge",), "There is hinge.") == "There is hinge."
    assert did_you_mean("banana", ("hinge",)) == ""
