"""The model's own chat template: compiled once, rendered in a sandbox exactly as transformers renders it.

A template comes with a model from the internet, so it is untrusted code. The sandbox keeps it from reaching Python;
the budget below keeps it from running or growing without end.
"""

from __future__ import annotations

import functools
import json
import re
from datetime import datetime
from typing import Any, TypeVar

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from finetune.errors import CheckpointError

# A conversation of 1,000 turns takes a few thousand steps and well under a megabyte; 8 million characters are far
# beyond any context.
MAX_STEPS = 200_000
MAX_CHARACTERS = 8_000_000
_MAX_NUMBER = 100_000  # of an argument that says how long a text becomes
_WIDE_FORMAT = re.compile(r"\d{6,}|\*")  # %-format
_WIDE_FIELD = re.compile(r"\d{6,}|:[^{}]*\{")  # str.format; a width given by another field too
_WORK = 1024  # characters or items that a call takes or gives, counted as one more step
# What of Jinja's own no chat template needs and takes time or room that its arguments do not show.
_LEFT_OUT_FILTERS = ("urlize", "xmlattr", "striptags", "pprint", "random")
_LEFT_OUT_GLOBALS = ("lipsum",)
_LENGTHS = (
    "center",
    "ljust",
    "rjust",
    "zfill",
    "expandtabs",
    "indent",
    "wordwrap",
    "batch",
    "slice",
    "tojson",
    "to_bytes",
)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple, dict)) else 0


def _inner(value: Any) -> list:
    """A value, or those of a dictionary (`translate`)."""
    return list(value.values()) if isinstance(value, dict) else [value]


AnyNode = TypeVar("AnyNode", bound=nodes.Node)


class TemplateFault(Exception):
    """The template refused or could not render these messages; the text says why."""


class _Generation(Extension):
    """`{% generation %}` blocks render as their body; supervised characters are found by prefixes instead."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller) -> str:
        return caller()


class _Counted:
    """An iterable whose items are taken from the budget of the running render. Keeps `len`, which `loop` uses."""

    def __init__(self, items: Any, environment: _Environment):
        self.items = items
        self.environment = environment

    def __iter__(self):
        spend = self.environment.spend
        for item in self.items:
            spend()
            yield item

    def __len__(self) -> int:
        return len(self.items)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with a budget: loop items, calls and filters are steps, more of them the longer what they work on.
    No text may outgrow MAX_CHARACTERS, nor may all that is written on the way.

    Constants are not computed when the template is compiled, where there is no budget: the optimizer is off, and a
    `finalize` that takes the context keeps the compiler from it.
    """

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,
            finalize=jinja2.pass_context(lambda context, value: self._count_written(value)),
        )
        self.start()
        self.filters["tojson"] = _tojson
        for name in _LEFT_OUT_FILTERS:
            del self.filters[name]
        for name in _LEFT_OUT_GLOBALS:
            del self.globals[name]
        for name, function in list(self.filters.items()):
            self.filters[name] = self._bounded(name, function)
        self.filters["_counted"] = lambda items: _Counted(items, self)
        self.filters["_concatenated"] = self._concatenate
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def start(self) -> None:
        """Fill up the budget."""
        self.steps, self.written = 0, 0

    def spend(self, steps: int = 1) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise SecurityError(f"the template did not end within {MAX_STEPS:,} steps")

    def call(self, context, function, *args, **kwargs):
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        name, owner = getattr(method, "__name__", ""), getattr(method, "__self__", None)
        self._check_call(name, owner, args, kwargs)
        return self._checked_result(super().call(context, function, *args, **kwargs))

    def _bounded(self, name: str, function):
        """A filter that takes its work from the budget."""

        @functools.wraps(function)  # with what says that it wants the context
        def bounded(*args, **kwargs):
            first = args[1:] if hasattr(function, "jinja_pass_arg") else args
            self._check_call(name, first[0] if first else None, first[1:], kwargs)
            return self._checked_result(function(*args, **kwargs))

        return bounded

    def _check_call(self, name: str, subject: Any, args: tuple, kwargs: dict) -> None:
        """Refuse a method or filter of `subject` whose result would be too long, before it is computed."""
        self.spend(1 + sum(_length(value) for value in (subject, *args)) // _WORK)
        given = (*args, *kwargs.values())
        if name in _LENGTHS and any(isinstance(value, (int, float)) and abs(value) > _MAX_NUMBER for value in given):
            raise SecurityError(f"{name} with a number above {_MAX_NUMBER:,}")
        if isinstance(subject, str) and name in ("format", "format_map"):
            if (_WIDE_FIELD if "{" in subject else _WIDE_FORMAT).search(subject):
                raise SecurityError("text formatting with a width above 99,999, or one that is not written out")
        elif name in ("replace", "join", "translate"):
            longest = max((_length(inner) for value in given for inner in _inner(value)), default=0)
            self._check_length(
                (_length(subject) + 1) * (longest + 1) if name != "join" else self._joined(subject, given)
            )

    @staticmethod
    def _joined(subject: Any, given: tuple) -> int:
        """Length of a list joined by a text: `text.join(list)`, or the filter `list | join(text)`."""
        parts = (subject, *given)
        texts = [len(part) for part in parts if isinstance(part, str)]
        items = [part for part in parts if isinstance(part, (list, tuple))]
        return sum(len(item) * max(texts, default=0) + sum(map(_length, item)) for item in items)

    def _checked_result(self, result: Any) -> Any:
        self._check_length(_length(result))
        self.spend(_length(result) // _WORK)
        return result

    def _count_written(self, value: Any) -> Any:
        if isinstance(value, str):
            self.written += len(value)
            self._check_length(self.written)
        return value

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, (str, list, tuple)) and isinstance(times, int):
                    self._check_length(len(text) * times)
        elif operator == "**" and isinstance(right, (int, float)) and abs(right) > 64:
            raise SecurityError("a power above 64")
        elif operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise SecurityError("text formatting with a width above 99,999")
        result = super().call_binop(context, operator, left, right)
        if operator == "+" and isinstance(result, (str, list)):
            self._check_length(len(result))
        return result

    def _concatenate(self, parts: list[Any]) -> str:
        text = "".join(map(str, parts))
        self._check_length(len(text))
        return text

    def _check_length(self, length: int) -> None:
        if length > MAX_CHARACTERS:
            raise SecurityError(f"the template builds a text of {length:,} characters")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filtered(loop.iter, "_counted")
        _wrap_concatenations(tree)
        return tree


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return _in_environment(nodes.Filter(node, name, [], [], None, None, lineno=node.lineno), node)


def _in_environment(made: AnyNode, like: nodes.Node) -> AnyNode:
    """A node that was made belongs where the one it stands for did."""
    if like.environment is not None:
        made.set_environment(like.environment)
    return made


def _wrap_concatenations(node: nodes.Node) -> None:
    """Replace every `a ~ b` below `node` by a call that checks the length of the result."""
    for field, value in list(node.iter_fields()):
        if isinstance(value, nodes.Node):
            setattr(node, field, _wrapped_concatenation(value))
        elif isinstance(value, list):
            setattr(node, field, [_wrapped_concatenation(x) if isinstance(x, nodes.Node) else x for x in value])


def _wrapped_concatenation(node: nodes.Node) -> nodes.Node:
    _wrap_concatenations(node)
    if not isinstance(node, nodes.Concat):
        return node
    return _filtered(_in_environment(nodes.List(node.nodes, lineno=node.lineno), node), "_concatenated")


def _tojson(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes HTML characters; transformers' does not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str):
    raise TemplateFault(message)


class ChatTemplate:
    """A compiled chat template.

    Attributes:
        source: The Jinja text.
        knows_tools: Whether the template reads `tools` at all; if not, tool definitions vanish silently.
        knows_tool_calls: Whether it renders an assistant message's `tool_calls`.
    """

    def __init__(self, source: str, where: str = "chat template"):
        self.source = source
        self._environment = _Environment()
        try:
            self._compiled = self._environment.from_string(source)
            tree = self._environment.parse(source)
        except (jinja2.TemplateError, RecursionError, ValueError, SyntaxError, MemoryError, OverflowError) as error:
            raise CheckpointError(
                f"the chat template is not valid Jinja: {error}",
                where=where,
                fix="Correct the template, or copy the tokenizer files from the original model.",
            ) from error
        self.knows_tools = "tools" in jinja2.meta.find_undeclared_variables(tree)
        self.knows_tool_calls = "tool_calls" in source

    def mentions(self, word: str) -> bool:
        """Whether a word, of a role or a key, stands in the template at all."""
        return re.search(rf"\b{re.escape(word)}\b", self.source) is not None

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False, **variables: Any) -> str:
        """Render messages to text.

        Keys whose value is None are left out, as transformers does: APIs write `content: null`, templates want no key.

        Raises:
            TemplateFault: the template refused the messages, lacks a key, or ran over its budget.
        """
        shown = [{key: value for key, value in message.items() if value is not None} for message in messages]
        self._environment.start()
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._compiled.generate(
                messages=shown, add_generation_prompt=add_generation_prompt, **variables
            ):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise TemplateFault(f"the template writes more than {MAX_CHARACTERS:,} characters")
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise TemplateFault(str(error) or type(error).__name__) from error
        except (RecursionError, MemoryError, OverflowError, ZeroDivisionError) as error:
            raise TemplateFault(f"{type(error).__name__} while rendering") from error
        return "".join(pieces)
