"""MLflow as the mirror of a study: writes what is missing there, and nothing else.

Optuna's storage is the truth. Trials' runs are made by who runs them; here is what a study as a
whole is, and what nobody lived to write.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from tracker.mlflow_store import MlflowStore
from tracker.mlflow_studies import MirroredRun, StudyRuns
from tracker.search.leases import PREFIX, Leases, searches
from tracker.search.page import study_page
from tracker.search.plan import ENDED, SLOT, SOURCE, Plan
from tracker.search.record import Record
from tracker.search.search import budget
from tracker.search.space import grid, identity
from tracker.search.storage import Storage
from tracker.search.tables import INTERMEDIATE, best, objectives, rows, saved
from tracker.uploader import LATE_SECONDS
from tracker.views.files import csv_text, json_text

STATUSES = {
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "KILLED",
    TrialState.FAIL: "FAILED",
    TrialState.RUNNING: "RUNNING",
    TrialState.WAITING: "SCHEDULED",
}
"""What a trial's state is in MLflow; of one that FAILed its attribute may say KILLED."""


class Mirror:
    """Keeps one study in one MLflow store as Optuna's storage has it."""

    def __init__(self, storage: Storage, record: Record, store: MlflowStore) -> None:
        self._storage = storage
        self._record = record
        self._runs = StudyRuns(store)
        self._leases = Leases(grace=math.inf)
        self.written = 0
        """How many things were missing, and were written."""
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
        with self._storage.lock():  # else two searches make one each
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
        """Bring the study's page up to date, while it goes on."""
        parent = self._parent()
        trials = self._trials()
        if parent is not None and any(trial.state.is_finished() for trial in trials):
            self._log_study(parent, trials, {})

    def complete(self, is_settled: Callable[[FrozenTrial], bool]) -> None:
        """Write all that is missing, of the trials that ended and of those that wait.

        Trials that another search runs are left to it. The run of a trial that has just ended may
        be on its way, unless `is_settled` says of it that it is not.
        """
        parent = self._parent()
        if parent is None:
            self.begin({}, None)
            parent = self._parent()
            assert parent is not None
        trials, attrs = self._trials(), self._attrs()
        children = self._runs.children(parent)
        alone = not any(self._leases.lives(search, attrs) for search in searches(attrs))
        for trial in trials:
            key = f"{self._record.key}-{trial.number}"
            if trial.state == TrialState.RUNNING:
                continue
            if trial.state == TrialState.WAITING and not alone:
                continue  # somebody is about to take it
            if key not in children and _is_recent(trial) and not is_settled(trial):
                continue  # on its way
            self._complete_trial(parent, trial, key, children)
        self._keep_the_best(trials, children)
        self._log_study(parent, trials, children)
        self._settle(parent)

    def _complete_trial(
        self,
        parent: MirroredRun,
        trial: FrozenTrial,
        key: str,
        children: dict[str, MirroredRun],
    ) -> None:
        tags, params, metrics = _wanted(self._record, trial)
        if (child := children.get(key)) is None:
            name = f"trial={trial.number}"
            begin = _milliseconds(trial.datetime_start) or _now()
            with self._storage.lock():  # another search's keeper may be about to make it too
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

    def _keep_the_best(
        self, trials: Sequence[FrozenTrial], children: Mapping[str, MirroredRun]
    ) -> None:
        record = self._record
        good = {f"{record.key}-{trial.number}" for trial in best(record, trials)}
        if record.models == "best" and any(children[k].models for k in good & children.keys()):
            ended = {f"{record.key}-{t.number}" for t in trials if t.state.is_finished()}
            for key in (ended - good) & children.keys():  # a living trial may be the best by now
                child = children[key]
                if child.models and not self._runs.is_registered(child.run_id):
                    for model in child.models:
                        self.written += self._runs.delete_model(model)
        if record.register is None or len(good) != 1:
            return
        child_or_none = children.get(next(iter(good)))
        if child_or_none is None or not child_or_none.models:
            return
        child = child_or_none
        tags = {
            "tracker.study": record.name,
            "tracker.storage": record.storage or "",
            "optuna.trial": child.tags.get("optuna.trial", ""),
        }
        version = self._runs.register(
            record.register, record.alias, child.models[-1], child.run_id, tags
        )
        self.written += version is not None

    def _log_study(
        self,
        parent: MirroredRun,
        trials: Sequence[FrozenTrial],
        children: Mapping[str, MirroredRun],
    ) -> None:
        """The tables, the page and the best, if anything changed since they were logged."""
        record = self._record
        table = rows(record, trials)
        good = best(record, trials)
        child = None
        if good:
            key = f"{record.key}-{good[0].number}"
            child = children.get(key) or self._runs.find(key)
        known = json_text(table) + (child.run_id if child else "")
        digest = hashlib.sha256(known.encode()).hexdigest()[:16]
        if parent.tags.get("tracker.mirrored") == digest:
            return
        tags: dict[str, str] = {"tracker.mirrored": digest}
        facts: dict[str, str] = {}
        if (steps := saved(record, trials)) is not None:
            facts["Steps not trained"] = f"{steps[0]:,} of {steps[1]:,}"
            tags["tracker.saved"] = f"{steps[0]} of {steps[1]}"
        if good:
            first = good[0]
            tags["best.trial"] = ", ".join(str(trial.number) for trial in good)
            tags["best.value"] = ", ".join(f"{value:.6g}" for value in first.values)
            tags["best.params"] = json.dumps(first.params)[:5000]
            tags["best.run"] = child.run_id if child else ""
            if record.replay is not None:
                tags["tracker.replay"] = record.replay.replace("{number}", str(first.number))
                facts["Train it again"] = f"$ {tags['tracker.replay']}"
        page = study_page(optuna.Study(record.name, self._storage.optuna), facts)
        self._runs.log_text(parent.run_id, page, "study.html")
        self._runs.log_text(parent.run_id, csv_text(table), "trials.csv")
        self._runs.log_text(parent.run_id, json_text(table), "trials.json")
        self._runs.log_text(
            parent.run_id,
            json_text([{"trial": t.number, "values": t.values, "params": t.params} for t in good]),
            "best.json",
        )
        metrics = []
        if good and len(record.metrics) == 1:
            at = _milliseconds(good[0].datetime_complete) or _now()
            metrics = [("best_objective", good[0].values[0], good[0].number, at)]
        self._runs.log(parent.run_id, metrics=metrics, tags=tags)
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
