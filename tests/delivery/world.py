"""One training's world: its folder, its store and its processes, for tests that kill them."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import mlflow.pytorch
import torch
from mlflow.entities import Run as MlflowRun

from tests.helpers import Store
from tests.programs import ForkServer, Program, wait_for

_LOADING = threading.Lock()  # torch loads one model at a time

SAFE_SECONDS = 0.25
"""What was logged this long before a kill is never lost."""
STEPS = 300
LOST = "ended without reporting why"
"""Part of the reason that a run gets whose process was killed."""
MODES = ("process", "inline", "offline")

TRAINING = """
import os, signal, sys, time
from pathlib import Path
from tracker import start_run

logged = os.open("logged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
name = Path.cwd().name


def milliseconds():
    return time.time_ns() // 1_000_000


def train(run, steps):
    for step in range(steps):
        before = milliseconds()
        run.log_metrics({"batch_loss": 1 / (step + 1)}, step)
        os.write(logged, f"{step} {before} {milliseconds()}\\n".encode())
        time.sleep(0.002 + step % 4 / 1000)


"""
COLD = f"{TRAINING}with start_run(name=name) as run:\n    train(run, {STEPS})\n"
"""Logs its points before its uploader has imported mlflow."""
WARM = f"{TRAINING}with start_run(name=name) as run:\n    run.flush(200); train(run, {STEPS})\n"
"""Its points are delivered while it logs them."""
WAITING = """
with start_run(name=name) as run:
    run.flush(200)  # its uploader is running
    train(run, 5)
    while not Path("tmp/go").exists():
        time.sleep(0.01)
"""


class Logged(NamedTuple):
    """A program's note about one call of log_metrics: its step, and the time in milliseconds."""

    step: int
    before: int
    after: int


class World:
    """The folder, the store and the processes of one case."""

    experiment: str | None = None
    """The experiment of its programs' runs, in a store that other worlds use too."""

    def __init__(
        self, folder: Path, uri: str, trainers: ForkServer, deliverers: ForkServer, name: str
    ) -> None:
        self.folder = folder
        self.uri = uri
        self.name = name
        self._trainers = trainers
        self._deliverers = deliverers
        self._programs: list[Program] = []
        self.killed: list[str] = []
        """The names of the processes that were alive when they were killed."""
        self.store = Store(uri)

    def start(
        self, program: str, mode: str = "process", *, imports_mlflow: bool = False
    ) -> Program:
        """Start a program that delivers as `mode` says."""
        uses_mlflow = imports_mlflow or mode == "inline"
        server = self._deliverers if uses_mlflow else self._trainers
        started = server.start(
            program,
            folder=self.folder,
            MLFLOW_TRACKING_URI=self.uri,
            **({} if self.experiment is None else {"MLFLOW_EXPERIMENT_NAME": self.experiment}),
            TMPDIR=str(self.folder / "tmp"),
            TRACKER_INLINE=str(int(mode == "inline")),
            TRACKER_OFFLINE=str(int(mode == "offline")),
        )
        self._programs.append(started)
        return started

    def start_sync(self, *arguments: str) -> Program:
        """Start `tracker sync`."""
        program = (
            f"import sys; from tracker.cli import main; sys.exit(main({['sync', *arguments]}))"
        )
        return self.start(program, imports_mlflow=True)

    def sync(self, *arguments: str) -> None:
        """Run `tracker sync`, which must succeed."""
        syncing = self.start_sync(*arguments)
        assert syncing.wait() == 0, f"{self.name}: {syncing.output()}"

    def journals(self) -> list[Path]:
        """The journals of this world's programs."""
        return sorted((self.folder / ".tracker").glob("[!.]*"))

    def journal(self) -> Path:
        """The only journal."""
        (journal,) = self.journals()
        return journal

    def is_sending(self) -> bool:
        """Whether the store may have received what is not marked as delivered."""
        try:
            path = self.journal() / "journal.sqlite"
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
                delivered, sending = db.execute(
                    "SELECT delivered, sending FROM progress"
                ).fetchone()
                return bool(sending > delivered)
        except (sqlite3.Error, ValueError):  # not made yet, or removed
            return False

    def logged(self) -> list[Logged]:
        """The program's notes about what it logged."""
        path = self.folder / "logged"
        if not path.exists():
            return []
        lines = path.read_text().splitlines(keepends=True)
        return [Logged(*map(int, line.split())) for line in lines if line.endswith("\n")]

    def wait_for_points(self, count: int) -> None:
        """Wait until the program has logged `count` points."""
        wait_for(lambda: len(self.logged()) >= count, f"{self.name}: {count} points", self.output)

    def release(self) -> None:
        """Let a waiting program continue; see WAITING."""
        (self.folder / "tmp" / "go").touch()

    def output(self) -> str:
        """What the programs of this world printed."""
        return "".join(program.output() for program in self._programs)

    def leftovers(self) -> set[str]:
        """The paths in the folder other than the store and the program's own files."""
        expected = {
            "logged",
            "output",
            "program.py",
            ".tracker",
            "tmp",
            "store",
            "mlruns",
            "mlflow.db",
        }
        paths = [path for sub in ("", ".tracker", "tmp", "store") for path in self._in(sub)]
        unexpected = [path for path in paths if path.name not in expected]
        # Loader workers that are killed with their loader leave their folder in TMPDIR.
        names = {str(path.relative_to(self.folder)) for path in unexpected}
        return {name for name in names if not Path(name).name.startswith("pymp-")}

    def _in(self, folder: str) -> list[Path]:
        return list((self.folder / folder).glob("*"))

    def runs(self) -> list[MlflowRun]:
        """The runs of this world; other worlds may share its store."""
        runs = self.store.runs(self.experiment or "Default")
        return [run for run in runs if run.info.run_name == self.folder.name]

    def run(self) -> MlflowRun:
        """The only run of this world."""
        runs = self.runs()
        assert len(runs) == 1, f"{self.name}: {len(runs)} runs: {self.output()}"
        return runs[0]

    def check_points(self, killed_at: float | None = None) -> int:
        """Check that each safe point is in MLflow once, as it was logged.

        Without the time of a kill every point is safe. Returns how many there are.
        """
        history = self.store.client.get_metric_history(self.run().info.run_id, "batch_loss")
        steps = [point.step for point in history]
        logged = self.logged()
        doubled = sorted({step for step in steps if steps.count(step) > 1})
        assert not doubled, f"{self.name}: steps stored twice: {doubled}"
        missing = [point for point in self.safe(killed_at) if point.step not in steps]
        assert not missing, f"{self.name}: lost, killed at {killed_at}: {missing}"
        assert steps == list(range(len(steps))), f"{self.name}: not in order: {steps}"
        for point, note in zip(history, logged, strict=False):
            assert note.before <= point.timestamp <= note.after, (
                f"{self.name}: step {point.step} has time {point.timestamp}, logged {note}"
            )
            assert point.value == 1 / (point.step + 1), f"{self.name}: {point}"
        return len(history)

    def check_model(self) -> None:
        """Check that there is one model, whole, and that it is the run's output."""
        run = self.run()
        models = self.store.client.search_logged_models([run.info.experiment_id])
        assert [str(model.status) for model in models] == ["READY"], f"{self.name}: {models}"
        assert run.outputs is not None
        outputs = [output.model_id for output in run.outputs.model_outputs]
        assert outputs == [models[0].model_id], f"{self.name}: {run.outputs}"
        with _LOADING:
            network = mlflow.pytorch.load_model(models[0].artifact_location)
        assert network(torch.zeros(1, 2)).shape == (1, 2)
        assert "folder/text.txt" in self.store.artifacts(run)

    def safe(self, killed_at: float | None = None) -> list[Logged]:
        """The points that must have survived."""
        last = (killed_at - SAFE_SECONDS) * 1000 if killed_at else float("inf")
        return [point for point in self.logged() if point.after <= last]

    def check_status(self, status: str, reason: str | None) -> None:
        """Check the run's status and that `tracker.failure` contains `reason`."""
        run = self.run()
        assert run.info.status == status, f"{self.name}: {run.info.status}, {self.output()}"
        failure = run.data.tags.get("tracker.failure")
        if reason is None:
            assert failure is None, f"{self.name}: {failure}"
        else:
            assert reason in (failure or ""), f"{self.name}: {failure!r}"


def side_by_side(cases: Sequence[Callable[[], int]], at_once: int = 5) -> int:
    """Run cases in threads, a few at a time; report all failures, return the sum of the results.

    Most of the time each case waits for an uploader that imports mlflow.
    """
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(case) for case in cases]
    if errors := [error for future in futures if (error := future.exception())]:
        message = "\n".join(str(error) for error in errors)
        raise AssertionError(f"{len(errors)} of {len(cases)} cases: {message}") from errors[0]
    return sum(future.result() for future in futures)
