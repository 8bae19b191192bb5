"""However a program ends, its run gets the correct status and nothing is left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest

from tests.delivery.world import COLD, LOST, MODES, STEPS, TRAINING, WAITING, World, side_by_side
from tests.programs import kill, process_group, wait_for

Worlds = Callable[..., World]


class Ending(NamedTuple):
    """A way for a program to end, and the status that its run then has."""

    program: str
    """What follows on TRAINING; it is ready for the signal once it has logged five points."""
    status: str
    reason: str | None
    code: int
    signal: int = 0
    receivers: tuple[str, ...] = ()
    """Who gets the signal: trainer, uploader, or the group of both, as from a terminal."""


OWN_HANDLER = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))"
ENDINGS = {
    "normal end": Ending("with start_run(name=name) as run: train(run, 5)", "FINISHED", None, 0),
    "exception in with": Ending(
        "with start_run(name=name) as run: train(run, 5); raise ValueError('lost')",
        *("FAILED", "ValueError: lost", 1),
    ),
    "exception": Ending(
        "train(start_run(name=name), 5); raise ValueError('lost')", "FAILED", "ValueError: lost", 1
    ),
    "Ctrl-C": Ending(
        WAITING, "KILLED", "KeyboardInterrupt", -signal.SIGINT, signal.SIGINT, ("group",)
    ),
    "SIGTERM": Ending(
        WAITING, "KILLED", "by SIGTERM", -signal.SIGTERM, signal.SIGTERM, ("trainer",)
    ),
    "SIGKILL": Ending(WAITING, "FAILED", LOST, -signal.SIGKILL, signal.SIGKILL, ("trainer",)),
    "SIGKILL of the uploader": Ending(WAITING, "FINISHED", None, 0, signal.SIGKILL, ("uploader",)),
    "SIGKILL of both": Ending(
        WAITING, "FAILED", LOST, -signal.SIGKILL, signal.SIGKILL, ("uploader", "trainer")
    ),
    "SIGTERM of both": Ending(
        WAITING, "KILLED", "by SIGTERM", -signal.SIGTERM, signal.SIGTERM, ("uploader", "trainer")
    ),
    "SIGTERM of the group": Ending(
        WAITING, "KILLED", "by SIGTERM", -signal.SIGTERM, signal.SIGTERM, ("group",)
    ),
    "its own handler": Ending(
        OWN_HANDLER + WAITING, "FAILED", "SystemExit: 7", 7, signal.SIGTERM, ("trainer",)
    ),
    "a handler set during the run": Ending(
        WAITING.replace("train(", f"{OWN_HANDLER}; train("),
        *("FAILED", "SystemExit: 7", 7, signal.SIGTERM, ("trainer",)),
    ),
}


def end_and_check(world: World, ending: Ending, mode: str) -> int:
    """Have a program end, and check its run's status; returns the number of runs."""
    world.name = mode
    training = world.start(TRAINING + ending.program, mode)
    if ending.signal:
        world.wait_for_points(5)
        uploader = training.uploader()
        assert (uploader is not None) == (mode == "process"), f"{mode}: {world.output()}"
        if "group" in ending.receivers:
            os.killpg(training.pid, ending.signal)
        if "uploader" in ending.receivers:
            kill(uploader, ending.signal)
        if "trainer" in ending.receivers:
            kill(training.pid, ending.signal)
        else:
            world.release()
    assert training.wait() == ending.code, f"{mode}: {training.code}, {world.output()}"
    training.wait_for_all()
    (world.folder / "tmp" / "go").unlink(missing_ok=True)
    if world.journals():
        world.sync()
    assert world.leftovers() == set(), f"{mode}: {world.output()}"
    world.check_status(ending.status, ending.reason)
    return len(world.store.runs())


@pytest.mark.parametrize(
    "how",
    [pytest.param(how, marks=() if how == "SIGTERM" else pytest.mark.slow) for how in ENDINGS],
)
def test_the_status_is_correct_however_the_program_ended(world: Worlds, how: str) -> None:
    side_by_side([partial(end_and_check, world(), ENDINGS[how], mode) for mode in MODES])


@pytest.mark.parametrize("mode", ["process", pytest.param("inline", marks=pytest.mark.slow)])
def test_a_program_leaves_nothing_behind(world: Worlds, mode: str) -> None:
    case = world()
    # On a busy machine the uploader may need longer than the end of a run waits.
    training = case.start(f"{COLD}    run.flush(200)\n", mode)
    assert training.wait() == 0, case.output()
    assert process_group(training.pid) == []  # no uploader outlives it
    assert case.leftovers() == set()
    assert case.output() == ""
    case.check_status("FINISHED", None)
    assert case.check_points() == STEPS


# -- forks and loader workers ----------------------------------------------------------------------

FORK = """
with start_run(name=name) as run:
    run.flush(200)
    if not os.fork():
        run.log_metrics({"of_the_child": 1.0})
        {ending}
    os.wait()
    assert list(Path(".tracker").glob("*/journal.sqlite")), "the child removed the journal"
    train(run, 50)
"""


def fork_and_check(world: World, mode: str, ending: str) -> int:
    """Fork in the middle of a run; returns how many points the run has."""
    world.name = mode
    training = world.start(TRAINING + FORK.replace("{ending}", ending), mode)
    assert training.wait() == 0, f"{mode}: {world.output()}"
    training.wait_for_all()
    if mode == "offline":
        world.sync()
    world.check_status("FINISHED", None)
    assert "of_the_child" not in world.run().data.metrics
    assert world.leftovers() == set()
    return world.check_points()


@pytest.mark.parametrize(
    "ending",
    [
        "run.deliver(); run.end(); sys.exit()",
        pytest.param("sys.exit()", marks=pytest.mark.slow),
        pytest.param("raise ValueError", marks=pytest.mark.slow),
        pytest.param("os._exit(0)", marks=pytest.mark.slow),
    ],
)
def test_a_fork_neither_delivers_nor_ends_the_run_of_its_parent(world: Worlds, ending: str) -> None:
    cases = [partial(fork_and_check, world(), mode, ending) for mode in MODES]
    assert side_by_side(cases) == 3 * 50


def test_a_living_fork_does_not_keep_a_dead_run_alive(world: Worlds) -> None:
    case = world()
    program = WAITING.replace("    train(", "    if not os.fork(): time.sleep(600)\n    train(")
    training = case.start(TRAINING + program)
    case.wait_for_points(5)
    kill(training.pid)
    training.wait()
    wait_for(lambda: len(process_group(training.pid)) == 1, "the uploader's end", case.output)
    assert case.leftovers() == set()
    case.check_status("FAILED", LOST)
    kill(*process_group(training.pid))


LOADER = """
import torch
from torch.utils.data import DataLoader

with start_run(name=name) as run:
    for epoch in range(3):
        loader = DataLoader(range(64), 4, num_workers=2, collate_fn=list)
        assert len(list(loader)) == 16
        run.flush(200)
    workers = iter(loader)
    train(run, 50)
    {ending}
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["pass", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_loader_workers_neither_deliver_nor_end_the_run(world: Worlds, ending: str) -> None:
    case = world()
    training = case.start(TRAINING + LOADER.replace("{ending}", ending))
    assert training.wait() == (0 if ending == "pass" else -signal.SIGTERM), case.output()
    training.wait_for_all()
    assert case.leftovers() == set()
    case.check_status(*(("FINISHED", None) if ending == "pass" else ("KILLED", "SIGTERM")))
    assert case.check_points() == 50
