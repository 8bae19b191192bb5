"""What a study in MLflow lacks: records that complete a trial's run, and final statuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from optuna.trial import FrozenTrial, TrialState

from tracker.journal.records import Begin, End, Metrics, Params, Record, Tags
from tracker.search.leases import PREFIX, searches
from tracker.search.plan import ENDED, SLOT, SOURCE, Plan, times
from tracker.search.stored_study import StoredStudy
from tracker.search.tables import INTERMEDIATE, attribute_tags, objectives
from tracker.statuses import Status
from tracker.store.runs import RunSnapshot
from tracker.validation import RUN_TAG

PARENT = "mlflow.parentRunId"
_STATUSES = {
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "KILLED",
    TrialState.WAITING: "SCHEDULED",
}

Missing = tuple[str, int, Record]
"""The key of a run, a time in milliseconds since 1970, and a record to deliver."""


def missing_records(
    study: StoredStudy, trial: FrozenTrial, key: str, parent: RunSnapshot, run: RunSnapshot | None
) -> list[Missing]:
    """Return the records that complete the run of a trial; none if nothing is missing.

    Args:
        study: The study.
        trial: A trial that has ended or waits to be claimed.
        key: The key of its run.
        parent: The run of the study.
        run: The trial's run, if it exists.
    """
    if trial.state == TrialState.WAITING and run is not None and not run.is_placeholder:
        return []  # it has been claimed meanwhile
    tags = _missing_tags(study, trial, parent, run.tags if run else {})
    params = {k: str(v) for k, v in trial.params.items() if run is None or k not in run.params}
    points = [
        point for point in _points(study, trial) if run is None or point[0] not in run.metrics
    ]
    if run is not None and run.is_open:
        points = []  # its journal may be in delivery, and would log them again
    status = _status(trial)
    # The run's own process may know better than the study that it was interrupted.
    has_status = run is not None and (
        run.status == status or (trial.state == TrialState.FAIL and run.status == "KILLED")
    )
    if has_status and not (tags or params or points):
        return []
    begin = Begin(
        experiment=study.experiment or "Default",
        experiment_id=run.experiment_id if run else study.experiment_id,
        name=f"trial={trial.number}",
        tags={**tags, RUN_TAG: key},
        adopt=run.run_id if run else None,
        keyed=True,
        placeholder=run is None,
    )
    started, ended = times(trial)
    entries: list[Missing] = [(key, started, begin)]
    if tags:
        entries.append((key, started, Tags(tags)))
    if params:
        entries.append((key, started, Params(params)))
    if points:
        entries.append((key, ended, Metrics(points)))
    if not has_status and trial.state.is_finished():
        entries.append((key, ended, End(cast(Status, status))))
    return entries


def _missing_tags(
    study: StoredStudy, trial: FrozenTrial, parent: RunSnapshot, existing: Mapping[str, str]
) -> dict[str, str]:
    ended = trial.user_attrs.get(ENDED, {})
    tags = {
        "tracker.study": study.name,
        "optuna.trial": str(trial.number),
        "optuna.state": trial.state.name,
        "tracker.slot": trial.user_attrs.get(SLOT),
        "tracker.source": trial.user_attrs.get(SOURCE),
        PARENT: parent.run_id,
    }
    # A process that was killed, or whose trial another search failed, does not know why.
    unaware = ended.get("why") in ("died", "lost", "given up")
    if trial.state == TrialState.FAIL and (unaware or "tracker.failure" not in existing):
        tags["tracker.failure"] = ended.get("reason") or None
    if trial.state == TrialState.PRUNED and "tracker.pruned" not in existing:
        tags["tracker.pruned"] = _pruning_reason(trial)
    attrs = attribute_tags(trial.user_attrs)
    tags |= {name: text for name, text in attrs.items() if name not in existing}
    texts = {name: str(value) for name, value in tags.items() if value is not None}
    return {name: text for name, text in texts.items() if existing.get(name) != text}


def _pruning_reason(trial: FrozenTrial) -> str:
    if (step := trial.last_step) is None:
        return "It was stopped before it reported."
    return f"It was stopped at step {step}, value {trial.intermediate_values[step]:g}."


def _points(study: StoredStudy, trial: FrozenTrial) -> list[tuple[str, float, int, int]]:
    _, at = times(trial)
    points = [(INTERMEDIATE, v, step, at) for step, v in sorted(trial.intermediate_values.items())]
    points += [(f"constraint.{name}", value, 0, at) for name, value in trial.constraints.items()]
    if trial.state == TrialState.COMPLETE:
        values = objectives(study.metrics, trial.values)
        points += [(name, value, 0, at) for name, value in values.items()]
    return points


def _status(trial: FrozenTrial) -> str:
    if trial.state == TrialState.FAIL:
        return str(trial.user_attrs.get(ENDED, {}).get("status", "FAILED"))
    return _STATUSES[trial.state]


def status_of_study(
    study: StoredStudy, trials: Sequence[FrozenTrial], attrs: Mapping[str, Any]
) -> tuple[str, str | None]:
    """Return the status of a study without a running search, and the reason if it failed.

    Args:
        study: The study.
        trials: All its trials.
        attrs: Its user attributes, which say how each search ended.
    """
    plan = Plan.of(study)
    plan.observe(trials)
    if plan.is_finished:
        return "FINISHED", None
    ends = [attrs[f"{PREFIX}{search}"] for search in searches(attrs)]
    last: Mapping[str, Any] = max(
        filter(None, ends), key=lambda end: float(end["time"]), default={}
    )
    if (left := last.get("left")) is None:
        return "FAILED", "The process that ran the study ended without reporting why."
    if left["status"] == "FINISHED" and left.get("stopped"):
        return "FINISHED", None  # by stop() or timeout=, as intended
    if left["status"] == "FINISHED":
        return "FAILED", "The study ended before its budget was used."
    return str(left["status"]), left["reason"]
