"""The best trials of a study, and its tables."""

from __future__ import annotations

import itertools
import random

import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from tracker.search.best import best_trials, feasible


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


def beats(one: FrozenTrial, other: FrozenTrial, signs: tuple[int, ...]) -> bool:
    """Whether `one` is as good as `other` in each objective and better, or as good and earlier."""
    a, b = (
        [sign * value for sign, value in zip(signs, trial.values, strict=True)]
        for trial in (one, other)
    )
    as_good = all(x <= y for x, y in zip(a, b, strict=True))
    return as_good and (a != b or one.number < other.number)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_best_trials_are_the_feasible_ones_that_no_other_beats(count: int) -> None:
    draw = random.Random(count)
    values = [0.0, 1.0, 2.0, 3.0, float("inf"), float("-inf")]  # many are equal
    for signs in itertools.product((1, -1), repeat=count):
        trials = [
            complete(n, draw.choices(values, k=count), draw.choice([-1.0, 0.0, 1.0]))
            for n in range(30)
        ]
        draw.shuffle(trials)
        allowed = [trial for trial in trials if feasible(trial)]
        expected = sorted(
            one.number
            for one in allowed
            if not any(beats(other, one, signs) for other in allowed if other is not one)
        )
        directions = ["minimize" if sign > 0 else "maximize" for sign in signs]
        assert [trial.number for trial in best_trials(trials, directions)] == expected


def test_there_is_no_best_trial_if_no_feasible_one_is_complete() -> None:
    assert best_trials([], ["minimize"]) == []
    assert best_trials([complete(0, [1.0, 1.0], 2.0)], ["minimize", "maximize"]) == []


class Counted(FrozenTrial):
    """A trial that counts how often the values of any trial are read."""

    reads = 0

    @property
    def values(self) -> list[float] | None:
        Counted.reads += 1
        return super().values


@pytest.mark.parametrize("count", [1, 2])
def test_finding_the_best_trials_does_not_compare_each_with_all(count: int) -> None:
    """Trials that improve with each one, and a Pareto front of all trials."""
    trials = [complete(n, [-float(n), float(n)][:count]) for n in range(2_000)]
    for trial in trials:
        trial.__class__ = Counted
    Counted.reads = 0
    best = best_trials(trials, ["minimize"] * count)
    assert len(best) == (1 if count == 1 else 2_000)
    assert Counted.reads < 10 * len(trials)
