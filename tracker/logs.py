"""Other packages' loggers, kept quiet for a while."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def muted(name: str, below: int = logging.CRITICAL + 1) -> Iterator[None]:
    """Drop what the logger `name` has to say below a level; by default all of it."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(below)
    try:
        yield
    finally:
        logger.setLevel(level)
