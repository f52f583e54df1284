"""YAML text to values with lines: what is read how, and what is refused where."""

from __future__ import annotations

import math
import time

import pytest

from finetune.recipe.tree import MAX_DEPTH, MAX_VALUES, parse_yaml, resolve_scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        ("1.0e-4", 1e-4),
        (".5", 0.5),
        ("2.", 2.0),
        ("-3", -3),
        ("+3", 3),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("yes", "yes"),
        ("on", "on"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2026-11-23", "2026-11-23"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    found = resolve_scalar(text)
    assert found == value and type(found) is type(value)


def test_nan_and_huge_exponents():
    assert math.isnan(resolve_scalar(".nan"))
    assert resolve_scalar("1e999999") == math.inf


def test_values_and_their_lines():
    tree = parse_yaml("a: 1\nb:\n  c: [x, 'y']\n  d:\n    - e: 2\n    - '3'\n")
    assert tree.value == {"a": 1, "b": {"c": ["x", "y"], "d": [{"e": 2}, "3"]}}
    assert tree.lines[("a",)] == 1
    assert tree.lines[("b", "c")] == 3
    assert tree.lines[("b", "d", 0, "e")] == 5
    assert tree.lines[("b", "d", 1)] == 6
    assert parse_yaml("a:\n  b c\nd: e\n").lines == {("a",): 2, ("d",): 3}
    assert tree.complete and not tree.faults


def test_anchors_are_read():
    tree = parse_yaml("a: &x {p: 1}\nb: *x\nc: [*x, &y 2, *y]\n")
    assert tree.value == {"a": {"p": 1}, "b": {"p": 1}, "c": [{"p": 1}, 2, 2]}
    assert tree.value["a"] is not tree.value["b"]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\na: 2\n", 2, "a is given twice, first in line 1"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", 4, "a.b is given twice"),
        ("a: !!python/object/apply:os.system ['true']\n", 1, "tag"),
        ("a: !!str 5\n", 1, "tag"),
        ("!x a: 5\n", 1, "tag"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("a: 1\n[b]: 2\n", 2, "a key is"),
        ("a: &x [*x]\n", 1, "before the end"),
        ("a: *nowhere\n", 1, "before the end"),
        ("<<: {a: 1}\n", 1, "merge keys"),
        ('a: "\\u0007"\n', 1, "U+0007"),
        ('a: "\\ud800"\n', 1, "U+D800"),
        ("a: 1\n\tb: 2\n", 2, "not valid YAML"),
        ("a: 1\n b: 2\n", 2, "not valid YAML"),
        ("a: [1, 2\nb: 1\n", 1, "what a '[' opens here is not closed"),
        ("a: 1\nb: {c: 1\nd: 2\n", 2, "what a '{' opens here is not closed"),
        ('a:\n  b: "x\n  c: 1\n', 2, "a text that begins with a quote here has no end"),
        ("a: 1\nb\n  c: 2\n", 2, "this line has no ':' behind its key"),
        ("a:\n  b: 1\n  c 2\n  d: 3\n", 3, "this line has no ':' behind its key"),
        ("a:\n  b: @c\n", 2, "'@' that cannot start any token"),
        ("a: b: c\n", 1, "mapping values are not allowed"),
        ("a: \x00\n", None, "U+0000 is not allowed"),
        ('a: "\\UFFFFFFFF"\n', None, "not valid YAML"),
        ("- " * (MAX_DEPTH + 1) + "a\n", 1, "nested"),
        ("[" * 10_000, 1, "nested"),
        ("a: [" + "1," * MAX_VALUES + "]\n", 1, "more than"),
    ],
)
def test_what_is_refused(text, line, words):
    tree = parse_yaml(text)
    where, what, _ = tree.faults[0]
    assert where == line and words in what


def test_anchors_cannot_explode():
    text = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
    start = time.perf_counter()
    tree = parse_yaml(text)
    assert time.perf_counter() - start < 2
    assert not tree.complete and "more than" in tree.faults[-1][1]


def test_reading_goes_on_after_a_fault_that_allows_it():
    tree = parse_yaml("a: !x 1\na: 2\nb: 3\n")
    assert len(tree.faults) == 2 and tree.complete and tree.value == {"a": 2, "b": 3}
