"""The optional parts of an installation: what an absent one leaves out, in one sentence."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module

logger = logging.getLogger(__name__)


def install(extra: str) -> str:
    """Return the command that adds an extra of pyproject.toml."""
    return f'pip install "mlflow-runmanager[{extra}]"'


@cache
def is_missing(module: str, extra: str, sentence: str) -> bool:
    """Return whether a module cannot be imported; one warning per process says so.

    Args:
        module: What is needed next.
        extra: The extra that brings it.
        sentence: What is left out without it, and why.
    """
    try:
        import_module(module)
    except ImportError:
        logger.warning("%s; %s", sentence, install(extra))
        return True
    return False
