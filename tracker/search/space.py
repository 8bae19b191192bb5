"""Search spaces: domains of hyperparameters, the points of a grid, and comparisons.

    {"lr": [0.01, 0.001], "momentum": FloatDistribution(0.0, 0.9), "layers": IntDistribution(1, 3)}

A list holds the values themselves, as for `RunBuilder.get_runs`; a range is one of Optuna's
distributions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from decimal import Decimal
from itertools import product
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)

from tracker.errors import ArgumentError
from tracker.validation import checked_mapping, checked_name, checked_params

Value = None | bool | int | float | str
Domain = list[Value] | BaseDistribution
Space = dict[str, Domain]
Point = dict[str, Value]

LARGEST_GRID = 100_000
_LARGEST_INT = 2**53  # Optuna stores floats, which hold every int up to here


def checked_space(given: Mapping[str, Any]) -> Space:
    """Return `given` as a space.

    Raises:
        ArgumentError: A name or a domain is not allowed.
    """
    space: Space = {}
    for name, domain in checked_mapping(given, "space").items():
        checked_name(name, "space")
        if isinstance(domain, CategoricalDistribution):
            domain = list(domain.choices)
        if isinstance(domain, BaseDistribution):
            bounds = getattr(domain, "low", 0), getattr(domain, "high", 0)
            if not all(map(math.isfinite, bounds)):
                raise ArgumentError(f"space[{name!r}]={domain} must be finite.")
            space[name] = domain
        elif isinstance(domain, (str, bytes, Mapping, Set)) or not isinstance(domain, Iterable):
            raise ArgumentError(
                f"space[{name!r}]={domain!r} is not allowed; it must be a list of values or one of "
                "optuna.distributions."
            )
        else:
            space[name] = _checked_values(name, list(domain))
    return space


def _checked_values(name: str, values: list[Any]) -> list[Value]:
    if not values:
        raise ArgumentError(f"space[{name!r}] is empty; it must have at least one value.")
    seen: set[Value] = set()
    # Scalars of NumPy and torch as Python's, which Optuna can store.
    values = [v.item() if getattr(v, "ndim", None) == 0 else v for v in values]
    for value in values:
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise ArgumentError(
                f"space[{name!r}] contains {value!r}; allowed are numbers, strings, True, False "
                "and None."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ArgumentError(f"space[{name!r}] contains {value}; numbers must be finite.")
        if isinstance(value, str):
            checked_params({name: value})
        if value in seen:
            raise ArgumentError(f"space[{name!r}] contains {value!r} twice.")
        seen.add(value)
    return [float(value) if isinstance(value, float) else value for value in values]  # NumPy's


def distributions(space: Space, *, grid: bool) -> dict[str, BaseDistribution]:
    """Return Optuna's distributions for a space.

    Args:
        space: The space.
        grid: Whether it is a grid's. Its numbers become a range, which Optuna lets grow later,
            unlike a list of choices.
    """
    return {name: _distribution(domain, grid) for name, domain in space.items()}


def _distribution(domain: Domain, grid: bool) -> BaseDistribution:
    if isinstance(domain, BaseDistribution):
        return domain
    numbers = [v for v in domain if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if grid and len(numbers) == len(domain):
        if all(isinstance(n, int) and abs(n) <= _LARGEST_INT for n in numbers):
            return IntDistribution(int(min(numbers)), int(max(numbers)))
        if all(isinstance(number, float) for number in numbers):
            return FloatDistribution(float(min(numbers)), float(max(numbers)))
    return CategoricalDistribution(domain)


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether `value` lies in a distribution."""
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (ValueError, TypeError):
        return False


def grid(spaces: Sequence[Space]) -> list[Point]:
    """Return the points of a grid, each once: those of the first space, then later additions.

    Within a space the order is that of `RunBuilder.get_runs`: the first name varies slowest.

    Raises:
        ArgumentError: The grid is too large, or a domain has infinitely many values.
    """
    points: dict[tuple[Any, ...], Point] = {}
    for space in spaces:
        values = {name: _values(name, domain) for name, domain in space.items()}
        count = math.prod(map(len, values.values()))
        if count > LARGEST_GRID:
            raise ArgumentError(
                f"The grid has {count:,} points; at most {LARGEST_GRID:,} are allowed."
            )
        for combination in product(*values.values()):
            point = dict(zip(values, combination, strict=True))
            points.setdefault(identity(point), point)
    return list(points.values())


def identity(point: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a key that is equal for equal points of a grid, and tells 1 from True."""
    return tuple(sorted((k, isinstance(v, bool), repr(v)) for k, v in point.items()))


def _values(name: str, domain: Domain) -> list[Value]:
    if isinstance(domain, list):
        return domain
    step = getattr(domain, "step", None)
    if step is None or getattr(domain, "log", False):
        raise ArgumentError(
            f"space[{name!r}]={domain} is continuous; a grid needs a list or a step."
        )
    low, high, step = (Decimal(str(getattr(domain, each))) for each in ("low", "high", "step"))
    if (high - low) / step > LARGEST_GRID:
        raise ArgumentError(
            f"space[{name!r}]={domain} has too many values; a grid has at most {LARGEST_GRID:,} "
            "points."
        )
    kind = int if isinstance(domain, IntDistribution) else float
    return [kind(low + index * step) for index in range(int((high - low) / step) + 1)]


def to_json(space: Space) -> dict[str, Any]:
    """Return `space` as JSON, in order."""
    return {
        name: distribution_to_json(domain) if isinstance(domain, BaseDistribution) else domain
        for name, domain in space.items()
    }


def from_json(stored: Mapping[str, Any]) -> Space:
    """Invert `to_json`."""
    return {
        name: json_to_distribution(domain) if isinstance(domain, str) else list(domain)
        for name, domain in stored.items()
    }


def difference(stored: Space, given: Space, *, grid: bool) -> str | None:
    """Describe why a study with space `stored` cannot continue with `given`; None if it can.

    Args:
        stored: The latest space of the study.
        given: The space to continue with. A grid's may have more numbers.
        grid: Whether the study is a grid.
    """
    for name in stored:
        if name not in given:
            return f"{name!r} is missing"
    for name, domain in given.items():
        if name not in stored:
            return f"{name!r} is new"
        old = stored[name]
        same = json.dumps(to_json({name: old})) == json.dumps(to_json({name: domain}))
        if not same and not (grid and _is_extended(old, domain)):
            return f"{name!r} was {old} and is now {domain}"
    return None


def _is_extended(old: Domain, new: Domain) -> bool:
    """Whether two lists hold numbers of one kind, and the new one all of the old one's."""
    if not isinstance(old, list) or not isinstance(new, list):
        return False
    kinds = {type(_distribution(domain, grid=True)) for domain in (old, new)}
    is_numeric = len(kinds) == 1 and CategoricalDistribution not in kinds
    return is_numeric and all(value in new for value in old)
