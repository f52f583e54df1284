from __future__ import annotations

import time
import tracemalloc

import pytest

from finetune.chat.template import ChatTemplate, TemplateFault
from finetune.errors import CheckpointError
from tests.chat.cases import WEATHER, said


def render(source: str, **variables) -> str:
    return ChatTemplate(source).render(said("q", "a"), **variables)


def test_whitespace_and_json_are_those_of_transformers():
    source = "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n"
    assert render(source) == "q\na\n"
    assert render("{{ t | tojson }}", t={"é": "<b>&'"}) == '{"é": "<b>&\'"}'
    assert render("{{ t | tojson(indent=1) }}", t=[1]) == "[\n 1\n]"


def test_loop_controls_generation_blocks_and_clock():
    assert (
        render("{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}")
        == "user"
    )
    assert render("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}") == "qa"
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


def test_loop_variables_survive_counting():
    inner = "{{ loop.first }} {{ loop.last }} {{ loop.length }} {{ loop.previtem is defined }};"
    source = "{% for m in messages %}" + inner + "{% endfor %}"
    assert render(source) == "True False 2 False;False True 2 True;"
    assert render("{% for k, v in {'a': 1}.items() %}{{ k ~ v ~ none }}{% else %}no{% endfor %}") == "a1None"


def test_null_keys_are_left_out():
    template = ChatTemplate("{% for m in messages %}{{ m.name is defined }}{% endfor %}")
    assert template.render([{"role": "user", "name": None}]) == "False"


def test_what_a_template_knows():
    assert not ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}").knows_tools
    assert ChatTemplate("{% if tools %}{{ tools }}{% endif %}").knows_tools
    assert not ChatTemplate("{% set tools = [] %}{{ tools }}").knows_tools
    assert ChatTemplate("{{ messages[0].tool_calls }}").knows_tool_calls


@pytest.mark.parametrize(
    "source, why",
    [
        ("{{ raise_exception('only two turns') }}", "only two turns"),
        ("{{ messages[5].content + 'x' }}", "has no element 5"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "safe"),
        ("{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}", "steps"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}", "steps"),
        ("{{ 'a' * 10 ** 12 }}", "characters"),
        ("{{ 9 ** 999999999 }}", "power"),
        ("{{ '%999999999d' % 1 }}", "width"),
        ("{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "characters"),
        ("{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}", "characters"),
        ("{% set x = 'a' * 1000000 %}{% for i in range(999) %}{{ x }}{% endfor %}", "characters"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_hostile_and_broken_templates_end_in_a_fault(source, why):
    began = time.monotonic()
    with pytest.raises(TemplateFault, match=why):
        render(source)
    assert time.monotonic() - began < 60


def test_wrong_syntax_names_the_place():
    with pytest.raises(CheckpointError, match="folder: default chat template: the chat template is not valid Jinja"):
        ChatTemplate("{% for %}", "folder: default chat template")


def test_tools_reach_the_template():
    assert '"天气' not in render("{{ tools[0] | tojson }}", tools=[WEATHER])
    assert "天气" in render("{{ tools[0] | tojson }}", tools=[WEATHER])


BOMBS = [
    "{{ 'a' | center(999999999) }}",
    "{{ 'a'.ljust(999999999) }}",
    "{{ 'a' | indent(999999999) }}",
    "{{ '%0999999999d' | format(1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 999999999) }}",
    "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "{{ ('b' * 99999).join(['a'] * 99999) }}",
    "{{ (['a'] * 99999) | join('b' * 99999) }}",
    "{{ lipsum(99999999) }}",
    "{{ ['a'] | batch(999999999, 'x') | list }}",
    "{{ {'a': 1} | tojson(indent=999999999) }}",
    "{% set x = 'a' * 1000 %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60 + "{{ x }}",
    "{% set ns = namespace(x='a' * 1000) %}{% for i in range(99999) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% for a in range(9999) %}{% for b in range(9999) %}{{ ('x' * 99999) | upper | length }}{% endfor %}{% endfor %}",
    "{{ range(99999) | map('string') | map('center', 99999) | list | length }}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_a_template_can_take_neither_time_nor_memory_without_end(source):
    from tests.fuzzing import time_limit

    tracemalloc.start()
    try:
        with time_limit(60), pytest.raises((TemplateFault, CheckpointError)):
            ChatTemplate(source).render([{"role": "user", "content": "a"}])
        assert tracemalloc.get_traced_memory()[1] < 600 * 2**20
    finally:
        tracemalloc.stop()
