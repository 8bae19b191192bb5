"""Loggers of other packages."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def muted(name: str, below: int = logging.CRITICAL + 1) -> Iterator[None]:
    """Drop the messages of a logger below a level, by default all, within the block."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(below)
    try:
        yield
    finally:
        logger.setLevel(level)
