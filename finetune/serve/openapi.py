"""What the server's own description of itself (/openapi.json) says beyond what FastAPI finds out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_MEANINGS = {
    400: "The request is wrong; the message says what, `param` where.",
    401: "The API key is missing or wrong.",
    403: "The name that the request calls the server by, or the page it comes from, is not allowed.",
    404: "There is no such model or path.",
    408: "The request did not come whole in time.",
    413: "The body is too large.",
    415: "The body is not sent as application/json.",
    429: "Too many requests or bodies wait already.",
    500: "The server failed; its log says where.",
    503: "The server is stopping, or has too many connections.",
}
Responses = dict[int | str, dict[str, Any]]


def errors(*statuses: int) -> Responses:
    """The errors that a path may answer with, beside those of every path."""
    content = {"application/json": {"schema": _ERROR}}
    return {
        status: {"description": _MEANINGS[status], "content": content}
        for status in sorted({*statuses, 400, 403, 408, 500, 503})
    }


def gives(*media: str) -> Responses:
    """A path's answer where all is well: JSON, or what else it is."""
    return {200: {"description": "The answer.", "content": {kind: {} for kind in media}}}


def takes(form: type[BaseModel], harmless: Iterable[str]) -> dict[str, Any]:
    """A path's body: a form of `finetune.serve.protocol`, the keys that are ignored, and no others."""
    schema = form.model_json_schema() | {"additionalProperties": False}
    schema["properties"] |= {name: {"description": "ignored"} for name in sorted(harmless)}
    definitions = schema.pop("$defs", {})  # put in their place: a path's own schema has no room for definitions
    for held in schema["properties"].values():
        if "anyOf" in held:
            held["anyOf"] = [
                definitions[kind["$ref"].rpartition("/")[2]] if "$ref" in kind else kind for kind in held["anyOf"]
            ]
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
