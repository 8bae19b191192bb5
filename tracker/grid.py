"""The runs of a grid of hyperparameters."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

from tracker.errors import ArgumentError
from tracker.validation import checked_mapping

_MAX_NAME = 80  # characters of a run name that is made of hyperparameters


class RunBuilder:
    """Builds the runs of a grid."""

    @staticmethod
    def get_runs(params: Mapping[str, Iterable[Any]]) -> list[Any]:
        """Return every combination of the values in `params` as a named tuple `Run`.

        Args:
            params: A list of values for each hyperparameter; the first one varies slowest.

        Raises:
            ArgumentError: `params` is not a mapping, a name is not a Python name, or a value is
                not a list.
        """
        for name, values in checked_mapping(params, "params").items():
            if isinstance(values, str) or not isinstance(values, Iterable):
                raise ArgumentError(f"params[{name!r}]={values!r} must be a list of values.")
        grid = {name: list(values) for name, values in params.items()}
        try:
            run_type: Any = namedtuple("Run", grid)  # type: ignore[misc]
        except ValueError as error:
            raise ArgumentError(
                f"params has a name that is not allowed ({error}); allowed are Python names "
                "without an underscore at the start."
            ) from error
        return [run_type(*combination) for combination in product(*grid.values())]


def run_name(params: Mapping[str, Any]) -> str | None:
    """Return the hyperparameters as a run name; None if that is empty or too long to read."""
    name = " ".join(f"{key}={value}" for key, value in params.items())
    return name if 0 < len(name) <= _MAX_NAME else None
