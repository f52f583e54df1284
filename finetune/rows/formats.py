"""The forms of rows, an entry each: which keys tell a form, what it is called where, and how it is read.

`FORMS` is the one place that knows them: the recipe's choices, its rules, what messages say and the table of the
documentation derive from it. Imports nothing heavy, since every recipe is checked against it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from finetune.chat.messages import Conversation, PlainText, Preference
from finetune.errors import DataError, nearest
from finetune.methods import CONVERSATION, PREFERENCE, RowKind
from finetune.rows.turns import Message, Row, is_turn, keys_of, kind_of, turn

Parsed = Conversation | PlainText | Preference


@dataclass(frozen=True)
class Form:
    """One form of rows.

    Attributes:
        name: What `format:` calls it.
        kind: What a row of it is.
        told_by: Sets of keys; a row that has all of one set is of this form.
        also: Other keys that it reads.
        read: Checks a row and brings it into the one form.
        row: A row, sketched as JSON, for the documentation.
        says: What the sketch does not say.
    """

    name: str
    kind: RowKind
    told_by: tuple[tuple[str, ...], ...]
    also: tuple[str, ...]
    read: Callable[[Row], Parsed]
    row: str
    says: str = ""

    @cached_property
    def keys(self) -> dict[str, None]:
        """All keys that it reads, in their order."""
        return dict.fromkeys([*(key for keys in self.told_by for key in keys), *self.also])


def detect_format(row: Mapping[str, Any], source: str = "", columns: Mapping[str, str] | None = None) -> str:
    """Name the form of a row by its keys.

    Args:
        columns: The keys that the source's `columns` gave the row: the form must read them all.

    Raises:
        DataError: no form has these keys; names the nearest one and what would mend it.
    """
    near = None
    for form in FORMS.values():
        if any(row.keys() >= set(keys) for keys in form.told_by):
            if form.keys.keys() >= set(columns or ()):
                return form.name
            near = near or form
    if near:
        raise DataError(
            f"form {near.name} does not read {' and '.join(key for key in columns or () if key not in near.keys)}",
            where=source,
            fix=f"Give `columns` keys of one form; those of {near.name} are {', '.join(near.keys)}.",
        )
    raise DataError(
        f"the row has no known form; its keys are: {', '.join(map(str, row))[:200] or 'none'}",
        where=source,
        fix=_suggestion(row) or f"Known are {'; '.join(_short(form) for form in FORMS.values())}.",
    )


def parse_row(row: dict[str, Any], format: str, source: str) -> Parsed:
    """Check a row and bring it into the one form.

    Args:
        row: One object of a data file.
        format: One of FORMS, or "auto" to go by the row's keys.
        source: "file:row", named in errors.

    Raises:
        DataError: a key is missing or of the wrong type, a role is unknown; the message names the key.
    """
    return FORMS[detect_format(row, source) if format == "auto" else format].read(Row(row, source))


# -- conversations ---------------------------------------------------------------------------------------------


def _messages(row: Row) -> Conversation:
    return Conversation(row.turns("messages"), row.tools(), row.source)


def _sharegpt(row: Row) -> Conversation:
    return Conversation(row.turns("conversations"), row.tools(wrap=True), row.source)


def _alpaca(row: Row) -> Conversation:
    prompt = _instruction(row)
    return Conversation([*prompt, _said(row.text("output"))], row.tools(wrap=True), row.source)


def _instruction(row: Row) -> list[Message]:
    """System, history and the instruction, with the input on a new line below it."""
    parts = [row.text("instruction"), row.text("input", default="")]
    return [*row.system(), *row.history(), {"role": "user", "content": "\n".join(part for part in parts if part)}]


def _query_response(row: Row) -> Conversation:
    prompt = _query(row)
    return Conversation([*prompt, _said(row.text("response"))], row.tools(wrap=True), row.source)


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _query(row: Row) -> list[Message]:
    return [*row.system(), *row.history(), {"role": "user", "content": row.text("query")}]


def _prompt_completion(row: Row) -> Conversation | PlainText:
    if all(isinstance(row.row.get(key), str) for key in ("prompt", "completion")):
        for key in ("system", "history", "tools"):
            if row.row.get(key):
                what = "texts are trained on as they are, without the chat template, which has a place for this"
                row.fail(key, what, "Write messages instead of texts, or remove it.")
        return PlainText(row.text("prompt"), row.text("completion"), row.source)
    prompt, completion = _prompt(row), _answer(row, "completion")
    _check_answer(row, prompt, "prompt", completion, "completion")
    return Conversation(prompt + completion, row.tools(), row.source, given=len(prompt))


def _text(row: Row) -> PlainText:
    return PlainText(None, row.text("text"), row.source)


# -- preferences -----------------------------------------------------------------------------------------------


def _preference(row: Row) -> Preference:
    """Read any of the forms in which pairs are published.

    A prompt under `prompt` (text or messages), `conversations`, `instruction` or `query`, and two answers, each a text,
    a turn, or turns, which may repeat the prompt. Without a prompt, answers of turns that begin alike, of which the
    shared beginning is the prompt, be they lists or texts as Anthropic writes them ("\\n\\nHuman: ..."). As ms-swift
    has it: a whole conversation under `messages`, the worse answer or the worse conversation beside it. As OpenAI has
    it: the prompt's messages and tools within `input`.
    """
    given = _input(row)
    tools = (given or row).tools(wrap="conversations" in row.row)
    good, bad = _sides(row)
    chosen, rejected = _answer(row, good), _answer(row, bad)
    if (good, bad) == ("messages", "rejected_response"):
        key, prompt, chosen = good, [*row.system(), *chosen[:-1]], chosen[-1:]
    elif given is not None:
        key, prompt = "input.messages", given.turns("input.messages")
    elif good != "messages" and (key := next((key for key in _PROMPTS if key in row.row), "")):
        prompt = _PROMPTS[key](row)
        chosen, rejected = _behind(prompt, chosen), _behind(prompt, rejected)
    else:
        key = good
        prompt, chosen, rejected = _split_shared(row, good, chosen, rejected)
        prompt = [*row.system(), *prompt]
    _check_answer(row, prompt, key, chosen, good)
    _check_answer(row, prompt, key, rejected, bad)
    for message in prompt:
        if message.get("train"):
            row.fail(key, "a turn of the prompt is marked as trained on", "Only the two answers are; remove the mark.")
    return Preference(Conversation(prompt, tools, row.source), chosen, rejected, row.source)


def _sides(row: Row) -> tuple[str, str]:
    """The keys of the better and the worse answer."""
    good, bad = next((pair for pair in _SIDES if all(map(row.has, pair))), _SIDES[0])
    for key in (good, bad):
        if not row.has(key):
            what = "found null" if key in row.row else f"the key is missing; the row has {keys_of(row.row)}"
            row.fail(key, what, "Give the two answers.")
    return good, bad


_SIDES = (
    ("chosen", "rejected"),
    ("messages", "rejected_messages"),
    ("messages", "rejected_response"),
    ("response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
)


def _input(row: Row) -> Row | None:
    """The messages and tools that OpenAI's preference rows have under `input`; None in rows that are none of those."""
    given = row.row.get("input")
    if not isinstance(given, dict):
        return None
    return Row({"input.messages": given.get("messages"), "tools": given.get("tools")}, row.source)


def _prompt(row: Row) -> list[Message]:
    if isinstance(row.row.get("prompt"), list):
        return row.turns("prompt")
    return [*row.system(), *row.history(), {"role": "user", "content": row.text("prompt")}]


_PROMPTS: dict[str, Callable[[Row], list[Message]]] = {
    "conversations": lambda row: row.turns("conversations"),
    "prompt": _prompt,
    "instruction": _instruction,
    "query": _query,
}


def _answer(row: Row, key: str) -> list[Message]:
    value = row.row.get(key)
    if isinstance(value, str):
        return _dialogue(value) or [_said(value)]
    if is_turn(value):
        return [turn(row, value, key)]
    if isinstance(value, list):
        return [turn(row, item, f"{key}[{i}]") for i, item in enumerate(row.items(key))]
    if key not in row.row:
        row.fail(key, f"the key is missing; the row has {keys_of(row.row)}", "Give it a text.")
    row.fail(key, f"found {kind_of(value)}", "It must be a text, a message or a list of messages.")


_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def _dialogue(text: str) -> list[Message]:
    """The turns of a text that is a whole dialogue, as Anthropic publishes them; none where it is not.

    >>> [message["content"] for message in _dialogue("\\n\\nHuman: Hi\\n\\nAssistant: Hello")]
    ['Hi', 'Hello']
    """
    before, *parts = _SPEAKER.split(text)
    if before or parts[:1] != ["Human"] or "Assistant" not in parts[::2]:
        return []
    return [{"role": _SPEAKERS[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]


def _behind(prompt: list[Message], answer: list[Message]) -> list[Message]:
    """Some sets repeat the prompt inside the answers; only what follows it is the answer."""
    for start in (0, 1):  # with and without the system message
        repeated = prompt[start:]
        if repeated and len(answer) > len(repeated) and answer[: len(repeated)] == repeated:
            return answer[len(repeated) :]
    return answer


def _split_shared(
    row: Row, key: str, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) or shared == len(rejected):
        # Equal answers share everything; the last assistant message is then the answer, and the data check names it.
        shared = max((i for i, m in enumerate(chosen[:shared]) if m["role"] == "assistant"), default=0)
    if shared == 0:
        column = next(
            (name for name in row.row if _alike("prompt", name) and name not in FORMS["preference"].keys), None
        )
        mend = f"add `columns: {{prompt: {column}}}` to the source" if column else 'add "prompt"'
        row.fail(
            key,
            "there is no prompt: chosen and rejected share no first message",
            f"{mend[0].upper()}{mend[1:]}, or begin both with the same messages.",
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _check_answer(row: Row, prompt: list[Message], key: str, answer: list[Message], name: str) -> None:
    last = prompt[-1]["role"] if prompt else "nobody"
    if last not in ("user", "tool"):
        what = f"the prompt ends with a message of role {last}"
        row.fail(key, what, "It must end with a user or tool message.")
    if not answer or answer[0]["role"] != "assistant":
        found = answer[0]["role"] if answer else "nothing"
        row.fail(name, f"behind the prompt stands {found}", "It must be an assistant message.")


# -- the table -------------------------------------------------------------------------------------------------

FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form(
            "preference",
            PREFERENCE,
            _SIDES,
            ("prompt", "conversations", "instruction", "input", "query", "system", "history", "tools"),
            _preference,
            '{"prompt": text or messages, "chosen": text or messages, "rejected": text or messages}',
            "The prompt may also stand under `conversations`, `instruction` and `input`, or `query`, or be what chosen "
            'and rejected both begin with (lists of messages, or texts with "Human:" and "Assistant:"). '
            "ms-swift's `rejected_response` and `rejected_messages` beside `messages` or `response` are read too, and "
            "OpenAI's `input`, `preferred_output` and `non_preferred_output`.",
        ),
        Form(
            "messages",
            CONVERSATION,
            (("messages",),),
            ("tools", "system"),
            _messages,
            '{"messages": [{"role": "system|developer|user|assistant|tool", "content": "..."}], "tools"?}',
            "OpenAI's form.",
        ),
        Form(
            "sharegpt",
            CONVERSATION,
            (("conversations",),),
            ("system", "tools"),
            _sharegpt,
            '{"conversations": [{"from": "human|gpt|system|function_call|observation", "value": "..."}], "system"?}',
            'Turns of `{"role", "content"}` are read too, and mixes of both; so are ms-swift\'s `tool_call` and '
            "`tool_response`, and `tools`.",
        ),
        Form(
            "alpaca",
            CONVERSATION,
            (("instruction", "output"),),
            ("input", "system", "history", "tools"),
            _alpaca,
            '{"instruction": "...", "input"?, "output": "...", "system"?, "history": [[prompt, response]]?}',
            "All but `instruction` and `output` may be absent.",
        ),
        Form(
            "query_response",
            CONVERSATION,
            (("query", "response"),),
            ("system", "history", "tools"),
            _query_response,
            '{"query": "...", "response": "...", "system"?, "history": [[query, response]]?}',
            "ms-swift's form.",
        ),
        Form(
            "prompt_completion",
            CONVERSATION,
            (("prompt", "completion"),),
            ("system", "history", "tools"),
            _prompt_completion,
            '{"prompt": text or messages, "completion": text or messages}',
            "TRL's form. Two texts are trained on as they are, without the chat template, and end with the eos token.",
        ),
        Form(
            "text",
            CONVERSATION,
            (("text",),),
            (),
            _text,
            '{"text": "..."}',
            "Every token is trained on, the eos token behind it too; there is no chat template.",
        ),
    )
}


def _short(form: Form) -> str:
    return f"{form.name}: {{{', '.join(form.told_by[0])}}}"


# -- rows of no form -------------------------------------------------------------------------------------------

# Names that others give to what our keys hold.
_ALIKE = tuple(
    words.split()
    for words in (
        "instruction query prompt question problem input inputs user human ask source article",
        "output response completion answer target targets solution reply assistant gpt summary",
        "messages conversations conversation dialog dialogue chat turns items",
        "chosen better accepted preferred positive winner good",
        "rejected worse negative loser bad rejected_response",
        "text content document passage body raw_content",
    )
)
# The same for what a form need not have. Only these very names: nothing is missing that a near name could be.
_ALIKE_ALSO = {"system": ("system_prompt", "system_message"), "input": ("context",), "tools": ("functions",)}
_OF_TEXT = ("instruction", "output", "query", "response", "rejected_response", "text", "input", "system")
_PLAIN_NAME = re.compile(r"[A-Za-z_][\w.-]*")


def _alike(key: str, name: Any) -> bool:
    """Whether a column of this name may hold what a key holds."""
    word = str(name).lower().strip()
    return any(key in group and word in group for group in _ALIKE) or nearest(word, [key]) == key


def _may_hold(key: str, value: Any) -> bool:
    """Whether a form's key may hold a value of this kind. Lists may come as JSON text, as in csv."""
    if isinstance(value, list):
        return key not in _OF_TEXT and all(isinstance(item, dict) for item in value)
    return value is None or isinstance(value, str) or (isinstance(value, dict) and key not in _OF_TEXT)


def _yaml_name(name: str) -> str:
    """A name as the recipe must have it: in quotes where YAML would read it otherwise."""
    plain = _PLAIN_NAME.fullmatch(name) and name.lower() not in (
        "yes",
        "no",
        "on",
        "off",
        "true",
        "false",
        "null",
        "y",
        "n",
    )
    return name if plain else json.dumps(name, ensure_ascii=False)


def _suggestion(row: Mapping[str, Any]) -> str | None:
    """The nearest form, and the recipe's line that would give it this row; None where nothing is near."""
    best: tuple[tuple[int, int], Form, dict[str, str], list[str]] | None = None
    for form, keys in _all_keys():
        columns: dict[str, str] = {}
        for key in keys:
            free = [name for name in row if name not in (*form.keys, *columns.values()) and _may_hold(key, row[name])]
            if key not in row and (name := next((name for name in free if _alike(key, name)), None)):
                columns[key] = name
        lacking = [key for key in keys if key not in row and key not in columns]
        score = (-len(lacking), sum(key in row for key in keys))
        if len(lacking) < len(keys) and (best is None or score > best[0]):
            best = score, form, columns, lacking
    if best is None:
        return None
    _, form, columns, lacking = best
    for key, names in _ALIKE_ALSO.items():
        if columns and key in form.also and key not in row:
            columns.update((key, name) for name in names if row.get(name) and _may_hold(key, row[name]))
    line = f"columns: {{{', '.join(f'{key}: {_yaml_name(name)}' for key, name in columns.items())}}}"
    if not lacking:
        return f"The nearest form is {_short(form)}; add `{line}` to the source."
    and_line = f", and `{line}` on the source" if columns else ""
    return f"The nearest form is {_short(form)}; it needs {' and '.join(lacking)} too{and_line}."


def _all_keys() -> Iterator[tuple[Form, tuple[str, ...]]]:
    """Every form with each set of its keys; those of one answer first, which win where two are as near."""
    for form in sorted(FORMS.values(), key=lambda form: form.kind == PREFERENCE):
        for keys in form.told_by:
            yield form, keys
