"""Trials prepared for Optuna's charts: text escaped and capped, each parameter on one scale."""

from __future__ import annotations

import html
from collections.abc import Container, Iterable, Sequence
from datetime import datetime
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tracker.search.plan import times
from tracker.texts import visible

T = TypeVar("T")

_HUGE = 1e150
"""Larger numbers overflow in the charts' arithmetic."""
_LABEL = 30
_ATTRS = 8


class Selection(optuna.Study):
    """A study of the given trials, read-only; an in-memory storage would renumber them."""

    def __init__(
        self, trials: list[FrozenTrial], directions: list[StudyDirection], names: list[str]
    ) -> None:
        self._trials = trials
        self._directions = directions
        self._names = names

    @property
    def directions(self) -> list[StudyDirection]:  # noqa: D102
        return self._directions

    @property
    def metric_names(self) -> list[str]:  # noqa: D102
        return self._names

    def get_trials(  # noqa: D102
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return [trial for trial in self._trials if states is None or trial.state in states]

    def of(self, trials: list[FrozenTrial]) -> Selection:
        """Return the same study with other trials."""
        return Selection(trials, self._directions, self._names)


def prepared(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return copies that all of Optuna's charts accept, without the tracker's own attributes."""
    seen: dict[str, list[tuple[BaseDistribution, Any]]] = {}
    for trial in trials:
        for name, distribution in trial.distributions.items():
            seen.setdefault(name, []).append((distribution, trial.params[name]))
    names = dict(zip(seen, labels(list(seen)), strict=True))
    categories = {name: _categories(pairs) for name, pairs in seen.items()}
    choices = {
        name: CategoricalDistribution(list(dict.fromkeys(known.values())))
        for name, known in categories.items()
        if known is not None
    }
    copies = []
    for trial in trials:
        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}
        for name, distribution in trial.distributions.items():
            known, value = categories[name], trial.params[name]
            bounds = [getattr(distribution, end, 0.0) for end in ("low", "high")]
            if not all(map(is_finite, bounds)):
                continue  # an axis cannot hold it
            params[names[name]] = value if known is None else known[repr(value)]
            distributions[names[name]] = choices.get(name, distribution)
        attrs = [item for item in trial.user_attrs.items() if not item[0].startswith("tracker:")]
        shown = {label(name): label(str(value), 2 * _LABEL) for name, value in attrs[:_ATTRS]}
        copies.append(
            changed(
                trial,
                params=params,
                distributions=distributions,
                user_attrs=shown,
                **_local_times(trial),
            )
        )
    return copies


def _local_times(trial: FrozenTrial) -> dict[str, datetime | None]:
    """Return a trial's times as this machine's local ones, as Optuna expects them."""
    begin, end = (datetime.fromtimestamp(at / 1000) for at in times(trial))
    return {
        "datetime_start": begin if trial.datetime_start else None,
        "datetime_complete": end if trial.datetime_complete else None,
    }


def _categories(pairs: Sequence[tuple[BaseDistribution, Any]]) -> dict[str, Any] | None:
    """Map the `repr` of each value to its category; None for numbers on one scale."""
    scales = {(type(each), getattr(each, "log", False)) for each, _ in pairs}
    if len(scales) == 1 and not isinstance(pairs[0][0], CategoricalDistribution):
        return None
    values: dict[str, Any] = {}
    for distribution, value in pairs:
        for each in (*getattr(distribution, "choices", ()), value):
            values.setdefault(repr(each), each)
    kinds = {type(value) for value in values.values()}
    if kinds == {bool} or (kinds <= {int, float} and all(map(is_finite, values.values()))):
        return values
    return dict(zip(values, labels([str(value) for value in values.values()]), strict=True))


def changed(trial: FrozenTrial, **fields: Any) -> FrozenTrial:
    """Return a copy of a trial with some fields changed."""
    names = "number state values datetime_start datetime_complete params distributions user_attrs"
    for name in (*names.split(), "system_attrs", "intermediate_values"):
        fields.setdefault(name, getattr(trial, name))
    return FrozenTrial(**fields, value=None, trial_id=trial.number)


def varied(trials: Iterable[FrozenTrial]) -> list[str]:
    """Return the parameters with more than one value, sorted by name."""
    values: dict[str, set[str]] = {}
    for trial in trials:
        for name, value in trial.params.items():
            values.setdefault(name, set()).add(repr(value))
    return sorted(name for name, different in values.items() if len(different) > 1)


def label(text: str, most: int = _LABEL) -> str:
    """Return `text` for a chart, short and escaped: plotly renders HTML."""
    return escaped(text if len(text) <= most else f"{text[: most - 1]}…", quote=False)


def escaped(text: str, *, quote: bool = True) -> str:
    """Return `text` as HTML, with its invisible characters written out."""
    return html.escape(visible(text), quote=quote)


def labels(texts: Sequence[str], most: int = _LABEL) -> list[str]:
    """Return a label for each text, no two the same."""
    unique: dict[str, None] = {}
    for text in texts:
        short = name = label(text, most)
        count = 1
        while name in unique:
            count += 1
            name = f"{short} ({count})"
        unique[name] = None
    return list(unique)


def evenly(items: Sequence[T], most: int) -> list[T]:
    """Return at most `most` items, evenly spread, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def is_finite(value: float) -> bool:
    """Whether a chart can draw a number."""
    return abs(value) <= _HUGE  # False for NaN
