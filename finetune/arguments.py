"""Readers of single options, and checks of what no one option sees; readers raise ValueError, checks ArgumentError."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from finetune.errors import ArgumentError, Fault, did_you_mean


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A reader of whole numbers from `low` to `high` whose message, unlike typer's, names what was found."""
    valid = f"of at least {low}" if high is None else f"from {low} to {high}"

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low or (high is not None and number > high):
            raise ValueError(f"{text} is not a whole number {valid}")
        return number

    return read


def number(text: str) -> float:
    """A number, whole or not."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None


def choice(*choices: str) -> Callable[[str], str]:
    """A reader of one of several words, with the nearest one in its message."""

    def read(text: str) -> str:
        if text not in choices:
            fault = Fault(f"{text!r} is not one of {', '.join(choices)}", fix=did_you_mean(text, choices))
            raise ValueError(str(fault))
        return text

    return read


def check_master(nnodes: int, master: str | None) -> None:
    """Several machines name their first; one machine names none."""
    if master is None:
        if nnodes > 1:
            raise ArgumentError(
                f"--nnodes {nnodes} needs --master", fix="Name the first machine, for example --master 10.0.0.1:8090"
            )
        return
    host, _, port = master.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ArgumentError(f"--master is {master!r}", fix="Write HOST:PORT, for example 10.0.0.1:8090")
    if nnodes == 1:
        raise ArgumentError("--master is given, but --nnodes is 1", fix="Give both or neither.")


def check_sampling(temperature: float | None, top_p: float | None) -> None:
    """What both must be to draw tokens."""
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise ArgumentError(f"--temperature is {temperature:g}", fix="It must be 0, which is greedy, or more.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ArgumentError(f"--top-p is {top_p:g}", fix="It must be above 0 and at most 1.")


def piped_prompt() -> str:
    """The prompt that stands on standard input."""
    if sys.stdin is None or sys.stdin.isatty():
        raise ArgumentError("there is no prompt", fix="Give --prompt TEXT or --input FILE.jsonl, or pipe text in.")
    try:
        text = sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise ArgumentError("the prompt from the pipe is not UTF-8", fix="Pipe UTF-8 text in.") from error
    if not text:
        raise ArgumentError("the prompt from the pipe is empty", fix="Give --prompt TEXT or --input FILE.jsonl.")
    return text


def check_utf8(arguments: list[str]) -> None:
    """Bytes of an argument that are not UTF-8 come as halves of surrogate pairs, which no file can be written with."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            shown = argument.encode("utf-8", "backslashreplace").decode()
            raise ArgumentError(
                f"argument '{shown}' is not UTF-8 from its character {error.start + 1} on",
                fix="Write it in UTF-8; a file of such a name must be renamed.",
            ) from error


def read_api_key(given: str | None) -> str | None:
    """The server's key, of the option or of FINETUNE_API_KEY; None asks for none.

    One that is set and cannot work ends the command, so that no server is open, or closed to everyone, by mistake.
    """
    if given is None:
        given = os.environ.get("FINETUNE_API_KEY")  # typer takes an empty variable for one that is not set
    key = given and given.strip()
    if key == "":
        raise ArgumentError("the API key is empty", fix="Give a key, or unset FINETUNE_API_KEY.")
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ArgumentError(
            "the API key has characters that HTTP headers cannot carry", fix="Use letters, digits and signs of ASCII."
        )
    return key


def check_name(name: str | None) -> str | None:
    """What a served model is called; None leaves it to the folder."""
    if name is not None and not (name.strip() and name.isprintable()):
        raise ArgumentError("--name is empty or not printable", fix="Give a name such as my-model.")
    return name
