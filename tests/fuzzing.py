"""What the fuzz tests share: hypothesis profiles, a command line run in this process and judged, damaged files."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from finetune import cli

SECONDS = 120  # far more than any case takes on a busy machine; a hang takes longer

_CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
# The suite tries the same cases each time, so that it fails only for what was changed; the soak draws new ones.
settings.register_profile(
    "quick", max_examples=40, derandomize=True, deadline=None, suppress_health_check=_CHECKS, database=None
)
settings.register_profile(
    "soak",
    parent=settings.get_profile("quick"),
    derandomize=False,
    max_examples=int(os.environ.get("FINETUNE_SOAK_EXAMPLES", "1200")),
)


class _Hang(BaseException):
    """Not an Exception, so that no handler of the program takes it."""


@contextlib.contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """End the body with an error when it takes longer."""

    def stop(*_: object) -> None:
        raise _Hang(f"took longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line, in this process."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")  # as sys.stderr is
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), time_limit():
        code = cli._run([str(argument) for argument in arguments], debug=False)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return code, *texts


def judge(*arguments: object) -> int:
    """Run a command line on input that may be wrong: it is done, or it says in one message what is wrong."""
    code, _, err = run(*arguments)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err and "fault of the program" not in err, err
    assert (code, len(errors)) in ((0, 0), (2, 1)), f"exit code {code}\n{err}"
    if errors:
        assert len(errors[0]) > len("error: ") + 5, err
    return code


# -- damaged text, bytes and JSON ------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 10**30])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "\0", "\ud800", "../x", "/etc/passwd", "<|im_end|>", "{{ x }}", "a" * 3000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
_SNIPPETS = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"{",
    b"}",
    b"[" * 500,
    b'"',
    b",",
    b"1e999",
    b"NaN",
    b"-",
]


@st.composite
def damaged_bytes(draw, content: bytes) -> bytes:
    """A file cut short, with a bit flipped, a piece put in, taken out or repeated; or something else altogether."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=60))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(content)))
        end = draw(st.integers(place, min(len(content), place + 40)))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            content = content[:place]
        elif kind == 1 and place < len(content):
            content = content[:place] + bytes([content[place] ^ 1 << draw(st.integers(0, 7))]) + content[place + 1 :]
        elif kind == 2:
            content = content[:place] + draw(st.sampled_from(_SNIPPETS)) + content[end:]
        elif kind == 3:
            content = content[:place] + content[end:]
        else:
            content = content[:end] + content[place:end] + content[end:]
    return content


@st.composite
def damaged_json(draw, value: object, more_keys: tuple[str, ...] = ()) -> object:
    """A JSON value with some of its parts replaced, taken out, or keys put in."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        place = value
        for _ in range(draw(st.integers(0, 4))):
            inner = list(place.values()) if isinstance(place, dict) else place if isinstance(place, list) else []
            inner = [item for item in inner if isinstance(item, (dict, list))]
            if not inner:
                break
            place = draw(st.sampled_from(inner))
        if isinstance(place, dict):
            keys = st.sampled_from([*place, *more_keys]) if place or more_keys else st.text(max_size=5)
            key = draw(keys | st.text(max_size=5))
            if draw(st.integers(0, 3)) == 0:
                place.pop(key, None)
            else:
                place[key] = draw(JSON)
        elif isinstance(place, list):
            at = draw(st.integers(0, len(place)))
            place[at : at + draw(st.integers(0, 1))] = draw(st.lists(JSON, max_size=1))
    return value


def json_bytes(value: object) -> bytes:
    """JSON as a hostile program would write it: NaN, lone surrogates and all."""
    return json.dumps(value).encode()


@contextlib.contextmanager
def file_as(path: Path, content: bytes) -> Iterator[None]:
    """Another content of a file, or a file that was not there, for a while."""
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        yield
    finally:
        path.unlink(missing_ok=True) if before is None else path.write_bytes(before)


if "pytest" in sys.modules:
    settings.load_profile("quick")
