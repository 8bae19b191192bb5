"""MLflow as the mirror of a study: writes what is missing there, and nothing else.

Optuna's storage is the truth. Trials' runs are made by who runs them; here is what a study as a
whole is, and what nobody lived to write.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from tracker.errors import RefusedError, StoreError
from tracker.redaction import public_uri
from tracker.search.leases import PREFIX, Leases, searches
from tracker.search.plan import ENDED, SLOT, SOURCE, Plan
from tracker.search.record import Record
from tracker.search.report.page import study_page
from tracker.search.session import budget
from tracker.search.space import grid, identity
from tracker.search.storage import Storage
from tracker.search.tables import INTERMEDIATE, best, objectives, rows, saved
from tracker.store.client import MlflowStore
from tracker.store.runs import PARENT, MirroredRun, StudyRuns
from tracker.views.files import csv_text, json_text

STATUSES = {
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "KILLED",
    TrialState.FAIL: "FAILED",
    TrialState.RUNNING: "RUNNING",
    TrialState.WAITING: "SCHEDULED",
}
"""What a trial's state is in MLflow; of one that FAILed its attribute may say KILLED."""

LATE_SECONDS = 30.0
"""For twice this time, the run of a trial that has ended may still be on its way."""

_DIGEST = "tracker.mirrored"
"""The tag that tells whether the tables are those of now, without reading them."""
_FILES = ("study.html", "trials.csv", "trials.json", "best.json")
_NAMED = 10
"""Trials of a Pareto front that the tags name; `best.json` has them all."""


class Mirror:
    """Keeps one study in one MLflow store as Optuna's storage has it."""

    def __init__(self, storage: Storage, record: Record, store: MlflowStore) -> None:
        self._storage = storage
        self._record = record
        self._runs = StudyRuns(store)
        self._leases = Leases(grace=math.inf)
        self.written = 0
        """How many things were missing, and were written."""
        self.problem: str | None = None
        """What `complete` could not write, though MLflow answers."""
        self._deleted: set[str] = set()
        self.run_id: str | None = None
        """The study's run."""

    def begin(
        self, environment: Mapping[str, str], adopt: str | None, started: int | None = None
    ) -> str:
        """See that the study's run is there and RUNNING; returns its id."""
        record = self._record
        tags = {
            **environment,
            "mlflow.runName": record.name,
            "tracker.study": record.name,
        }
        with self._alone():
            parent, made = self._runs.parent(
                record.key,
                experiment=record.experiment or "Default",
                experiment_id=record.experiment_id,
                tags=tags,
                start_time=started or _now(),
                adopt=adopt,
            )
        self.run_id = parent.run_id
        self.written += made
        if parent.status != "RUNNING":
            self._runs.set_status(parent.run_id, "RUNNING", None)
            self.written += 1
        self._log_params(parent)
        return parent.run_id

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other mirror makes a run meanwhile; else there would be two.

        A lock of its own: trials are taken under the storage's, and wait for no server.
        """
        with self._storage.lock("mirror") as held:
            if not held:
                raise StoreError("another process makes the runs of studies there, and is slow.")
            yield

    def _log_params(self, parent: MirroredRun) -> None:
        record = self._record
        params = {
            "study": record.name,
            "sampler": record.sampler,
            "pruner": record.pruner,
            "seed": record.seed,
            "direction": ",".join(record.directions),
            "metric": ",".join(record.metrics),
        }
        missing = {k: str(v) for k, v in params.items() if k not in parent.params}
        if missing:
            self._runs.log(parent.run_id, params=missing)
            self.written += len(missing)

    def refresh(self) -> None:
        """Bring the study's page up to date while it goes on, and its best; looks at no more."""
        parent = self._parent()
        trials = self._trials()
        if parent is None or not any(trial.state.is_finished() for trial in trials):
            return
        same = parent.tags.get(_DIGEST) == _digest(rows(self._record, trials))
        if same and parent.tags.get("best.run") != "":  # the run of the best is on its way
            return
        children = self._runs.children(self._record.key)
        self._delete_models(trials, children)
        self._log_study(parent, trials, children, there=_FILES)

    def complete(self, is_settled: Callable[[FrozenTrial], bool]) -> None:
        """Write all that is missing, of the trials that ended and of those that wait.

        Trials that another search runs are left to it. The run of a trial that has just ended may
        be on its way, unless `is_settled` says of it that it is not.
        """
        record = self._record
        self.problem, self.run_id = None, None  # it may have been deleted since
        trials, attrs = self._trials(), self._attrs()
        parent = self._parent()
        if parent is None:
            begun = [t.datetime_start for t in trials if t.datetime_start is not None]
            self.begin({}, None, _milliseconds(min(begun, default=None)))
            parent = self._parent()
            assert parent is not None
        self._log_params(parent)
        children = self._runs.children(record.key)
        alone = not any(self._leases.lives(search, attrs) for search in searches(attrs))
        for trial in trials:
            key = f"{record.key}-{trial.number}"
            if trial.state == TrialState.RUNNING:
                continue
            if trial.state == TrialState.WAITING and not alone:
                continue  # somebody is about to take it
            if key not in children and _is_recent(trial) and not is_settled(trial):
                continue  # on its way
            self._complete_trial(parent, trial, key, children)
        self._delete_models(trials, children)
        self._log_study(parent, trials, children, there=self._runs.artifacts(parent.run_id))
        self._settle(parent)
        self._register(trials, children)

    def _complete_trial(
        self,
        parent: MirroredRun,
        trial: FrozenTrial,
        key: str,
        children: dict[str, MirroredRun],
    ) -> None:
        tags, params, metrics = _wanted(self._record, trial)
        tags[PARENT] = parent.run_id
        if (child := children.get(key)) is None:
            name = f"trial={trial.number}"
            begin = _milliseconds(trial.datetime_start) or _now()
            with self._alone():
                child = self._runs.find(key)
                if child is None:
                    told = {**tags, "mlflow.runName": name}
                    child = self._runs.create(parent, key, told, begin)
                    self.written += 1
            children[key] = child
        new_tags = {k: v for k, v in tags.items() if child.tags.get(k) != v}
        reason = trial.user_attrs.get(ENDED, {}).get("reason")
        if trial.state == TrialState.FAIL and reason and "tracker.failure" not in child.tags:
            new_tags["tracker.failure"] = reason  # its process ended before it had a run
        if trial.state == TrialState.PRUNED and "tracker.pruned" not in child.tags:
            new_tags["tracker.pruned"] = _where_pruned(trial)
        new_params = {k: v for k, v in params.items() if k not in child.params}
        new_metrics = [point for point in metrics if point[0] not in child.metrics]
        if new_tags or new_params or new_metrics:
            self._runs.log(child.run_id, metrics=new_metrics, params=new_params, tags=new_tags)
            self.written += 1
        status = status_of(trial)
        if child.status != status and not _as_good(trial, child.status):
            end = _milliseconds(trial.datetime_complete) if trial.state.is_finished() else None
            self._runs.set_status(child.run_id, status, end)
            self.written += 1

    def _delete_models(
        self, trials: Sequence[FrozenTrial], children: Mapping[str, MirroredRun]
    ) -> None:
        """Delete the models that are not the best any more, of runs that are whole."""
        record = self._record
        good = {f"{record.key}-{trial.number}" for trial in best(record, trials)}
        if record.models != "best" or not any(children[k].models for k in good & children.keys()):
            return
        ended = {f"{record.key}-{t.number}" for t in trials if t.state.is_finished()}
        for key in (ended - good) & children.keys():  # a living trial may be the best by now
            child = children[key]
            models = [model for model in child.models if model not in self._deleted]
            if child.status == "RUNNING":
                continue  # its model may be on its way
            if models and not self._runs.is_registered(child.run_id):
                for model in models:
                    self.written += self._runs.delete_model(model)
                self._deleted.update(models)

    def _register(self, trials: Sequence[FrozenTrial], children: Mapping[str, MirroredRun]) -> None:
        """Register the model of the best; where MLflow refuses that, the rest is there."""
        record = self._record
        good = best(record, trials)
        if record.register is None or len(good) != 1:
            return
        child = children.get(f"{record.key}-{good[0].number}")
        if child is None or not child.models:
            return
        tags = {
            "tracker.study": record.name,
            "tracker.storage": record.storage or "",
            "optuna.trial": child.tags.get("optuna.trial", ""),
        }
        try:
            with self._alone():
                self.written += self._runs.register(
                    record.register, record.alias, child.models[-1], child.run_id, tags
                )
        except StoreError as error:
            self.problem = str(error)

    def _log_study(
        self,
        parent: MirroredRun,
        trials: Sequence[FrozenTrial],
        children: Mapping[str, MirroredRun],
        *,
        there: Sequence[str],
    ) -> None:
        """The tables, the page and the best; of the files those that are not `there`, or old."""
        record = self._record
        table = rows(record, trials)
        good = best(record, trials)
        runs = [children.get(f"{record.key}-{trial.number}") for trial in good[:_NAMED]]
        tags = {"tracker.study": record.name, _DIGEST: _digest(table), **_best_tags(good, runs)}
        facts: dict[str, str] = {}
        if (steps := saved(record, trials)) is not None:
            facts["Steps not trained"] = f"{steps[0]:,} of {steps[1]:,}"
            tags["tracker.saved"] = f"{steps[0]} of {steps[1]}"
        if good and record.replay is not None:
            number = str(good[0].number)
            tags["tracker.replay"] = record.replay.replace("{number}", number)
            facts[f"Train trial {number} again"] = f"$ {tags['tracker.replay']}"
        if parent.tags.get(_DIGEST) != tags[_DIGEST]:
            there = []
        texts: dict[str, Callable[[], str]] = {
            "study.html": lambda: study_page(
                optuna.Study(record.name, self._storage.optuna), facts
            ),
            "trials.csv": lambda: csv_text(table),
            "trials.json": lambda: json_text(table),
            "best.json": lambda: json_text(
                [{"trial": t.number, "values": t.values, "params": t.params} for t in good]
            ),
        }
        for name in [name for name in _FILES if name not in there]:
            try:
                self._runs.log_text(parent.run_id, texts[name](), name)
            except Exception as error:
                if isinstance(error, StoreError) and not isinstance(error, RefusedError):
                    raise  # MLflow does not answer
                self.problem = public_uri(f"{name} cannot be written: {error}")
                tags.pop(_DIGEST, None)  # it is tried again
                continue
            self.written += 1
        new = {name: value for name, value in tags.items() if parent.tags.get(name) != value}
        metrics = []
        if len(good) == 1 and ("best.trial" in new or "best_objective" not in parent.metrics):
            at = _milliseconds(good[0].datetime_complete) or _now()
            metrics = [("best_objective", good[0].values[0], good[0].number, at)]
        if new or metrics:
            self._runs.log(parent.run_id, metrics=metrics, tags=new)
            self.written += 1

    def _settle(self, parent: MirroredRun) -> None:
        """Give the study's run its status, by how things stand now: somebody may go on with it."""
        trials, attrs = self._trials(), self._attrs()
        if any(self._leases.lives(search, attrs) for search in searches(attrs)):
            return
        status, reason = status_of_study(self._record, trials, attrs)
        if parent.status != status:
            self._runs.set_status(parent.run_id, status, _now())
            self.written += 1
        had = parent.tags.get("tracker.failure")
        if (reason or "") != (had or ""):
            self._runs.log(parent.run_id, tags={"tracker.failure": reason or ""})
            self.written += 1

    def _parent(self) -> MirroredRun | None:
        if self.run_id is not None:
            return self._runs.run(self.run_id)
        found = self._runs.find(self._record.key)
        self.run_id = None if found is None else found.run_id
        return found

    def _trials(self) -> list[FrozenTrial]:
        return self._storage.optuna.get_all_trials(self._record.study_id, deepcopy=False)

    def _attrs(self) -> dict[str, Any]:
        return self._storage.optuna.get_study_user_attrs(self._record.study_id)


def _digest(table: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json_text(table).encode()).hexdigest()[:16]


def _best_tags(good: Sequence[FrozenTrial], runs: Sequence[MirroredRun | None]) -> dict[str, str]:
    """The tags of the best trial; of a Pareto front lists, with a place for each trial."""
    if not good:
        return {}
    shown = good[:_NAMED]
    more = f" and {len(good) - _NAMED} more" if len(good) > _NAMED else ""
    params = [trial.params for trial in shown]
    return {
        "best.trial": ", ".join(str(trial.number) for trial in shown) + more,
        "best.value": "; ".join(", ".join(f"{v:.6g}" for v in t.values) for t in shown),
        "best.params": json.dumps(params[0] if len(good) == 1 else params)[:5000],
        "best.run": ", ".join(run.run_id for run in runs if run) if all(runs) else "",
    }


def _where_pruned(trial: FrozenTrial) -> str:
    """What is known of it where the search's own words are not."""
    if (step := trial.last_step) is None:
        return "It was stopped before it reported."
    return f"It was stopped at step {step}, value {trial.intermediate_values[step]:g}."


def _wanted(
    record: Record, trial: FrozenTrial
) -> tuple[dict[str, str], dict[str, str], list[tuple[str, float, int, int]]]:
    """The tags, params and metrics that the run of an ended or waiting trial has."""
    ended = trial.user_attrs.get(ENDED, {})
    tags = {
        "tracker.study": record.name,
        "optuna.trial": str(trial.number),
        "optuna.state": trial.state.name,
    }
    if (slot := trial.user_attrs.get(SLOT)) is not None:
        tags["tracker.slot"] = str(slot)
    if (source := trial.user_attrs.get(SOURCE)) is not None:
        tags["tracker.source"] = source
    if trial.state == TrialState.FAIL and ended.get("why") in ("died", "lost", "given up"):
        tags["tracker.failure"] = ended["reason"]
    at = _milliseconds(trial.datetime_complete) or _now()
    metrics = [
        (INTERMEDIATE, value, step, at) for step, value in sorted(trial.intermediate_values.items())
    ]
    metrics += [(f"constraint.{name}", value, 0, at) for name, value in trial.constraints.items()]
    if trial.state == TrialState.COMPLETE:
        found = objectives(record.metrics, trial.values)
        metrics += [(name, value, 0, at) for name, value in found.items()]
    return tags, {name: str(value) for name, value in trial.params.items()}, metrics


def status_of(trial: FrozenTrial) -> str:
    """What the status of a trial's run must be."""
    if trial.state == TrialState.FAIL:
        return str(trial.user_attrs.get(ENDED, {}).get("status", "FAILED"))
    return STATUSES[trial.state]


def _as_good(trial: FrozenTrial, status: str) -> bool:
    """Whether a status that the run's own process gave it says as much, or more."""
    return trial.state == TrialState.FAIL and status == "KILLED"


def status_of_study(
    record: Record, trials: Sequence[FrozenTrial], attrs: Mapping[str, Any]
) -> tuple[str, str | None]:
    """The status of a study that nobody works on, and the reason unless it is FINISHED."""
    points = grid(record.spaces) if record.sampler == "grid" else None
    total = budget(record, points)
    slots = {identity(p): n for n, p in enumerate(points)} if points is not None else None
    plan = Plan(record.retries, slots)
    plan.observe(trials)
    if plan.finished(total) == total:
        return "FINISHED", None
    ends = [attrs[f"{PREFIX}{search}"] for search in searches(attrs)]
    ends = [end for end in ends if end is not None]
    last: Mapping[str, Any] = max(ends, key=lambda end: float(end["time"]), default={})
    left = last.get("left")
    if left is None:
        return "FAILED", "The process that ran the study ended without saying how."
    if left["status"] == "FINISHED":
        return "FAILED", "The study ended before its budget was used."
    return str(left["status"]), left["reason"]


def _is_recent(trial: FrozenTrial) -> bool:
    end = trial.datetime_complete
    return end is not None and (datetime.now() - end).total_seconds() < 2 * LATE_SECONDS


def _now() -> int:
    return time.time_ns() // 1_000_000


def _milliseconds(moment: datetime | None) -> int | None:
    """Optuna's moments are local times."""
    return None if moment is None else int(moment.timestamp() * 1000)
