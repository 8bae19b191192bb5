"""Parsing of command lines, by the command `tracker` and by the studies' programs."""

from __future__ import annotations

import argparse
import math
from typing import NoReturn


class OneSentenceParser(argparse.ArgumentParser):
    """Reports a wrong argument in one sentence, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        """Print `message` without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def positive_float(text: str) -> float:
    """Parse a finite number above 0: the type of an argument."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be a number above 0")
    return value
