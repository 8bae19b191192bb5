"""The best trials of a study, and that they are computed quickly."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from tracker.search.record import Record
from tracker.search.tables import best


def record(*directions: str) -> Record:
    names = tuple(f"metric{n}" for n in range(len(directions)))
    return Record(
        name="study",
        sampler="random",
        pruner="none",
        trials=10,
        directions=directions,
        metrics=names,
        seed=0,
        retries=0,
        steps=None,
    )


def complete(number: int, values: list[float], constraint: float = 0.0) -> FrozenTrial:
    trial = create_trial(
        state=TrialState.COMPLETE,
        params={"x": 0.5},
        distributions={"x": FloatDistribution(0, 1)},
        values=values,
        constraints={"size": constraint},
    )
    trial.number = number
    return trial


def beats(one: FrozenTrial, other: FrozenTrial, directions: Sequence[str]) -> bool:
    """Whether `one` is at least as good everywhere, and better somewhere or earlier."""
    signs = [-1 if direction == "maximize" else 1 for direction in directions]
    ours, theirs = ([v * s for v, s in zip(t.values, signs, strict=True)] for t in (one, other))
    no_worse = all(a <= b for a, b in zip(ours, theirs, strict=True))
    return no_worse and (ours != theirs or one.number < other.number)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_best_are_those_that_no_other_beats(count: int) -> None:
    draw = random.Random(count)
    for directions in itertools.product(("minimize", "maximize"), repeat=count):
        values = [0.0, 1.0, 2.0, 3.0, float("inf"), float("-inf")]  # many are equal
        trials = [
            complete(n, draw.choices(values, k=count), draw.choice([-1.0, 0.0, 1.0]))
            for n in range(30)
        ]
        draw.shuffle(trials)
        feasible = [t for t in trials if t.constraints["size"] <= 0.0]
        expected = sorted(
            t.number for t in feasible if not any(beats(o, t, directions) for o in feasible)
        )
        assert [t.number for t in best(record(*directions), trials)] == expected


def test_no_trial_is_the_best_where_none_is_complete() -> None:
    assert best(record("minimize"), []) == []
    assert best(record("minimize", "maximize"), [complete(0, [1.0, 1.0], 2.0)]) == []


class Counted(FrozenTrial):
    """A trial that counts how often its values are looked at, with those of all others."""

    looks = 0

    @property
    def values(self) -> list[float] | None:
        Counted.looks += 1
        return super().values


@pytest.mark.parametrize("count", [1, 2])
def test_the_best_of_many_are_found_without_comparing_each_with_all(count: int) -> None:
    """One that gets better with each trial, and a front that all are on."""
    trials = [complete(n, [-float(n), float(n)][:count]) for n in range(2_000)]
    for trial in trials:
        trial.__class__ = Counted
    Counted.looks = 0
    found = best(record(*["minimize"] * count), trials)
    assert len(found) == (1 if count == 1 else 2_000)
    assert Counted.looks < 10 * len(trials)
