"""Rows are read with the tokenizers that chat is tested with."""

from tests.chat.conftest import real, tokenizer, tooled, write  # noqa: F401
