"""YAML text to plain Python values that remember their lines, with everything surprising refused.

Numbers and booleans follow YAML 1.2: `1e-4` is a float, `yes` is text, `010` is ten. Tags, duplicate keys, merge keys,
several documents and control characters are faults; anchors work, within a bound on how much they may expand to.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

MAX_DEPTH = 12
MAX_VALUES = 20_000

_INT = re.compile(r"[-+]?[0-9]{1,60}|0o[0-7]{1,60}|0x[0-9a-fA-F]{1,60}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]{1,60}|[0-9]{1,60}(\.[0-9]{0,60})?)([eE][-+]?[0-9]{1,6})?")
_SPECIAL: dict[str, bool | float | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_SPECIAL |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)
_SPECIAL |= {f"{sign}.{text}": float(f"{sign}inf") for sign in ("", "+", "-") for text in ("inf", "Inf", "INF")}
_SPECIAL |= {f".{text}": float("nan") for text in ("nan", "NaN", "NAN")}

Path = tuple[str | int, ...]


@dataclass
class Tree:
    """A parsed document.

    Attributes:
        value: dict, list or scalar; None when the text holds no document.
        lines: Line, from 1, of each key or list item, by its path.
        faults: (line, what, fix) of all that was refused; line is None when there is none to name.
        complete: False when reading had to stop at a fault, so that keys further down are not in `value`.
    """

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    faults: list[tuple[int | None, str, str | None]] = field(default_factory=list)
    complete: bool = True


def resolve_scalar(text: str) -> Any:
    """The value of an unquoted scalar by YAML 1.2's core schema.

    >>> resolve_scalar("1e-4"), resolve_scalar("2"), resolve_scalar("yes"), resolve_scalar("null")
    (0.0001, 2, 'yes', None)
    """
    if text in _SPECIAL:
        return _SPECIAL[text]
    if _INT.fullmatch(text):
        return int(text[2:], {"0o": 8, "0x": 16}[text[:2]]) if text[:2] in ("0o", "0x") else int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def parse_yaml(text: str) -> Tree:
    """Read one YAML document. Never raises for what the text holds: see `Tree.faults`."""
    return _Composer().read(text)


def _line(mark: Any) -> int | None:
    """The line, from 1, that a mark of PyYAML names; None where there is no mark."""
    return None if mark is None else int(mark.line) + 1


_FIXES = {
    "'\\t'": "Indent with spaces, not with tabs",
    "cannot start any token": "Put text that starts with it in quotes",
    "alphabetic or numeric character": "Put text that starts with * or & in quotes",
    "mapping values are not allowed": "Put a value that holds ': ' in quotes, and the keys of a section in one column",
    "expected <block end>": "Put the keys of a section in one column",
}


def _slip(error: yaml.YAMLError) -> tuple[int, str, str] | None:
    """(line, what, fix) where the slip stands before the place at which reading could not go on."""
    line = _line(getattr(error, "context_mark", None))
    context, problem = str(getattr(error, "context", "")), str(getattr(error, "problem", ""))
    if line is None:
        return None
    if "scanning a quoted scalar" in context:
        return line, "a text that begins with a quote here has no end", "Close the quote"
    if "parsing a flow" in context:
        bracket = "[" if "sequence" in context else "{"
        return line, f"what a '{bracket}' opens here is not closed", "Close it, or put a comma where one is missing"
    if "could not find expected ':'" in problem:
        return line, "this line has no ':' behind its key", "Write 'key: value'"
    return None


class _Stop(Exception):
    """Reading cannot go on; the fault is already noted."""


@dataclass
class _Frame:
    """A mapping or list in the making."""

    value: dict[str, Any] | list[Any]
    path: Path
    anchor: str | None
    first: int  # number of values before this one, to know how many it holds
    key: str | None = None  # of a mapping, and given, where its value comes next

    @property
    def awaits_key(self) -> bool:
        return isinstance(self.value, dict) and self.key is None

    def put(self, value: Any) -> Path:
        """Take the next value in; returns its path."""
        if isinstance(self.value, list):
            self.value.append(value)
            return (*self.path, len(self.value) - 1)
        key, self.key = str(self.key), None
        self.value[key] = value
        return (*self.path, key)


class _Composer:
    """Builds values from parser events with a stack of its own, so that no nesting can exhaust Python's."""

    def __init__(self) -> None:
        self.tree = Tree()
        self.stack: list[_Frame] = []
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.count = 0
        self.documents = 0

    def read(self, text: str) -> Tree:
        try:
            for event in yaml.parse(text, Loader=yaml.SafeLoader):
                self._take(event)
        except _Stop:
            self.tree.complete = False
        except yaml.YAMLError as error:
            self._syntax(error)
        except (ValueError, OverflowError) as error:  # an escape such as "\UFFFFFFFF" goes through PyYAML unchecked
            self._note(None, f"this is not valid YAML: {error}")
            self.tree.complete = False
        return self.tree

    def _note(self, line: int | None, what: str, fix: str | None = None) -> None:
        self.tree.faults.append((line, what, fix))

    def _stop(self, line: int | None, what: str, fix: str | None = None) -> NoReturn:
        self._note(line, what, fix)
        raise _Stop

    def _syntax(self, error: yaml.YAMLError) -> None:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None)
        if problem is None:
            character = getattr(error, "character", None)
            problem = f"character {character!r} is not allowed" if isinstance(character, str) else str(error)
            if isinstance(character, int):
                problem = f"character U+{character:04X} is not allowed"
        fix = next((fix for words, fix in _FIXES.items() if words in problem), None)
        line, problem, fix = _slip(error) or (_line(mark), problem, fix)
        self._note(line, f"this is not valid YAML: {problem}", fix)
        self.tree.complete = False

    def _take(self, event: yaml.Event) -> None:
        line = _line(event.start_mark) or 1
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                self._stop(line, "a second document starts here", "Keep one recipe in a file and remove the '---'")
        elif isinstance(event, yaml.NodeEvent):
            if self.stack and self.stack[-1].awaits_key:
                self._take_key(event, line)
            else:
                self._take_value(event, line)
        elif isinstance(event, yaml.CollectionEndEvent):
            frame = self.stack.pop()
            self._remember(frame.anchor, frame.value, self.count - frame.first)

    def _take_key(self, event: yaml.NodeEvent, line: int) -> None:
        if not isinstance(event, yaml.ScalarEvent):
            self._stop(line, "a key is a list, a mapping or an alias", "Write keys as plain names")
        self._refuse_tag(event, line)
        key = self._clean(event.value, line)
        frame = self.stack[-1]
        if key == "<<":
            self._note(line, "merge keys ('<<') are not read", "Write the keys out")
        path = (*frame.path, key)
        if key in frame.value:
            name = ".".join(map(str, path))
            self._note(line, f"{name} is given twice, first in line {self.tree.lines.get(path)}", "Keep one")
        frame.key = key
        self.tree.lines[path] = line

    def _take_value(self, event: yaml.NodeEvent, line: int) -> None:
        self.count += 1
        value = self._value(event, line)
        if self.count > MAX_VALUES:
            self._stop(line, f"this holds more than {MAX_VALUES} values", "A recipe is a page of keys")
        path = self._place(value, line)
        if isinstance(event, yaml.CollectionStartEvent):
            if len(self.stack) == MAX_DEPTH:
                self._stop(line, f"values are nested more than {MAX_DEPTH} deep", "A recipe needs five levels")
            self.stack.append(_Frame(value, path, event.anchor, self.count))
        elif isinstance(event, yaml.ScalarEvent):
            self.tree.lines[path] = line  # below its key where a ':' is missing there
            self._remember(event.anchor, value, 1)

    def _value(self, event: yaml.NodeEvent, line: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, line)
        if isinstance(event, yaml.ScalarEvent):
            self._refuse_tag(event, line)
            return resolve_scalar(event.value) if event.implicit[0] else self._clean(event.value, line)
        if isinstance(event, yaml.CollectionStartEvent):
            self._refuse_tag(event, line)
        return {} if isinstance(event, yaml.MappingStartEvent) else []

    def _alias(self, event: yaml.AliasEvent, line: int) -> Any:
        if event.anchor not in self.anchors:
            self._stop(line, f"*{event.anchor} stands before the end of what it names", "Write the value out")
        value, size = self.anchors[str(event.anchor)]
        self.count += size
        return copy.deepcopy(value) if self.count <= MAX_VALUES else None

    def _remember(self, anchor: str | None, value: Any, size: int) -> None:
        if anchor is not None:
            self.anchors[anchor] = (value, size)

    def _place(self, value: Any, line: int) -> Path:
        if not self.stack:
            self.tree.value = value
            return ()
        path = self.stack[-1].put(value)
        self.tree.lines.setdefault(path, line)  # of a mapping, the line of the key is there
        return path

    def _refuse_tag(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent, line: int) -> None:
        if event.tag is not None:
            self._note(line, f"the tag {event.tag!r} is not read", "Write the value without a tag")

    def _clean(self, text: str, line: int) -> str:
        bad = next((c for c in text if ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000), None)
        if bad is not None:
            self._note(line, f"a value holds the character U+{ord(bad):04X}", "Write it without control characters")
        return text
