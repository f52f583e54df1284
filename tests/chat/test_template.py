from __future__ import annotations

import time

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
