"""Many kills at random moments: not part of CI, but of the figure in a report.

    TRACKER_TEST_KILLS=30 python -m pytest tests/delivery/test_kill_figure.py -s

kills the trainer, its uploader, both of them, and `tracker sync` as often as it says, on SQLite
and on a server. Each case checks that nothing older than a quarter of a second is lost, that
nothing is stored twice, and that the run has its status.
"""

from __future__ import annotations

import os
import random
import signal
import uuid
from collections.abc import Callable
from functools import partial

import pytest

from tests.delivery.test_kills import (
    MODEL,
    SYNC_AND_DIE,
    Moment,
    kill_and_check,
    kill_sync_and_check,
)
from tests.delivery.world import COLD, STEPS, WARM, World, side_by_side

KILLS = int(os.environ.get("TRACKER_TEST_KILLS", "0"))
pytestmark = [
    pytest.mark.skipif(not KILLS, reason="set TRACKER_TEST_KILLS to the number of kills"),
    pytest.mark.timeout(7_200),
]
Worlds = Callable[[], World]


@pytest.fixture(params=["sqlite", "server"])
def worlds(
    request: pytest.FixtureRequest, world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> Worlds:
    """Makes worlds with a new SQLite store each, or with an experiment each of one server."""
    uri = request.getfixturevalue("server") if request.param == "server" else ""
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # where `load_model` finds artifacts

    def make() -> World:
        made = world(uri=uri)
        if uri:
            made.experiment = f"kills-{uuid.uuid4().hex}"
        return made

    return make


def any_moment(generator: random.Random, victims: str) -> Moment:
    """A moment in the life of a training; its uploader runs by then if that is to be killed."""
    is_warm = generator.random() < 0.5
    points = generator.randrange(STEPS + 1)
    if "uploader" in victims and not is_warm:
        return Moment(COLD, points, sending=True, seconds=generator.random() / 20)
    sending = generator.random() < 0.5
    return Moment(WARM if is_warm else COLD, points, sending, generator.random() / 5)


@pytest.mark.parametrize("victims", ["trainer", "uploader", "uploader and trainer"])
def test_a_training_is_killed_at_random_moments(victims: str, worlds: Worlds) -> None:
    generator = random.Random(victims)
    names = victims.split(" and ")
    kills = points = 0
    while kills < KILLS:  # some trainings end before their moment
        cases = [worlds() for _ in range(KILLS - kills)]
        points += side_by_side(
            [
                partial(kill_and_check, case, any_moment(generator, victims), *names)
                for case in cases
            ]
        )
        kills += sum(set(case.killed) == set(names) for case in cases)
    print(f"\n{kills} kills of {victims}: {points} points arrived, nothing lost or twice")


def test_a_sync_is_killed_between_its_changes(worlds: Worlds) -> None:
    kills = 0
    while kills < KILLS:
        case = worlds()
        if case.experiment is None:
            kills += kill_sync_and_check(case, range(1, KILLS - kills + 1))
        else:
            kills += kill_each_and_check(worlds, range(1, KILLS - kills + 1))
    print(f"\n{kills} kills of sync: all was completed by the next one, once")


def kill_each_and_check(worlds: Worlds, moments: range) -> int:
    """Kill a new `tracker sync` at each of `moments`, on a store that cannot be put back."""
    for number, moment in enumerate(moments):
        case = worlds()
        case.name = f"sync killed at change {moment}"
        assert case.start(MODEL, "offline", imports_mlflow=True).wait() == 0, case.output()
        code = case.start(SYNC_AND_DIE.replace("MOMENT", str(moment)), imports_mlflow=True).wait()
        case.sync()
        assert case.leftovers() == set(), f"{case.name}: {case.leftovers()} {case.output()}"
        case.check_status("FINISHED", None)
        case.check_points()
        case.check_model()
        if code == 0:
            return number
        assert code == -signal.SIGKILL, f"{case.name}: {code}, {case.output()}"
    return len(moments)
