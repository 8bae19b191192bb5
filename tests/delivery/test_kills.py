"""What survives SIGKILL: real programs, real signals, read back from the real store."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest

from tests.delivery.world import COLD, LOST, STEPS, TRAINING, WARM, World, side_by_side
from tests.programs import Program, kill, wait_for

Worlds = Callable[..., World]


class Moment(NamedTuple):
    """When to kill: `points` are logged, a request is under way, `seconds` have passed."""

    program: str
    points: int
    sending: bool = False
    seconds: float = 0.0

    def wait(self, world: World, training: Program) -> None:
        world.wait_for_points(self.points)
        if self.sending:  # unless it was over too quickly
            what = f"{world.name}: a request"
            wait_for(lambda: training.ended() or world.is_sending(), what, world.output)
        time.sleep(self.seconds)

    def __str__(self) -> str:
        program = "cold" if self.program is COLD else "warm"
        sending = " in a request" if self.sending else ""
        return f"{program}, {self.points} points{sending} + {self.seconds:.3f} s"


MOMENTS = [
    Moment(COLD, 0),
    Moment(COLD, 1, seconds=0.05),
    Moment(COLD, 120, seconds=0.003),
    Moment(COLD, STEPS),
    Moment(COLD, 0, sending=True),
    Moment(COLD, 0, sending=True, seconds=0.02),
    Moment(WARM, 1),
    Moment(WARM, 1, sending=True),
    Moment(WARM, 150, seconds=0.007),
    Moment(WARM, 150, sending=True, seconds=0.01),
    Moment(WARM, STEPS),
    Moment(WARM, STEPS, seconds=0.2),
]
"""Each phase of a run: before its uploader starts, during delivery, in a request, at the end."""


def kill_and_check(world: World, moment: Moment, *victims: str) -> int:
    """Kill the trainer, its uploader or both; returns how many points there are in the end."""
    world.name = f"{' and '.join(victims)}, {moment}"
    training = world.start(moment.program)
    moment.wait(world, training)
    killed_at = time.time()
    pids = {"uploader": training.uploader(), "trainer": training.pid}
    for victim in victims:
        if pids[victim] is not None and not training.ended():
            world.killed.append(victim)
        kill(pids[victim])
    code = training.wait()
    training.wait_for_all()
    if world.leftovers():  # no process was left to deliver it, or to remove all of it
        world.sync()
    assert world.leftovers() == set(), f"{world.name}: {world.leftovers()} {world.output()}"
    if not world.runs():
        assert not world.safe(killed_at), f"{world.name}: the run is lost, {world.output()}"
        return 0
    if world.run().info.status == "FINISHED":
        assert "trainer" not in victims or len(world.logged()) == STEPS, f"{world.name}: FINISHED"
        world.check_status("FINISHED", None)
        return world.check_points()
    assert code == -signal.SIGKILL, f"{world.name}: {code}, {world.output()}"
    world.check_status("FAILED", LOST)
    return world.check_points(killed_at)


def test_a_killed_training_loses_nothing(world: Worlds) -> None:
    moments = [Moment(COLD, 200), Moment(WARM, 200)]
    side_by_side([partial(kill_and_check, world(), moment, "trainer") for moment in moments])


@pytest.mark.slow
def test_a_training_killed_in_any_phase_loses_nothing(world: Worlds) -> None:
    side_by_side([partial(kill_and_check, world(), moment, "trainer") for moment in MOMENTS])


def test_a_killed_uploader_is_started_again(world: Worlds) -> None:
    kill_and_check(world(), Moment(WARM, 1, sending=True), "uploader")


@pytest.mark.slow
@pytest.mark.parametrize("victims", [("uploader",), ("uploader", "trainer")], ids=" and ".join)
def test_an_uploader_killed_in_any_phase_loses_nothing(
    world: Worlds, victims: tuple[str, ...]
) -> None:
    moments = MOMENTS[4 : len(MOMENTS) : 2] + MOMENTS[7:8]  # the uploader runs by then
    side_by_side([partial(kill_and_check, world(), moment, *victims) for moment in moments])


# -- tracker sync, killed before and after each of its requests ------------------------------------

MODEL = f"""{TRAINING}
import torch
with start_run(name=name, params={{"lr": 0.1}}) as run:
    train(run, 3)
    run.log_text("text", "folder/text.txt")
    run.log_dataset(torch.utils.data.TensorDataset(torch.zeros(2, 2)))
    run.log_histograms(torch.nn.Linear(2, 2), 1)
    run.log_model(torch.nn.Linear(2, 2), torch.zeros(1, 2))
"""
SYNC_AND_DIE = """
import inspect, os, signal, sys
from mlflow import MlflowClient
from tracker.cli import main
from tracker.journal.reader import Journal

left = MOMENT
inside = False  # a call of MLflow's that makes another one


def dying(method):
    def call(*arguments, **options):
        global inside, left
        if inside:
            return method(*arguments, **options)
        left -= 1
        if left == 0:  # between two changes: after the one before, and before this one
            os.kill(os.getpid(), signal.SIGKILL)
        inside = True
        try:
            return method(*arguments, **options)
        finally:
            inside = False

    return call


CHANGES = ("create_", "log_", "set_", "update_", "finalize_", "delete_", "restore_")
for name, method in inspect.getmembers(MlflowClient, inspect.isfunction):
    if name.startswith(CHANGES):
        setattr(MlflowClient, name, dying(method))
Journal.mark_delivered = dying(Journal.mark_delivered)
Journal.remove = dying(Journal.remove)
sys.exit(main(["sync"]))
"""


def kill_sync_and_check(world: World, moments: range) -> int:
    """Kill `tracker sync` at each of `moments`, and have another one complete its work.

    Returns how many times it was killed; fewer than there are moments once it survives them all.
    """
    assert world.start(MODEL, "offline", imports_mlflow=True).wait() == 0, world.output()
    backup = {
        path: path.read_bytes()
        for folder in (".tracker", "store")
        for path in (world.folder / folder).rglob("*")
        if path.is_file()
    }
    for number, moment in enumerate(moments):
        world.name = f"sync killed at change {moment}"
        for path, content in backup.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        syncing = world.start(SYNC_AND_DIE.replace("MOMENT", str(moment)), imports_mlflow=True)
        code = syncing.wait()
        world.sync()
        assert world.leftovers() == set(), f"{world.name}: {world.leftovers()} {world.output()}"
        world.check_status("FINISHED", None)
        world.check_points()
        world.check_model()
        if code == 0:
            return number
        assert code == -signal.SIGKILL, f"{world.name}: {code}, {world.output()}"
    return len(moments)


def test_a_killed_sync_is_completed_by_the_next_one(world: Worlds) -> None:
    assert kill_sync_and_check(world(), range(2, 14, 4)) == 3


@pytest.mark.slow
def test_a_sync_killed_at_any_change_is_completed_by_the_next_one(world: Worlds) -> None:
    killed = side_by_side(
        [partial(kill_sync_and_check, world(), range(first, 400, 4)) for first in range(1, 5)]
    )
    assert killed > 10
