"""Keys of a row that its form does not read.

Some say that the row is not to be trained on as it is, which is an error; of the others people are told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import DataError
from finetune.methods import CONVERSATION
from finetune.rows.formats import Form
from finetune.rows.turns import MASK_KEYS

_MEDIA = ("images", "videos", "audios", "image", "video", "audio")
_WANTED_KEYS = ("label", "kto_tag")  # TRL's and ms-swift's name in KTO's rows, and LLaMA-Factory's
_MAX_SHOWN = 6


def check_media(row: Mapping[str, Any], source: str) -> None:
    """Refuse a row that is about something that is no text.

    Raises:
        DataError: it has pictures, films or sounds.
    """
    for key in _MEDIA:
        if row.get(key):
            _fail(source, key, "the models here see text only", "Leave such rows out, or remove the key.")


def unread_keys(row: Mapping[str, Any], form: Form, source: str) -> str:
    """The keys of a row that hold something and that its form does not read, for messages; "" where there are none.

    Raises:
        DataError: without one of them the row would say something else.
    """
    if row.keys() <= form.keys.keys():
        return ""
    check_media(row, source)
    for key in _WANTED_KEYS:
        value = row.get(key)
        unwanted = value is False or value in ("False", "false")  # in csv all is text
        if unwanted and form.kind == CONVERSATION and form.name != "text":
            what = "false marks an answer that is not wanted, as in KTO's rows, which no method here takes"
            fix = "Leave such rows out, or pair them up for dpo: prompt, chosen, rejected. Or rename the key."
            _fail(source, key, what, fix)
    for key in MASK_KEYS:
        if key not in form.keys and isinstance(value := row.get(key), (bool, int, float)) and not value:
            what = "it says that the row is not to be trained on; only turns have such a mark"
            _fail(source, key, what, "Leave such rows out, or rename the key.")
    keys = [str(key) for key, value in row.items() if key and key not in form.keys and value not in (None, "", [], {})]
    more = f" and {len(keys) - _MAX_SHOWN:,} more" if len(keys) > _MAX_SHOWN else ""
    return ", ".join(keys[:_MAX_SHOWN]) + more


def _fail(source: str, key: str, what: str, fix: str) -> None:
    raise DataError(what, where=f"{source}, key {key}", fix=fix)
