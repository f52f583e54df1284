"""JSON schemas: some as published in documentation and standards, and any number drawn at random."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]


def _object(properties: Schema, required: list[str] | None = None, **more: Any) -> Schema:
    required = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False, **more}


_SHORT = {"type": "string", "maxLength": 12}
PUBLIC: list[Schema] = [
    # OpenAI's guide to structured outputs: an event, steps of a solution, a recursive page, a review.
    _object({"name": _SHORT, "date": _SHORT, "participants": {"type": "array", "items": _SHORT, "maxItems": 4}}),
    _object(
        {
            "steps": {"type": "array", "items": _object({"explanation": _SHORT, "output": _SHORT}), "maxItems": 3},
            "final_answer": _SHORT,
        }
    ),
    {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": _object(
                {
                    "type": {"type": "string", "enum": ["div", "button", "header"]},
                    "label": _SHORT,
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
                }
            )
        },
    },
    _object(
        {"violates": {"type": "boolean"}, "category": {"anyOf": [{"enum": ["violence", "hate"]}, {"type": "null"}]}}
    ),
    # OpenAI's guide to function calling: the weather, an e-mail.
    _object({"location": _SHORT, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}}, ["location"]),
    _object({"to": {"type": "string", "format": "email", "maxLength": 30}, "subject": _SHORT, "body": _SHORT}),
    # json-schema.org's examples: a person, a place, a device, enums, conditional kinds.
    _object({"firstName": _SHORT, "lastName": _SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 150}}, []),
    _object(
        {
            "latitude": {"type": "number", "minimum": -90, "maximum": 90},
            "longitude": {"type": "number", "minimum": -180, "maximum": 180},
        }
    ),
    {"enum": [42, True, "hello", None, [1, 2, 3]]},
    _object(
        {
            "vegetables": {
                "type": "array",
                "items": _object({"veggieName": _SHORT, "veggieLike": {"type": "boolean"}}),
                "maxItems": 3,
            }
        }
    ),  # fmt: skip
    # JSON-RPC's request and GeoJSON's point.
    _object(
        {"jsonrpc": {"const": "2.0"}, "method": _SHORT, "id": {"type": ["integer", "null"]}}, ["jsonrpc", "method"]
    ),
    _object(
        {
            "type": {"const": "Point"},
            "coordinates": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 3},
        }
    ),
]


def drawn(draw: random.Random, depth: int = 3) -> Schema:
    """A schema of the keywords that requests use."""
    kinds = [_text, _number, _plain, _choice]
    kinds += [_list, _named, _either, _list, _named] if depth else []
    return draw.choice(kinds)(draw, depth - 1)


def _text(draw: random.Random, _: int) -> Schema:
    return draw.choice(
        [
            {"type": "string", "minLength": draw.randint(0, 3), "maxLength": draw.randint(3, 20)},
            {
                "type": "string",
                "pattern": draw.choice(["^[a-c]{2,5}$", "^(yes|no)+$", "^\\d{3}-\\d{4}$"]),
                "maxLength": 12,
            },
            {"type": "string", "format": draw.choice(["date", "uuid", "ipv4", "time"])},
        ]
    )


def _number(draw: random.Random, _: int) -> Schema:
    low = draw.randint(-1000, 1000)
    return {
        "type": draw.choice(["integer", "number"]),
        "minimum": low,
        draw.choice(["maximum", "exclusiveMaximum"]): low + draw.randint(1, 500),
    }


def _plain(draw: random.Random, _: int) -> Schema:
    return {"type": draw.choice(["boolean", "null"])}


def _choice(draw: random.Random, _: int) -> Schema:
    values = draw.sample([1, -2.5, "a", "ü\n", None, True, [1], {"b": 2}, ""], 3)
    return draw.choice([{"enum": values}, {"const": values[0]}])


def _list(draw: random.Random, depth: int) -> Schema:
    if draw.random() < 0.3:
        items = [drawn(draw, depth) for _ in range(draw.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    least = draw.randint(0, 2)
    return {"type": "array", "items": drawn(draw, depth), "minItems": least, "maxItems": least + draw.randint(0, 2)}


def _named(draw: random.Random, depth: int) -> Schema:
    names = draw.sample(["a", "b c", "größe", 'q"', "x", "long_name_of_a_key"], draw.randint(1, 3))
    return _object({name: drawn(draw, depth) for name in names}, draw.sample(names, draw.randint(0, len(names))))


def _either(draw: random.Random, depth: int) -> Schema:
    return {"anyOf": [drawn(draw, depth) for _ in range(2)]}
