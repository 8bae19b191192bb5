"""Run: one tracked run, from its beginning to its final status."""

from __future__ import annotations

import os
import time
import uuid
import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from tracker.capture.provenance import environment_tags
from tracker.cells import when_cell_fails
from tracker.delivery.background import DEADLINE_SECONDS, checked_timeout
from tracker.delivery.base import Delivery, mode_of, open_delivery
from tracker.errors import ArgumentError, CallOrderError
from tracker.journal import records
from tracker.redaction import public_uri
from tracker.statuses import Outcome, Status, abandoned, outcome, uncaught_error
from tracker.store.history import ResumeState
from tracker.torch_recorder import TorchRecorder
from tracker.training.distributed import is_main
from tracker.validation import (
    DIRECTORY,
    MAX_EXPERIMENT_NAME,
    MAX_RUN_NAME,
    RUN_TAG,
    checked_local_path,
    checked_params,
    checked_tags,
    checked_text,
    fitted,
    named_values,
)

_begun: ContextVar[tuple[weakref.ref[Run], ...]] = ContextVar("begun", default=())
"""The runs begun in this context, the innermost last; some may have ended."""


def current_run() -> Run:
    """Return the open run that began last in this context, by `start_run` or a RunManager.

    Contexts are those of `contextvars`: an asyncio task has the runs of the code that made it, and
    a new thread has none, unless it is started with `contextvars.copy_context().run`.

    Raises:
        CallOrderError: No run is open.
    """
    for reference in reversed(_begun.get()):
        run = reference()
        if run is not None and run.status is None:
            return run
    raise CallOrderError(
        "no run is open in this context (a new thread has none); call start_run() first, or log "
        "to a run that you pass."
    )


def _make_current(run: Run) -> None:
    runs = [one for reference in _begun.get() if (one := reference()) is not None]
    others = [one for one in runs if one.status is None and one is not run]
    _begun.set(tuple(map(weakref.ref, [*others, run])))


def start_run(
    *,
    params: Any = None,
    experiment: str | None = None,
    name: str | None = None,
    tags: Mapping[str, str] | None = None,
    parent: Run | str | None = None,
    tracking_uri: str | None = None,
    directory: str | Path = DIRECTORY,
    rename: bool = False,
    inline: bool | None = None,
    offline: bool | None = None,
    exit_timeout: float | None = None,
) -> Run:
    """Start one run, to be used in a `with` block, which sets its final status.

    Under torchrun only rank 0 writes it; the run of another rank takes every call and drops it.

    Args:
        params: Hyperparameters to log: a mapping, named tuple, dataclass or namespace.
        experiment: Name of the experiment; default as in MLflow.
        name: Name of the run; default one that MLflow chooses.
        tags: Tags to set.
        parent: Parent of the run, or its id.
        tracking_uri: Where the run is delivered; default as in MLflow.
        directory: Holds the journal while the run lasts.
        rename: Rename metrics, params and tags that MLflow refuses: `AR@100` to `AR_at_100`.
        inline: Deliver from this thread, not from a second process; default TRACKER_INLINE.
        offline: Keep the run on disk until `tracker sync`; default TRACKER_OFFLINE.
        exit_timeout: Seconds to wait for the delivery when the run and the program end; default
            TRACKER_EXIT_TIMEOUT, then 10.

    Raises:
        ArgumentError: An argument is not allowed; nothing has begun.
        StoreError: The store cannot be used; nothing has begun.
    """
    mode = mode_of(inline=inline, offline=offline)
    if exit_timeout is not None:
        exit_timeout = checked_timeout("exit_timeout", exit_timeout)
    folder = checked_local_path(directory, "directory")
    delivery = open_delivery(folder, tracking_uri, mode, exit_timeout, writes=is_main())
    try:
        run = Run(
            delivery,
            params,
            experiment,
            name,
            tags,
            parent,
            owns_delivery=True,
            rename=rename,
        )
    except BaseException:  # Ctrl-C must not leave a journal open either
        delivery.close()
        raise
    when_cell_fails(run.end)
    return run


class GivenParams(dict[str, str]):
    """Params as text, which also reads like the named tuple that a run was begun with."""

    def __init__(self, texts: Mapping[str, str], given: Mapping[str, Any]) -> None:
        super().__init__(texts)
        self._given = given

    def _asdict(self) -> dict[str, Any]:
        return dict(self._given)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._given:
            raise AttributeError(f"the run has no hyperparameter {name!r}.")
        return self._given[name]


class Run(TorchRecorder):
    """One tracked run.

    Everything logged is on disk within a fifth of a second, once a GPU has computed it, and is
    delivered from there to MLflow, for which only `flush` and `end` wait.
    """

    def __init__(
        self,
        delivery: Delivery,
        params: Any = None,
        experiment: str | None = None,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
        parent: Run | str | None = None,
        *,
        resume: ResumeState | None = None,
        owns_delivery: bool = False,
        rename: bool = False,
        key: str | None = None,
        parent_key: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Begin a run; `start_run` and `RunManager` call this.

        Args:
            delivery: Delivers the run to MLflow.
            params: Hyperparameters to log: a mapping, named tuple, dataclass or namespace.
            experiment: Name of the experiment.
            name: Name of the run.
            tags: Tags to set.
            parent: Parent of the run, or its id.
            resume: State of an earlier run that this one continues.
            owns_delivery: Close `delivery` when the run ends.
            rename: Rename what has a name that MLflow does not allow.
            key: Key that the caller owns. A run that MLflow has under it is continued.
            parent_key: Key of a parent that another process tracks.
            environment: Result of `environment_tags`, if the caller has it.

        Raises:
            ArgumentError: A param or tag is not allowed, or the parent is in another store.
            StoreError: The store cannot be used.
        """
        super().__init__(
            delivery.journal,
            key or uuid.uuid4().hex,
            resume.params if resume else {},
            resume.last_steps if resume else {},
            rename,
        )
        self._delivery = delivery
        self._owns_delivery = owns_delivery
        self._delivered_id: str | None = None  # set when the run has ended
        self._error_before = uncaught_error()
        self.resume_state: ResumeState | None = resume
        """State of the earlier run that this one continues."""
        self.given: Mapping[str, Any] = named_values(params or {}, "params")
        """The hyperparameters, as given."""
        self.start_time = time.time()
        """When the run began, in seconds since 1970."""
        self.count = 1
        """Number of the run in its RunManager."""
        self.data: list[dict[str, Any]] = []
        """The table of its RunManager, `run_data`."""
        checked = checked_params(params or {}, self.name_of)
        if environment is None:
            environment = {"tracker.resumed": "true"} if resume else environment_tags()
        tags = {**fitted(environment), **checked_tags(tags or {}, self.name_of)}
        tags[RUN_TAG] = self._key
        checked_text(name or "-", "name", MAX_RUN_NAME)
        environ = os.environ
        named = experiment or environ.get("MLFLOW_EXPERIMENT_NAME")
        checked_text(named or "-", "experiment", MAX_EXPERIMENT_NAME)
        self._append(
            records.Begin(
                experiment=named or "Default",
                experiment_id=None if experiment else environ.get("MLFLOW_EXPERIMENT_ID") or None,
                name=self._public_name(name),
                tags=self._without_secrets(tags, "tag"),
                parent={"key": parent_key} if parent_key else self._parent(parent),
                adopt=environ.get("MLFLOW_RUN_ID") or None if key is None else None,
                keyed=key is not None,
                resume=resume.run_id if resume else None,
                samples=resume.samples if resume else 0,
                named=bool(named),
            )
        )
        if resume:
            self._resumed_tables |= resume.tables
            for row in resume.rows:
                self.log_epoch(row)
            for old in resume.histograms:
                unit = old.get("unit", "epoch")
                self._append(records.Histograms(old["step"], old["histograms"], True, unit))
        self._log_params(checked)
        delivery.begin(self._key, self.abandon)
        _make_current(self)

    @property
    def params(self) -> GivenParams:
        """The params logged so far, as text; the hyperparameters, as given, are its attributes."""
        return GivenParams(self._params, self.given)

    @params.setter
    def params(self, given: Any) -> None:
        self.given = named_values(given or {}, "params")

    def _parent(self, parent: Run | str | None) -> records.Parent | None:
        if parent is None:
            return None
        if not isinstance(parent, Run):
            return {"run_id": checked_text(parent, "parent", MAX_RUN_NAME)}
        if parent.tracking_uri != self.tracking_uri:
            raise ArgumentError(
                f"parent={parent.run_id!r} is in {public_uri(parent.tracking_uri)!r}; it must be "
                "in the store of its children."
            )
        return {"key": parent._key}

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, to use with MLflow's own functions; None until it is known."""
        if self._status is not None:
            return self._delivered_id
        return self._read(lambda: self._delivery.run_id(self._key), None)

    @property
    def tracking_uri(self) -> str:
        """The tracking URI of the store that the run is delivered to."""
        return self._delivery.tracking_uri

    @property
    def status(self) -> Status | None:
        """The final status; None until the run has ended."""
        return self._status

    def deliver(self) -> None:
        """With inline delivery, deliver what was logged so far; called after each epoch."""
        self._delivery.deliver()

    def flush(self, timeout: float = DEADLINE_SECONDS) -> bool:
        """Wait until everything logged so far is delivered; return False after `timeout` s."""
        return self._read(lambda: self._delivery.flush(timeout, self._key), False)

    def end(
        self,
        ended: Outcome = Outcome("FINISHED"),  # noqa: B008 - immutable
        *,
        wait: bool = True,
    ) -> None:
        """End the run; a second call does nothing.

        Args:
            ended: Final status, and the reason if it is not FINISHED.
            wait: Wait for the delivery, at most `exit_timeout` of `start_run`.
        """
        if self._status is not None or os.getpid() != self._pid:
            return  # a fork leaves its parent's run alone
        try:
            if ended.reason:
                self.set_tags({"tracker.failure": ended.reason})
        finally:
            self._append(records.End(ended.status))
            self._status = ended.status  # before the wait, which Ctrl-C may cut short
        try:
            self._read(lambda: self._delivery.end(self._key, wait=wait), None)
        finally:
            self._delivered_id = self._read(lambda: self._delivery.run_id(self._key), None)
            if self._owns_delivery:
                self._delivery.close()

    def abandoned_outcome(self, where: str) -> Outcome:
        """Return the outcome of a run abandoned without `end`; `where` says where or when."""
        error = uncaught_error()
        return abandoned(error if error is not self._error_before else None, where)

    def abandon(self) -> None:
        """End the run as abandoned, unless it has ended; called when the program ends."""
        self.end(self.abandoned_outcome("when the program ended"))

    def __enter__(self) -> Run:
        _make_current(self)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.end(outcome(error))
