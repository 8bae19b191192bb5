"""The budget of a study is exact, whichever searches work on it and however trials end."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from tracker.search.plan import ENDED, MOST_DEATHS, SLOT, STARTED, Plan, times
from tracker.search.space import Point

DONE = ["COMPLETE", "PRUNED", "invalid"]
"""Ends that resolve a slot."""
NOT_COUNTED = ["lost", "interrupted", "given up"]
ENDS = [*DONE, "failed", "died", *NOT_COUNTED]


def a_trial(slot: int | None, end: str | None, number: int, x: int = 0) -> FrozenTrial:
    """A trial that ended like `end`; None is running. Without a slot it is from elsewhere."""
    attrs: dict[str, Any] = {} if slot is None else {SLOT: slot}
    state = TrialState.RUNNING
    if end is not None:
        state = TrialState[end] if end in ("COMPLETE", "PRUNED", "WAITING") else TrialState.FAIL
    if state == TrialState.FAIL:
        attrs[ENDED] = {"why": end, "status": "FAILED", "reason": ""}
    trial = create_trial(
        state=state,
        value=1.0 if state == TrialState.COMPLETE else None,
        params={"x": x},
        distributions={"x": IntDistribution(0, 1000)},
        user_attrs=attrs,
    )
    trial.number = number
    return trial


def plan_after(ends: list[str | None], *, retries: int = 0, total: int = 1) -> Plan:
    """A plan that has observed trials of slot 0 with these ends."""
    plan = Plan(retries, total)
    plan.observe([a_trial(0, end, number) for number, end in enumerate(ends)])
    return plan


# -- one slot --------------------------------------------------------------------------------------


def test_slots_are_used_in_order() -> None:
    plan, trials = Plan(0, 3), list[FrozenTrial]()
    for slot in range(3):
        plan.observe(trials)
        assert plan.next_slot() == slot
        trials.append(a_trial(slot, None, slot))
    plan.observe(trials)
    assert plan.next_slot() is None
    assert plan.finished() == 0


@pytest.mark.parametrize(
    ("ends", "retries", "needs_a_trial"),
    [
        *((["failed"] * count, count, True) for count in (0, 1, 3)),
        *((["failed"] * (count + 1), count, False) for count in (0, 1, 3)),
        *((["died"] * (MOST_DEATHS - 1), retries, True) for retries in (0, 100)),
        *((["died"] * MOST_DEATHS, retries, False) for retries in (0, 100)),
        (["died", "failed", "died"], 1, True),  # deaths and failures are counted separately
        *(([end], 5, False) for end in DONE),
        *(([end] * 100, 0, True) for end in NOT_COUNTED),
        ([None], 0, False),  # it is running
        (["failed", None], 1, False),
    ],
)
def test_a_slot_is_tried_until_it_is_done_or_has_no_attempts_left(
    ends: list[str | None], retries: int, needs_a_trial: bool
) -> None:
    plan = plan_after(ends, retries=retries)
    assert plan.next_slot() == (0 if needs_a_trial else None)
    assert plan.resolved(0) == (not needs_a_trial and None not in ends)


def test_a_slot_with_a_running_trial_is_skipped() -> None:
    assert plan_after(["failed", None], retries=1, total=2).next_slot() == 1


def test_a_failure_without_a_reason_counts() -> None:
    """It was stored by another program."""
    trial = create_trial(state=TrialState.FAIL, user_attrs={SLOT: 0})
    trial.number = 0
    plan = Plan(0, 1)
    plan.observe([trial])
    assert plan.next_slot() is None


def test_a_slot_remembers_its_latest_ended_trial() -> None:
    plan = plan_after(["failed", "lost", None], retries=3)
    last = plan.slot(0).last
    assert last is not None
    assert last.number == 1
    assert plan.slot(1).last is None


def test_a_trial_observed_twice_is_counted_once() -> None:
    plan, trials = Plan(1, 1), [a_trial(0, "failed", 0)]
    for _ in range(3):
        plan.observe(trials)
    assert plan.next_slot() == 0


def test_observing_costs_nothing_for_trials_that_ended_before() -> None:
    class Counting(list[FrozenTrial]):
        def __getitem__(self, index: Any) -> Any:
            item = super().__getitem__(index)
            reads.append(len(item) if isinstance(index, slice) else 1)
            return item

    reads: list[int] = []
    plan = Plan(0, 200)
    trials = Counting(a_trial(slot, "COMPLETE", slot) for slot in range(100))
    plan.observe(trials)
    reads.clear()
    trials.append(a_trial(100, None, 100))
    plan.observe(trials)
    assert sum(reads) <= 3
    assert plan.next_slot() == 101
    assert plan.finished() == 100


# -- trials from elsewhere -------------------------------------------------------------------------

POINTS: list[Point] = [{"x": 0}, {"x": 1}, {"x": 2}]


@pytest.mark.parametrize(
    ("points", "end", "x", "resolved"),
    [
        (POINTS, "COMPLETE", 1, [1]),
        (POINTS, "COMPLETE", 7, []),  # not a point of the grid
        *((POINTS, end, 1, []) for end in ("PRUNED", "failed", "WAITING", None)),
        (None, "COMPLETE", 1, []),
    ],
)
def test_only_a_complete_trial_at_a_point_of_a_grid_uses_up_a_slot(
    points: list[Point] | None, end: str | None, x: int, resolved: list[int]
) -> None:
    plan = Plan(0, 3, points)
    plan.observe([a_trial(None, end, 0, x=x)])
    assert [slot for slot in range(3) if plan.resolved(slot)] == resolved
    assert plan.finished() == len(resolved)
    assert plan.next_slot() == 0


def test_a_slot_beyond_the_budget_does_not_count_for_it() -> None:
    trials = [a_trial(3, "COMPLETE", 0), a_trial(4, None, 1)]
    small, large = Plan(0, 3), Plan(0, 4)
    for plan in (small, large):
        plan.observe(trials)
    assert (small.finished(), small.next_slot()) == (0, 0)
    assert large.finished() == 1


# -- any number of searches, and any sequence of events -------------------------------------------


class Searches(RuleBasedStateMachine):
    """Searches that share a study: each claims under a lock, and trials end at any time."""

    @initialize(
        total=st.integers(1, 5),
        retries=st.integers(0, 2),
        is_grid=st.booleans(),
        searches=st.integers(1, 3),
    )
    def begin(self, total: int, retries: int, is_grid: bool, searches: int) -> None:
        self.total, self.retries, self.is_grid = total, retries, is_grid
        self.storage: list[FrozenTrial] = []
        self.ends: dict[int, str] = {}
        self.plans = [self.a_plan() for _ in range(searches)]

    def a_plan(self) -> Plan:
        """The plan of a search that starts now."""
        points: list[Point] = [{"x": x} for x in range(self.total)]
        return Plan(self.retries, self.total, points if self.is_grid else None)

    # The expected state, computed without a plan.

    def trials_of(self, slot: int) -> list[FrozenTrial]:
        return [trial for trial in self.storage if trial.user_attrs.get(SLOT) == slot]

    def imported(self, slot: int) -> bool:
        return self.is_grid and any(
            SLOT not in trial.user_attrs and trial.params["x"] == slot for trial in self.storage
        )

    def running_numbers(self) -> list[int]:
        return [t.number for t in self.storage if t.state == TrialState.RUNNING]

    def are_enough(self, ends: list[str]) -> bool:
        count = Counter(ends)
        return (
            any(count[end] for end in DONE)
            or count["failed"] > self.retries
            or count["died"] >= MOST_DEATHS
        )

    # Events.

    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        plan = data.draw(st.sampled_from(self.plans))
        plan.observe(self.storage)
        slot = plan.next_slot()
        if slot is None:
            assert self.running_numbers() or plan.finished() == self.total
            return
        assert not self.imported(slot)
        self.storage.append(a_trial(slot, None, len(self.storage), x=slot))

    @precondition(lambda self: self.running_numbers())
    @rule(data=st.data(), end=st.sampled_from(ENDS))
    def end(self, data: st.DataObject, end: str) -> None:
        number = data.draw(st.sampled_from(self.running_numbers()))
        slot = self.storage[number].user_attrs[SLOT]
        self.storage[number] = a_trial(slot, end, number, x=slot)
        self.ends[number] = end

    @precondition(lambda self: self.running_numbers())
    @rule(data=st.data(), times=st.integers(1, MOST_DEATHS))
    def keep_dying(self, data: st.DataObject, times: int) -> None:
        """A slot that kills one worker after the other."""
        slot = self.storage[data.draw(st.sampled_from(self.running_numbers()))].user_attrs[SLOT]
        for _ in range(times):
            number = next(t.number for t in self.trials_of(slot) if t.state == TrialState.RUNNING)
            self.storage[number] = a_trial(slot, "died", number, x=slot)
            self.ends[number] = "died"
            plan = self.plans[0]
            plan.observe(self.storage)
            if plan.resolved(slot):
                return
            self.storage.append(a_trial(slot, None, len(self.storage), x=slot))

    @rule(x=st.integers(0, 6), end=st.sampled_from(["COMPLETE", "PRUNED", "WAITING"]))
    def import_a_trial(self, x: int, end: str) -> None:
        if end == "COMPLETE" or not self.is_grid:
            self.storage.append(a_trial(None, end, len(self.storage), x=x))

    @rule(more=st.integers(1, 2))
    def raise_the_budget(self, more: int) -> None:
        """All searches end, and new ones continue: only the new slots are unresolved."""
        before = [slot for slot in range(self.total) if self.fresh_plan().resolved(slot)]
        self.total += more
        self.plans = [self.a_plan() for _ in self.plans]
        after = self.fresh_plan()
        assert [slot for slot in range(self.total - more) if after.resolved(slot)] == before
        new = [slot for slot in range(self.total - more, self.total) if not self.imported(slot)]
        assert not any(map(after.resolved, new))

    def fresh_plan(self) -> Plan:
        """A plan that observes all trials for the first time."""
        plan = self.a_plan()
        plan.observe(self.storage)
        return plan

    # Invariants.

    @invariant()
    def a_slot_has_at_most_one_running_trial(self) -> None:
        running = Counter(
            self.storage[number].user_attrs[SLOT] for number in self.running_numbers()
        )
        assert all(count == 1 for count in running.values())

    @invariant()
    def a_slot_has_no_superfluous_trials(self) -> None:
        for slot in range(self.total):
            numbers = [trial.number for trial in self.trials_of(slot)]
            ends = [self.ends[number] for number in numbers[:-1]]  # only the last one may run
            assert not self.are_enough(ends)

    @invariant()
    def a_slot_is_resolved_once_it_has_enough_trials(self) -> None:
        plan = self.fresh_plan()
        for slot in range(self.total):
            ends = [self.ends[t.number] for t in self.trials_of(slot) if t.number in self.ends]
            assert plan.resolved(slot) == (self.are_enough(ends) or self.imported(slot))
        done = [plan.resolved(slot) for slot in range(self.total)]
        running = {self.storage[number].user_attrs[SLOT] for number in self.running_numbers()}
        pending = [slot for slot in range(self.total) if not done[slot] and slot not in running]
        assert plan.finished() == sum(done)
        assert plan.next_slot() == (pending[0] if pending else None)

    @invariant()
    def an_old_and_a_fresh_plan_agree(self) -> None:
        fresh = self.fresh_plan()
        for plan in self.plans:
            plan.observe(self.storage)
            assert plan.next_slot() == fresh.next_slot()
            assert plan.finished() == fresh.finished()
            for slot in range(self.total):
                assert plan.resolved(slot) == fresh.resolved(slot)
                if not fresh.resolved(slot):
                    assert plan.slot(slot) == fresh.slot(slot)

    def teardown(self) -> None:
        """Complete the study."""
        if not hasattr(self, "plans"):
            return
        for number in self.running_numbers():
            slot = self.storage[number].user_attrs[SLOT]
            self.storage[number] = a_trial(slot, "COMPLETE", number, x=slot)
            self.ends[number] = "COMPLETE"
        remaining = self.total - self.fresh_plan().finished()
        for _ in range(remaining):
            plan = self.fresh_plan()
            slot_or_none = plan.next_slot()
            assert slot_or_none is not None
            number = len(self.storage)
            self.storage.append(a_trial(slot_or_none, "COMPLETE", number, x=slot_or_none))
            self.ends[number] = "COMPLETE"
        self.check_the_end(self.fresh_plan())

    def check_the_end(self, plan: Plan) -> None:
        assert plan.finished() == self.total
        assert plan.next_slot() is None
        for slot in range(self.total):
            ends = Counter(self.ends[trial.number] for trial in self.trials_of(slot))
            if sum(ends[end] for end in DONE) == 1 or self.imported(slot):
                continue
            assert sum(ends[end] for end in DONE) == 0
            assert ends["failed"] == self.retries + 1 or ends["died"] == MOST_DEATHS


TestSearches = Searches.TestCase
TestSearches.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)


@pytest.mark.parametrize("hours", [0, 5, -8])
def test_a_trial_of_a_machine_in_another_time_zone_has_its_true_times(hours: int) -> None:
    there = datetime(2026, 11, 30, 12) + timedelta(hours=hours)  # Optuna stores no zone
    trial = create_trial(value=1.0, user_attrs={STARTED: 1_000})
    trial.datetime_start, trial.datetime_complete = there, there + timedelta(seconds=30)
    assert times(trial) == (1_000, 31_000)
