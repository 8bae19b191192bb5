"""A study in its storage: created once, and merged with new settings when resumed."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import optuna
from optuna.study import StudyDirection

from tracker.errors import ArgumentError, StoreError
from tracker.redaction import public_uri
from tracker.search.config import StudyConfig
from tracker.search.sampler import pruner_text, sampler_text
from tracker.search.space import Space, difference, from_json, to_json
from tracker.search.storage import Storage, quiet

STUDY = "tracker:study"
"""The user attribute of Optuna's study that holds its settings as JSON."""


@dataclass(frozen=True, kw_only=True)
class StoredStudy(StudyConfig):
    """A stored study: its settings and what identifies it.

    Of a sampler and a pruner that are objects it has the class and the settings, as a text.
    """

    sampler: str = "tpe"
    pruner: str = "none"
    key: str = ""
    """Finds the study's run in MLflow."""
    study_id: int = -1
    """The id of the study in its storage."""

    def _check_strategy(self) -> None:
        """Leave the check to the search that needs them: they may be objects."""

    def to_json(self) -> dict[str, Any]:
        """Return what is stored with the study."""
        stored = asdict(self) | {"spaces": [to_json(space) for space in self.spaces]}
        del stored["study_id"]
        return stored

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], study_id: int) -> StoredStudy:
        """Invert `to_json`.

        Raises:
            StoreError: A newer version stored the study.
        """
        if unknown := sorted(stored.keys() - cls.__dataclass_fields__.keys()):
            raise StoreError(
                f"study={stored['name']!r} has settings of a newer version: {', '.join(unknown)}."
            )
        tuples = {name: tuple(stored[name]) for name in ("directions", "metrics")}
        spaces = tuple(map(from_json, stored["spaces"]))
        return cls(**{**stored, **tuples, "spaces": spaces, "study_id": study_id})


def load(storage: Storage, name: str) -> StoredStudy:
    """Load a study.

    Args:
        storage: Where it is stored.
        name: Its name.

    Raises:
        StoreError: It does not exist, or was not created by this library.
    """
    try:
        study_id = storage.optuna.get_study_id_from_name(name)
    except KeyError:
        names = sorted(study.study_name for study in storage.optuna.get_all_studies())
        content = ", ".join(names) or "no studies"
        raise StoreError(
            f"study={name!r} is not in storage={public_uri(storage.url)!r}, which has {content}."
        ) from None
    stored = storage.optuna.get_study_user_attrs(study_id).get(STUDY)
    if stored is None:
        raise StoreError(
            f"study={name!r} was created by another program; choose another name, and use its "
            "trials with warm_start_from_study."
        )
    return StoredStudy.from_json(stored, study_id)


def open_study(storage: Storage, config: StudyConfig, *, resume: bool) -> StoredStudy:
    """Create the study that `config` describes, or resume it.

    Args:
        storage: Where the study is, or will be.
        config: Its settings.
        resume: Whether an existing study may be continued.

    Raises:
        ArgumentError: It exists and `resume` is False, or its stored settings differ. Nothing has
            changed then.
        StoreError: Another process holds the storage's lock, or a newer version stored the study.
    """
    with storage.lock():
        try:
            study_id = storage.optuna.get_study_id_from_name(config.name)
        except KeyError:
            directions = [StudyDirection[direction.upper()] for direction in config.directions]
            with quiet():
                study_id = storage.optuna.create_new_study(directions, config.name)
        stored = storage.optuna.get_study_user_attrs(study_id).get(STUDY)
        # Without settings and trials, the study is new, or its creator died at this point.
        if stored is None and not storage.optuna.get_all_trials(study_id, deepcopy=False):
            _check_directions(config, storage.optuna.get_study_directions(study_id))
            with quiet():
                study = optuna.Study(config.name, storage.optuna)
                study.set_metric_names(list(config.metrics))
            record = StoredStudy(**_fields(config), key=uuid.uuid4().hex, study_id=study_id)
        elif resume:
            record = _merged(load(storage, config.name), config)
        else:
            raise ArgumentError(
                f"study={config.name!r} already exists in storage={public_uri(storage.url)!r}; "
                "continue it with resume=True (--resume), or choose another name."
            )
        storage.optuna.set_study_user_attr(study_id, STUDY, record.to_json())
        return record


def _check_directions(config: StudyConfig, directions: Sequence[StudyDirection]) -> None:
    """Raise ArgumentError if Optuna created an empty study with other directions."""
    stored = tuple(direction.name.lower() for direction in directions)
    if stored != config.directions:
        raise ArgumentError(
            f"study={config.name!r} has direction={list(stored)}, not {list(config.directions)}."
        )


def _fields(config: StudyConfig) -> dict[str, Any]:
    fields = {name: getattr(config, name) for name in StudyConfig.__dataclass_fields__}
    texts = {"sampler": sampler_text(config.sampler), "pruner": pruner_text(config.pruner)}
    return fields | texts


_MUST_MATCH = ("sampler", "pruner", "directions", "metrics", "seed", "steps")
_MUST_MATCH_IN_ONE_STORE = ("experiment", "experiment_id")
_HANDLED_BELOW = ("spaces", "fixed")
"""How `resume=True` treats a setting; each one that is not listed takes its new value."""
_ABSENT = "(not given)"


def _merged(stored: StoredStudy, given: StudyConfig) -> StoredStudy:
    is_same_store = stored.tracking_uri == given.tracking_uri
    names = (*_MUST_MATCH, *(_MUST_MATCH_IN_ONE_STORE if is_same_store else ()))
    new_values = _fields(given)
    settings = [(name, _shown(getattr(stored, name)), _shown(new_values[name])) for name in names]
    old, new = ({k: repr(v) for k, v in each.fixed.items()} for each in (stored, given))
    settings += [(k, old.get(k, _ABSENT), new.get(k, _ABSENT)) for k in sorted(old | new)]
    for name, before, now in settings:
        if before != now:
            raise ArgumentError(
                f"study={given.name!r} has {name}={before}, not {now}; resume it with the stored "
                "value, or choose another name."
            )
    updates = {k: v for k, v in new_values.items() if k not in (*_MUST_MATCH, *_HANDLED_BELOW)}
    return replace(stored, **updates, spaces=_merged_spaces(stored, given))


def _shown(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)


def _merged_spaces(stored: StoredStudy, given: StudyConfig) -> tuple[Space, ...]:
    if bool(stored.spaces) != bool(given.spaces):
        raise ArgumentError(
            f"study={given.name!r} has {'a' if stored.spaces else 'no'} declared space; resume it "
            "in the same way, or choose another name."
        )
    if not stored.spaces:
        return ()
    old, new = stored.spaces[-1], given.spaces[-1]
    if (how := difference(old, new, grid=given.sampler == "grid")) is not None:
        raise ArgumentError(f"study={given.name!r} has another space: {how}.")
    return stored.spaces if to_json(old) == to_json(new) else (*stored.spaces, new)
