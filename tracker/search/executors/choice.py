"""Which executor runs the trials of a study."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any

from tracker.errors import ArgumentError
from tracker.search.executors.base import Executor, TrialSpec
from tracker.search.executors.devices import place
from tracker.search.executors.inprocess import InProcessExecutor
from tracker.search.executors.processes import ProcessExecutor
from tracker.search.policy import Catch
from tracker.search.sending import pack


def choose_executor(
    objective: Any, catch: Catch, *, workers: int, devices: Any, gpus_per_trial: Any
) -> Callable[[TrialSpec], Executor]:
    """Return what makes the executor: this process for one worker without its own GPUs.

    Args:
        objective: The objective.
        catch: The exceptions that only fail their trial.
        workers: How many trials run at a time.
        devices: The GPUs that they share; see `place`.
        gpus_per_trial: How many each gets, or which part of one.

    Raises:
        ArgumentError: An argument is not allowed.
    """
    if not isinstance(workers, Integral) or workers < 1:
        raise ArgumentError(f"workers={workers!r} is not allowed; it must be at least 1.")
    places = place(workers, devices, gpus_per_trial)
    if places == [None]:
        return InProcessExecutor
    pack(objective, catch)  # or refuse it, before anything is created
    return partial(ProcessExecutor, places=places)
