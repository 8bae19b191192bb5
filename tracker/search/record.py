"""What a study is: made once, stored with it, and compared when somebody goes on with it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import optuna
from optuna.study import StudyDirection

from tracker.errors import ArgumentError, StoreError
from tracker.redaction import public_uri
from tracker.search import sampler as samplers
from tracker.search.space import Space, difference, from_json, grid, to_json
from tracker.search.storage import Storage, quiet
from tracker.validation import checked_name

STUDY = "tracker:study"
_ALIAS = re.compile(r"(?!(latest|v\d+)$)[\w\-]{1,255}", re.IGNORECASE)  # mlflow.utils.validation


@dataclass(frozen=True, kw_only=True)
class Record:
    """A study of ours, as its storage has it."""

    name: str
    sampler: str
    pruner: str
    trials: int | None
    """The budget; None is a whole grid."""
    directions: tuple[str, ...]
    metrics: tuple[str, ...]
    """The names of the objectives."""
    seed: int
    retries: int
    steps: int | None
    """The last step that a trial reports which is not pruned; None where that is not known."""
    spaces: tuple[Space, ...] = ()
    """What is suggested to every trial; of a grid all that it was, in the order it grew."""
    key: str = ""
    """The key of the study's run."""
    experiment: str | None = None
    experiment_id: str | None = None
    tracking_uri: str | None = None
    """Where its runs go; without secrets."""
    storage: str = ""
    """Where it lies; without secrets."""
    models: str = "best"
    """Which trials' models are kept: best, all or none."""
    register: str | None = None
    """The name that the best model is registered under."""
    alias: str | None = None
    """The alias that the best model has there."""
    replay: str | None = None
    """The command that trains trial {number} again."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What all trials have in common, as JSON."""
    study_id: int = -1
    """The storage's number for it."""

    def __post_init__(self) -> None:
        """Raise ArgumentError for what cannot be."""
        if not self.name:
            raise ArgumentError("study='' is not allowed; it must be a name.")
        several = len(self.directions) > 1
        samplers.sampler(self.sampler, 0, 0, several=several)
        samplers.pruner(self.pruner, self.steps)
        if several and self.pruner != "none":
            raise ArgumentError(f"pruner={self.pruner!r} takes one objective; it must be none.")
        for name in ("trials", "steps"):
            if (value := getattr(self, name)) is not None and not _whole(value, 1):
                raise ArgumentError(f"{name}={value!r} is not allowed; it must be at least 1.")
        if not _whole(self.retries, 0):
            raise ArgumentError(f"retries={self.retries!r} is not allowed; it must be at least 0.")
        if not _whole(self.seed, 0):
            raise ArgumentError(f"seed={self.seed!r} is not allowed; it must be at least 0.")
        if len(self.metrics) != len(self.directions):
            raise ArgumentError(
                f"metric={list(self.metrics)} must name as many as direction="
                f"{list(self.directions)}."
            )
        if self.models not in ("best", "all", "none"):
            raise ArgumentError(
                f"models={self.models!r} is not allowed; it must be best, all or none."
            )
        for name in self.metrics:
            checked_name(name, "metric")
        if len(set(self.metrics)) < len(self.metrics):
            raise ArgumentError(f"metric={list(self.metrics)} has the same name twice.")
        self._check_registering(several)
        if self.sampler == "grid":
            if not self.spaces or not self.spaces[-1]:
                raise ArgumentError("sampler='grid' needs a space: a list of values for each name.")
            grid(self.spaces)
        elif self.trials is None:
            raise ArgumentError(f"trials is missing; sampler={self.sampler!r} never ends.")

    def _check_registering(self, several: bool) -> None:
        if self.register is None:
            if self.alias is not None:
                raise ArgumentError(f"alias={self.alias!r} needs the name to register under.")
            return
        if not self.register.strip() or set("/:'") & set(self.register):
            raise ArgumentError(
                f"register={self.register!r} is not allowed; it must be a name without / : and '."
            )
        if self.models == "none" or several:
            why = "there are several" if several else "models='none' keeps none"
            raise ArgumentError(f"register={self.register!r} needs one best model; {why}.")
        if self.alias is not None and not _ALIAS.fullmatch(self.alias):
            raise ArgumentError(
                f"alias={self.alias!r} is not allowed; it must be letters, digits, _ and -, and "
                "neither 'latest' nor a version such as v1."
            )

    def to_json(self) -> dict[str, Any]:
        """What is stored with the study."""
        stored = asdict(self) | {"spaces": [to_json(space) for space in self.spaces]}
        del stored["study_id"]
        return stored

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], study_id: int) -> Record:
        """What `to_json` was given."""
        return cls(
            **{
                **stored,
                "directions": tuple(stored["directions"]),
                "metrics": tuple(stored["metrics"]),
                "spaces": tuple(map(from_json, stored["spaces"])),
                "study_id": study_id,
            }
        )


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def load(storage: Storage, name: str) -> Record:
    """The study `name`; StoreError where there is none, or not one of ours."""
    try:
        study_id = storage.optuna.get_study_id_from_name(name)
    except KeyError:
        known = [study.study_name for study in storage.optuna.get_all_studies()]
        there = f"it has {', '.join(sorted(known))}" if known else "it has none"
        where = public_uri(storage.url)
        raise StoreError(f"study={name!r} is not in storage={where!r}; {there}.") from None
    stored = storage.optuna.get_study_user_attrs(study_id).get(STUDY)
    if stored is None:
        raise StoreError(
            f"study={name!r} was made by something else; go on under another name, with "
            "warm_start to use its trials."
        )
    return Record.from_json(stored, study_id)


def open_study(storage: Storage, given: Record, *, resume: bool) -> Record:
    """The study that `given` describes: a new one, or with `resume` the one that there is.

    Raises ArgumentError where it exists and `resume` is not set, or is another study; then nothing
    has changed.
    """
    with storage.translated(), storage.lock():
        try:
            study_id = storage.optuna.get_study_id_from_name(given.name)
        except KeyError:
            return _create(storage, given)
        stored = storage.optuna.get_study_user_attrs(study_id).get(STUDY)
        if stored is None and not storage.optuna.get_all_trials(study_id, deepcopy=False):
            return _describe(storage, given, study_id)  # who made it died before this
        if not resume:
            raise ArgumentError(
                f"study={given.name!r} exists in storage={public_uri(storage.url)!r}; go on with "
                "it with resume (--resume), or choose another name."
            )
        going_on = _merged(load(storage, given.name), given)
        storage.optuna.set_study_user_attr(study_id, STUDY, going_on.to_json())
        return going_on


def _create(storage: Storage, given: Record) -> Record:
    directions = [StudyDirection[direction.upper()] for direction in given.directions]
    with quiet():
        study_id = storage.optuna.create_new_study(directions, given.name)
    return _describe(storage, given, study_id)


def _describe(storage: Storage, given: Record, study_id: int) -> Record:
    made = replace(given, key=uuid.uuid4().hex, study_id=study_id)
    with quiet():
        optuna.Study(given.name, storage.optuna).set_metric_names(list(given.metrics))
    storage.optuna.set_study_user_attr(study_id, STUDY, made.to_json())
    return made


def _merged(stored: Record, given: Record) -> Record:
    for name in ("sampler", "pruner", "directions", "metrics", "seed", "steps"):
        had, now = getattr(stored, name), getattr(given, name)
        if had != now:
            raise ArgumentError(
                f"study={given.name!r} has {name}={_plain(had)}, not {_plain(now)}; it goes on as "
                "it was, or under another name."
            )
    for name in stored.fixed.keys() | given.fixed.keys():
        had, now = (
            repr(each.fixed[name]) if name in each.fixed else "(not given)"
            for each in (stored, given)
        )
        if had != now:
            raise ArgumentError(
                f"study={given.name!r} has {name}={had}, not {now}; it goes on as it was, or under "
                "another name."
            )
    if stored.tracking_uri == given.tracking_uri:
        had, now = [(each.experiment, each.experiment_id) for each in (stored, given)]
        if had != now:
            raise ArgumentError(
                f"study={given.name!r} is in experiment={had[0] or had[1]!r}, not "
                f"{now[0] or now[1]!r}; it goes on there, or under another name."
            )
    if bool(stored.spaces) != bool(given.spaces):
        raise ArgumentError(
            f"study={given.name!r} has {'a' if stored.spaces else 'no'} declared space; it goes on "
            "as it was, or under another name."
        )
    spaces = stored.spaces
    if spaces:
        is_grid = given.sampler == "grid"
        if (how := difference(spaces[-1], given.spaces[-1], grid=is_grid)) is not None:
            raise ArgumentError(f"study={given.name!r} has another space: {how}.")
        if to_json(spaces[-1]) != to_json(given.spaces[-1]):
            spaces = (*spaces, given.spaces[-1])
    return replace(
        stored,
        spaces=spaces,
        trials=given.trials,
        retries=given.retries,
        experiment=given.experiment,
        experiment_id=given.experiment_id,
        tracking_uri=given.tracking_uri,
        storage=given.storage,
        models=given.models,
        register=given.register,
        alias=given.alias,
        replay=given.replay,
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else repr(value)
