"""RunBuilder: the runs of a grid, and what a run's hyperparameters are."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

from tracker.errors import ArgumentError

_LONGEST_NAME = 80  # of a run whose name is made of its hyperparameters


class RunBuilder:
    """Makes the runs of a grid."""

    @staticmethod
    def get_runs(params: Mapping[str, Iterable[Any]]) -> list[Any]:
        """Every combination of the values in `params`, as `Run` named tuples, first name slowest.

        Raises ArgumentError for a name that cannot be a field of one, or a value that is no list.
        """
        for name, several in params.items():
            if isinstance(several, str) or not isinstance(several, Iterable):
                raise ArgumentError(f"params[{name!r}]={several!r} must be a list of values.")
        values = {name: list(several) for name, several in params.items()}
        try:
            kind: Any = namedtuple("Run", values)  # type: ignore[misc]
        except ValueError as error:
            raise ArgumentError(
                f"params has a name that is not allowed ({error}); allowed are Python names "
                "that do not begin with an underscore."
            ) from error
        return [kind(*combination) for combination in product(*values.values())]


def hyperparameters(run: Any) -> dict[str, Any]:
    """The hyperparameters in `run`, a named tuple or a mapping; ArgumentError for anything else."""
    if isinstance(run, Mapping):
        return dict(run)
    if hasattr(run, "_asdict"):
        return dict(run._asdict())
    raise ArgumentError(
        f"run={run!r} has no hyperparameters; allowed are a named tuple of RunBuilder.get_runs() "
        "and a mapping."
    )


def run_name(params: Mapping[str, Any]) -> str | None:
    """The hyperparameters, where they make a readable name; else MLflow finds one."""
    name = " ".join(f"{key}={value}" for key, value in params.items())
    return name if 0 < len(name) <= _LONGEST_NAME else None
