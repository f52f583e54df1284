"""A run of a file's rows, cut between rows and not yet parsed: what readers give out and other processes take."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

# Bytes of text in a block, as read; rows in a block of an Arrow file.
BLOCK_BYTES = 1 << 20
BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Block:
    """Rows of one file that follow each other, not yet parsed.

    Attributes:
        first: Number of the first row: its line in jsonl, its 1-based number elsewhere.
        count: Rows, blank lines left out.
        kind: What `content` is: "lines" of JSON (bytes), the text of a JSON "array", "csv" (the header and the rows as
            lists), an "arrow" stream (bytes), or "rows" as they are.
        content: As `kind` says.
        size: About how many of its file's `text_bytes` it is; 0 where that cannot be told.
    """

    first: int
    count: int
    kind: Literal["lines", "array", "csv", "arrow", "rows"]
    content: Any
    size: int = 0

    def sha256(self) -> bytes:
        """Hash of the content."""
        content = self.content
        if not isinstance(content, bytes):
            content = json.dumps(content, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
        return hashlib.sha256(content).digest()
