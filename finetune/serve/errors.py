"""What clients are told when something is wrong, in OpenAI's form."""

from __future__ import annotations

from typing import Any

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_SHOWN = 80  # characters of a client's own text that come back in a message


class ApiError(Exception):
    """An answer with OpenAI's error object.

    Attributes:
        status: HTTP status code.
        body: {"error": {"message", "type", "param", "code"}}.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.status = status
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        super().__init__(message)


def shown(text: str) -> str:
    """A client's text as it stands in a message: quoted, and cut where it is long."""
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")
