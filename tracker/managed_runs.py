"""The runs of a manager, begun and ended one after another, and the delivery that they share."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tracker.delivery.background import checked_timeout
from tracker.delivery.base import Delivery, Mode, open_delivery
from tracker.delivery.leftovers import settle_run
from tracker.errors import CallOrderError
from tracker.grid import run_name
from tracker.run import Run
from tracker.statuses import Outcome
from tracker.store.history import ResumeState, load_resume_state
from tracker.training.distributed import is_main, rank_0_first
from tracker.validation import Renamer, checked_local_path, checked_mapping


class ManagedRuns:
    """Begins and ends the runs of a manager, one after another.

    A separate object, which is closed even if the manager is garbage-collected first.
    """

    def __init__(
        self,
        *,
        experiment: str | None,
        tracking_uri: str | None,
        directory: str | Path,
        mode: Mode,
        exit_timeout: float | None,
        tags: Mapping[str, str] | None,
        parent: Run | str | None,
        joined: Run | None,
        rename: bool,
    ) -> None:
        """Configure the runs; arguments are those of `RunManager`.

        Args:
            experiment: Name of the experiment.
            tracking_uri: Where runs are delivered.
            directory: Holds the journal while a run lasts.
            mode: How runs are delivered.
            exit_timeout: How long ends wait for the delivery, in seconds.
            tags: Tags of every run.
            parent: Parent of every run, or its id.
            joined: The only run, which the caller has begun and will end.
            rename: Rename what has a name that MLflow does not allow.

        Raises:
            ArgumentError: `directory`, `exit_timeout` or `tags` is not allowed.
        """
        if exit_timeout is not None:
            exit_timeout = checked_timeout("exit_timeout", exit_timeout)
        self.tracking_uri = tracking_uri
        self.directory = checked_local_path(directory, "directory")
        self._run: Run | None = None
        self.joined = joined
        self._tags = {"tracker.session": uuid.uuid4().hex, **checked_mapping(tags or {}, "tags")}
        self._experiment = experiment
        self._mode = mode
        self._exit_timeout = exit_timeout
        self._rename = rename
        if joined is not None and rename:
            joined.name_of = Renamer()
        self._parent = parent
        self._has_joined = False
        self._delivery: Delivery | None = None
        self._pid = os.getpid()

    @property
    def open_run(self) -> Run | None:
        """The run that is logged to, until it ends; its owner may end one that was joined."""
        return None if self._run is None or self._run.status is not None else self._run

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the current run; None without a run, and until MLflow has created it."""
        return None if self._run is None else self._run.run_id

    @property
    def is_forked(self) -> bool:
        """Whether this is a forked process, which must leave its parent's run alone."""
        return os.getpid() != self._pid

    def load(self, run_id: str) -> ResumeState:
        """Read the state of a run to continue, after what a dead process left of it is delivered.

        In a process group the other ranks wait for rank 0, and rank 0 for them: they would find a
        run that is alive again.

        Raises:
            StoreError: The run does not exist, or its process may still be running.
        """
        with rank_0_first():
            settle_run(run_id, self.tracking_uri, self.directory)
            return load_resume_state(run_id, self.tracking_uri)

    def begin(
        self,
        params: Mapping[str, Any],
        facts: Mapping[str, Any],
        tags: Mapping[str, str],
        resume_state: ResumeState | None,
    ) -> Run:
        """Begin a run, or log to the run that the caller has begun.

        Args:
            params: Hyperparameters to log.
            facts: Params about the training, unless the user has given them.
            tags: More tags to set.
            resume_state: The state of a run that the new one continues.

        Raises:
            ArgumentError: A param or tag is not allowed; nothing has begun.
            CallOrderError: The caller's run has already been used.
            StoreError: The store cannot be opened; nothing has begun.
        """
        if self.is_forked:  # its runs are its own; those of the parent are left alone
            self._pid, self._delivery, self._run = os.getpid(), None, None
        tags = {**self._tags, **tags}
        if self.joined is not None:
            return self._join(self.joined, params, facts, tags)
        route = self._delivery or open_delivery(
            self.directory, self.tracking_uri, self._mode, self._exit_timeout, writes=is_main()
        )
        try:
            self._run = Run(
                route,
                params,
                self._experiment,
                tags.get("mlflow.runName") or run_name(params),
                tags,
                self._parent,
                resume=resume_state,
                rename=self._rename,
            )
        except BaseException:  # Ctrl-C must not leave a journal open either
            if self._delivery is None:
                route.close()
            raise
        self._delivery = route
        self._run.log_facts(facts)
        return self._run

    def _join(
        self,
        run: Run,
        params: Mapping[str, Any],
        facts: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> Run:
        if self._has_joined:
            raise CallOrderError("begin_run() was called twice; this manager logs to one run.")
        run.log_params(params)
        run.log_facts(facts)
        run.set_tags(tags)
        self._has_joined = True
        self._run = run
        return run

    def current(self, verb: str) -> Run:
        """Return the open run.

        Args:
            verb: The method to name in the error.

        Raises:
            CallOrderError: No run is open, or it is that of the parent process.
        """
        if self.open_run is None:
            raise CallOrderError(f"{verb}() was called without a run; call begin_run() first.")
        if self.is_forked:
            raise CallOrderError(
                f"{verb}() was called in a forked process, which cannot log to the run of its "
                "parent; call begin_run() here first, or log in the parent."
            )
        return self.open_run

    def end(self, ended: Outcome) -> None:
        """End the open run; one that the caller has begun is only left."""
        if self.open_run is not None and self.open_run is not self.joined:
            self.open_run.end(ended)
        self._run = None

    def close(self, where: str) -> None:
        """End a run that is still open as abandoned `where`, and close the delivery."""
        if self.is_forked:
            return
        if self.open_run is not None:
            self.end(self.open_run.abandoned_outcome(where))
        if self._delivery is not None:
            self._delivery.close()
            self._delivery = None
