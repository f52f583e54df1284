"""A hook of the site: what tells Chinese words apart for the search stays quiet about how long it took."""

from __future__ import annotations

import logging

import jieba

jieba.setLogLevel(logging.WARNING)
