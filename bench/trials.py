"""What a trial costs whose objective does nothing, beside peers: `python -m bench.trials`.

Each study is a process of its own, in a fresh folder; contestants take turns, in an order that
changes. The clock runs from the begin of one objective to the begin of the next. The CPU is that of
the whole tree of processes, until all is in MLflow, and the difference of a long study and a short
one, so that what starting costs is not in it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from bench.measuring import goal, shuffled, table
from studies.arguments import positive_int

MLFLOW = "sqlite:///mlflow.db"
GOAL_WAIT, GOAL_CPU = 6.0, 20.0  # milliseconds a trial
WAYPOINTS = (10, 100, 1000)
WINDOW = 10  # trials up to a waypoint, of which the median is shown
DRAIN_SECONDS = 600.0

BEGINS: list[float] = []
"""When each objective was called."""


def objective(trial: Any) -> float:
    """Three hyperparameters, and nothing to do."""
    BEGINS.append(time.perf_counter())
    rate = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    layers = trial.suggest_int("layers", 1, 8)
    trial.suggest_categorical("activation", ["relu", "tanh"])
    return float(rate * layers)


SPACE = {
    "lr": FloatDistribution(1e-4, 1e-1, log=True),
    "layers": IntDistribution(1, 8),
    "activation": CategoricalDistribution(["relu", "tanh"]),
}

# -- contestants: each runs so many trials in the current, empty directory -------------------------


def tracker(trials: int, **settings: Any) -> None:
    """A study of ours, with its storage and its delivery as they are by default."""
    from tracker import Study

    def patient(trial: Any) -> float:
        value = objective(trial)
        if len(BEGINS) == trials:  # an empty objective is faster than MLflow: all is to be counted
            trial.run.flush(DRAIN_SECONDS)
        return value

    Study("bench", patient, sampler="random", trials=trials, tracking_uri=MLFLOW, **settings).run()


def plain(trials: int, storage: Any = None, callbacks: Any = None, work: Any = objective) -> None:
    """A study of Optuna's."""
    study = optuna.create_study(storage=storage, study_name="bench", sampler=RandomSampler(seed=0))
    study.optimize(work, n_trials=trials, callbacks=callbacks)


def callback(trials: int) -> None:
    """optuna-integration's callback, with Optuna's SQLite storage."""
    if find_spec("optuna_integration") is not None:
        made = importlib.import_module("optuna_integration.mlflow").MLflowCallback(MLFLOW)
        plain(trials, "sqlite:///optuna.db", [made])
        return
    import mlflow

    def log(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """The calls of MLflow that `MLflowCallback(uri)` makes at a trial's end."""
        mlflow.set_tracking_uri(MLFLOW)
        mlflow.set_experiment(study.study_name)
        with mlflow.start_run(run_name=str(trial.number)):
            mlflow.log_metrics({"value": trial.values[0]})
            mlflow.log_params(trial.params)
            tags = {"number": trial.number, "state": trial.state.name}
            tags |= {"datetime_start": trial.datetime_start, "direction": study.direction.name}
            tags |= {"datetime_complete": trial.datetime_complete, **trial.user_attrs}
            tags |= {f"{name}_distribution": kind for name, kind in trial.distributions.items()}
            mlflow.set_tags({name: str(value) for name, value in tags.items()})

    plain(trials, "sqlite:///optuna.db", [log])


def nested(trials: int) -> None:
    """Runs below one of the study, with MLflow's fluent API, as its tutorials do."""
    import mlflow

    def work(trial: optuna.Trial) -> float:
        value = objective(trial)
        with mlflow.start_run(nested=True):
            mlflow.log_params(trial.params)
            mlflow.log_metric("objective", value)
        return value

    mlflow.set_tracking_uri(MLFLOW)
    with mlflow.start_run():
        plain(trials, work=work)


def mlflow_storage(trials: int) -> None:
    """MLflow's own storage for Optuna."""
    import mlflow
    from mlflow.optuna.storage import MlflowStorage

    mlflow.set_tracking_uri(MLFLOW)
    plain(trials, MlflowStorage(experiment_id=mlflow.create_experiment("bench")))


OURS = "tracker Study"
NO_CALLBACK = "what MLflowCallback does, SQLite"
CONTESTANTS: dict[str, tuple[Callable[[int], None], int]] = {
    OURS: (lambda trials: tracker(trials, space=SPACE), 1),
    "tracker Study, no space declared": (tracker, 1),
    "Optuna in memory": (plain, 1),
    "Optuna, JournalStorage": (
        lambda trials: plain(trials, JournalStorage(JournalFileBackend("optuna.journal"))),
        1,
    ),
    "Optuna, SQLite": (lambda trials: plain(trials, "sqlite:///optuna.db"), 5),
    ("MLflowCallback, SQLite" if find_spec("optuna_integration") else NO_CALLBACK): (callback, 5),
    "nested MLflow runs, in memory": (nested, 5),
    "MlflowStorage": (mlflow_storage, 50),
}
"""Each with how many times fewer trials it is given."""


class Taken(NamedTuple):
    """What one study took."""

    waits: list[float]
    """Milliseconds from the begin of each objective to the begin of the next."""
    training: float
    """Seconds of CPU of the process that ran the study …"""
    mirror: float
    """… of those that it had started and that ended before it: ours, the mirror's …"""
    rest: float
    """… and of those that ended with it: ours, the uploader."""

    @property
    def cpu(self) -> float:
        """Seconds of CPU, all processes."""
        return self.training + self.mirror + self.rest


def alone(name: str, trials: int) -> None:
    """Run one study in this process, and print what is to be known of it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    CONTESTANTS[name][0](trials)
    own, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"begins": BEGINS, "own": _cpu(own), "children": _cpu(children)}))


def _cpu(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def run(name: str, trials: int) -> Taken:
    """Run one study in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        root = str(Path(__file__).parents[1])
        command = [sys.executable, "-m", "bench.trials", "--alone", name, "--trials", str(trials)]
        env = os.environ | {"PYTHONPATH": root, "MLFLOW_LOGGING_LEVEL": "ERROR"}
        env |= {"MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONWARNINGS": "ignore"}
        for setting in ("TRACKER_INLINE", "TRACKER_OFFLINE", "MLFLOW_RUN_ID"):
            env.pop(setting, None)
        with (Path(folder) / "said").open("w+") as said:
            process = subprocess.Popen(
                command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=said
            )
            assert process.stdout is not None
            with process.stdout as stdout:
                printed = stdout.read().decode()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            said.seek(0)
            words = said.read()
    if process.returncode != 0 or "not all in MLflow" in words:
        raise RuntimeError(f"{name} failed: {words}")
    found = json.loads(printed.splitlines()[-1])
    waits = list(np.diff(found["begins"]) * 1e3)
    rest = _cpu(usage) - found["own"] - found["children"]
    return Taken(waits, found["own"], found["children"], rest)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="bench.trials", description=__doc__)
    parser.add_argument("--trials", type=positive_int, default=1000, help="of a study of ours")
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--only", choices=CONTESTANTS, action="append", help="more than once")
    parser.add_argument("--alone", choices=CONTESTANTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone is not None:
        alone(given.alone, given.trials)
        return
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    print(
        f"{date.today()}, {cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, Optuna {version('optuna')}, "
        f"MLflow {version('mlflow')}; medians of {given.rounds} rounds"
    )
    if find_spec("optuna_integration") is None:
        print("optuna-integration is not installed: its callback's calls of MLflow are made here")
    compare(given.only or list(CONTESTANTS), given.trials, given.rounds)


def compare(names: list[str], trials: int, rounds: int) -> None:
    """Long and short studies of all contestants."""
    long = {name: max(3, trials // CONTESTANTS[name][1]) for name in names}
    short = {name: max(2, trials // 10) for name, trials in long.items()}
    took: dict[str, list[tuple[Taken, Taken]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in shuffled(names):
            took[name].append((run(name, short[name]), run(name, long[name])))

    rows = []
    found: dict[str, tuple[float, float]] = {}
    for name, pairs in took.items():
        waits = [long.waits for _, long in pairs]
        several = [wait for each in waits for wait in each]
        found[name] = median(several), _slope(pairs, long[name] - short[name], "cpu")
        row = [name, f"{long[name]:,}", f"{median(map(mean, waits)):,.1f}"]
        row += [f"{found[name][0]:,.1f}", f"{np.percentile(several, 90):,.1f}"]
        for point in WAYPOINTS:
            near = [wait for each in waits for wait in each[max(0, point - WINDOW) : point]]
            row += [f"{median(near):,.1f}" if point <= long[name] else ""]
        rows.append([*row, f"{found[name][1]:,.1f}"])
    table(
        "A trial with an empty objective, ms. `trial N`: the median of the "
        f"{WINDOW} up to it. `CPU`: in all processes, a trial.",
        [
            "a trial",
            "trials",
            "mean",
            "median",
            "90 %",
            *map("trial {:,}".format, WAYPOINTS),
            "CPU",
        ],
        rows,
    )
    for name in (name for name in names if name.startswith("tracker")):
        parts = [
            f"{_slope(took[name], long[name] - short[name], part):.1f} {where}"
            for part, where in (
                ("training", "in its own process"),
                ("rest", "in the uploader"),
                ("mirror", "in the mirror's"),
            )
        ]
        print(f"{name}: CPU ms a trial, {', '.join(parts)}.")
    if OURS in found:
        goal(f"{OURS}, ms a trial", found[OURS][0], GOAL_WAIT)
        goal(f"{OURS}, CPU ms a trial", found[OURS][1], GOAL_CPU)


def _slope(pairs: list[tuple[Taken, Taken]], trials: int, what: str) -> float:
    """Milliseconds of CPU a trial."""
    return float(median((getattr(b, what) - getattr(a, what)) / trials * 1e3 for a, b in pairs))


if __name__ == "__main__":
    main()
