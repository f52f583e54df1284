"""The `chat` command: a conversation in the terminal.

Answers are drawn as the model's generation_config.json says (greedy where it says nothing), and printed as they come.
Everything but the answers goes to stderr, so that a piped conversation leaves nothing else on stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune.chat.messages import Conversation
from finetune.chat.render import prompt_ids
from finetune.errors import DataError
from finetune.infer.open import Opened, open_model
from finetune.infer.sampling import DEFAULT_MAX_NEW_TOKENS, Sampling
from finetune.report.console import console, say

if TYPE_CHECKING:
    from finetune.infer.engine import Delta

HELP = """\
/system TEXT   set the system message (without TEXT: take it away) and start over
/undo          take back the last question and its answer
/retry         answer the last question again
/reset         start over, keeping the system message
/save FILE     append the conversation to FILE as a training row (messages form)
/help          show this
/exit          leave (Ctrl-D too); Ctrl-C stops an answer"""


@dataclass
class Talk:
    """The state of a conversation.

    Attributes:
        messages: All messages so far, the system message first if there is one.
        answers: How many were asked for, those taken back included: with a seed, each answer has draws of its own.
    """

    opened: Opened
    sampling: Sampling
    messages: list[dict[str, str]] = field(default_factory=list)
    answers: int = 0

    def prompt(self) -> tuple[list[int], int]:
        """Ids of the conversation with the header of the answer, and how many old turns were left out to make room.

        Oldest turns go first, whole; the system message stays. A quarter of the context is kept for the answer.

        Raises:
            DataError: even the last message alone does not fit.
        """
        room = self.opened.engine.context - min(self.sampling.max_new_tokens, self.opened.engine.context // 4)
        system = [message for message in self.messages[:1] if message["role"] == "system"]
        turns = self.messages[len(system) :]
        questions = [i for i, message in enumerate(turns) if message["role"] == "user"]
        for dropped, start in enumerate(questions):
            ids = prompt_ids(self.opened.tokenizer, Conversation(system + turns[start:], None, "chat"))
            if len(ids) <= room:
                return ids, dropped
        raise DataError(
            f"the message is too long: {len(ids)} tokens, and there is room for {room}", fix="Shorten it, or /reset."
        )

    def answer(self) -> Iterator["Delta"]:
        """Stream the answer to the last message; the caller adds it to `messages`."""
        ids, dropped = self.prompt()
        if dropped:
            say(f"The {dropped} oldest turns no longer fit the model's context and are left out.", style="yellow")
        sampling = self.sampling
        if sampling.seed is not None:
            seed = np.random.SeedSequence([sampling.seed, self.answers]).generate_state(1)[0]
            sampling = replace(sampling, seed=int(seed))
        self.answers += 1
        return self.opened.engine.stream(ids, sampling)

    def undo(self) -> bool:
        """Take back the last question and what followed it."""
        questions = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not questions:
            return False
        del self.messages[questions[-1] :]
        return True

    def reset(self, system: str | None = None) -> None:
        """Start over, with another system message if one is given ("" for none)."""
        kept = [message for message in self.messages[:1] if message["role"] == "system"]
        if system is not None:
            kept = [{"role": "system", "content": system}] if system else []
        self.messages = kept

    def save(self, path: Path) -> None:
        """Append the conversation, up to its last answer, as a row of messages form."""
        row = list(self.messages)
        while row and row[-1]["role"] != "assistant":
            row.pop()
        if not row:
            raise DataError("there is no answer to save yet")
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": row}, ensure_ascii=False) + "\n")


def chat(
    model: str,
    *,
    system: str | None = None,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
) -> None:
    """Talk with a model until /exit or the end of the input.

    Args:
        temperature, top_p, top_k: Instead of the model's own settings; temperature 0 is greedy.

    Raises:
        UserError: the model cannot be opened or has no chat template.
    """
    opened = open_model(model)
    opened.tokenizer.template_for(None)
    asked = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    sampling = Sampling.under_model(opened.generation_config, asked, max_new_tokens=max_new_tokens, seed=seed)
    talk = Talk(opened, sampling)
    talk.reset(system or "")
    if sys.stdin.isatty():
        say(f"Talking with {model}. /help shows what can be done.", style="dim")
    for line in _lines():
        try:
            if not _handle(talk, line):
                return
        except (DataError, OSError) as error:
            say(str(error), style="red")


def _lines() -> Iterator[str]:
    """What the user writes, stripped, without empty lines. A Ctrl-C at the prompt only clears it."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  editing and history for input()
    while True:
        try:
            line = input("\001\033[1m\002> \001\033[0m\002") if terminal else sys.stdin.readline()
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            continue
        except EOFError:
            return
        if not terminal and not line:
            return
        if line.strip():
            yield line.strip()


def _handle(talk: Talk, line: str) -> bool:
    """Do what one line asks for; False ends the conversation."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if not line.startswith("/"):
        _ask(talk, line)
    elif command == "/exit":
        return False
    elif command == "/help":
        console.print(HELP, markup=False)
    elif command == "/reset":
        talk.reset()
        say("Started over.", style="dim")
    elif command == "/system":
        talk.reset(rest)
        say("Started over with this system message." if rest else "Started over without one.", style="dim")
    elif command == "/undo":
        say("Took back the last question." if talk.undo() else "There is nothing to take back.", style="dim")
    elif command == "/retry":
        _retry(talk)
    elif command == "/save":
        _save(talk, rest)
    else:
        say(f"There is no {command}. /help shows what there is.", style="red")
    return True


def _ask(talk: Talk, text: str) -> None:
    """Answer a message. One that cannot be answered, or whose answer was stopped before it began, is taken back."""
    talk.messages.append({"role": "user", "content": text})
    said, end = "", None
    try:
        for delta in talk.answer():
            said += delta.text
            end = delta.output
            sys.stdout.write(delta.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        say("(stopped)", style="dim")
    finally:
        if said or end is not None:
            talk.messages.append({"role": "assistant", "content": said})
        else:
            talk.messages.pop()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if end is not None and end.finish_reason == "length":
        say("(cut at the greatest length)", style="dim")


def _retry(talk: Talk) -> None:
    question = next((m["content"] for m in reversed(talk.messages) if m["role"] == "user"), None)
    if question is None:
        say("There is nothing to answer again.", style="dim")
        return
    talk.undo()
    _ask(talk, question)


def _save(talk: Talk, name: str) -> None:
    if not name:
        say("Name a file: /save FILE", style="red")
        return
    path = Path(name).expanduser()
    talk.save(path)
    say(f"Appended to {path}.", style="dim")
