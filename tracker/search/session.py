"""One search: takes trials from the study, answers their questions, and says how they ended.

All that touches the storage goes through here, in the one process that runs the search; its
workers ask over pipes. Several searches, on several machines, share the storage.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from tracker.errors import ArgumentError, TrackerError
from tracker.search import sampler as samplers
from tracker.search.leases import BEATS, PREFIX, Leases, active_searches, this_process
from tracker.search.plan import ENDED, MOST_DEATHS, SEARCH, SLOT, Plan, Why
from tracker.search.record import Record
from tracker.search.space import Space, distributions, grid, identity
from tracker.search.storage import LOCK_SECONDS, Storage
from tracker.statuses import Status

_HOLD_SECONDS = 2.0  # after a storage did not answer, before it is asked again on the way

QUEUED = 1_000_000
"""The first slot of trials that somebody enqueued with Optuna: they are on top of the budget."""

logger = logging.getLogger(__name__)

Answer = Literal["wait", "done"]
T = TypeVar("T")


class TrialLostError(TrackerError):
    """The trial was given up meanwhile: its process was silent for too long."""


@dataclass(frozen=True)
class Task:
    """A trial to run."""

    number: int
    """Optuna's number of the trial."""
    slot: int
    """Its place in the study, which its seeds follow from."""
    seed: int
    """The seed of its training."""
    key: str
    """The key of its run."""
    params: Mapping[str, Any]
    """What is suggested already: all of the declared space."""
    queued: bool = False
    """Whether it waited in the storage, and may have a run."""
    reported: Mapping[int, float] = field(default_factory=dict)
    """What earlier attempts reported, by step."""


@dataclass(frozen=True)
class Ended:
    """How a trial ended."""

    state: Literal["COMPLETE", "PRUNED", "FAIL"]
    values: Sequence[float] | None = None
    why: Why | None = None
    """Of a trial that FAILed."""
    status: Status = "FINISHED"
    """The status of its run."""
    reason: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What the study makes of an ended trial."""

    accepted: bool
    """Whether it counts; not so for one that was given up before."""
    best: bool = False
    """Whether it is the best so far, or one of the best where there are several objectives."""
    again: bool = False
    """Whether its slot is tried again."""


@dataclass
class _Live:
    task: Task
    trial: optuna.Trial
    outbox: deque[tuple[int, float]] = field(default_factory=deque)


class Search:
    """Takes part in a study until it is done. Not for several threads but where it says so."""

    def __init__(
        self,
        storage: Storage,
        record: Record,
        *,
        grace: float,
    ) -> None:
        """`grace` is how long another search may be silent, in seconds."""
        self.on_end: Callable[[FrozenTrial], None] = lambda trial: None
        """Told of each trial's end."""
        self.stopping: Callable[[], bool] = lambda: False
        """Whether to wait no longer for a storage that does not answer."""
        self.id = uuid.uuid4().hex[:8]
        self.storage = storage
        self.record = record
        self.grace = grace
        self._optuna = storage.optuna
        self._study_id = record.study_id
        spaces = record.spaces
        self._space: Space | None = spaces[-1] if spaces else None
        is_grid = record.sampler == "grid"
        self._points = grid(spaces) if is_grid else None
        self.total = budget(record, self._points)
        """How many slots the study has."""
        self._distributions = distributions(self._space or {}, grid=is_grid)
        self.plan = Plan(record.retries, _slots(self._points))
        self._leases = Leases(grace)
        self._live: dict[int, _Live] = {}
        self._silent_until = 0.0
        self._beats = 0
        self._next_beat = 0.0
        self._me = this_process()
        self._directions = [StudyDirection[d.upper()] for d in record.directions]

    # -- taking trials ---------------------------------------------------------------------

    def claim(self) -> Task | Answer:
        """The next trial to run; `wait` while others run the last ones, `done` after that."""

        def claim() -> Task | Answer:
            try:
                return self._claim()
            except UpdateFinishedTrialError:  # we were stopped, and somebody else has ended it
                return "wait"
            except Exception as error:
                if self.storage.unreachable(error):
                    self._leases.forget()
                raise

        return self._patiently(claim)

    def _claim(self) -> Task | Answer:
        began = time.monotonic()
        with self.storage.lock():
            trials = self._reap(self._trials())
            slot = self.plan.again(QUEUED)
            if slot is None and (waiting := self._waiting(trials)) is not None:
                slot = max([QUEUED - 1, *self.plan.slots]) + 1
                if not self._pop(waiting, slot):
                    return "wait"
                return self._start(waiting._trial_id, slot, queued=True)
            if slot is None and (slot := self.plan.free(self.total)) is None:
                return "done" if self.plan.finished(self.total) == self.total else "wait"
            trial_id = self._optuna.create_new_trial(self._study_id, self._template(slot))
            # PostgreSQL forgets a lock with its connection; elsewhere its holder may be stopped.
            unsure = (
                self.storage.kind == "postgresql" or time.monotonic() > began + LOCK_SECONDS / 2
            )
            if unsure and self._is_second(trial_id, slot):
                return "wait"
            return self._start(trial_id, slot)

    def _is_second(self, trial_id: int, slot: int) -> bool:
        """Give a trial up whose slot somebody else has: one of us was stopped, and not waited for.

        The first one has it; the other sees that when it goes on.
        """
        others = [
            trial
            for trial in self._trials()
            if trial.user_attrs.get(SLOT) == slot and trial.state != TrialState.FAIL
        ]
        if all(trial._trial_id >= trial_id for trial in others):
            return False
        reason = "Another search took its place in the study."
        fail(self._optuna, trial_id, Ended("FAIL", why="given up", status="FAILED", reason=reason))
        return True

    def _trials(self) -> list[FrozenTrial]:
        return self._optuna.get_all_trials(self._study_id, deepcopy=False)

    def _template(self, slot: int) -> FrozenTrial:
        params: Mapping[str, Any] = {} if self._points is None else self._points[slot]
        last = self.plan.slot(slot).last
        fixed = None if last is None or slot < QUEUED else last.system_attrs.get("fixed_params")
        return create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions=self._distributions if params else {},
            user_attrs={SLOT: slot, SEARCH: self.id},
            system_attrs={} if fixed is None else {"fixed_params": fixed},
        )

    def _waiting(self, trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
        """A trial that somebody enqueued with Optuna; a grid takes none but its points."""
        if self._points is not None:
            return None
        open_ = trials[self.plan.ended :]
        return next((trial for trial in open_ if trial.state == TrialState.WAITING), None)

    def _pop(self, trial: FrozenTrial, slot: int) -> bool:
        self._optuna.set_trial_user_attr(trial._trial_id, SLOT, slot)
        self._optuna.set_trial_user_attr(trial._trial_id, SEARCH, self.id)
        return self._optuna.set_trial_state_values(trial._trial_id, TrialState.RUNNING)

    def _start(self, trial_id: int, slot: int, *, queued: bool = False) -> Task | Answer:
        record = self.record
        study = optuna.Study(
            record.name,
            self._optuna,
            samplers.sampler(
                record.sampler,
                record.seed,
                slot,
                several=len(record.directions) > 1,
                known=self.plan.slot(slot).params,
            ),
            samplers.pruner(record.pruner, record.steps),
        )
        trial = optuna.Trial(study, trial_id)
        params = dict(trial.params)
        for name, distribution in self._distributions.items():
            if name not in params:
                try:
                    params[name] = _suggest(trial, name, distribution)
                except ValueError as error:  # it was enqueued with what is not in the space
                    reason = f"{name} cannot be suggested: {error}"
                    ended = Ended("FAIL", why="invalid", status="FAILED", reason=reason)
                    fail(self._optuna, trial_id, ended)
                    return "wait"
        task = Task(
            number=trial.number,
            slot=slot,
            seed=samplers.training_seed(record.seed, slot),
            key=f"{record.key}-{trial.number}",
            params=params,
            queued=queued,
            reported=self.plan.slot(slot).reported,
        )
        self._live[task.number] = _Live(task, trial)
        return task

    # -- while a trial runs ----------------------------------------------------------------

    def suggest(self, number: int, name: str, distribution: BaseDistribution) -> Any:
        """The value of a hyperparameter of a trial.

        Raises ArgumentError where it was suggested before as something else, TrialLostError for a
        trial that was given up.
        """
        try:
            return self._of(number, lambda trial: _suggest(trial, name, distribution))
        except ValueError as error:
            if isinstance(error, TrackerError):
                raise
            raise ArgumentError(f"{name}={distribution} cannot be suggested: {error}") from error

    def report(self, number: int, value: float, step: int) -> None:
        """Store an intermediate value, now or as soon as the storage answers."""
        live = self._running(number)
        live.outbox.append((step, value))
        self._flush_reports(live)

    def prune(self, number: int) -> str | None:
        """Why a trial is to be pruned, None where it is not, or the storage does not answer."""
        live = self._running(number)
        if self.record.pruner == "none" or not self._flush_reports(live):
            return None
        try:
            if not live.trial.should_prune():
                return None
            frozen = self._optuna.get_trial(live.trial._trial_id)
        except UpdateFinishedTrialError as error:
            raise self._given_up(number) from error
        except Exception as error:
            if not self.storage.unreachable(error):
                raise
            return None
        step = frozen.last_step
        assert step is not None
        value = frozen.intermediate_values[step]
        return f"The {self.record.pruner} pruner stopped it at step {step}, value {value:g}."

    def set_attr(self, number: int, name: str, value: Any) -> None:
        """Set an attribute of the user's."""
        self._of(number, lambda trial: trial.set_user_attr(name, value))

    def constrain(self, number: int, name: str, value: float) -> None:
        """Set a constraint; the trial is feasible where none is above 0."""
        self._of(number, lambda trial: trial.set_constraint(name, value))

    def _of(self, number: int, ask: Callable[[optuna.Trial], T]) -> T:
        """What a running trial answers; TrialLostError where somebody else has ended it."""
        live = self._running(number)
        try:
            return self._patiently(lambda: ask(live.trial))
        except UpdateFinishedTrialError as error:
            raise self._given_up(number) from error

    def _running(self, number: int) -> _Live:
        if number not in self._live:
            raise self._given_up(number)
        return self._live[number]

    def _given_up(self, number: int) -> TrialLostError:
        self._live.pop(number, None)
        return TrialLostError(f"Trial {number} was given up: nothing was heard of it for too long.")

    def _flush_reports(self, live: _Live) -> bool:
        """Store what was reported; whether that is done."""
        if time.monotonic() < self._silent_until:
            return False
        while live.outbox:
            step, value = live.outbox[0]
            try:
                live.trial.report(value, step)
            except UpdateFinishedTrialError as error:
                raise self._given_up(live.task.number) from error
            except Exception as error:
                if not self.storage.unreachable(error):
                    live.outbox.popleft()  # the trial's end must not meet it again
                    raise
                logger.debug("A report waits: %s", error)
                self._silent_until = time.monotonic() + _HOLD_SECONDS
                self._leases.forget()
                return False
            live.outbox.popleft()
        return True

    # -- the end of a trial ----------------------------------------------------------------

    def finish(self, number: int, ended: Ended) -> Verdict:
        """Store how a trial ended; waits for a storage that does not answer."""
        live = self._live.get(number)
        if live is None:
            return Verdict(accepted=False, again=True)
        slot = live.task.slot
        if ended.why == "died" and (deaths := self.plan.slot(slot).deaths + 1) >= MOST_DEATHS:
            given_up = f"Slot {slot} is given up: its worker died or fell silent {deaths} times."
            ended = replace(ended, reason=f"{ended.reason} {given_up}")
            logger.warning("Trial %d of study %s: %s", number, self.record.name, ended.reason)

        def tell() -> bool:
            self._silent_until = 0.0
            frozen = self._optuna.get_trial(live.trial._trial_id)
            if frozen.state.is_finished():  # by us, but the answer was lost; or by others
                ours = frozen.user_attrs.get(SEARCH) == self.id
                return ours and frozen.state.name == ended.state
            while live.outbox:
                step, value = live.outbox[0]
                live.trial.report(value, step)
                live.outbox.popleft()
            self._tell(live, ended)
            return True

        try:
            accepted = self._patiently(tell)
        except UpdateFinishedTrialError:
            accepted = False
        finally:
            self._live.pop(number, None)
        trials = self._patiently(self._trials)
        self.plan.observe(trials)
        own = next((t for t in reversed(trials) if t.number == number), None)
        best = accepted and own is not None and is_best(own, trials, self._directions)
        again = not self.plan.resolved(slot)
        if own is not None:
            self.on_end(own)
        return Verdict(accepted=accepted, best=best, again=again)

    def _tell(self, live: _Live, ended: Ended) -> None:
        trial_id = live.trial._trial_id
        if ended.state == "FAIL":
            fail(self._optuna, trial_id, ended)
        else:
            values = None if ended.values is None else list(ended.values)
            live.trial.study.tell(live.trial, values, TrialState[ended.state])

    # -- who lives -------------------------------------------------------------------------

    def beat(self, *, force: bool = False) -> None:
        """Show that this search lives, when it is time to; safe in a thread of its own."""
        if time.monotonic() < self._next_beat and not force:
            return
        self._next_beat = time.monotonic() + self.grace / BEATS
        self._beats += 1
        try:
            self._show({"beat": self._beats})
        except Exception as error:
            if not self.storage.unreachable(error):
                raise
            logger.debug("A beat is missing: %s", error)
            self._leases.forget()

    def leave(self, status: Status, reason: str | None) -> None:
        """Say how this search ended."""
        left = {"status": status, "reason": reason}
        self.storage.patiently(lambda: self._show({"left": left}), patience=self.grace)

    def enter(self) -> None:
        """Show that this search lives; nobody takes it for lost from here on."""
        self._patiently(lambda: self._show({"beat": 0}))

    def _show(self, more: Mapping[str, Any]) -> None:
        info = {**self._me, "grace": self.grace, "time": time.time(), **more}
        self._optuna.set_study_user_attr(self._study_id, f"{PREFIX}{self.id}", info)

    def _patiently(self, do: Callable[[], T]) -> T:
        return self.storage.patiently(do, self.stopping)

    def abandon(self, ended: Ended) -> None:
        """Give up what this search runs: it ends in the middle of things."""
        for number in list(self._live):
            self.finish(number, ended)

    def _reap(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Fail the trials of dead searches, and such as we never got the answer to; all of now."""
        left = [
            t
            for t in trials[self.plan.ended :]
            if t.state == TrialState.RUNNING
            and SEARCH in t.user_attrs
            and t.number not in self._live
        ]
        if any(t.user_attrs[SEARCH] != self.id for t in left):
            attrs = self._optuna.get_study_user_attrs(self._study_id)
            left = [
                t
                for t in left
                if t.user_attrs[SEARCH] == self.id
                or not self._leases.lives(t.user_attrs[SEARCH], attrs)
            ]
        for trial in left:
            fail(self._optuna, trial._trial_id, lost(trial, self.id))
        trials = self._trials() if left else trials
        self.plan.observe(trials)
        return trials


def reap(storage: Storage, record: Record, dead: Callable[[str], bool]) -> list[FrozenTrial]:
    """Fail the trials of searches that are `dead`, and mark those as gone; returns the trials."""
    with storage.lock():
        found = [
            trial
            for trial in storage.optuna.get_all_trials(record.study_id, deepcopy=False)
            if trial.state == TrialState.RUNNING
            and (by := trial.user_attrs.get(SEARCH)) is not None
            and dead(by)
        ]
        for trial in found:
            fail(storage.optuna, trial._trial_id, lost(trial, ""))
        attrs = storage.optuna.get_study_user_attrs(record.study_id)
        for search in active_searches(attrs):
            if dead(search):
                left = {"status": "FAILED", "reason": "The process that ran the study was lost."}
                info = {**attrs[f"{PREFIX}{search}"], "time": time.time(), "left": left}
                storage.optuna.set_study_user_attr(record.study_id, f"{PREFIX}{search}", info)
    return found


def lost(trial: FrozenTrial, by: str) -> Ended:
    """What becomes of a trial whose search is dead."""
    if trial.user_attrs[SEARCH] == by:  # created, but the answer was lost
        return Ended("FAIL", why="given up", status="FAILED", reason="The storage did not answer.")
    reason = "The process that ran its search ended without saying how, or was silent for too long."
    return Ended("FAIL", why="lost", status="FAILED", reason=reason)


def fail(storage: optuna.storages.BaseStorage, trial_id: int, ended: Ended) -> None:
    """Store that a trial failed, and why; nothing where somebody else has ended it."""
    why = {"why": ended.why, "status": ended.status, "reason": (ended.reason or "")[:2000]}
    try:
        storage.set_trial_user_attr(trial_id, ENDED, why)
        storage.set_trial_state_values(trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return


def budget(record: Record, points: Sequence[Any] | None) -> int:
    """How many slots a study has, whose grid has `points`."""
    if points is None:
        return record.trials or 0
    return min(record.trials or len(points), len(points))


def is_best(
    trial: FrozenTrial, trials: Iterable[FrozenTrial], directions: Sequence[StudyDirection]
) -> bool:
    """Whether no other complete trial is as good in all and better in one objective.

    Of equal ones the first is the best. A trial that breaks a constraint is none.
    """
    if trial.state != TrialState.COMPLETE or not feasible(trial):
        return False
    ours = _losses(trial, directions)
    for other in trials:
        if other.number == trial.number or other.state != TrialState.COMPLETE:
            continue
        if not feasible(other):
            continue
        theirs = _losses(other, directions)
        if all(a <= b for a, b in zip(theirs, ours, strict=True)) and (
            theirs != ours or other.number < trial.number
        ):
            return False
    return True


def feasible(trial: FrozenTrial) -> bool:
    """Whether a trial keeps all its constraints."""
    return all(value <= 0.0 for value in trial.constraints.values())


def _losses(trial: FrozenTrial, directions: Sequence[StudyDirection]) -> list[float]:
    return [
        -value if direction == StudyDirection.MAXIMIZE else value
        for value, direction in zip(trial.values, directions, strict=True)
    ]


def _suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case FloatDistribution():
            return trial.suggest_float(
                name,
                distribution.low,
                distribution.high,
                step=distribution.step,
                log=distribution.log,
            )
        case IntDistribution():
            return trial.suggest_int(
                name,
                distribution.low,
                distribution.high,
                step=distribution.step,
                log=distribution.log,
            )
        case CategoricalDistribution():
            return trial.suggest_categorical(name, distribution.choices)
    raise ArgumentError(f"{name}={distribution} is not a distribution that Optuna suggests from.")


def _slots(points: Sequence[Mapping[str, Any]] | None) -> dict[tuple[Any, ...], int] | None:
    if points is None:
        return None
    return {identity(point): slot for slot, point in enumerate(points)}
