"""Messages between a search and its trials, in one process or over a pipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, cast

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.trial import FrozenTrial

from tracker.errors import TrackerError
from tracker.search.plan import Why
from tracker.statuses import Status


class TrialLostError(TrackerError):
    """The trial was abandoned while it ran: its process or its search was silent for too long."""


@dataclass(frozen=True)
class Task:
    """A trial to run."""

    number: int
    """Optuna's number of the trial."""
    slot: int
    """Its place in the study, from which its seeds follow."""
    seed: int
    """The seed of its training."""
    key: str
    """The key of its run."""
    params: Mapping[str, Any]
    """The values suggested so far: all of the declared space."""
    reported: Mapping[int, float] = field(default_factory=dict)
    """What earlier attempts at the slot reported, by step."""
    user_attrs: Mapping[str, Any] = field(default_factory=dict)
    """The user attributes that it was enqueued with."""
    system_attrs: Mapping[str, Any] = field(default_factory=dict)
    """Optuna's own attributes, as they were at its start."""
    started: datetime | None = None
    """When it started, as Optuna stores it: local time."""


@dataclass(frozen=True)
class Ended:
    """The end of a trial: its state, its values and the reason."""

    state: Literal["COMPLETE", "PRUNED", "FAIL"]
    values: Sequence[float] | None = None
    why: Why | None = None
    """Why it failed."""
    status: Status = "FINISHED"
    """The status of its run."""
    reason: str | None = None
    """The reason in words, unless it is complete."""

    @classmethod
    def failed(cls, why: Why, reason: str | None) -> Ended:
        """Return the end of a trial that failed; an interruption makes its run KILLED."""
        return cls("FAIL", None, why, "KILLED" if why == "interrupted" else "FAILED", reason)


@dataclass(frozen=True)
class Verdict:
    """The study's answer to the end of a trial."""

    accepted: bool
    """Whether its end was stored; False if it had been abandoned."""
    retry: bool = False
    """Whether its slot will be tried again."""


class Channel(ABC):
    """A running trial's connection to its search; each method sends one request.

    `Search` has methods of the same names; `number` is the trial's. All raise TrialLostError if the
    trial was abandoned in the meantime.
    """

    @abstractmethod
    def request(self, verb: str, *arguments: Any) -> Any:
        """Have the search call its method `verb`, and return the result."""

    def suggest(self, number: int, name: str, distribution: BaseDistribution) -> Any:
        """Return the value of a hyperparameter of trial `number`."""
        return self.request("suggest", number, name, distribution_to_json(distribution))

    def report(self, number: int, value: float, step: int) -> None:
        """Report an intermediate value."""
        self.request("report", number, value, step)

    def prune(self, number: int) -> str | None:
        """Return why the trial should be pruned; None if it should continue."""
        return cast("str | None", self.request("prune", number))

    def set_attr(self, number: int, name: str, value: Any) -> None:
        """Store a user attribute."""
        self.request("set_attr", number, name, value)

    def constrain(self, number: int, name: str, value: float) -> None:
        """Store a constraint; the trial is feasible if no constraint is above 0."""
        self.request("constrain", number, name, value)

    def trials(self, number: int) -> list[FrozenTrial]:
        """Return all trials of the study; they must not be changed."""
        return cast("list[FrozenTrial]", self.request("trials_for", number))

    def is_early(self, number: int) -> bool:
        """Return whether the trial is one of the first, of which none has ended well."""
        return bool(self.request("is_early", number))

    def stop(self, number: int) -> None:
        """Let the search start no more trials."""
        self.request("stop", number)

    def is_best(self, number: int, ended: Ended) -> bool:
        """Return whether a trial that ends like this is the best so far, or on a Pareto front."""
        return bool(self.request("is_best", number, ended))

    def finish(self, number: int, ended: Ended) -> Verdict:
        """Store how the trial ended."""
        return cast("Verdict", self.request("finish", number, ended))
