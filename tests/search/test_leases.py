"""A search is alive while its process runs or, on another machine, while its beat changes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tracker.search.leases import PREFIX, Leases, searches, this_process

GRACE = 60.0


class Clock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def leases(clock: Clock) -> Leases:
    return Leases(GRACE, clock)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs until it is killed."""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def shown(info: dict[str, Any], beat: int = 1, **more: Any) -> dict[str, Any]:
    """The attributes of a study in which search `a` has stored `info`."""
    return {"other": 1, f"{PREFIX}a": {**info, "beat": beat, **more}}


def of(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Identify `process`, which runs on this machine."""
    started = psutil.Process(process.pid).create_time()
    return {**this_process(), "pid": process.pid, "started": started}


ELSEWHERE = {**this_process(), "place": "elsewhere.example"}


# -- on this machine -------------------------------------------------------------------------------


def test_this_process_is_alive(leases: Leases) -> None:
    assert this_process()["pid"] == os.getpid()
    assert leases.lives("a", shown(this_process()))


def test_a_local_search_is_alive_until_its_process_ends(
    leases: Leases, process: subprocess.Popen[bytes]
) -> None:
    info = of(process)
    assert leases.lives("a", shown(info, beat=1))

    process.kill()
    process.wait()

    assert not leases.lives("a", shown(info, beat=2))  # even though its beat changed


def test_a_zombie_is_dead(leases: Leases, process: subprocess.Popen[bytes]) -> None:
    info = of(process)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie

    assert not leases.lives("a", shown(info))


def test_a_reused_process_id_is_not_the_search(leases: Leases) -> None:
    info = this_process()
    assert not leases.lives("a", shown({**info, "started": info["started"] - 60.0}))


def test_a_hanging_process_is_lost_after_the_grace_period(leases: Leases, clock: Clock) -> None:
    assert leases.lives("a", shown(this_process()))
    clock.now += GRACE + 1
    assert not leases.lives("a", shown(this_process()))


# -- on another machine ----------------------------------------------------------------------------


@pytest.mark.parametrize("pid", [1, 2**22 + 1])
def test_on_another_machine_only_beats_count(leases: Leases, clock: Clock, pid: int) -> None:
    info = {**ELSEWHERE, "pid": pid, "started": 0.0}
    assert leases.lives("a", shown(info))
    clock.now += GRACE + 1
    assert not leases.lives("a", shown(info))


def test_a_search_is_alive_as_long_as_its_beat_changes(leases: Leases, clock: Clock) -> None:
    for beat in range(20):
        assert leases.lives("a", shown(ELSEWHERE, beat))
        clock.now += GRACE * 0.9


def test_a_search_is_lost_a_grace_period_after_its_last_beat(leases: Leases, clock: Clock) -> None:
    assert leases.lives("a", shown(ELSEWHERE, 7))
    clock.now += GRACE
    assert leases.lives("a", shown(ELSEWHERE, 7))
    clock.now += 0.001
    assert not leases.lives("a", shown(ELSEWHERE, 7))
    assert not leases.lives("a", shown(ELSEWHERE, 7))  # asking changes nothing


def test_a_lost_search_is_alive_again_after_a_new_beat(leases: Leases, clock: Clock) -> None:
    leases.lives("a", shown(ELSEWHERE, 7))
    clock.now += GRACE + 1
    assert not leases.lives("a", shown(ELSEWHERE, 7))
    assert leases.lives("a", shown(ELSEWHERE, 8))


def test_clocks_of_other_machines_do_not_matter(leases: Leases) -> None:
    for time in (0.0, -1e9, 1e12):
        assert leases.lives("a", shown(ELSEWHERE, time=time))


def test_a_new_observer_waits_a_grace_period(clock: Clock) -> None:
    clock.now += 1e6
    late = Leases(GRACE, clock)
    assert late.lives("a", shown(ELSEWHERE, 7))
    clock.now += GRACE + 1
    assert not late.lives("a", shown(ELSEWHERE, 7))


def test_an_outage_restarts_the_grace_period(leases: Leases, clock: Clock) -> None:
    leases.lives("a", shown(ELSEWHERE, 7))
    clock.now += GRACE + 1

    leases.forget()  # no search could store a beat

    assert leases.lives("a", shown(ELSEWHERE, 7))
    clock.now += GRACE + 1
    assert not leases.lives("a", shown(ELSEWHERE, 7))


def test_searches_are_independent(leases: Leases, clock: Clock) -> None:
    both = shown(ELSEWHERE, 1) | {f"{PREFIX}b": {**ELSEWHERE, "beat": 1}}
    assert leases.lives("a", both)
    assert leases.lives("b", both)
    clock.now += GRACE + 1
    both |= shown(ELSEWHERE, 2)
    assert leases.lives("a", both)
    assert not leases.lives("b", both)


def test_the_longer_of_both_grace_periods_counts(clock: Clock) -> None:
    for info in (this_process(), ELSEWHERE):
        for watcher, own in ((2.0, GRACE), (GRACE, 2.0)):
            leases = Leases(watcher, clock)
            assert leases.lives("a", shown(info, grace=own))
            clock.now += GRACE
            assert leases.lives("a", shown(info, grace=own))
            clock.now += 1
            assert not leases.lives("a", shown(info, grace=own))


# -- leaving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("info", [this_process(), ELSEWHERE], ids=["here", "elsewhere"])
def test_a_search_that_left_is_not_alive(leases: Leases, info: dict[str, Any]) -> None:
    assert leases.lives("a", shown(info))
    left = {"status": "FINISHED", "reason": None}
    assert not leases.lives("a", {f"{PREFIX}a": {**info, "left": left}})


def test_an_unknown_search_is_not_alive(leases: Leases) -> None:
    assert not leases.lives("b", shown(this_process()))


def test_searches_are_listed_by_prefix() -> None:
    attrs = {f"{PREFIX}a": {}, "tracker:study": {}, f"{PREFIX}b": {}, "mine": 1}
    assert sorted(searches(attrs)) == ["a", "b"]
