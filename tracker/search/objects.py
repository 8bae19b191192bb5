"""Optuna's samplers and pruners as settings: objects or factories, described and seeded by slot."""

from __future__ import annotations

import copy
import inspect
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler
from optuna.samplers._lazy_random_state import LazyRandomState

from tracker.errors import ArgumentError

SamplerLike = str | BaseSampler | Callable[..., BaseSampler]
PrunerLike = str | BasePruner | Callable[..., BasePruner]

_SHOWN = (bool, int, float, str, type(None))


def own_sampler(given: Any, seed: int) -> BaseSampler:
    """Return the sampler for one trial, with its random generators seeded.

    Optuna's classes keep what they learn in the storage, so each trial gets a copy. Other
    classes may learn from trial to trial: all trials share the object, as in Optuna.

    Args:
        given: An object or a factory, which is called with `seed=` if it has such a parameter.
        seed: The seed of the generators.

    Raises:
        ArgumentError: It is neither, or the factory returns something else.
    """
    sampler: BaseSampler = _own("sampler", given, BaseSampler, seed)
    for reseed in generators(sampler):
        reseed(seed)
    return sampler


def own_pruner(given: Any) -> BasePruner:
    """Return the pruner for one trial; see `own_sampler`."""
    pruner: BasePruner = _own("pruner", given, BasePruner, 0)
    return pruner


def _own(name: str, given: Any, kind: type, seed: int) -> Any:
    if isinstance(given, kind):
        return copy.deepcopy(given) if _is_optunas(given) else given
    if not callable(given):
        raise ArgumentError(
            f"{name}={given!r} is not allowed; it must be a name, one of optuna.{name}s or a "
            "function that returns one."
        )
    arguments = {"seed": seed} if takes_seed(given) else {}
    try:
        inspect.signature(given).bind(**arguments)
    except TypeError as error:
        raise ArgumentError(
            f"{name}={given!r} cannot be called: {error}; its only argument may be seed."
        ) from None
    made = given(**arguments)
    if not isinstance(made, kind):
        raise ArgumentError(f"{name}={given!r} returned {made!r}; it must be a {name}.")
    return made


def takes_seed(factory: Any) -> bool:
    """Whether a factory has a parameter `seed`."""
    return not isinstance(factory, (BaseSampler, BasePruner)) and (
        "seed" in inspect.signature(factory).parameters
    )


def generators(root: Any) -> Iterator[Callable[[int], Any]]:
    """Return a function that seeds it for each random generator of NumPy and Python in `root`."""
    seen: set[int] = set()
    pending = [root]
    while pending:
        each = pending.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, LazyRandomState):
            yield each.rng.seed
        elif isinstance(each, (np.random.RandomState, random.Random)):
            yield each.seed
        elif isinstance(each, np.random.Generator):
            yield partial(_seed_bits, each.bit_generator)
        elif each is root or isinstance(each, BaseSampler) or _is_optunas(each):
            pending += getattr(each, "__dict__", {}).values()


def _seed_bits(bits: Any, seed: int) -> None:
    bits.state = type(bits)(seed).state


def _is_optunas(value: Any) -> bool:
    return type(value).__module__.startswith("optuna.")


def describe(given: BaseSampler | BasePruner) -> str:
    """Return the class and the settings that differ from its defaults, but for the seed.

    Settings are found by the names of the constructor's parameters, as Optuna's classes keep them;
    only numbers, texts, and other samplers and pruners are shown.
    """
    if isinstance(given, NopPruner):
        return "none"
    parameters = inspect.signature(type(given)).parameters
    defaults = {name: repr(parameter.default) for name, parameter in parameters.items()}
    if _is_optunas(given):
        with warnings.catch_warnings(), suppress(TypeError, ValueError):  # of missing arguments
            warnings.simplefilter("ignore")
            defaults |= _settings(type(given)())
    settings = [f"{k}={v}" for k, v in _settings(given).items() if defaults.get(k) != v]
    return f"{type(given).__name__}({', '.join(settings)})"


def _settings(given: Any) -> dict[str, str]:
    attributes, shown = getattr(given, "__dict__", {}), {}
    for name, parameter in inspect.signature(type(given)).parameters.items():
        value = attributes.get(f"_{name}", attributes.get(name, parameter.default))
        if isinstance(value, (BaseSampler, BasePruner)):
            shown[name] = describe(value)
        elif isinstance(value, _SHOWN) and name != "seed":
            shown[name] = repr(value)
    return shown
