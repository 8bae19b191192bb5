"""Search spaces: what each hyperparameter may be, the points of a grid, and how two spaces differ.

    {"lr": [0.01, 0.001], "momentum": FloatDistribution(0.0, 0.9), "layers": IntDistribution(1, 3)}

A list names the values themselves, as `RunBuilder.get_runs` takes it; a range is one of Optuna's
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
from tracker.validation import checked_name

Value = None | bool | int | float | str
Domain = list[Value] | BaseDistribution
Space = dict[str, Domain]
Point = dict[str, Value]

LARGEST_GRID = 100_000
_LARGEST_WHOLE = 2**53  # up to which Optuna, which stores floats, keeps each int


def checked_space(given: Mapping[str, Any]) -> Space:
    """`given` as a space; ArgumentError, in one sentence, where a name or its values cannot be."""
    space: Space = {}
    for name, domain in given.items():
        checked_name(name, "space")
        if isinstance(domain, CategoricalDistribution):
            domain = list(domain.choices)
        if isinstance(domain, BaseDistribution):
            space[name] = _checked_range(name, domain)
        elif isinstance(domain, (str, bytes, Mapping, Set)) or not isinstance(domain, Iterable):
            raise ArgumentError(
                f"space[{name!r}]={domain!r} is not allowed; it must be a list of values or one of "
                "optuna.distributions."
            )
        else:
            space[name] = _checked_values(name, list(domain))
    return space


def _checked_range(name: str, domain: BaseDistribution) -> BaseDistribution:
    ends = getattr(domain, "low", 0), getattr(domain, "high", 0)
    if not all(map(math.isfinite, ends)):
        raise ArgumentError(f"space[{name!r}]={domain} must be finite.")
    return domain


def _checked_values(name: str, values: list[Any]) -> list[Value]:
    if not values:
        raise ArgumentError(f"space[{name!r}] is empty; it must have at least one value.")
    for value in values:
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise ArgumentError(
                f"space[{name!r}] has the value {value!r}; allowed are numbers, texts, True, False "
                "and None."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ArgumentError(f"space[{name!r}] has the value {value}; it must be finite.")
    seen: set[Value] = set()
    for value in values:
        if value in seen:
            raise ArgumentError(f"space[{name!r}] has the value {value!r} twice.")
        seen.add(value)
    return [float(value) if isinstance(value, float) else value for value in values]  # numpy's


def distributions(space: Space, *, grid: bool) -> dict[str, BaseDistribution]:
    """Optuna's distributions of `space`.

    The numbers of a `grid` are points on a range, so that points can be added to it later: Optuna
    lets a range grow, but not a list of choices.
    """
    return {name: _distribution(domain, grid) for name, domain in space.items()}


def _distribution(domain: Domain, grid: bool) -> BaseDistribution:
    if isinstance(domain, BaseDistribution):
        return domain
    numbers = [v for v in domain if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if grid and len(numbers) == len(domain):
        if all(isinstance(n, int) and abs(n) <= _LARGEST_WHOLE for n in numbers):
            return IntDistribution(int(min(numbers)), int(max(numbers)))
        if all(isinstance(number, float) for number in numbers):
            return FloatDistribution(float(min(numbers)), float(max(numbers)))
    return CategoricalDistribution(domain)


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a distribution has a value."""
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (ValueError, TypeError):
        return False


def grid(spaces: Sequence[Space]) -> list[Point]:
    """The points of a grid, each once: those of the first space, then what later ones add.

    Within a space they come as from `RunBuilder.get_runs`: the first name is the slowest.
    """
    points: list[Point] = []
    seen: set[tuple[Any, ...]] = set()
    for space in spaces:
        values = {name: _values(name, domain) for name, domain in space.items()}
        count = math.prod(map(len, values.values()))
        if count > LARGEST_GRID:
            raise ArgumentError(f"The grid has {count:,} points; allowed are {LARGEST_GRID:,}.")
        for combination in product(*values.values()):
            point = dict(zip(values, combination, strict=True))
            if (key := identity(point)) not in seen:
                seen.add(key)
                points.append(point)
    return points


def identity(point: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a point of a grid that one: its values by name, 1 and True being two."""
    return tuple(sorted((k, isinstance(v, bool), repr(v)) for k, v in point.items()))


def _values(name: str, domain: Domain) -> list[Value]:
    step = getattr(domain, "step", None)
    low, high = getattr(domain, "low", 0), getattr(domain, "high", 0)
    if step is not None and (high - low) / step > LARGEST_GRID:
        raise ArgumentError(
            f"space[{name!r}]={domain} has too many values; a grid has at most {LARGEST_GRID:,} "
            "points."
        )
    if isinstance(domain, IntDistribution) and not domain.log:
        return list(range(domain.low, domain.high + 1, domain.step))
    if isinstance(domain, FloatDistribution) and domain.step is not None:
        low, high, step = (Decimal(str(x)) for x in (domain.low, domain.high, domain.step))
        return [float(low + index * step) for index in range(int((high - low) / step) + 1)]
    if isinstance(domain, BaseDistribution):
        raise ArgumentError(
            f"space[{name!r}]={domain} has no end of values; a grid needs a list or a step."
        )
    return domain


def to_json(space: Space) -> dict[str, Any]:
    """`space` as JSON, in order."""
    return {
        name: distribution_to_json(domain) if isinstance(domain, BaseDistribution) else domain
        for name, domain in space.items()
    }


def from_json(stored: Mapping[str, Any]) -> Space:
    """What `to_json` was given."""
    return {
        name: json_to_distribution(domain) if isinstance(domain, str) else list(domain)
        for name, domain in stored.items()
    }


def difference(stored: Space, given: Space, *, grid: bool) -> str | None:
    """How `given` differs from the stored space of a study; None where it may go on with it.

    A grid may have got more numbers.
    """
    for name in stored:
        if name not in given:
            return f"{name!r} is missing"
    for name, domain in given.items():
        if name not in stored:
            return f"{name!r} is new"
        had = stored[name]
        if json.dumps(to_json({name: had})) == json.dumps(to_json({name: domain})):
            continue
        lists = not isinstance(had, BaseDistribution) and not isinstance(domain, BaseDistribution)
        if grid and lists and _grows(had, domain):
            continue
        return f"{name!r} was {had} and is now {domain}"
    return None


def _grows(had: Domain, domain: Domain) -> bool:
    assert isinstance(had, list)
    assert isinstance(domain, list)
    kinds = [type(_distribution(each, grid=True)) for each in (had, domain)]
    return kinds[0] is kinds[1] is not CategoricalDistribution and all(
        value in domain for value in had
    )
