"""Argument types that say in one sentence what is allowed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be a number above 0")
    return value


def positive_int(text: str) -> int:
    """A whole number from 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; it must be a whole number from 1"
        )
    return value


def natural(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; it must be a whole number from 0"
        )
    return int(text)


def numbers(text: str) -> list[float] | BaseDistribution:
    """Numbers above 0, `0.1,0.01`, or the range between two, `0.001:0.1`, with `:log` by ratio."""
    return _domain(text, positive_float, FloatDistribution)


def whole_numbers(text: str) -> list[int] | BaseDistribution:
    """Whole numbers from 1, `50,100`, or the range between two, `50:200`, with `:log` by ratio."""
    return _domain(text, positive_int, IntDistribution)


def booleans(text: str) -> list[bool]:
    """`true`, `false` or both, `true,false`."""
    return [boolean(part) for part in text.split(",")]


def _domain(
    text: str, number: Callable[[str], Any], distribution: Callable[..., BaseDistribution]
) -> list[Any] | BaseDistribution:
    if ":" not in text:
        return [number(part) for part in text.split(",")]
    low, high, *rest = text.split(":")
    if rest not in ([], ["log"]):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be LOW:HIGH[:log]")
    ends = number(low), number(high)
    if ends[0] > ends[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; LOW must not be above HIGH")
    return distribution(*ends, log=bool(rest))


def seed(text: str) -> int:
    """A seed that torch takes: a whole number from 0 to 2**63 - 1."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; it must be a whole number from 0 to 2**63 - 1"
        )
    return int(text)


def boolean(text: str) -> bool:
    """`true` or `false`, in any case."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be true or false")
    return text.lower() == "true"
