"""Several trainings that share one SQLite file, and several that create it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.delivery.world import STEPS, TRAINING, WARM, World
from tests.helpers import Store

Worlds = Callable[..., World]

LONG = WARM.replace("0.002 + step % 4 / 1000", "0.02")
NEW = f"{TRAINING}with start_run(name=name, experiment='new') as run:\n    train(run, 3)\n"


def train_and_check(world: World) -> int:
    """Run a training to its end; returns how many points its run has."""
    training = world.start(LONG)
    assert training.wait() == 0, world.output()
    training.wait_for_all()
    assert "database is locked" not in world.output()
    if world.journals():  # not delivered by the deadline
        world.sync()
    world.check_status("FINISHED", None)
    return world.check_points()


@pytest.mark.slow
def test_six_trainings_write_to_one_sqlite_file(world: Worlds) -> None:
    first = world()
    worlds = [first, *(world(uri=first.uri) for _ in range(5))]
    with ThreadPoolExecutor(len(worlds)) as pool:
        points = list(pool.map(train_and_check, worlds))
    assert points == [STEPS] * 6
    assert [each.leftovers() for each in worlds] == [set()] * 6


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["process", "inline"])
def test_six_processes_start_on_an_empty_folder(world: Worlds, tmp_path: Path, mode: str) -> None:
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    worlds = [world(uri=uri) for _ in range(6)]
    programs = [each.start(NEW, mode) for each in worlds]
    for each, program in zip(worlds, programs, strict=True):
        assert program.wait() == 0, each.output()
        program.wait_for_all()
        if each.journals():  # six uploaders that start at once may miss the deadline
            each.sync()
        assert each.leftovers() == set(), each.output()
    runs = Store(uri).runs("new")
    assert {run.info.run_name for run in runs} == {each.folder.name for each in worlds}
    assert [run.info.status for run in runs] == ["FINISHED"] * 6
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"mlflow.db"}
