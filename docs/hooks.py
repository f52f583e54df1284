"""Hooks of the site. mkdocs calls them by name."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import jieba

jieba.setLogLevel(logging.WARNING)  # it tells Chinese words apart for the search, and how long it took for that


def on_post_build(config: Any) -> None:
    """The theme asks for a map of each language's pages, and all of them are in one."""
    site = Path(config.site_dir)
    (site / "zh").mkdir(exist_ok=True)  # its pages come after those of the first language
    shutil.copy(site / "sitemap.xml", site / "zh")
