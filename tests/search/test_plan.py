"""The budget of a study is exact, whoever works on it and whatever happens to its trials."""

from __future__ import annotations

from collections import Counter
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

from tracker.search.plan import ENDED, MOST_DEATHS, SLOT, Plan
from tracker.search.space import identity

DONE = ["COMPLETE", "PRUNED", "invalid"]
"""Ends after which a slot needs no more trials."""
NOT_COUNTED = ["lost", "interrupted", "given up"]
ENDS = [*DONE, "failed", "died", *NOT_COUNTED]


def a_trial(slot: int | None, end: str | None, number: int, x: int = 0) -> FrozenTrial:
    """A trial that ended as `end` says; None is running. Without a slot it is not of ours."""
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


def planned(ends: list[str | None], retries: int = 0) -> Plan:
    """A plan that has seen the trials of slot 0."""
    plan = Plan(retries)
    plan.observe([a_trial(0, end, number) for number, end in enumerate(ends)])
    return plan


# -- one slot --------------------------------------------------------------------------------------


def test_slots_are_taken_in_order() -> None:
    plan, trials = Plan(0), list[FrozenTrial]()
    for slot in range(3):
        plan.observe(trials)
        assert plan.free(3) == slot
        trials.append(a_trial(slot, None, slot))
    plan.observe(trials)
    assert plan.free(3) is None
    assert plan.finished(3) == 0


@pytest.mark.parametrize("end", DONE)
def test_a_slot_is_done_after_one_trial_that_tells_its_value_or_that_it_has_none(end: str) -> None:
    plan = planned([end], retries=5)
    assert plan.resolved(0)
    assert plan.free(1) is None


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_slot_is_tried_again_as_often_as_retries_says(retries: int) -> None:
    assert planned(["failed"] * retries, retries).free(1) == 0
    assert planned(["failed"] * (retries + 1), retries).free(1) is None


@pytest.mark.parametrize("retries", [0, 100])
def test_a_slot_whose_process_keeps_dying_is_given_up(retries: int) -> None:
    assert planned(["died"] * (MOST_DEATHS - 1), retries).free(1) == 0
    assert planned(["died"] * MOST_DEATHS, retries).free(1) is None


def test_deaths_are_no_failures() -> None:
    assert planned(["died", "failed", "died"], retries=1).free(1) == 0


@pytest.mark.parametrize("end", NOT_COUNTED)
def test_what_was_not_the_slot_s_fault_is_not_counted(end: str) -> None:
    assert planned([end] * 100).free(1) == 0


def test_a_trial_that_somebody_else_failed_counts_as_a_failure() -> None:
    trial = create_trial(state=TrialState.FAIL, user_attrs={SLOT: 0})
    trial.number = 0
    plan = Plan(0)
    plan.observe([trial])
    assert plan.free(1) is None


def test_nobody_takes_a_slot_that_somebody_works_on() -> None:
    assert planned([None]).free(1) is None
    assert planned(["failed", None], retries=1).free(2) == 1


def test_the_last_trial_of_a_slot_that_ended_is_known() -> None:
    plan = planned(["failed", "lost", None], retries=3)
    last = plan.slot(0).last
    assert last is not None
    assert last.number == 1
    assert plan.slot(1).last is None


def test_the_same_trial_is_counted_once() -> None:
    plan, trials = Plan(1), [a_trial(0, "failed", 0)]
    for _ in range(3):
        plan.observe(trials)
    assert plan.free(1) == 0


def test_trials_that_ended_are_not_looked_at_again() -> None:
    class Looked(list[FrozenTrial]):
        def __getitem__(self, index: Any) -> Any:
            found = super().__getitem__(index)
            looks.append(len(found) if isinstance(index, slice) else 1)
            return found

    looks: list[int] = []
    plan = Plan(0)
    trials = Looked(a_trial(slot, "COMPLETE", slot) for slot in range(100))
    plan.observe(trials)
    looks.clear()
    trials.append(a_trial(100, None, 100))
    plan.observe(trials)
    assert sum(looks) <= 3
    assert plan.free(200) == 101
    assert plan.finished(200) == 100


# -- trials that are not of ours -------------------------------------------------------------------

POINTS = {identity({"x": x}): x for x in range(3)}


def test_a_point_of_the_grid_that_is_complete_elsewhere_is_done() -> None:
    plan = Plan(0, POINTS)
    plan.observe([a_trial(None, "COMPLETE", 0, x=1)])
    assert [plan.resolved(slot) for slot in range(3)] == [False, True, False]
    assert plan.free(3) == 0


@pytest.mark.parametrize("end", ["PRUNED", "failed", "WAITING", None])
def test_a_point_that_is_not_complete_elsewhere_is_to_be_done(end: str | None) -> None:
    plan = Plan(0, POINTS)
    plan.observe([a_trial(None, end, 0, x=1)])
    assert plan.finished(3) == 0


def test_what_is_no_point_of_the_grid_is_none_of_its_slots() -> None:
    plan = Plan(0, POINTS)
    plan.observe([a_trial(None, "COMPLETE", 0, x=7)])
    assert plan.finished(3) == 0


def test_without_a_grid_other_trials_take_nothing_of_the_budget() -> None:
    plan = Plan(0)
    plan.observe([a_trial(None, "COMPLETE", number, x=number) for number in range(3)])
    assert plan.finished(3) == 0


def test_a_slot_beyond_the_budget_takes_nothing_of_it() -> None:
    plan = Plan(0)
    plan.observe([a_trial(3, "COMPLETE", 0), a_trial(4, None, 1)])
    assert plan.finished(3) == 0
    assert plan.free(3) == 0
    assert plan.finished(4) == 1


# -- any number of searches, and anything that happens ---------------------------------------------


class Searches(RuleBasedStateMachine):
    """Searches that share a study. Each claims with the storage locked; trials end at any time."""

    @initialize(
        total=st.integers(1, 5),
        retries=st.integers(0, 2),
        in_a_grid=st.booleans(),
        searches=st.integers(1, 3),
    )
    def begin(self, total: int, retries: int, in_a_grid: bool, searches: int) -> None:
        self.total, self.retries, self.in_a_grid = total, retries, in_a_grid
        self.storage: list[FrozenTrial] = []
        self.ends: dict[int, str] = {}
        self.plans = [self.a_plan() for _ in range(searches)]

    def a_plan(self) -> Plan:
        """The plan of a search that begins now."""
        points = {identity({"x": x}): x for x in range(self.total)} if self.in_a_grid else None
        return Plan(self.retries, points)

    # What there is, seen without the plan.

    def of(self, slot: int) -> list[FrozenTrial]:
        return [trial for trial in self.storage if trial.user_attrs.get(SLOT) == slot]

    def imported(self, slot: int) -> bool:
        return self.in_a_grid and any(
            SLOT not in trial.user_attrs and trial.params["x"] == slot for trial in self.storage
        )

    def running(self) -> list[int]:
        return [t.number for t in self.storage if t.state == TrialState.RUNNING]

    def is_enough(self, ends: list[str]) -> bool:
        count = Counter(ends)
        return (
            any(count[end] for end in DONE)
            or count["failed"] > self.retries
            or count["died"] >= MOST_DEATHS
        )

    # What happens.

    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        plan = data.draw(st.sampled_from(self.plans))
        plan.observe(self.storage)
        slot = plan.free(self.total)
        if slot is None:
            assert self.running() or plan.finished(self.total) == self.total
            return
        assert not self.imported(slot)
        self.storage.append(a_trial(slot, None, len(self.storage), x=slot))

    @precondition(lambda self: self.running())
    @rule(data=st.data(), end=st.sampled_from(ENDS))
    def end(self, data: st.DataObject, end: str) -> None:
        number = data.draw(st.sampled_from(self.running()))
        slot = self.storage[number].user_attrs[SLOT]
        self.storage[number] = a_trial(slot, end, number, x=slot)
        self.ends[number] = end

    @precondition(lambda self: self.running())
    @rule(data=st.data(), times=st.integers(1, MOST_DEATHS))
    def keep_dying(self, data: st.DataObject, times: int) -> None:
        """A slot that kills its process, one time after the other."""
        slot = self.storage[data.draw(st.sampled_from(self.running()))].user_attrs[SLOT]
        for _ in range(times):
            number = next(t.number for t in self.of(slot) if t.state == TrialState.RUNNING)
            self.storage[number] = a_trial(slot, "died", number, x=slot)
            self.ends[number] = "died"
            plan = self.plans[0]
            plan.observe(self.storage)
            if plan.resolved(slot):
                return
            self.storage.append(a_trial(slot, None, len(self.storage), x=slot))

    @rule(x=st.integers(0, 6), end=st.sampled_from(["COMPLETE", "PRUNED", "WAITING"]))
    def add_from_elsewhere(self, x: int, end: str) -> None:
        if end == "COMPLETE" or not self.in_a_grid:
            self.storage.append(a_trial(None, end, len(self.storage), x=x))

    @rule(more=st.integers(1, 2))
    def raise_the_budget(self, more: int) -> None:
        """All searches end, others go on: what was done is, and only the new slots are not."""
        before = [slot for slot in range(self.total) if self.seen().resolved(slot)]
        self.total += more
        self.plans = [self.a_plan() for _ in self.plans]
        after = self.seen()
        assert [slot for slot in range(self.total - more) if after.resolved(slot)] == before
        new = [slot for slot in range(self.total - more, self.total) if not self.imported(slot)]
        assert not any(map(after.resolved, new))

    def seen(self) -> Plan:
        """A plan that sees all trials for the first time."""
        plan = self.a_plan()
        plan.observe(self.storage)
        return plan

    # What always holds.

    @invariant()
    def no_two_trials_of_a_slot_run(self) -> None:
        running = Counter(self.storage[number].user_attrs[SLOT] for number in self.running())
        assert all(count == 1 for count in running.values())

    @invariant()
    def no_slot_has_a_trial_too_many(self) -> None:
        for slot in range(self.total):
            numbers = [trial.number for trial in self.of(slot)]
            ends = [self.ends[number] for number in numbers[:-1]]  # only the last one may run
            assert not self.is_enough(ends)

    @invariant()
    def a_slot_is_resolved_when_it_has_enough(self) -> None:
        plan = self.seen()
        for slot in range(self.total):
            ends = [self.ends[t.number] for t in self.of(slot) if t.number in self.ends]
            assert plan.resolved(slot) == (self.is_enough(ends) or self.imported(slot))
        done = [plan.resolved(slot) for slot in range(self.total)]
        running = {self.storage[number].user_attrs[SLOT] for number in self.running()}
        to_do = [slot for slot in range(self.total) if not done[slot] and slot not in running]
        assert plan.finished(self.total) == sum(done)
        assert plan.free(self.total) == (to_do[0] if to_do else None)

    @invariant()
    def who_watched_all_along_and_who_begins_now_agree(self) -> None:
        new = self.seen()
        for plan in self.plans:
            plan.observe(self.storage)
            assert plan.free(self.total) == new.free(self.total)
            assert plan.finished(self.total) == new.finished(self.total)
            for slot in range(self.total):
                assert plan.resolved(slot) == new.resolved(slot)
                if not new.resolved(slot):
                    assert plan.slot(slot) == new.slot(slot)

    def teardown(self) -> None:
        """Run what is left to its end."""
        if not hasattr(self, "plans"):
            return
        for number in self.running():
            slot = self.storage[number].user_attrs[SLOT]
            self.storage[number] = a_trial(slot, "COMPLETE", number, x=slot)
            self.ends[number] = "COMPLETE"
        left = self.total - self.seen().finished(self.total)
        for _ in range(left):
            plan = self.seen()
            slot_or_none = plan.free(self.total)
            assert slot_or_none is not None
            number = len(self.storage)
            self.storage.append(a_trial(slot_or_none, "COMPLETE", number, x=slot_or_none))
            self.ends[number] = "COMPLETE"
        self.check_the_end(self.seen())

    def check_the_end(self, plan: Plan) -> None:
        assert plan.finished(self.total) == self.total
        assert plan.free(self.total) is None
        for slot in range(self.total):
            ends = Counter(self.ends[trial.number] for trial in self.of(slot))
            if sum(ends[end] for end in DONE) == 1 or self.imported(slot):
                continue
            assert sum(ends[end] for end in DONE) == 0
            assert ends["failed"] == self.retries + 1 or ends["died"] == MOST_DEATHS


TestSearches = Searches.TestCase
TestSearches.settings = settings(deadline=None, max_examples=100, stateful_step_count=30)
