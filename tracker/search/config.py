"""The settings of a study, checked when they are created."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tracker.errors import ArgumentError
from tracker.search.objects import PrunerLike, SamplerLike
from tracker.search.sampler import pruner, pruner_text, sampler, sampler_text
from tracker.search.space import Space, grid
from tracker.validation import MAX_RUN_NAME, checked_mapping, checked_name, checked_text

MODEL = "model"
"""The name of a trial's model that the study keeps or deletes."""
_ALIAS = re.compile(r"(?!(latest|v\d+)$)[\w\-]{1,255}", re.IGNORECASE)  # mlflow.utils.validation


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The settings of a study that are stored with it.

    Raises:
        ArgumentError: A setting is not allowed.
    """

    name: str
    """Its name in the storage, and of its run."""
    sampler: SamplerLike = "tpe"
    """One of `tracker.search.sampler.SAMPLERS`, a sampler of Optuna, or a function that returns one
    and may have a parameter `seed`."""
    pruner: PrunerLike = "none"
    """One of `tracker.search.sampler.PRUNERS`, a pruner of Optuna, or a function that returns
    one."""
    trials: int | None = None
    """The budget in trials; None for the whole of a grid."""
    directions: tuple[str, ...] = ("minimize",)
    """"minimize" or "maximize" for each objective."""
    metrics: tuple[str, ...] = ("objective",)
    """The name of each objective."""
    seed: int = 0
    """Determines, with a trial's slot, what is suggested and how it is trained."""
    retries: int = 0
    """How often a failed slot is tried again."""
    steps: int | None = None
    """The last step that an unpruned trial reports; None if unknown."""
    spaces: tuple[Space, ...] = ()
    """The declared space; for a grid that has grown, all its spaces in order."""
    experiment: str | None = None
    """The name of the MLflow experiment."""
    experiment_id: str | None = None
    """The id of the MLflow experiment, if no name is given."""
    tracking_uri: str | None = None
    """The MLflow store, without secrets."""
    storage: str = ""
    """The URL of the storage, without secrets."""
    models: str = "best"
    """Which trials keep their model: "best", "all" or "none"."""
    register: str | None = None
    """The name under which the best model is registered."""
    alias: str | None = None
    """The alias of that model."""
    replay: str | None = None
    """The command that trains trial {number} again, shown in the report."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings shared by all trials, as JSON; a resumed study must have the same."""

    def __post_init__(self) -> None:
        checked_text(self.name, "study", MAX_RUN_NAME)
        checked_mapping(self.fixed, "fixed")
        for name, least in {"trials": 1, "steps": 1, "retries": 0, "seed": 0}.items():
            value = getattr(self, name)
            optional = value is None and name in ("trials", "steps")
            is_int = isinstance(value, int) and not isinstance(value, bool)
            if not optional and not (is_int and value >= least):
                raise ArgumentError(
                    f"{name}={value!r} is not allowed; it must be at least {least}."
                )
        self._check_objectives()
        self._check_strategy()
        if self.models not in ("best", "all", "none"):
            raise ArgumentError(
                f"models={self.models!r} is not allowed; it must be best, all or none."
            )
        self._check_registration()
        if self.sampler == "grid":
            if not self.spaces or not self.spaces[-1]:
                raise ArgumentError("sampler='grid' needs a space: a list of values for each name.")
            grid(self.spaces)
        elif self.trials is None:
            text = sampler_text(self.sampler)
            raise ArgumentError(f"trials is required: sampler={text!r} has no natural end.")

    @property
    def is_multi_objective(self) -> bool:
        """Whether the study has several objectives."""
        return len(self.directions) > 1

    def _check_strategy(self) -> None:
        sampler(self.sampler, 0, 0, several=self.is_multi_objective)
        pruner(self.pruner, self.steps)
        if self.is_multi_objective and (text := pruner_text(self.pruner)) != "none":
            raise ArgumentError(f"pruner={text!r} supports one objective only; it must be none.")

    def _check_objectives(self) -> None:
        if not self.directions:
            raise ArgumentError("direction is empty; it must be minimize, maximize or a list.")
        for direction in self.directions:
            if direction not in ("minimize", "maximize"):
                raise ArgumentError(
                    f"direction={direction!r} is not allowed; it must be minimize or maximize."
                )
        for name in self.metrics:
            checked_name(name, "objective")
        metrics, directions = list(self.metrics), list(self.directions)
        if len(metrics) != len(directions):
            raise ArgumentError(
                f"metric={metrics} must have one name for each of direction={directions}."
            )
        if len(set(metrics)) < len(metrics):
            raise ArgumentError(f"metric={metrics} contains a name twice.")

    def _check_registration(self) -> None:
        if self.register is None:
            if self.alias is not None:
                raise ArgumentError(f"alias={self.alias!r} needs register=NAME.")
            return
        checked_text(self.register, "register", MAX_RUN_NAME)
        if not self.register.strip() or set("/:'") & set(self.register):
            raise ArgumentError(
                f"register={self.register!r} is not allowed; it must be a name without / : and '."
            )
        if self.models == "none" or self.is_multi_objective:
            why = "models='none' keeps none"
            if self.is_multi_objective:
                why = "with several objectives there is none"
            raise ArgumentError(f"register={self.register!r} needs one best model; {why}.")
        if self.alias is not None and not _ALIAS.fullmatch(self.alias):
            raise ArgumentError(
                f"alias={self.alias!r} is not allowed; it must consist of letters, digits, _ and "
                "-, and be neither 'latest' nor a version such as v1."
            )
