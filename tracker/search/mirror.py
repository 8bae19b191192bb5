"""Brings a study in MLflow up to date: its run, the runs of its trials, and the best model.

Optuna's storage holds the truth. A trial's run is tracked by the process that runs the trial; the
mirror adds what is missing afterwards. Missing runs and trial records go through a journal; the
study's own tags, files and status are written directly. Nothing is written if nothing is missing.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from tracker.delivery.uploader import Uploader
from tracker.errors import GoneError, RefusedError, StoreError
from tracker.journal.reader import Journal
from tracker.journal.records import Begin, Params, now
from tracker.journal.writer import JournalWriter
from tracker.redaction import public_uri
from tracker.search.best import LISTED, best_tags, best_trials
from tracker.search.config import MODEL
from tracker.search.leases import Leases, searches
from tracker.search.missing import Missing, missing_records, status_of_study
from tracker.search.plan import SEARCH, times
from tracker.search.report.page import study_page
from tracker.search.storage import Storage
from tracker.search.stored_study import StoredStudy
from tracker.search.tables import rows, saved
from tracker.store.client import MlflowStore
from tracker.store.runs import RunSnapshot, read_run, runs_by_tag_prefix
from tracker.validation import RUN_TAG
from tracker.views.files import csv_text, json_text

_DIGEST = "tracker.mirrored"
"""The tag with a digest of the trials that the tables show."""
_FILES = ("study.html", "trials.csv", "trials.json", "best.json")


class Mirror:
    """Adds the missing parts of one study to MLflow."""

    def __init__(self, storage: Storage, study: StoredStudy, store: MlflowStore) -> None:
        self._storage = storage
        self._study = study
        self._store = store
        self._leases = Leases(grace=float("inf"))
        self._deleted: set[str] = set()
        self.written = 0
        """How many missing items have been written."""
        self.problem: str | None = None
        """Why `complete` could not write some items although MLflow answers."""
        self.run_id: str | None = None
        """The run of the study."""

    def begin(
        self, environment: Mapping[str, str], adopt: str | None = None, started: int | None = None
    ) -> None:
        """Create the study's run, or set it to RUNNING again.

        Args:
            environment: More tags of the run.
            adopt: The id of a run that `mlflow run` created, for a study without a run.
            started: Start time in milliseconds since 1970; None is now.

        Raises:
            StoreError: MLflow does not answer.
        """
        study, at = self._study, started or now()
        with self._lock():
            existing = self._parent()
            begin = Begin(
                experiment=study.experiment or "Default",
                experiment_id=study.experiment_id,
                name=study.name,
                tags={**environment, "tracker.study": study.name, RUN_TAG: study.key},
                adopt=adopt,
                resume=None if existing is None else existing.run_id,
                keyed=True,
            )
            ids = self._deliver([(study.key, at, begin), (study.key, at, Params(self._params()))])
        self.run_id = ids[study.key]
        self.written += 1

    def refresh(self) -> None:
        """Update the page, the tables and the best model of a study that is running."""
        trials, parent = self._trials(), self._parent()
        if parent is None or not any(trial.state.is_finished() for trial in trials):
            return
        unchanged = parent.tags.get(_DIGEST) == _digest(rows(self._study.metrics, trials))
        if unchanged and parent.tags.get("best.run") != "":
            return
        self._log_study(existing=_FILES)

    def complete(self) -> None:
        """Write everything that is missing; running trials are left to their own processes.

        Raises:
            StoreError: MLflow does not answer.
        """
        self.problem = self.run_id = None  # the run may have been deleted
        trials = self._trials()
        if (parent := self._parent()) is None:
            begun = [times(trial)[0] for trial in trials if trial.datetime_start is not None]
            self.begin({}, started=min(begun, default=None))
            parent = self._parent()
            assert parent is not None
        if params := {k: v for k, v in self._params().items() if k not in parent.params}:
            self._store.log_batch(parent.run_id, params=params)
            self.written += 1
        self._complete_trials(parent, trials)
        self._log_study(existing=self._store.artifacts(parent.run_id))
        self._log_status(parent)
        self._register(self._trials(), self._runs())

    # -- trials ----------------------------------------------------------------------------

    def _complete_trials(self, parent: RunSnapshot, trials: Sequence[FrozenTrial]) -> None:
        attrs = self._attrs()
        is_active = self._is_active(attrs)
        runs, entries, waiting = self._runs(), list[Missing](), list[str]()
        for trial in trials:
            if trial.state == TrialState.RUNNING:
                continue
            if trial.state == TrialState.WAITING and is_active:
                continue  # a search may be claiming it
            key = self._key(trial)
            run, search = runs.get(key), str(trial.user_attrs.get(SEARCH))
            if run is not None and run.is_open and self._leases.lives(search, attrs):
                continue  # its search will complete it
            missing = missing_records(self._study, trial, key, parent, run)
            entries += missing
            self.written += bool(missing)
            if missing and trial.state == TrialState.WAITING:
                waiting.append(key)
        ids = self._deliver(entries)
        for key in waiting:
            if self._store.is_placeholder(ids[key]):  # else the trial was claimed meanwhile
                self._store.set_status(ids[key], "SCHEDULED")

    def _deliver(self, entries: Sequence[Missing]) -> dict[str, str]:
        """Write records to a journal and deliver it; return MLflow's ids of the runs by key.

        Nothing depends on the journal: if this process dies, the next mirror compares again.
        """
        if not entries:
            return {}
        with tempfile.TemporaryDirectory(prefix="tracker-") as folder:
            writer = JournalWriter(Path(folder))
            for key, at, record in entries:
                writer.append(key, record, at)
            writer.close()
            with closing(Journal(writer.folder)) as journal:
                Uploader(journal, self._store).drain()
                for _, notice in journal.notices():
                    self.problem = notice
                ids = {key: journal.run_id(key) for key in {key for key, *_ in entries}}
        return {key: run_id for key, run_id in ids.items() if run_id is not None}

    def _delete_models(
        self, trials: Sequence[FrozenTrial], runs: Mapping[str, RunSnapshot]
    ) -> None:
        """Delete models of trials that are not the best any more, once a best one has its model."""
        good = {self._key(trial) for trial in self._best(trials)}
        if self._study.models != "best" or not any(runs[k].models for k in good & runs.keys()):
            return
        ended = {self._key(trial) for trial in trials if trial.state.is_finished()}
        for key in (ended - good) & runs.keys():  # a running trial may become the best
            run = runs[key]
            models = set(run.models) - self._deleted
            if not models or run.status == "RUNNING":  # its model may be in upload
                continue
            if not self._store.models.is_registered(run.run_id):
                self.written += sum(self._store.models.delete(each, MODEL) for each in models)
                self._deleted |= models

    def _register(self, trials: Sequence[FrozenTrial], runs: Mapping[str, RunSnapshot]) -> None:
        """Register the model of the best trial; a refusal leaves everything else in place."""
        study, good = self._study, self._best(trials)
        if study.register is None:
            return
        run = runs.get(self._key(good[0])) if len(good) == 1 else None
        if run is None or not run.models:
            if trials and not self._is_active(self._attrs()):
                why = "the best trial logged no model" if good else "no trial is complete"
                self.problem = f"register={study.register!r} has registered nothing: {why}"
            return
        tags = {
            "tracker.study": study.name,
            "tracker.storage": study.storage or "",
            "optuna.trial": run.tags.get("optuna.trial", ""),
        }
        try:
            with self._lock():
                self.written += self._store.models.register(
                    study.register, study.alias, run.models[-1], run.run_id, tags
                )
        except (RefusedError, GoneError) as error:
            self.problem = str(error)

    # -- the study's run -------------------------------------------------------------------

    def _log_study(self, *, existing: Collection[str]) -> None:
        """Log the files that do not exist or are outdated, and the tags of the best trials."""
        with self._lock():  # or an older page could replace a newer one
            parent = self._parent()
            if parent is None:
                raise StoreError("the study's run was deleted meanwhile")
            trials, runs = self._trials(), self._runs()
            self._delete_models(trials, runs)
            self._log_files_and_tags(parent, trials, runs, existing)

    def _log_files_and_tags(
        self,
        parent: RunSnapshot,
        trials: Sequence[FrozenTrial],
        runs: Mapping[str, RunSnapshot],
        existing: Collection[str],
    ) -> None:
        study, good = self._study, self._best(trials)
        table = rows(study.metrics, trials)
        tags = {"tracker.study": study.name, _DIGEST: _digest(table), **self._best_tags(good, runs)}
        facts: dict[str, str] = {}
        if (steps := saved(study, trials)) is not None:
            facts["Steps saved by pruning"] = f"{steps[0]:,} of {steps[1]:,}"
            tags["tracker.saved"] = f"{steps[0]} of {steps[1]}"
        if good and study.replay is not None:
            number = str(good[0].number)
            tags["tracker.replay"] = study.replay.replace("{number}", number)
            facts[f"Train trial {number} again"] = f"$ {tags['tracker.replay']}"
        best = [{"trial": t.number, "values": t.values, "params": t.params} for t in good]
        texts: dict[str, Callable[[], str]] = {
            "study.html": lambda: study_page(optuna.Study(study.name, self._storage.optuna), facts),
            "trials.csv": lambda: csv_text(table),
            "trials.json": lambda: json_text(table),
            "best.json": lambda: json_text(best),
        }
        outdated = parent.tags.get(_DIGEST) != tags[_DIGEST]
        for name in _FILES:
            if name in existing and not outdated:
                continue
            try:
                self._store.log_text(parent.run_id, texts[name](), name)
                self.written += 1
            except Exception as error:
                is_away = isinstance(error, StoreError) and not isinstance(error, RefusedError)
                if is_away or self._storage.unreachable(error):
                    raise  # the next mirror tries again
                self.problem = public_uri(f"{name} cannot be written: {error}")
                tags.pop(_DIGEST, None)  # the next mirror tries again
        new = {name: value for name, value in tags.items() if parent.tags.get(name) != value}
        metrics = []
        if len(good) == 1 and ("best.trial" in new or "best_objective" not in parent.metrics):
            _, at = times(good[0])
            metrics = [("best_objective", good[0].values[0], good[0].number, at)]
        if new or metrics:
            self._store.log_batch(parent.run_id, metrics=metrics, tags=new)
            self.written += 1

    def _best_tags(
        self, good: Sequence[FrozenTrial], runs: Mapping[str, RunSnapshot]
    ) -> dict[str, str]:
        """Return the tags of the best trial; of a Pareto front, lists in the same order."""
        listed = good[:LISTED]
        ids = [runs[key].run_id for key in map(self._key, listed) if key in runs]
        own = {"best.run": ", ".join(ids) if len(ids) == len(listed) else ""} if good else {}
        return best_tags(good) | own

    def _log_status(self, parent: RunSnapshot) -> None:
        """Set the status of the study's run, unless a search is working on the study."""
        trials, attrs = self._trials(), self._attrs()
        if self._is_active(attrs):
            return
        status, reason = status_of_study(self._study, trials, attrs)
        if parent.status != status:
            self._store.end_run(parent.run_id, status, now())
            self.written += 1
        if (reason or "") != parent.tags.get("tracker.failure", ""):
            self._store.log_batch(parent.run_id, tags={"tracker.failure": reason or ""})
            self.written += 1

    def _attrs(self) -> dict[str, Any]:
        return self._storage.optuna.get_study_user_attrs(self._study.study_id)

    def _is_active(self, attrs: Mapping[str, Any]) -> bool:
        """Whether a search is working on the study."""
        return any(self._leases.lives(search, attrs) for search in searches(attrs))

    def _params(self) -> dict[str, str]:
        study = self._study
        return {
            "study": study.name,
            "sampler": study.sampler,
            "pruner": study.pruner,
            "seed": str(study.seed),
            "direction": ",".join(study.directions),
            "metric": ",".join(study.metrics),
        }

    def _parent(self) -> RunSnapshot | None:
        if self.run_id is None:
            self.run_id = self._store.find_run(self._study.key)
        return None if self.run_id is None else read_run(self._store, self.run_id)

    def _runs(self) -> dict[str, RunSnapshot]:
        """Return the runs of the trials by key; their parent may be another one, or deleted."""
        return runs_by_tag_prefix(self._store, RUN_TAG, f"{self._study.key}-")

    def _key(self, trial: FrozenTrial) -> str:
        return f"{self._study.key}-{trial.number}"

    def _best(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        return best_trials(trials, self._study.directions)

    def _trials(self) -> list[FrozenTrial]:
        return self._storage.optuna.get_all_trials(self._study.study_id, deepcopy=False)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Exclude other mirrors; trials are claimed under another lock and never wait for it."""
        with self._storage.lock("mirror"):
            yield


def _digest(table: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json_text(table).encode()).hexdigest()[:16]
