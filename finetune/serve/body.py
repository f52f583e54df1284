"""Bodies of requests: bytes to JSON values, at a cost that is bounded by their size.

A body of 8 MB can hold 2.7 million empty objects, each of which costs Python more than a whole page of text. They are
counted before any is made; no request of use has a hundredth of that.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
from starlette.requests import Request

from finetune.errors import DataError
from finetune.infer.prompts import check_characters
from finetune.serve.errors import ApiError

MAX_BODY = 8 * 1024 * 1024
MAX_BODIES = 16 * MAX_BODY
"""Bytes of all bodies that are being sent or read."""
MAX_PARTS = 200_000
"""Lists, objects and keys in a body."""
MAX_DEPTH = 200
"""Lists and objects inside each other."""

_HALF_OF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


class Bodies:
    """Takes bodies off the network, as many at once as memory is set aside for."""

    def __init__(self) -> None:
        self._held = 0

    async def read(self, request: Request) -> bytearray:
        """The body, no longer than MAX_BODY. It counts as held until `release`.

        Another type than JSON is refused: browsers send plain text from any page to a loopback address without asking.

        Raises:
            ApiError: 413, 415, or 429 where the other bodies leave no room.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "Send the body as Content-Type: application/json.")
        body = bytearray()
        try:
            async for piece in request.stream():
                body += piece
                self._held += len(piece)
                if len(body) > MAX_BODY:
                    raise ApiError(413, f"The body is larger than {MAX_BODY:,} bytes.")
                if self._held > MAX_BODIES:
                    raise ApiError(
                        429, "Too many large bodies are being read. Try again later.", code="too_many_bodies"
                    )
        except BaseException:
            self.release(body)
            raise
        return body

    def release(self, body: bytearray) -> None:
        """The body is of no use any more."""
        self._held -= len(body)
        body.clear()


def parse(body: bytes | bytearray) -> Any:
    """The JSON value of a body.

    Raises:
        ApiError: 400; it is not UTF-8 or not JSON, holds too many lists, objects and keys or nests them too deeply, or
            a text of it holds half of a character pair.
    """
    _check_structure(bytes(body))
    try:
        text = body.decode()
        value = json.loads(text)
        if _HALF_OF_A_PAIR.search(text) and isinstance(value, dict):
            check_characters(value, "body")
    except DataError as error:
        raise ApiError(400, str(error)) from error
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}") from error
    return value


def _check_structure(body: bytes) -> None:
    """Count brackets and colons outside of texts, in NumPy: no object is made, and other threads go on meanwhile."""
    # Without escapes, every quotation mark begins or ends a text.
    characters = np.frombuffer(body.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    inside = np.logical_xor.accumulate(characters == ord('"'))
    opening = ((characters == ord("{")) | (characters == ord("["))) & ~inside
    keys = (characters == ord(":")) & ~inside
    if np.count_nonzero(opening) + np.count_nonzero(keys) > MAX_PARTS:
        raise ApiError(400, f"The body holds more than {MAX_PARTS:,} lists, objects and keys.")
    closing = ((characters == ord("}")) | (characters == ord("]"))) & ~inside
    brackets = np.flatnonzero(opening | closing)
    depth = np.cumsum(np.where(opening[brackets], 1, -1))
    if len(depth) and depth.max() > MAX_DEPTH:
        raise ApiError(400, f"The body nests more than {MAX_DEPTH} lists and objects in each other.")
