"""Search spaces: what is allowed, the points of a grid and how it grows, storage as JSON."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import create_trial

from tracker import RunBuilder
from tracker.errors import ArgumentError
from tracker.search.space import (
    LARGEST_GRID,
    Space,
    checked_space,
    difference,
    distributions,
    from_json,
    grid,
    identity,
    to_json,
)

patient = settings(deadline=None)

NAMES = ["lr", "width", "activation", "norm", "steps"]
VALUES = (
    st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.none()
)
LISTS = st.lists(VALUES, min_size=1, max_size=3, unique=True)
SPACES = st.dictionaries(st.sampled_from(NAMES), LISTS, min_size=1, max_size=4)


@st.composite
def stepped(draw: st.DrawFn) -> BaseDistribution:
    """A range with a step, of ints or of floats with up to two decimals."""
    low, step = draw(st.integers(-500, 500)), draw(st.integers(1, 50))
    count = draw(st.integers(0, 6))
    if draw(st.booleans()):
        return IntDistribution(low, low + count * step, step=step)
    exact_low, exact_step = Decimal(low) / 100, Decimal(step) / 100
    return FloatDistribution(
        float(exact_low), float(exact_low + count * exact_step), step=float(exact_step)
    )


def rejection(space: Any) -> str:
    """The message for a space that is not allowed."""
    with pytest.raises(ArgumentError) as caught:
        checked_space(space)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# -- what is rejected ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("domain", "allowed"),
    [
        ([], "at least one value"),
        (range(0), "at least one value"),
        ("adam", "a list of values or one of optuna.distributions"),
        (b"adam", "a list of values or one of optuna.distributions"),
        (0.1, "a list of values or one of optuna.distributions"),
        (None, "a list of values or one of optuna.distributions"),
        ({"a": 1}, "a list of values or one of optuna.distributions"),
        ({"adam"}, "a list of values or one of optuna.distributions"),  # a set has no order
        ([0.1, math.nan], "finite"),
        ([math.inf], "finite"),
        ([1, -math.inf], "finite"),
        ([[1], [2]], "numbers, strings, True, False and None"),
        ([{"a": 1}], "numbers, strings, True, False and None"),
        ([1j], "numbers, strings, True, False and None"),
        (CategoricalDistribution((0.1, math.nan)), "finite"),
        (FloatDistribution(0.0, math.inf), "finite"),
        (FloatDistribution(math.nan, 1.0), "finite"),
    ],
    ids=str,
)
def test_an_invalid_domain_is_rejected_by_name(domain: Any, allowed: str) -> None:
    message = rejection({"width": [16], "lr": domain})

    assert "space['lr']" in message
    assert allowed in message
    assert "width" not in message


@pytest.mark.parametrize("twice", [[1, 2, 1], [1, 1.0], [True, 1], [0.0, -0.0], ["a", "b", "a"]])
def test_a_value_is_rejected_the_second_time_and_1_equals_true(twice: list[Any]) -> None:
    assert rejection({"lr": twice}) == f"space['lr'] contains {twice[-1]!r} twice."
    assert "twice" in rejection({"lr": CategoricalDistribution(twice)})


@pytest.mark.parametrize("name", ["", 1, None, ("lr",)])
def test_a_name_must_be_a_string(name: Any) -> None:
    assert rejection({name: [1]}).startswith(
        f"space name {name!r} is not allowed; allowed are up to"
    )


# -- what is accepted ------------------------------------------------------------------------------


@patient
@given(SPACES)
def test_lists_are_not_changed(space: Space) -> None:
    assert repr(checked_space(space)) == repr(space)


def test_any_ordered_values_become_a_list() -> None:
    given_: dict[str, Any] = {
        "a": (1, 2),
        "b": range(3),
        "c": (width for width in (16, 32)),
        "d": CategoricalDistribution(("relu", None)),
    }
    assert checked_space(given_) == {
        "a": [1, 2],
        "b": [0, 1, 2],
        "c": [16, 32],
        "d": ["relu", None],
    }


def test_ranges_stay_ranges() -> None:
    space = {"lr": FloatDistribution(1e-5, 1e-1, log=True), "layers": IntDistribution(1, 3)}
    assert checked_space(space) == space


def test_numpy_numbers_become_python_numbers() -> None:
    """Their `repr` differs, so a grid would not recognise its own points."""
    space = checked_space({"lr": np.linspace(0.1, 0.3, 3)})

    assert [type(value) for value in space["lr"]] == [float] * 3  # type: ignore[union-attr]
    again = from_json(json.loads(json.dumps(to_json(space))))
    assert list(map(identity, grid([space]))) == list(map(identity, grid([again])))


# -- grids -----------------------------------------------------------------------------------------


@patient
@given(SPACES)
def test_a_grid_has_the_points_of_run_builder_in_the_same_order(space: Space) -> None:
    runs = [run._asdict() for run in RunBuilder.get_runs(space)]  # type: ignore[arg-type]
    assert repr(grid([checked_space(space)])) == repr(runs)


@patient
@given(SPACES)
def test_points_of_a_grid_are_distinct(space: Space) -> None:
    points = grid([space])
    assert len(set(map(identity, points))) == len(points) == math.prod(map(len, space.values()))


def test_the_identity_of_a_point_tells_1_from_true() -> None:
    assert len({identity({"a": value}) for value in (1, True, 1.0, "1", "True", None, "None")}) == 7


def test_the_identity_of_a_point_ignores_the_order_of_names() -> None:
    assert identity({"a": 1, "b": 2}) == identity({"b": 2, "a": 1})


@st.composite
def growing(draw: st.DrawFn) -> list[Space]:
    """Spaces of a growing grid: each adds numbers to the previous one."""
    full = draw(
        st.dictionaries(
            st.sampled_from(NAMES),
            st.lists(st.integers(-9, 9), min_size=1, max_size=4, unique=True)
            | st.lists(st.floats(-1, 1), min_size=1, max_size=4, unique=True),
            min_size=1,
            max_size=3,
        )
    )
    spaces: list[Space] = []
    least = dict.fromkeys(full, 1)
    for _ in range(draw(st.integers(1, 3))):
        least = {name: draw(st.integers(least[name], len(full[name]))) for name in full}
        spaces.append({name: list(full[name][: least[name]]) for name in full})
    return spaces


@patient
@given(growing(), st.randoms())
def test_a_growing_grid_keeps_its_points_and_appends_new_ones(
    spaces: list[Space], random: Any
) -> None:
    random.shuffle(next(iter(spaces[-1].values())))  # wherever new values are inserted
    for count in range(1, len(spaces)):
        before, after = grid(spaces[:count]), grid(spaces[: count + 1])
        assert after[: len(before)] == before
        assert difference(spaces[count - 1], spaces[count], grid=True) is None
    assert sorted(map(identity, grid(spaces))) == sorted(map(identity, grid(spaces[-1:])))


@pytest.mark.parametrize(
    ("domain", "values"),
    [
        (IntDistribution(1, 3), [1, 2, 3]),
        (IntDistribution(16, 64, step=16), [16, 32, 48, 64]),
        (IntDistribution(5, 5), [5]),
        (FloatDistribution(0.0, 1.0, step=0.25), [0.0, 0.25, 0.5, 0.75, 1.0]),
        (FloatDistribution(0.1, 0.3, step=0.1), [0.1, 0.2, 0.3]),
        (CategoricalDistribution(("a", "b")), ["a", "b"]),
    ],
    ids=str,
)
def test_a_grid_enumerates_a_range_with_a_step(domain: BaseDistribution, values: list[Any]) -> None:
    assert repr(grid([checked_space({"x": domain})])) == repr([{"x": value} for value in values])


@pytest.mark.parametrize(
    "domain",
    [
        FloatDistribution(0.0, 1.0),
        FloatDistribution(0.1, 1.0, log=True),
        IntDistribution(1, 64, log=True),
    ],
    ids=str,
)
def test_a_continuous_range_is_rejected_in_a_grid(domain: BaseDistribution) -> None:
    with pytest.raises(
        ArgumentError, match=r"^space\['lr'\]=.* is continuous; a grid needs a list or a step\.$"
    ):
        grid([{"width": [16], "lr": domain}])


def test_a_too_large_grid_is_rejected_before_it_is_computed() -> None:
    largest = {"a": IntDistribution(1, LARGEST_GRID)}
    assert len(grid([largest])) == LARGEST_GRID
    with pytest.raises(
        ArgumentError, match=r"^The grid has 1,000,000,000 points; at most 100,000 are allowed\.$"
    ):
        grid([dict.fromkeys("abc", IntDistribution(1, 1000))])


# -- Optuna's distributions ------------------------------------------------------------------------


@patient
@given(st.dictionaries(st.sampled_from(NAMES), LISTS | stepped(), min_size=1, max_size=3))
def test_distributions_of_a_grid_preserve_its_points(space: Space) -> None:
    known = distributions(space, grid=True)
    for point in grid([space]):
        # Optuna rejects trials whose params are outside their distributions.
        create_trial(value=0.0, params=point, distributions=known)
        stored = {name: known[name].to_internal_repr(value) for name, value in point.items()}
        again = {name: known[name].to_external_repr(value) for name, value in stored.items()}
        assert repr(again) == repr(point)


@pytest.mark.parametrize("values", [[2**53 + 1], [1, 10**30], [-(2**60) - 1, 0], [10**400]])
def test_integers_beyond_float_precision_are_preserved(values: list[int]) -> None:
    (known,) = distributions({"seed": list(values)}, grid=True).values()
    assert [known.to_external_repr(known.to_internal_repr(value)) for value in values] == values


@pytest.mark.parametrize(
    ("values", "in_a_grid"),
    [
        ([3, 1, 2], IntDistribution(1, 3)),
        ([0.1, 0.001], FloatDistribution(0.001, 0.1)),
        ([1, 0.5], CategoricalDistribution([1, 0.5])),
        ([True, False], CategoricalDistribution([True, False])),
        ([1, None], CategoricalDistribution([1, None])),
        (["a", "b"], CategoricalDistribution(["a", "b"])),
    ],
    ids=str,
)
def test_numbers_form_a_range_in_a_grid_and_choices_elsewhere(
    values: list[Any], in_a_grid: BaseDistribution
) -> None:
    assert distributions({"x": values}, grid=True) == {"x": in_a_grid}
    assert distributions({"x": values}, grid=False) == {"x": CategoricalDistribution(values)}


# -- as JSON ---------------------------------------------------------------------------------------


@patient
@given(st.dictionaries(st.sampled_from(NAMES), LISTS | stepped(), max_size=4))
def test_json_preserves_a_space(space: Space) -> None:
    again = from_json(json.loads(json.dumps(to_json(space))))
    assert repr(again) == repr(space)
    assert difference(space, again, grid=True) is None
    assert difference(space, again, grid=False) is None


def test_a_string_in_a_list_is_not_parsed_as_a_distribution() -> None:
    space: Space = {"code": ['{"name": "IntDistribution"}'], "lr": FloatDistribution(0.0, 1.0)}
    assert from_json(to_json(space)) == space


# -- how two spaces differ -------------------------------------------------------------------------

STORED: Space = {"lr": [0.1, 0.01], "layers": IntDistribution(1, 3), "norm": ["batch", None]}


@pytest.mark.parametrize("in_a_grid", [True, False])
@pytest.mark.parametrize(
    ("change", "how"),
    [
        ({"lr": None}, "'lr' is missing"),
        ({"width": [16]}, "'width' is new"),
        ({"lr": [0.1]}, "'lr' was [0.1, 0.01] and is now [0.1]"),
        ({"lr": [0.1, 0.02]}, "'lr' was [0.1, 0.01] and is now [0.1, 0.02]"),
        ({"lr": [0.1, 0.01, "auto"]}, "'lr' was [0.1, 0.01] and is now [0.1, 0.01, 'auto']"),
        ({"norm": ["batch", None, "layer"]}, "'norm' was ['batch', None] and is now ['batch', Non"),
        ({"layers": IntDistribution(1, 4)}, "'layers' was IntDistribution(high=3, log=False, low="),
        ({"layers": [1, 2, 3]}, "'layers' was IntDistribution(high=3, log=False, low=1, step=1) a"),
    ],
)
def test_a_difference_is_described(change: dict[str, Any], how: str, in_a_grid: bool) -> None:
    now = {name: domain for name, domain in {**STORED, **change}.items() if domain is not None}

    text = difference(STORED, checked_space(now), grid=in_a_grid)

    assert text is not None
    assert text.startswith(how)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([0.1, 0.01], [0.1, 0.01, 0.001]),
        ([0.1, 0.01], [1.0, 0.01, 0.1]),
        ([1, 2], [1, 2, 3]),
        ([1, 2], [2, 1]),
    ],
)
def test_only_a_grid_may_grow_by_numbers(old: list[Any], new: list[Any]) -> None:
    assert difference({"x": old}, {"x": new}, grid=True) is None
    assert difference({"x": old}, {"x": new}, grid=False) == f"'x' was {old} and is now {new}"


@pytest.mark.parametrize(
    ("old", "new"), [([1], [1.0]), ([0, 1], [False, True]), ([1, 2], [1.0, 2.0, 3.0])]
)
def test_a_grid_cannot_grow_by_numbers_of_another_type(old: list[Any], new: list[Any]) -> None:
    assert difference({"x": old}, {"x": new}, grid=True) == f"'x' was {old} and is now {new}"


def test_the_order_of_names_is_not_a_difference() -> None:
    assert difference(STORED, dict(reversed(STORED.items())), grid=True) is None


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (np.logspace(-3, -1, 3), [0.001, 0.01, 0.1]),
        (np.arange(1, 4), [1, 2, 3]),
        (np.linspace(0, 1, 3, dtype="float32"), [0.0, 0.5, 1.0]),
        (np.array([True, False]), [True, False]),
        (torch.tensor([1, 2]), [1, 2]),
        (np.array(["a", "b"]), ["a", "b"]),
    ],
    ids=["logspace", "arange", "float32", "bool", "tensor", "text"],
)
def test_arrays_are_lists_of_python_s_own_values(array: Any, wanted: list[Any]) -> None:
    (values,) = checked_space({"x": array}).values()
    assert values == pytest.approx(wanted) if isinstance(wanted[0], float) else values == wanted
    assert {type(value) for value in values} == {type(wanted[0])}
