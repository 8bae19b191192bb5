"""How the benchmark measures and shows what it found."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Work = Callable[[], object]
ORDER = random.Random(0)


def seconds(work: Work, times: int = 1) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times


def shuffled(contestants: Sequence[T]) -> list[T]:
    """Another order for each round: what comes and goes on the machine hits all alike."""
    return ORDER.sample(contestants, len(contestants))


def compare(works: dict[str, Work], rounds: int, times: int = 1) -> dict[str, float]:
    """Seconds that one call of each takes."""
    took: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name in shuffled(list(works)):
            took[name].append(seconds(works[name], times))
    return {name: median(values[1:]) for name, values in took.items()}  # the first warms up


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table; all columns but the first hold numbers."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    rule = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    print(f"\n{title}\n")
    for first, *numbers in (columns, rule, *rows):
        right = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        print("|", " | ".join([first.ljust(widths[0]), *right]), "|", flush=True)


def goal(text: str, value: float, limit: float) -> None:
    """Print what is hoped for, and what it is."""
    verdict = "met" if value <= limit else "MISSED"
    print(f"goal: {text} <= {limit:.2f}: {value:.3f}, {verdict}", flush=True)


class Turn(NamedTuple):
    """What an epoch took: seconds by the clock, and of the CPU, all threads of this process."""

    seconds: float
    cpu: float
    epoch: float
    """Seconds of it in begin_epoch and end_epoch."""
