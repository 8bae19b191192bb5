"""Journals whose writer may be dead, here or on another machine: who delivers them, and when."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.delivery.world import LOST, STEPS, TRAINING, WAITING, WARM, World
from tests.programs import kill, wait_for
from tracker.journal.reader import OFFLINE

Worlds = Callable[..., World]

DEAD = f"""{TRAINING}
run = start_run(name=name)
train(run, 5)
run.flush()  # on disk
Path("tmp/ready").touch()
time.sleep(600)
"""


def leave_a_journal(world: World) -> Path:
    """A journal whose process was killed, with nothing delivered."""
    training = world.start(DEAD, "offline")
    ready = world.folder / "tmp" / "ready"
    wait_for(ready.exists, "records on disk", world.output)
    ready.unlink()
    kill(training.pid)
    training.wait_for_all()
    return world.journal()


def change_writer(journal: Path, **changed: object) -> None:
    """Change fields of writer.json."""
    path = journal / "writer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def set_last_beat(journal: Path, seconds: float) -> None:
    """Make the writer's last sign of life `seconds` old."""
    at = time.time() - seconds
    os.utime(journal / "writer.lock", (at, at))


def test_the_run_of_a_lost_machine_is_closed_after_ten_minutes(world: Worlds) -> None:
    case = world()
    journal = leave_a_journal(case)
    change_writer(journal, host="elsewhere")
    database = (journal / "journal.sqlite").read_bytes()
    (journal / "journal.sqlite").write_bytes(b"opening this fails")
    set_last_beat(journal, 60)
    before = {path.name for path in journal.iterdir()}

    refused = case.start_sync(str(journal))
    assert refused.wait() == 2
    assert "on elsewhere" in case.output()
    assert (journal / "journal.sqlite").read_bytes() == b"opening this fails"
    assert {path.name for path in journal.iterdir()} - {"delivery.lock"} == before
    assert case.store.runs() == []

    (journal / "journal.sqlite").write_bytes(database)
    set_last_beat(journal, 601)
    case.sync()
    case.check_status("FAILED", "on elsewhere ended without reporting why")
    assert case.check_points() == 5
    assert case.leftovers() == set()


@pytest.mark.parametrize("other", ["dead", pytest.param("alive", marks=pytest.mark.slow)])
def test_a_living_writer_is_left_alone_whatever_its_pid_seems_to_be(
    world: Worlds, other: str
) -> None:
    case = world()
    training = case.start(TRAINING + WAITING, "offline")
    case.wait_for_points(5)
    change_writer(case.journal(), pid=2**22 + 1 if other == "dead" else os.getpid())
    set_last_beat(case.journal(), 10_000)
    refused = case.start_sync(str(case.journal()))
    assert refused.wait() == 2, case.output()
    assert case.store.runs() == []
    case.release()
    assert training.wait() == 0
    case.sync()
    case.check_status("FINISHED", None)


def test_a_dead_writer_s_run_is_closed_even_if_its_pid_was_reused(world: Worlds) -> None:
    case = world()
    change_writer(leave_a_journal(case), pid=os.getpid())
    case.sync()
    case.check_status("FAILED", LOST)


def test_a_new_run_delivers_what_dead_processes_left_for_the_same_store(world: Worlds) -> None:
    dead, elsewhere, living = world("dead"), world("other store"), world("living")
    ours, others = leave_a_journal(dead), leave_a_journal(elsewhere)
    running = living.start(TRAINING + WAITING, "offline")
    living.wait_for_points(5)
    new = world("new", uri=dead.uri)
    journals = new.folder / ".tracker"
    journals.mkdir()
    for journal in (ours, others, living.journal()):
        journal.rename(journals / journal.name)
    for journal in (ours, others):  # as if their process had meant to deliver them
        (journals / journal.name / OFFLINE).unlink()

    training = new.start(WARM)
    assert training.wait() == 0
    training.wait_for_all()
    new.check_status("FINISHED", None)
    assert new.check_points() == STEPS
    dead.check_status("FAILED", LOST)
    assert dead.check_points() == 5
    assert len(new.journals()) == 2
    assert not (journals / ours.name).exists()
    assert elsewhere.store.runs() == []
    kill(running.pid)
