"""What survives when processes die: real programs, real signals, read back from the real store.

The programs are forked from one process that has imported torch, and another that has imported
mlflow: that takes seconds, and a fork milliseconds. Each has its own folder, store, journal and
uploader, and leads a process group, so that all it started can be waited for.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlflow.pytorch
import psutil
import pytest
import torch
from mlflow.entities import Run as MlflowRun

from tests.helpers import Store
from tracker.journal.reader import OFFLINE

SAFE_SECONDS = 0.25
"""What was logged so long before a kill is never lost."""
STEPS = 300
PATIENCE = 120.0
"""Seconds until something that must happen counts as never happening."""
AT_ONCE = 5
"""Programs at a time: most of the time each waits for an uploader that imports mlflow."""
LOADING = threading.Lock()
ROUNDS = int(os.environ.get("TRACKER_TEST_ROUNDS", "3"))

# -- processes -------------------------------------------------------------------------------------

NURSERY = """
import json, os, signal, sys, tempfile
for module in sys.argv[1:]:
    __import__(module)
for line in sys.stdin:
    request = json.loads(line)
    if "poll" in request:
        ended, code = os.waitpid(request["poll"], os.WNOHANG)
        answer = os.waitstatus_to_exitcode(code) if ended else None
    else:
        answer = os.fork()
        if answer == 0:
            break
    print(json.dumps(answer), flush=True)
else:
    sys.exit()
os.setpgid(0, 0)
os.chdir(request["folder"])
tempfile.tempdir = None  # TMPDIR is the world's
os.environ.update(request["environment"])
output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(output, 1)
os.dup2(output, 2)
# A test run in the background inherits that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
exec(compile(request["program"], "program.py", "exec"))
"""


class Nursery:
    """A process that has imported what takes long, and forks programs on request."""

    def __init__(self, *modules: str) -> None:
        self._started: list[int] = []
        self._speaking = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_ALLOW_FILE_STORE": "true"},
        )

    def ask(self, request: dict[str, Any]) -> int | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._speaking:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        return None if answer is None else int(answer)

    def start(self, program: str, folder: Path, environment: dict[str, str]) -> Program:
        request = {"program": program, "folder": str(folder), "environment": environment}
        pid = self.ask(request)
        assert pid is not None
        self._started.append(pid)
        return Program(pid, self, folder)

    def close(self) -> None:
        for pid in self._started:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._process.communicate(timeout=PATIENCE)


class Program:
    """A program that was forked from a nursery; it leads a process group."""

    def __init__(self, pid: int, nursery: Nursery, folder: Path) -> None:
        self.pid = pid
        self.code: int | None = None
        self._nursery = nursery
        self._folder = folder

    def ended(self) -> bool:
        """Whether it has ended; `code` is then its exit code."""
        if self.code is None:
            self.code = self._nursery.ask({"poll": self.pid})
        return self.code is not None

    def wait(self) -> int | None:
        wait_for(self.ended, f"the end of process {self.pid}", self.output)
        return self.code

    def all_ended(self) -> bool:
        """Whether it and all that it started has ended."""
        return self.ended() and not group(self.pid)

    def wait_for_all(self) -> None:
        wait_for(self.all_ended, f"the end of process {self.pid} and its uploader", self.output)

    def uploader(self) -> int | None:
        """The pid of the uploader that the program has at the moment."""
        try:
            children = psutil.Process(self.pid).children()
        except psutil.NoSuchProcess:
            return None
        alive = [child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE]
        return alive[0] if alive else None

    def output(self) -> str:
        return (self._folder / "output").read_text(errors="replace")


def group(leader: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == leader and not is_dead(process):
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found


def is_dead(process: psutil.Process) -> bool:
    """Whether nothing of it lives: the threads of a zombie hold its locks a little longer."""
    return process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1


def wait_for(
    condition: Callable[[], object], what: str, tell: Callable[[], str] = lambda: ""
) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, f"waited {PATIENCE:g} s for {what}: {tell()[-3000:]}"
        time.sleep(0.002)


def kill(pid: int | None, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that may just have ended."""
    if pid is not None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


@pytest.fixture(scope="module")
def trainers() -> Iterator[Nursery]:
    nursery = Nursery("tracker.run")
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def deliverers() -> Iterator[Nursery]:
    """For `tracker sync` and programs that deliver in-line."""
    nursery = Nursery("tracker.run", "tracker.store.client", "tracker.delivery.leftovers")
    yield nursery
    nursery.close()


# -- one program's world ---------------------------------------------------------------------------


class Logged(NamedTuple):
    """What a program says of one call of log_metrics: when it was made, in milliseconds."""

    step: int
    before: int
    after: int


class World:
    """A folder, a store and the processes of one case."""

    def __init__(
        self, folder: Path, uri: str, trainers: Nursery, deliverers: Nursery, name: str = ""
    ) -> None:
        self.folder = folder
        self.uri = uri
        self.name = name
        self._trainers = trainers
        self._deliverers = deliverers
        self.store = Store(uri)

    def start(self, program: str, mode: str = "process", *, nursery: str = "") -> Program:
        """Start a program in a mode of delivery."""
        environment = {
            "MLFLOW_TRACKING_URI": self.uri,
            "TMPDIR": str(self.folder / "tmp"),
            "TRACKER_INLINE": str(int(mode == "inline")),
            "TRACKER_OFFLINE": str(int(mode == "offline")),
        }
        knows_mlflow = nursery == "deliverers" or mode == "inline"
        chosen = self._deliverers if knows_mlflow else self._trainers
        return chosen.start(program, self.folder, environment)

    def start_sync(self, *arguments: str) -> Program:
        program = f"from tracker.cli import main; sys.exit(main({['sync', *arguments]!r}))"
        return self.start(program, nursery="deliverers")

    def sync(self, *arguments: str) -> None:
        """`tracker sync`, which must succeed."""
        syncing = self.start_sync(*arguments)
        assert syncing.wait() == 0, f"{self.name}: {syncing.output()}"

    def journals(self) -> list[Path]:
        return sorted((self.folder / ".tracker").glob("[!.]*"))

    def journal(self) -> Path:
        (journal,) = self.journals()
        return journal

    def progress(self) -> tuple[int, int]:
        """The last record of the journal that was delivered, and the last that was sent."""
        try:
            path = self.journal() / "journal.sqlite"
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
                row: tuple[int, int] = db.execute(
                    "SELECT delivered, sending FROM progress"
                ).fetchone()
                return row
        except (sqlite3.Error, ValueError):  # not there yet, or no more
            return 0, 0

    def is_sending(self) -> bool:
        """Whether the store may have got what is not marked as delivered."""
        delivered, sending = self.progress()
        return sending > delivered

    def logged(self) -> list[Logged]:
        """What the program says that it logged."""
        path = self.folder / "logged"
        if not path.exists():
            return []
        lines = path.read_text().splitlines(keepends=True)
        return [Logged(*map(int, line.split())) for line in lines if line.endswith("\n")]

    def wait_for_points(self, count: int) -> None:
        wait_for(lambda: len(self.logged()) >= count, f"{self.name}: {count} points", self.tell)

    def tell(self) -> str:
        output = self.folder / "output"
        return output.read_text(errors="replace") if output.exists() else "no output"

    def left_behind(self) -> set[str]:
        """What there is beside the store and what the program itself wrote."""
        ours = {"logged", "output", ".tracker", "tmp", "store", "mlruns", "mlflow.db"}
        subfolders = ["", ".tracker", "tmp"]
        if self.uri.startswith("sqlite:"):  # the file store has its own
            subfolders.append("store")
        paths = [path for sub in subfolders for path in (self.folder / sub).glob("*")]
        others = [path for path in paths if path.name not in ours]
        # A loader's workers that are killed with it leave their folder in TMPDIR.
        return {str(p.relative_to(self.folder)) for p in others if not p.name.startswith("pymp-")}

    def run(self) -> MlflowRun:
        """The only run of this world, which may share its store."""
        runs = [run for run in self.store.runs() if run.info.run_name == self.folder.name]
        assert len(runs) == 1, f"{self.name}: {len(runs)} runs: {self.tell()}"
        return runs[0]

    def check_points(self, killed_at: float | None = None) -> int:
        """Each point that was safe when the program was killed is there once, as it was logged.

        Without a time all of them are. Returns how many there are.
        """
        history = self.store.client.get_metric_history(self.run().info.run_id, "batch_loss")
        steps = [point.step for point in history]
        logged = self.logged()
        twice = sorted({step for step in steps if steps.count(step) > 1})
        assert not twice, f"{self.name}: steps that are there twice: {twice}"
        missing = [point for point in self.safe(killed_at) if point.step not in steps]
        assert not missing, f"{self.name}: lost, killed at {killed_at}: {missing}"
        assert steps == list(range(len(steps))), f"{self.name}: not in order: {steps}"
        for point, said in zip(history, logged, strict=False):
            assert said.before <= point.timestamp <= said.after, (
                f"{self.name}: step {point.step} has time {point.timestamp}, logged {said}"
            )
            assert point.value == 1 / (point.step + 1), f"{self.name}: {point}"
        return len(history)

    def check_model(self, *, loads: bool = True) -> None:
        """There is one model, whole, and it is the run's output; what `loads` takes a second."""
        run = self.run()
        models = self.store.client.search_logged_models([run.info.experiment_id])
        assert [str(model.status) for model in models] == ["READY"], f"{self.name}: {models}"
        assert run.outputs is not None
        outputs = [output.model_id for output in run.outputs.model_outputs]
        assert outputs == [models[0].model_id], f"{self.name}: {run.outputs}"
        if loads:
            with LOADING:  # torch loads one at a time
                network = mlflow.pytorch.load_model(models[0].artifact_location)
            assert network(torch.zeros(1, 2)).shape == (1, 2)
        assert "folder/text.txt" in self.store.artifacts(run)

    def safe(self, killed_at: float | None = None) -> list[Logged]:
        """The points that must have survived."""
        last = (killed_at - SAFE_SECONDS) * 1000 if killed_at else float("inf")
        return [point for point in self.logged() if point.after <= last]

    def check_status(self, status: str, reason: str | None) -> None:
        run = self.run()
        assert run.info.status == status, f"{self.name}: {run.info.status}, {self.tell()}"
        failure = run.data.tags.get("tracker.failure")
        if reason is None:
            assert failure is None, f"{self.name}: {failure}"
        else:
            assert reason in (failure or ""), f"{self.name}: {failure!r}"


@pytest.fixture
def world(
    tmp_path: Path, _sqlite_template: Path, trainers: Nursery, deliverers: Nursery
) -> Callable[..., World]:
    """Makes worlds: `world("sqlite")`, `world("file")`."""
    worlds: list[World] = []

    def make(kind: str = "sqlite", name: str = "", uri: str = "") -> World:
        folder = tmp_path / f"world-{len(worlds)}"
        store = folder / "store"
        store.mkdir(parents=True)
        (folder / "tmp").mkdir()
        if uri:
            pass
        elif kind == "file":
            uri = store.as_uri()
        else:
            uri = f"sqlite:///{store / 'mlflow.db'}"
            shutil.copyfile(_sqlite_template, store / "mlflow.db")
            with closing(sqlite3.connect(store / "mlflow.db")) as db, db:
                artifacts = (store / "mlruns" / "0").as_uri()
                db.execute("UPDATE experiments SET artifact_location = ?", (artifacts,))
        worlds.append(World(folder, uri, trainers, deliverers, name))
        return worlds[-1]

    return make


@pytest.fixture(autouse=True)
def _file_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def side_by_side(cases: Sequence[Callable[[], int]]) -> int:
    """Run cases in threads, a few at a time; tells all failures, returns the sum of the results."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [pool.submit(case) for case in cases]
    if errors := [error for future in futures if (error := future.exception())]:
        message = "\n".join(str(error) for error in errors)
        raise AssertionError(f"{len(errors)} of {len(cases)} cases: {message}") from errors[0]
    return sum(future.result() for future in futures)


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
"""Its points are logged before its uploader has imported mlflow."""
WARM = f"{TRAINING}with start_run(name=name) as run:\n    run.flush(100); train(run, {STEPS})\n"
"""Its points are delivered while it logs them."""
SYNCED = ("sqlite",)  # MLflow's file store is not crash-safe


class Moment(NamedTuple):
    """When a process is killed: so many points are logged, a request is under way, some seconds."""

    program: str
    points: int
    sending: bool = False
    seconds: float = 0.0

    def wait(self, world: World, training: Program) -> None:
        world.wait_for_points(self.points)
        if self.sending:  # unless that was over too quickly
            what = f"{world.name}: a request"
            wait_for(lambda: training.ended() or world.is_sending(), what, world.tell)
        time.sleep(self.seconds)  # the moment is meant to be any

    def __str__(self) -> str:
        program = "cold" if self.program is COLD else "warm"
        sending = " in a request" if self.sending else ""
        return f"{program}, {self.points} points{sending} + {self.seconds:.3f} s"


def moments(count: int, seed: int) -> list[Moment]:
    """Random moments: before the uploader is there, while it delivers, and at the end."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        match number % 4:
            case 0:
                found.append(Moment(COLD, draw.randrange(STEPS), False, draw.random() / 100))
            case 1:
                found.append(Moment(WARM, 1 + draw.randrange(STEPS), False, draw.random() / 100))
            case 2:
                found.append(Moment(draw.choice((COLD, WARM)), 0, True, draw.random() / 20))
            case _:
                found.append(Moment(WARM, STEPS, False, draw.random() / 2))
    return found


# -- 1. SIGKILL at random moments ------------------------------------------------------------------


def kill_and_check(world: World, moment: Moment, *whom: str) -> int:
    """Kill the trainer or its uploader or both; returns how many points there are in the end."""
    world.name = f"{' and '.join(whom)}, {world.store.uri[:6]}, {moment}"
    training = world.start(moment.program)
    moment.wait(world, training)
    killed_at = time.time()
    if "uploader" in whom:
        kill(training.uploader())
    if "trainer" in whom:
        kill(training.pid)
    code = training.wait()
    training.wait_for_all()
    if world.left_behind():  # nobody was there to deliver it, or to remove all of it
        world.sync()
    assert world.left_behind() == set(), f"{world.name}: {world.left_behind()} {world.tell()}"
    if not world.store.runs():
        assert not world.safe(killed_at), f"{world.name}: the run is lost, {world.tell()}"
        return 0
    if world.run().info.status == "FINISHED":
        assert "trainer" not in whom or len(world.logged()) == STEPS, f"{world.name}: FINISHED"
        world.check_status("FINISHED", None)
        return world.check_points()
    assert code == -signal.SIGKILL, f"{world.name}: {code}, {world.tell()}"
    world.check_status("FAILED", "ended without saying how")
    return world.check_points(killed_at)


def test_a_killed_training_loses_nothing(world: Callable[..., World]) -> None:
    some = [Moment(COLD, 200), Moment(WARM, 200)]
    side_by_side([partial(kill_and_check, world(), moment, "trainer") for moment in some])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_killed_at_any_moment_loses_nothing(world: Callable[..., World]) -> None:
    cases = [partial(kill_and_check, world(), moment, "trainer") for moment in moments(50, seed=1)]
    print(side_by_side(cases), "points of 50 trainings")


def test_a_killed_uploader_is_started_again(world: Callable[..., World]) -> None:
    some = [(kind, Moment(WARM, 1, sending=True)) for kind in SYNCED]
    side_by_side([partial(kill_and_check, world(kind), m, "uploader") for kind, m in some])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SYNCED)
@pytest.mark.parametrize("whom", [("uploader",), ("uploader", "trainer")], ids=" and ".join)
def test_an_uploader_killed_at_any_moment_loses_nothing(
    world: Callable[..., World], kind: str, whom: tuple[str, ...]
) -> None:
    some = moments(8, seed=len(whom))
    print(
        side_by_side([partial(kill_and_check, world(kind), moment, *whom) for moment in some]),
        "points of 8 trainings",
    )


MODEL = f"""{TRAINING}
import torch
with start_run(name=name, params={{"lr": 0.1}}) as run:
    train(run, {STEPS})
    run.log_text("text", "folder/text.txt")
    run.log_model(torch.nn.Linear(2, 2), torch.zeros(1, 2))
"""


def kill_sync_and_check(world: World, kills: int, seed: int) -> int:
    """Kill `tracker sync` at random moments, so many times at most; returns how many times."""
    world.name = f"sync, {world.store.uri[:6]}, seed {seed}"
    draw = random.Random(seed)
    assert world.start(MODEL, "offline", nursery="deliverers").wait() == 0, world.tell()
    killed = 0
    while killed < kills and world.journals():
        syncing = world.start_sync()
        if draw.random() < 0.5:  # else while it starts
            wait_for(lambda: syncing.ended() or world.is_sending(), "a request", world.tell)  # noqa: B023
        time.sleep(draw.random() / 10)
        if syncing.ended():
            break
        kill(syncing.pid)
        syncing.wait()
        killed += 1
    world.sync()
    assert world.left_behind() == set(), f"{world.name}: {world.left_behind()} {world.tell()}"
    world.check_status("FINISHED", None)
    world.check_points()
    world.check_model()
    return killed


def test_a_sync_that_was_killed_goes_on(world: Callable[..., World]) -> None:
    assert side_by_side([partial(kill_sync_and_check, world(kind), 5, 1) for kind in SYNCED])


@pytest.mark.slow
def test_a_sync_killed_at_any_moment_goes_on(world: Callable[..., World]) -> None:
    killed = side_by_side([partial(kill_sync_and_check, world(), 12, n) for n in range(6)])
    print(killed, "times killed")
    assert killed > 20


# -- 2. true statuses ------------------------------------------------------------------------------


class Ending(NamedTuple):
    """A way for a program to end, and what becomes of its run."""

    program: str
    """What follows on TRAINING; it is ready for the signal once it has logged five points."""
    status: str
    reason: str | None
    code: int
    number: int = 0
    """The signal sent to …"""
    whom: tuple[str, ...] = ()
    """… trainer, uploader, or the group of both, as a terminal does."""


WAITING = """
with start_run(name=name) as run:
    run.flush(100)  # its uploader lives
    train(run, 5)
    while not Path("tmp/go").exists():
        time.sleep(0.01)
"""
LOST = "ended without saying how"
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
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))" + WAITING,
        *("FAILED", "SystemExit: 7", 7, signal.SIGTERM, ("trainer",)),
    ),
    "a handler it sets later": Ending(
        WAITING.replace("train(", "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); train("),
        *("FAILED", "SystemExit: 7", 7, signal.SIGTERM, ("trainer",)),
    ),
}
MODES = ("process", "inline", "offline")


def end_and_check(world: World, ending: Ending, mode: str) -> int:
    world.name = mode
    training = world.start(TRAINING + ending.program, mode)
    if ending.number:
        world.wait_for_points(5)
        uploader = training.uploader()
        assert (uploader is not None) == (mode == "process"), f"{mode}: {world.tell()}"
        if "group" in ending.whom:
            os.killpg(training.pid, ending.number)
        if "uploader" in ending.whom:
            kill(uploader, ending.number)
        if "trainer" in ending.whom:
            kill(training.pid, ending.number)
        else:
            (world.folder / "tmp" / "go").touch()
    assert training.wait() == ending.code, f"{mode}: {training.code}, {world.tell()}"
    training.wait_for_all()
    (world.folder / "tmp" / "go").unlink(missing_ok=True)
    if world.journals():
        world.sync()
    assert world.left_behind() == set(), f"{mode}: {world.tell()}"
    world.check_status(ending.status, ending.reason)
    return len(world.store.runs())


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=() if way == "SIGTERM" else pytest.mark.slow) for way in ENDINGS],
)
def test_the_status_is_true_however_it_ended(world: Callable[..., World], way: str) -> None:
    side_by_side([partial(end_and_check, world(), ENDINGS[way], mode) for mode in MODES])


# -- 3. a machine that went away -------------------------------------------------------------------

DEAD = f"""{TRAINING}
run = start_run(name=name)
train(run, 5)
run.flush()  # on disk
Path("tmp/ready").touch()
time.sleep(600)
"""


def leave_a_journal(world: World) -> Path:
    """A journal whose process was killed; nothing of it is delivered."""
    training = world.start(DEAD, "offline")
    ready = world.folder / "tmp" / "ready"
    wait_for(ready.exists, "records on disk", world.tell)
    ready.unlink()
    kill(training.pid)
    training.wait_for_all()
    return world.journal()


def write_as(journal: Path, **changed: object) -> None:
    """Have writer.json say something else."""
    path = journal / "writer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def last_beat(journal: Path, seconds: float) -> None:
    """Have the writer be silent for so long."""
    at = time.time() - seconds
    os.utime(journal / "writer.lock", (at, at))


def test_a_machine_that_went_away_is_closed_after_ten_minutes(world: Callable[..., World]) -> None:
    here = world()
    journal = leave_a_journal(here)
    write_as(journal, host="elsewhere")
    database = (journal / "journal.sqlite").read_bytes()
    (journal / "journal.sqlite").write_bytes(b"whoever opens this fails")
    last_beat(journal, 60)
    before = {path.name for path in journal.iterdir()}

    refused = here.start_sync(str(journal))
    assert refused.wait() == 2
    assert "is still in use by process" in here.tell()
    assert "on elsewhere" in here.tell()
    assert (journal / "journal.sqlite").read_bytes() == b"whoever opens this fails"
    assert {path.name for path in journal.iterdir()} - {"delivery.lock"} == before
    assert here.store.runs() == []

    (journal / "journal.sqlite").write_bytes(database)
    last_beat(journal, 601)
    here.sync()
    here.check_status("FAILED", "on elsewhere ended without saying how")
    assert here.check_points() == 5
    assert here.left_behind() == set()


@pytest.mark.parametrize("other", ["dead", pytest.param("alive", marks=pytest.mark.slow)])
def test_a_living_process_is_left_alone_whatever_its_pid(
    world: Callable[..., World], other: str
) -> None:
    here = world()
    training = here.start(TRAINING + WAITING, "offline")
    here.wait_for_points(5)
    write_as(here.journal(), pid=2**22 + 1 if other == "dead" else os.getpid())
    last_beat(here.journal(), 10_000)
    refused = here.start_sync(str(here.journal()))
    assert refused.wait() == 2, here.tell()
    assert here.store.runs() == []
    (here.folder / "tmp" / "go").touch()
    assert training.wait() == 0
    here.sync()
    here.check_status("FINISHED", None)


def test_a_dead_process_is_closed_though_its_pid_is_anothers_now(
    world: Callable[..., World],
) -> None:
    here = world()
    write_as(leave_a_journal(here), pid=os.getpid())
    here.sync()
    here.check_status("FAILED", LOST)


def test_a_new_run_closes_what_dead_processes_left_for_the_same_store(
    world: Callable[..., World],
) -> None:
    here, elsewhere, living = world(name="dead"), world(name="other store"), world(name="living")
    ours, others = leave_a_journal(here), leave_a_journal(elsewhere)
    going_on = living.start(TRAINING + WAITING, "offline")
    living.wait_for_points(5)
    new = world(name="new", uri=here.uri)
    journals = new.folder / ".tracker"
    journals.mkdir()
    for journal in (ours, others, living.journal()):
        journal.rename(journals / journal.name)
    for journal in (ours, others):  # as one that was to be delivered is left
        (journals / journal.name / OFFLINE).unlink()

    training = new.start(WARM)
    assert training.wait() == 0
    training.wait_for_all()
    new.check_status("FINISHED", None)
    assert new.check_points() == STEPS
    here.check_status("FAILED", LOST)
    assert here.check_points() == 5
    assert len(new.journals()) == 2
    assert not (journals / ours.name).exists()
    assert elsewhere.store.runs() == []
    kill(going_on.pid)


# -- 4. nothing is left behind ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["process", pytest.param("inline", marks=pytest.mark.slow)])
def test_a_program_leaves_nothing_behind(world: Callable[..., World], mode: str) -> None:
    here = world()
    # Its uploader may be starved of a busy machine's cores: the end itself waits for 10 s alone.
    training = here.start(f"{COLD}    run.flush(100)\n", mode)
    assert training.wait() == 0, here.tell()
    assert group(training.pid) == []  # no uploader outlives it
    assert here.left_behind() == set()
    assert here.tell() == ""
    here.check_status("FINISHED", None)
    assert here.check_points() == STEPS


@pytest.mark.slow
def test_the_uploader_of_a_killed_program_ends_by_itself(world: Callable[..., World]) -> None:
    here = world()
    training = here.start(TRAINING + WAITING)
    here.wait_for_points(5)
    kill(training.pid)
    training.wait_for_all()
    assert here.left_behind() == set()
    here.check_status("FAILED", LOST)


# -- 5. forks --------------------------------------------------------------------------------------

CHILD = """
with start_run(name=name) as run:
    run.flush(100)
    if not os.fork():
        run.log_metrics({"of_the_child": 1.0})
        {ending}
    os.wait()
    assert list(Path(".tracker").glob("*/journal.sqlite")), "the child removed the journal"
    train(run, 50)
"""


def fork_and_check(world: World, mode: str, ending: str) -> int:
    world.name = mode
    training = world.start(TRAINING + CHILD.replace("{ending}", ending), mode)
    assert training.wait() == 0, f"{mode}: {world.tell()}"
    training.wait_for_all()
    if mode == "offline":
        world.sync()
    world.check_status("FINISHED", None)
    assert "of_the_child" not in world.run().data.metrics
    assert world.left_behind() == set()
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
def test_a_fork_neither_delivers_nor_ends_the_run_of_its_parent(
    world: Callable[..., World], ending: str
) -> None:
    cases = [partial(fork_and_check, world(), mode, ending) for mode in MODES]
    assert side_by_side(cases) == 3 * 50


def test_a_fork_does_not_keep_a_dead_run_alive(world: Callable[..., World]) -> None:
    here = world()
    program = WAITING.replace("    train(", "    if not os.fork(): time.sleep(600)\n    train(")
    training = here.start(TRAINING + program)
    here.wait_for_points(5)
    kill(training.pid)
    training.wait()
    wait_for(lambda: len(group(training.pid)) == 1, "the uploader's end", here.tell)
    assert here.left_behind() == set()
    here.check_status("FAILED", LOST)
    kill(*group(training.pid))


LOADER = """
import torch
from torch.utils.data import DataLoader

with start_run(name=name) as run:
    for epoch in range(3):
        loader = DataLoader(range(64), 4, num_workers=2, collate_fn=list)
        assert len(list(loader)) == 16
        run.flush(100)
    workers = iter(loader)
    train(run, 50)
    {ending}
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["pass", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_the_workers_of_a_loader_neither_deliver_nor_end_the_run(
    world: Callable[..., World], ending: str
) -> None:
    here = world()
    training = here.start(TRAINING + LOADER.replace("{ending}", ending))
    assert training.wait() == (0 if ending == "pass" else -signal.SIGTERM), here.tell()
    training.wait_for_all()
    assert here.left_behind() == set()
    here.check_status(*(("FINISHED", None) if ending == "pass" else ("KILLED", "SIGTERM")))
    assert here.check_points() == 50


# -- 6. and 7. many at once ------------------------------------------------------------------------


def train_and_check(world: World, program: str, mode: str = "process") -> int:
    training = world.start(program, mode)
    assert training.wait() == 0, world.tell()
    training.wait_for_all()
    assert "database is locked" not in world.tell()
    if world.journals():  # not delivered by the deadline
        world.sync()
    world.check_status("FINISHED", None)
    return world.check_points()


@pytest.mark.slow
def test_eight_trainings_write_to_one_sqlite_file(world: Callable[..., World]) -> None:
    first = world()
    worlds = [first, *(world(uri=first.uri) for _ in range(7))]
    long = WARM.replace(str(STEPS), "600").replace("0.002 + step % 4 / 1000", "0.025")
    with ThreadPoolExecutor(len(worlds)) as pool:
        points = list(pool.map(partial(train_and_check, program=long), worlds))
    assert points == [600] * 8
    assert [each.left_behind() for each in worlds] == [set()] * 8  # when nobody writes any more


NEW = f"{TRAINING}with start_run(name=name, experiment='new') as run:\n    train(run, 3)\n"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["process", "inline"])
def test_six_processes_start_on_an_empty_folder(
    world: Callable[..., World], tmp_path: Path, mode: str
) -> None:
    for number in range(ROUNDS):
        uri = f"sqlite:///{tmp_path / f'new-{number}' / 'mlflow.db'}"
        worlds = [world(uri=uri, name=f"round {number}") for _ in range(6)]
        programs = [each.start(NEW, mode) for each in worlds]
        for each, program in zip(worlds, programs, strict=True):
            assert program.wait() == 0, each.tell()
            program.wait_for_all()
            if each.journals():  # six uploaders that start at once may pass the deadline
                each.sync()
            assert each.left_behind() == set(), each.tell()
        runs = Store(uri).runs("new")
        assert {run.info.run_name for run in runs} == {each.folder.name for each in worlds}
        assert [run.info.status for run in runs] == ["FINISHED"] * 6
        assert {path.name for path in (tmp_path / f"new-{number}").iterdir()} == {"mlflow.db"}
