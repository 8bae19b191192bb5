"""One search: claims trials of a study, answers their requests and stores how they ended.

Workers reach the storage only through here: they send requests over pipes. Several searches, also
on several machines, can share a storage.
"""

from __future__ import annotations

import copy
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, TypeVar

import optuna
from optuna.distributions import json_to_distribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from tracker.errors import ArgumentError, TrackerError
from tracker.journal.records import now
from tracker.search import sampler as samplers
from tracker.search.best import best_trials
from tracker.search.channel import Ended, Task, TrialLostError, Verdict
from tracker.search.leases import Heart, Leases
from tracker.search.objects import PrunerLike, SamplerLike
from tracker.search.plan import FIXED, MOST_DEATHS, SEARCH, SLOT, STARTED, Plan, Why
from tracker.search.policy import FIRST
from tracker.search.reap import fail_orphans, store_failure
from tracker.search.running_trial import RunningTrial
from tracker.search.space import distributions
from tracker.search.stopping import RunningStudy, StopFlag
from tracker.search.storage import Storage
from tracker.search.stored_study import StoredStudy
from tracker.search.tables import attributes
from tracker.statuses import Status

QUEUED = 1_000_000
"""The first slot of enqueued trials for which the budget has no slot left."""

_HOLD_SECONDS = 2.0  # after a failed request; until then reports are only queued

logger = logging.getLogger(__name__)

Answer = Literal["wait", "done"]
Callback = Callable[[optuna.Study, FrozenTrial], None]
T = TypeVar("T")


class Search:
    """Works on a study until it is done. It is not thread-safe."""

    def __init__(
        self,
        storage: Storage,
        record: StoredStudy,
        *,
        grace: float,
        sampler: SamplerLike | None = None,
        pruner: PrunerLike | None = None,
    ) -> None:
        """Prepare a search; `enter` makes it visible to others.

        Args:
            storage: The storage of the study.
            record: The study.
            grace: How long another search may be silent before it counts as lost, in seconds.
            sampler: An object or a factory that `record` can only name.
            pruner: The same for the pruner.
        """
        self.on_end: Callable[[FrozenTrial, bool], None] = lambda trial, is_best: None
        """Called with each trial that ends, and whether it is the best so far."""
        self.stopping: Callable[[], bool] = lambda: False
        """Whether to stop waiting for a storage that does not answer."""
        self.flag = StopFlag()
        """Set when no more trials should start."""
        self.callbacks: Sequence[Callback] = ()
        """Called with the study and each trial that ended, before the next is claimed."""
        self._ended: deque[FrozenTrial] = deque()
        self._claims = 0
        self._has_succeeded = False
        self.id = uuid.uuid4().hex[:8]
        self.storage = storage
        self.record = record
        self.grace = grace
        self.plan = Plan.of(record)
        space = record.spaces[-1] if record.spaces else {}
        self._distributions = distributions(space, grid=self.plan.points is not None)
        self._sampler, self._pruner = sampler or record.sampler, pruner or record.pruner
        self._optuna = storage.optuna
        self._leases = Leases(grace)
        self._running: dict[int, RunningTrial] = {}
        self._hold_until = 0.0
        self._heart = Heart(storage.optuna, record.study_id, self.id, grace)

    # -- taking trials -----------------------------------------------------------------------------

    def claim(self) -> Task | Answer:
        """Claim the next trial; "wait" while others run the last ones, "done" after that."""
        self.call_back()
        if self.flag.is_set:
            return "done"
        try:
            return self._patiently(self._claim)
        except UpdateFinishedTrialError:  # this process was suspended, and another ended the trial
            return "wait"

    def call_back(self) -> None:
        """Call the callbacks for the trials that have ended."""
        while self._ended:
            trial = self._ended.popleft()
            for callback in self.callbacks:
                callback(self._study(), copy.deepcopy(trial))

    def _study(self, **more: Any) -> optuna.Study:
        return RunningStudy(self.record.name, self._optuna, self.flag.set, **more)

    def _claim(self) -> Task | Answer:
        with self.storage.study_lock(self.record.key):
            trials = self._fail_lost_trials(self.trials())
            slot = self.plan.next_retry(QUEUED)
            if slot is None and (queued := self._queued_trial(trials)) is not None:
                slot = self._slot_for(queued)
                self._optuna.set_trial_user_attr(queued._trial_id, SLOT, slot)
                self._optuna.set_trial_user_attr(queued._trial_id, SEARCH, self.id)
                self._optuna.set_trial_user_attr(queued._trial_id, STARTED, now())
                trial_id = queued._trial_id
                if not self._optuna.set_trial_state_values(trial_id, TrialState.RUNNING):
                    return "wait"
            else:
                if slot is None and (slot := self.plan.next_slot()) is None:
                    return "done" if self.plan.is_finished else "wait"
                new = self._new_trial(slot)
                trial_id = self._optuna.create_new_trial(self.record.study_id, new)
                # PostgreSQL drops a lock with its connection.
                is_unsure = self.storage.kind == "postgresql"
                if is_unsure and self._yields_to_another(trial_id, slot):
                    return "wait"
        return self._start(trial_id, slot)  # a slow sampler does not hold up other searches

    def _yields_to_another(self, trial_id: int, slot: int) -> bool:
        """Fail this trial if another search claimed its slot first."""
        rivals = [
            trial
            for trial in self.trials()
            if trial.user_attrs.get(SLOT) == slot and trial.state != TrialState.FAIL
        ]
        if all(trial._trial_id >= trial_id for trial in rivals):
            return False
        ended = Ended.failed("given up", "Another search claimed its slot in the study first.")
        store_failure(self._optuna, trial_id, ended)
        return True

    def trials(self) -> list[FrozenTrial]:
        """Return all trials of the study; they must not be changed."""
        return self._optuna.get_all_trials(self.record.study_id, deepcopy=False)

    def _new_trial(self, slot: int) -> FrozenTrial:
        params: Mapping[str, Any] = {} if self.plan.points is None else self.plan.points[slot]
        last = self.plan.slot(slot).last
        attrs: dict[str, Any] = {}
        system_attrs: dict[str, Any] = {}
        if last is not None and FIXED in last.system_attrs:  # it was enqueued
            system_attrs[FIXED] = last.system_attrs[FIXED]
            attrs = attributes(last.user_attrs)
        return create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions=self._distributions if params else {},
            user_attrs={**attrs, SLOT: slot, SEARCH: self.id, STARTED: now()},
            system_attrs=system_attrs,
        )

    def _queued_trial(self, trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
        """The first enqueued trial; None in a grid, which runs only its own points."""
        if self.plan.points is not None:
            return None
        pending = trials[self.plan.first_open :]
        return next((trial for trial in pending if trial.state == TrialState.WAITING), None)

    def _slot_for(self, queued: FrozenTrial) -> int:
        """Return the slot of an enqueued trial: the next of the budget, or one in addition."""
        if (reserved := queued.user_attrs.get(SLOT)) is not None:  # by a search that died
            return int(reserved)
        unused = self.plan.next_unused()
        return max([QUEUED - 1, *self.plan.slots]) + 1 if unused is None else unused

    def _start(self, trial_id: int, slot: int) -> Task | Answer:
        record, history = self.record, self.plan.slot(slot)
        sampler = samplers.sampler(
            self._sampler,
            record.seed,
            slot,
            several=record.is_multi_objective,
            known=history.params,
        )
        pruner = samplers.pruner(self._pruner, record.steps)
        study, name = self._study(sampler=sampler, pruner=pruner), "A hyperparameter"
        try:
            trial = optuna.Trial(study, trial_id)
            params = dict(trial.params)
            for name in [each for each in self._distributions if each not in params]:
                params[name] = samplers.suggest(trial, name, self._distributions[name])
        except Exception as error:
            if isinstance(error, UpdateFinishedTrialError) or self.storage.unreachable(error):
                raise
            fixed = self._optuna.get_trial(trial_id).system_attrs.get(FIXED, {})
            is_fixed = name in fixed and isinstance(error, ValueError)
            why: Why = "invalid" if is_fixed else "given up"  # enqueued, or the sampler's error
            ended = Ended.failed(why, f"{name} cannot be suggested: {error}")
            store_failure(self._optuna, trial_id, ended)
            if not is_fixed:
                raise
            return "wait"
        task = Task(
            number=trial.number,
            slot=slot,
            seed=samplers.training_seed(record.seed, slot),
            key=f"{record.key}-{trial.number}",
            params=params,
            reported=history.reported,
            user_attrs=attributes(trial.user_attrs),
            system_attrs=dict(trial._cached_frozen_trial.system_attrs),
            started=trial.datetime_start,
        )
        self._running[task.number] = RunningTrial(task, trial, self._claims)
        self._claims += 1
        return task

    def _fail_lost_trials(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Fail the trials of dead searches, and those whose creation was never confirmed."""
        if fail_orphans(
            self._optuna,
            self.record.study_id,
            trials[self.plan.first_open :],
            own=self.id,
            confirmed=self._running,
            leases=self._leases,
        ):
            trials = self.trials()
        self.plan.observe(trials)
        return trials

    # -- requests of a running trial: the verbs of `Channel` ---------------------------------------

    def suggest(self, number: int, name: str, distribution: str) -> Any:
        """Return the value of a hyperparameter.

        Args:
            number: The trial.
            name: The hyperparameter.
            distribution: Optuna's distribution as JSON.

        Raises:
            ArgumentError: It was suggested from an incompatible distribution before.
            TrialLostError: The trial was abandoned.
        """
        wanted = json_to_distribution(distribution)
        try:
            return self._of(number, lambda trial: samplers.suggest(trial, name, wanted))
        except ValueError as error:
            if isinstance(error, TrackerError):
                raise
            raise ArgumentError(f"{name}={wanted} cannot be suggested: {error}") from error

    def report(self, number: int, value: float, step: int) -> None:
        """Store an intermediate value, now or as soon as the storage answers.

        Args:
            number: The trial.
            value: The value.
            step: Its step.

        Raises:
            TrialLostError: The trial was abandoned.
        """
        running = self._trial(number)
        running.reports.append((step, value))
        self._flush_reports(running)

    def prune(self, number: int) -> str | None:
        """Return why a trial should be pruned; None if not, or if the storage does not answer.

        Raises:
            TrialLostError: The trial was abandoned.
        """
        running = self._trial(number)
        if self.record.pruner == "none" or not self._flush_reports(running):
            return None
        try:
            return running.pruned_by(self.record.pruner)
        except UpdateFinishedTrialError as error:
            raise self._abandoned(number) from error
        except Exception as error:
            if not self.storage.unreachable(error):
                raise
            return None

    def set_attr(self, number: int, name: str, value: Any) -> None:
        """Store a user attribute."""
        self._of(number, lambda trial: trial.set_user_attr(name, value))

    def trials_for(self, number: int) -> list[FrozenTrial]:
        """Return all trials of the study to one of them."""
        return self._of(number, lambda trial: self.trials())

    def is_early(self, number: int) -> bool:
        """Return whether a trial is one of this search's first, of which none has ended well."""
        return self._trial(number).index < FIRST and not self._has_succeeded

    def stop(self, number: int) -> None:
        """Start no more trials, at the request of one."""
        self._trial(number)
        self.flag.set()

    def constrain(self, number: int, name: str, value: float) -> None:
        """Store a constraint."""
        self._of(number, lambda trial: trial.set_constraint(name, value))

    def _of(self, number: int, ask: Callable[[optuna.Trial], T]) -> T:
        running = self._trial(number)
        try:
            return self._patiently(lambda: ask(running.trial))
        except UpdateFinishedTrialError as error:
            raise self._abandoned(number) from error

    def _trial(self, number: int) -> RunningTrial:
        if number not in self._running:
            raise self._abandoned(number)
        return self._running[number]

    def _abandoned(self, number: int) -> TrialLostError:
        self._running.pop(number, None)
        return TrialLostError(
            f"Trial {number} was abandoned: it or its search was silent for too long."
        )

    def _flush_reports(self, running: RunningTrial) -> bool:
        """Store pending reports; return whether none is left."""
        if time.monotonic() < self._hold_until:
            return False
        try:
            running.write_reports()
        except UpdateFinishedTrialError as error:
            raise self._abandoned(running.task.number) from error
        except Exception as error:
            if not self.storage.unreachable(error):
                running.reports.popleft()  # or `finish` would fail on it again
                raise
            logger.debug("A report is pending: %s", error)
            self._hold_until = time.monotonic() + _HOLD_SECONDS
            self._leases.forget()
            return False
        return True

    def is_best(self, number: int, ended: Ended) -> bool:
        """Return whether a trial will be the best so far, or on a Pareto front; see `Channel`."""
        trials = list(self._patiently(self.trials))
        trials[number] = copy.copy(trials[number])
        trials[number].state, trials[number].values = TrialState.COMPLETE, ended.values
        return trials[number] in best_trials(trials, self.record.directions)

    def finish(self, number: int, ended: Ended) -> Verdict:
        """Store how a trial ended, waiting for a storage that does not answer.

        Args:
            number: The trial.
            ended: How it ended.

        Returns:
            Whether that was stored, and what follows from it.
        """
        running = self._running.get(number)
        if running is None:
            return Verdict(accepted=False, retry=True)
        slot = running.task.slot
        if ended.why == "died" and (deaths := self.plan.slot(slot).deaths + 1) >= MOST_DEATHS:
            abandoned = f"Slot {slot} is abandoned: its worker died or hung {deaths} times."
            ended = replace(ended, reason=f"{ended.reason} {abandoned}")
            logger.warning("Trial %d of study %s: %s", number, self.record.name, ended.reason)
        try:
            accepted = self._patiently(lambda: self._store_end(running, ended))
        except UpdateFinishedTrialError:
            accepted = False
        finally:
            self._running.pop(number, None)
        trials = self._patiently(self.trials)
        self.plan.observe(trials)
        best = accepted and trials[number] in best_trials(trials, self.record.directions)
        self.on_end(trials[number], best)
        self._ended.append(trials[number])
        self._has_succeeded |= accepted and ended.state != "FAIL"
        return Verdict(accepted=accepted, retry=not self.plan.resolved(slot))

    def _store_end(self, running: RunningTrial, ended: Ended) -> bool:
        """Return whether the trial ended like this, and not because another search failed it."""
        self._hold_until = 0.0
        trial_id = running.trial._trial_id
        frozen = self._optuna.get_trial(trial_id)
        if frozen.state.is_finished():  # an earlier request was executed, but its answer was lost
            return frozen.user_attrs.get(SEARCH) == self.id and frozen.state.name == ended.state
        running.write_reports()
        if ended.state == "FAIL":
            store_failure(self._optuna, trial_id, ended)
        else:
            values = None if ended.values is None else list(ended.values)
            running.trial.study.tell(running.trial, values, TrialState[ended.state])
        return True

    # -- taking part -------------------------------------------------------------------------------

    def enter(self) -> None:
        """Show that this search is alive, before it claims a trial."""
        self._patiently(lambda: self._heart.show(beat=0))

    def beating(self) -> AbstractContextManager[None]:
        """Show in a block that this search is alive, from a thread: samplers may take minutes."""
        return self._heart.beating(self._leases.forget)

    def abandon(self, ended: Ended) -> None:
        """End all running trials of this search."""
        for number in list(self._running):
            self.finish(number, ended)

    def leave(self, status: Status, reason: str | None) -> None:
        """Store how this search ended.

        Args:
            status: The status of the study's run, if no other search is working on it.
            reason: Why it is not FINISHED.
        """
        left = {"status": status, "reason": reason, "stopped": self.flag.is_set}
        self.storage.patiently(lambda: self._heart.show(left=left), patience=self.grace)

    def _patiently(self, do: Callable[[], T]) -> T:
        def attempt() -> T:
            try:
                return do()
            except Exception as error:
                if self.storage.unreachable(error):
                    self._leases.forget()
                raise

        return self.storage.patiently(attempt, self.stopping)
