"""How the benchmarks measure and print."""

from __future__ import annotations

import os
import platform
import random
import re
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Work = Callable[[], object]
ORDER = random.Random(0)


def machine(*packages: str, threads: int | None = None) -> str:
    """Return the date, the machine, and the versions of Python and of some packages.

    Args:
        *packages: Names of distributions.
        threads: Threads that torch uses; None: its default.
    """
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    parts = [str(date.today()), cpu[1] if cpu else platform.machine(), f"{os.cpu_count()} cores"]
    if threads is not None:
        parts.append(f"{threads} thread")
    parts.append(f"Python {platform.python_version()}")
    spelt = {"mlflow": "MLflow", "optuna": "Optuna"}
    return ", ".join([*parts, *(f"{spelt.get(name, name)} {version(name)}" for name in packages)])


def seconds(work: Work, times: int = 1) -> float:
    """Return the seconds of one call, averaged over `times` calls."""
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times


def shuffled(contestants: Sequence[T]) -> list[T]:
    """Return the contestants in another order each time, so that no one is favoured by it."""
    return ORDER.sample(contestants, len(contestants))


def compare(works: dict[str, Work], rounds: int, times: int = 1) -> dict[str, float]:
    """Measure several calls in turns.

    Args:
        works: The calls by name.
        rounds: Turns of each, after one to warm up.
        times: Calls per turn.

    Returns:
        The median seconds of one call, by name.
    """
    took: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name in shuffled(list(works)):
            took[name].append(seconds(works[name], times))
    return {name: median(values[1:]) for name, values in took.items()}


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table; all columns but the first are aligned as numbers."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    rule = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    print(f"\n{title}\n")
    for first, *numbers in (columns, rule, *rows):
        right = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        print("|", " | ".join([first.ljust(widths[0]), *right]), "|", flush=True)


def goal(text: str, value: float, limit: float) -> None:
    """Print whether a value meets its goal.

    Args:
        text: What is measured.
        value: What was measured.
        limit: The largest value that meets the goal.
    """
    verdict = "met" if value <= limit else "MISSED"
    print(f"goal: {text} <= {limit:.2f}: {value:.3f}, {verdict}", flush=True)


class Turn(NamedTuple):
    """The cost of an epoch."""

    seconds: float
    cpu: float
    """CPU seconds of all threads of this process."""
    epoch: float
    """Seconds spent in `begin_epoch` and `end_epoch`."""
