"""A study's trials as any of Optuna's charts can take them: names, values, how many."""

from __future__ import annotations

import html
from collections.abc import Container, Iterable, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

_HUGE = 1e150
"""Numbers beyond it overflow in the charts' arithmetic, and are left out as infinite ones are."""
_ATTRS = 8  # in a trial's hover text


class Snapshot(optuna.Study):
    """Trials as optuna's functions read them from a study: a selection, read once.

    It has no storage: one in memory would number the trials anew, and log that it was made.
    """

    def __init__(
        self, trials: list[FrozenTrial], directions: list[StudyDirection], names: list[str]
    ) -> None:
        self._trials = trials
        self._directions = directions
        self.names = names

    @property
    def directions(self) -> list[StudyDirection]:  # noqa: D102
        return self._directions

    @property
    def metric_names(self) -> list[str] | None:  # noqa: D102
        return self.names

    def get_trials(  # noqa: D102
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return [trial for trial in self._trials if states is None or trial.state in states]

    def of(self, trials: list[FrozenTrial]) -> Snapshot:
        """The same study with other trials."""
        return Snapshot(trials, self._directions, self.names)


def drawable(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials with names and values that any chart can take, and none of the internal ones.

    Plotly reads text as HTML: what is not ours is escaped.
    """
    seen: dict[str, list[tuple[BaseDistribution, Any]]] = {}
    for trial in trials:
        for name, distribution in trial.distributions.items():
            seen.setdefault(name, []).append((distribution, trial.params[name]))
    labels = dict(zip(seen, as_labels(list(seen), 30), strict=True))
    # Of params that cannot be drawn there is no entry; of numbers it is None.
    texts = {name: _texts(pairs) for name, pairs in seen.items() if _has_scale(pairs)}
    choices = {
        name: CategoricalDistribution(list(dict.fromkeys(known.values())))
        for name, known in texts.items()
        if known is not None
    }
    drawable = []
    for trial in trials:
        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}
        for name, value in trial.params.items():
            if name not in texts:
                continue
            known = texts[name]
            params[labels[name]] = value if known is None else known[repr(value)]
            distributions[labels[name]] = choices.get(name, trial.distributions[name])
        drawable.append(
            copied(
                trial,
                params=params,
                distributions=distributions,
                user_attrs={
                    as_label(key, 30): as_label(str(trial.user_attrs[key]), 60)
                    for key in [key for key in trial.user_attrs if not key.startswith("tracker:")][
                        :_ATTRS
                    ]
                },
            )
        )
    return drawable


def _has_scale(pairs: Iterable[tuple[BaseDistribution, Any]]) -> bool:
    return all(
        isinstance(distribution, CategoricalDistribution)
        or (
            isinstance(distribution, FloatDistribution | IntDistribution)
            and is_finite(distribution.low)
            and is_finite(distribution.high)
        )
        for distribution, _ in pairs
    )


def _texts(pairs: Sequence[tuple[BaseDistribution, Any]]) -> dict[str, Any] | None:
    """What stands for each value, by its repr, on an axis of categories; None on one of numbers."""
    kinds = {(type(each), getattr(each, "log", False)) for each, _ in pairs}
    if len(kinds) == 1 and not isinstance(pairs[0][0], CategoricalDistribution):
        return None
    values = {repr(value): value for _, value in pairs}
    for distribution, _ in pairs:
        if isinstance(distribution, CategoricalDistribution):
            values = {repr(choice): choice for choice in distribution.choices} | values
    kinds_of_value = {type(value) for value in values.values()}
    if kinds_of_value == {bool} or (
        kinds_of_value <= {int, float} and all(map(is_finite, values.values()))
    ):
        return values
    texts = as_labels([str(value) for value in values.values()], 30)
    return dict(zip(values, texts, strict=True))


def copied(trial: FrozenTrial, **changes: Any) -> FrozenTrial:
    """A trial with other fields."""
    fields: dict[str, Any] = {
        "number": trial.number,
        "state": trial.state,
        "values": trial.values,
        "datetime_start": trial.datetime_start,
        "datetime_complete": trial.datetime_complete,
        "params": trial.params,
        "distributions": trial.distributions,
        "user_attrs": trial.user_attrs,
        "system_attrs": trial.system_attrs,  # the constraints among them
        "intermediate_values": trial.intermediate_values,
    }
    return FrozenTrial(**{**fields, **changes}, value=None, trial_id=trial.number)


def varied_params(trials: Iterable[FrozenTrial]) -> list[str]:
    """The params that have more than one value, by name."""
    values: dict[str, set[Any]] = {}
    for trial in trials:
        for name, value in trial.params.items():
            values.setdefault(name, set()).add(value)
    return sorted(name for name, of_name in values.items() if len(of_name) > 1)


def as_label(text: str, most: int = 40) -> str:
    """Text as a chart takes it: short, and without HTML."""
    return html.escape(text if len(text) <= most else f"{text[: most - 1]}…", quote=False)


def as_labels(texts: Sequence[str], most: int) -> list[str]:
    """A label for each text, no two the same."""
    labels: list[str] = []
    for text in texts:
        label, count = as_label(text, most), 1
        while label in labels:
            count += 1
            label = f"{as_label(text, most)} ({count})"
        labels.append(label)
    return labels


def as_text(value: object) -> str:
    """A value as a reader takes it: six digits, 200 characters."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else f"{text[:199]}…"


def out_of(shown: Sequence[object], total: Sequence[object]) -> str:
    """How many are shown."""
    return f"{len(shown):,} of {len(total):,}"


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spread, the first and the last included."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def value_of(trial: FrozenTrial) -> float:
    """The value of a complete trial with one objective."""
    assert trial.value is not None
    return trial.value


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether a trial keeps all its constraints."""
    return all(value <= 0 for value in trial.constraints.values())


def is_finite(value: float) -> bool:
    """Whether a number can be drawn."""
    return abs(value) <= _HUGE  # and not NaN
