"""Suggestions follow from the study's seed and the trial's slot, not from who asks and when."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any

import optuna
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import create_trial

from tracker.errors import ArgumentError
from tracker.search.sampler import (
    PRUNERS,
    SAMPLERS,
    pruner,
    sampler,
    suggestion_seed,
    training_seed,
    value_at,
)
from tracker.search.storage import Storage

patient = settings(deadline=None)
few = settings(deadline=None, max_examples=20)

INDEPENDENT = ["grid", "random", "qmc"]
LEARNING = ["tpe", "cmaes", "gp"]
SPACE: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-5, 1e-1, log=True),
    "momentum": FloatDistribution(0.0, 0.99),
    "layers": IntDistribution(1, 8),
    "width": IntDistribution(16, 512, log=True),
    "activation": CategoricalDistribution(("relu", "tanh", None)),
}
SEEDS = st.integers(0, 2**40)


def create_study(storage: BaseStorage) -> None:
    storage.create_new_study([StudyDirection.MINIMIZE], "study")


def run_trials(
    storage: BaseStorage, name: str, seed: int, slots: Iterable[int], space: Any = None
) -> dict[int, dict[str, Any]]:
    """Run a trial for each slot, in this order; return the params by slot."""
    params = {}
    for slot in slots:
        ours = optuna.Study("study", storage, sampler(name, seed, slot))
        trial = ours.ask(space or SPACE)
        params[slot] = trial.params
        ours.tell(trial, objective(trial.params))
    return params


def objective(params: dict[str, Any]) -> float:
    return sum(value for value in params.values() if isinstance(value, float))


def suggested(name: str, seed: int, slots: Iterable[int], space: Any = None) -> dict[int, Any]:
    """Run the trials in a new study."""
    storage = InMemoryStorage()
    create_study(storage)
    return run_trials(storage, name, seed, slots, space)


# -- seeds -----------------------------------------------------------------------------------------


@patient
@given(SEEDS, st.integers(0, 10**6))
def test_the_two_seeds_of_a_slot_are_stable(seed: int, slot: int) -> None:
    seeds = suggestion_seed(seed, slot), training_seed(seed, slot)
    assert seeds == (suggestion_seed(seed, slot), training_seed(seed, slot))
    assert all(0 <= each < 2**32 for each in seeds)
    assert seeds[0] != seeds[1]


def test_slots_and_studies_have_different_seeds() -> None:
    for seed_of in (suggestion_seed, training_seed):
        seeds = {seed_of(seed, slot) for seed in range(20) for slot in range(50)}
        assert len(seeds) == 1000


# -- samplers that do not learn --------------------------------------------------------------------


@pytest.mark.parametrize("name", INDEPENDENT)
@few
@given(seed=SEEDS, order=st.permutations(range(8)), single=st.integers(0, 7))
def test_values_of_a_slot_do_not_depend_on_the_order_of_trials(
    name: str, seed: int, order: list[int], single: int
) -> None:
    in_order = suggested(name, seed, range(8))
    assert suggested(name, seed, order) == in_order
    assert suggested(name, seed, [single]) == {single: in_order[single]}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_retried_slot_gets_the_same_values(name: str) -> None:
    storage = InMemoryStorage()
    create_study(storage)
    first = run_trials(storage, name, 1, [0, 1, 2])
    again = run_trials(storage, name, 1, [1])
    assert again[1] == first[1]


@pytest.mark.parametrize("name", INDEPENDENT)
def test_further_hyperparameters_do_not_change_the_first_ones(name: str) -> None:
    small = dict(list(SPACE.items())[:2])
    for slot, params in suggested(name, 3, range(4), small).items():
        assert params.items() <= suggested(name, 3, [slot])[slot].items()


@pytest.mark.parametrize("name", SAMPLERS)
def test_other_seeds_and_slots_give_other_values(name: str) -> None:
    space = {"x": FloatDistribution(0.0, 1.0)}
    seen = [suggested(name, seed, range(4), space) for seed in range(4)]
    values = {params["x"] for slots in seen for params in slots.values()}
    assert len(values) == 16


# -- samplers that learn ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNING)
def test_trials_are_the_same_with_and_without_interruption(name: str) -> None:
    """Each trial has a fresh sampler, as in another process."""
    count = 12 if name == "gp" else 20
    # CMA-ES does not sample choices.
    space = {key: each for key, each in SPACE.items() if key not in ("activation", "width")}
    runs = []
    for file, first in [("one", count), ("two", 5), ("three", count - 5)]:
        with opened(f"journal:///{file}") as storage:
            create_study(storage)
            begun = run_trials(storage, name, 7, range(first), space)
        with opened(f"journal:///{file}") as storage:
            runs.append(begun | run_trials(storage, name, 7, range(first, count), space))
    assert len(runs[0]) == count
    assert runs[0] == runs[1] == runs[2]


class opened:  # noqa: N801 - a context manager
    """Optuna's storage behind one of ours."""

    def __init__(self, url: str) -> None:
        self._storage = Storage(url)

    def __enter__(self) -> BaseStorage:
        return self._storage.optuna

    def __exit__(self, *error: object) -> None:
        self._storage.close()


# -- quasi-random ----------------------------------------------------------------------------------


@few
@given(
    seed=SEEDS,
    power=st.integers(0, 5),
    block=st.integers(0, 40),
    dimensions=st.integers(1, 6),
)
def test_each_of_n_equal_cells_holds_one_of_n_points(
    seed: int, power: int, block: int, dimensions: int
) -> None:
    """For powers of two, and for each later block of n points, as in any Sobol sequence."""
    count = 2**power
    space = {f"x{index}": FloatDistribution(0.0, 1.0) for index in range(dimensions)}
    points = suggested("qmc", seed, range(block * count, (block + 1) * count), space)
    for name in space:
        cells = Counter(int(point[name] * count) for point in points.values())
        assert cells == dict.fromkeys(range(count), 1)


@few
@given(seed=SEEDS)
def test_pairs_of_dimensions_are_filled_evenly(seed: int) -> None:
    """In the first two dimensions, each of 4 x 4 cells holds one of 16 points."""
    space = {"x": FloatDistribution(0.0, 1.0), "y": FloatDistribution(0.0, 1.0)}
    points = suggested("qmc", seed, range(16), space).values()
    assert len({(int(point["x"] * 4), int(point["y"] * 4)) for point in points}) == 16


@few
@given(seed=SEEDS, power=st.integers(0, 3), extra=st.integers(0, 2))
def test_every_choice_appears_equally_often(seed: int, power: int, extra: int) -> None:
    choices = [f"choice {index}" for index in range(2**power)]
    space = {
        "choice": CategoricalDistribution(choices),
        "whole": IntDistribution(1, 2**power),
        "stepped": FloatDistribution(0.0, 0.25 * (2**power - 1), step=0.25),
    }
    points = suggested("qmc", seed, range(2 ** (power + extra)), space)
    for name in space:
        counts = Counter(point[name] for point in points.values())
        assert list(counts.values()) == [2**extra] * 2**power


def test_more_hyperparameters_than_dimensions_are_rejected() -> None:
    space = {f"x{index}": FloatDistribution(0.0, 1.0) for index in range(64)}
    assert len(suggested("qmc", 0, [0], space)[0]) == 64
    with pytest.raises(
        ArgumentError, match=r"^sampler='qmc' supports at most 64 hyperparameters\.$"
    ):
        suggested("qmc", 0, [0], space | {"more": IntDistribution(1, 2)})


# -- values of a range -----------------------------------------------------------------------------

SHARES = st.floats(0.0, 1.0, exclude_max=True)
LAST = math.nextafter(1.0, 0.0)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = st.floats(min_value=1e-300, allow_infinity=False)


@st.composite
def stepped(draw: st.DrawFn) -> BaseDistribution:
    """A range with a step, of ints or of floats with up to two decimals."""
    low, step = draw(st.integers(-(10**6), 10**6)), draw(st.integers(1, 1000))
    count = draw(st.integers(0, 100))
    if draw(st.booleans()):
        return IntDistribution(low, low + count * step, step=step)
    exact_low, exact_step = Decimal(low) / 100, Decimal(step) / 100
    return FloatDistribution(
        float(exact_low), float(exact_low + count * exact_step), step=float(exact_step)
    )


def ranges() -> st.SearchStrategy[BaseDistribution]:
    """Any range."""

    def between(of: st.SearchStrategy[Any], kind: Any, log: bool) -> Any:
        return st.tuples(of, of).map(lambda ends: kind(min(ends), max(ends), log=log))

    return (
        between(FLOATS, FloatDistribution, False)
        | between(POSITIVE, FloatDistribution, True)
        | between(st.integers(-(2**40), 2**40), IntDistribution, False)
        | between(st.integers(1, 2**40), IntDistribution, True)
        | stepped()
    )


TENTHS = FloatDistribution(0.1, 0.3, step=0.1)  # 0.1 + 2 * 0.1 is above 0.3
WIDE = FloatDistribution(-1.5e308, 1.5e308)  # its width overflows


@patient
@example(TENTHS, LAST)
@example(WIDE, 0.5)
@given(ranges() | st.lists(st.text(), min_size=1, max_size=9).map(CategoricalDistribution), SHARES)
def test_a_value_lies_within_its_distribution(distribution: BaseDistribution, share: float) -> None:
    value = value_at(distribution, share)
    kinds = {IntDistribution: int, FloatDistribution: float, CategoricalDistribution: str}
    assert type(value) is kinds[type(distribution)]
    # Optuna rejects trials whose params are outside their distributions.
    create_trial(value=0.0, params={"x": value}, distributions={"x": distribution})


@patient
@example(TENTHS)
@example(WIDE)
@given(ranges())
def test_both_ends_of_a_range_are_reached(distribution: Any) -> None:
    first, last = value_at(distribution, 0.0), value_at(distribution, LAST)
    if isinstance(distribution, IntDistribution) or distribution.step is not None:
        assert (first, last) == (distribution.low, distribution.high)
    else:
        size = max(abs(distribution.low), abs(distribution.high))
        assert abs(first - distribution.low) <= 1e-9 * size
        assert abs(last - distribution.high) <= 1e-9 * size


@patient
@given(ranges(), SHARES, SHARES)
def test_values_increase_with_the_share(
    distribution: BaseDistribution, one: float, other: float
) -> None:
    smaller, larger = sorted((one, other))
    assert value_at(distribution, smaller) <= value_at(distribution, larger)


@patient
@given(st.integers(1, 40), st.integers(0, 9))
def test_values_are_evenly_spread(values: int, power: int) -> None:
    """Evenly spread shares hit each value about equally often."""
    shares = [(index + 0.5) / 2**power for index in range(2**power)]
    fair = 2**power / values
    for distribution in (
        IntDistribution(-3, values - 4),
        IntDistribution(10, 10 + 5 * (values - 1), step=5),
        FloatDistribution(0.5, 0.5 + 0.25 * (values - 1), step=0.25),
        CategoricalDistribution(range(values)),
    ):
        counts = Counter(value_at(distribution, share) for share in shares)
        assert all(abs(counts[value] - fair) <= 1 for value in counts)
        assert len(counts) == min(values, 2**power)


@pytest.mark.parametrize("whole", [False, True])
def test_octaves_of_a_logarithmic_range_are_equally_likely(whole: bool) -> None:
    high = 2**10
    known = IntDistribution(1, high, log=True) if whole else FloatDistribution(1, high, log=True)
    values = [value_at(known, (index + 0.5) / 10_000) for index in range(10_000)]
    octaves = Counter(int(math.log2(value)) for value in values if value < high)
    if not whole:
        assert all(abs(octaves[octave] - 1000) <= 1 for octave in range(10))
    assert all(octaves[octave] > 800 for octave in range(10))


# -- names -----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Turn warnings about experimental features and fallbacks into errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_are_created_by_name(name: str) -> None:
    assert isinstance(sampler(name, 0, 0), optuna.samplers.BaseSampler)


@pytest.mark.parametrize("name", ["", "TPE", "sobol"])
def test_an_unknown_sampler_is_rejected(name: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        sampler(name, 0, 0)
    assert str(caught.value) == (
        f"sampler={name!r} is unknown; allowed: grid, tpe, random, gp, cmaes, qmc."
    )


def test_cmaes_rejects_several_objectives() -> None:
    with pytest.raises(ArgumentError) as caught:
        sampler("cmaes", 0, 0, several=True)
    assert (
        str(caught.value)
        == "sampler='cmaes' supports one objective only; all other samplers support several."
    )


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"cmaes"}))
def test_other_samplers_support_several_objectives(name: str) -> None:
    ours = optuna.create_study(
        directions=["minimize", "maximize"], sampler=sampler(name, 0, 0, several=True)
    )
    trial = ours.ask({"x": FloatDistribution(0.0, 1.0)})
    ours.tell(trial, [1.0, 2.0])
    assert len(ours.best_trials) == 1


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("steps", [None, 10])
def test_pruners_are_created_by_name(name: str, steps: int | None) -> None:
    assert isinstance(pruner(name, steps), optuna.pruners.BasePruner)


def test_an_unknown_pruner_is_rejected() -> None:
    with pytest.raises(ArgumentError) as caught:
        pruner("asha", 10)
    assert str(caught.value) == "pruner='asha' is unknown; allowed: none, median, hyperband."
