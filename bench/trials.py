"""The cost of a trial whose objective does nothing, and that of peers.

python -m bench.trials [--trials 1000] [--rounds 3]

Each study runs in a separate process, in an empty folder; contestants take turns in a random order.
Times are measured from the start of one objective to the start of the next. CPU is that of all
processes until everything is in MLflow; start-up is excluded by taking the difference between a
long and a short study.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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

from bench.measuring import goal, machine, shuffled, table
from studies.arguments import RAW, positive_int

MLFLOW = "sqlite:///mlflow.db"
GOAL_WAIT, GOAL_CPU = 6.0, 20.0  # milliseconds per trial
WAYPOINTS = (10, 100, 1000)
WINDOW = 10  # the median of so many trials up to a waypoint is shown
DRAIN_SECONDS = 600.0

BEGINS: list[float] = []
"""When each objective was called."""


def objective(trial: Any) -> float:
    """Suggest three hyperparameters and do nothing."""
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

# -- contestants: each runs a number of trials in the current, empty directory ---------------------


def tracker(trials: int, **settings: Any) -> None:
    """Run a study of the tracker with its default storage and delivery."""
    from tracker import Study

    def flushing(trial: Any) -> float:
        value = objective(trial)
        if len(BEGINS) == trials:  # an empty objective outruns MLflow: wait, to measure all of it
            trial.run.flush(DRAIN_SECONDS)
        return value

    Study("bench", flushing, sampler="random", trials=trials, tracking_uri=MLFLOW, **settings).run()


def plain(trials: int, storage: Any = None, callbacks: Any = None, work: Any = objective) -> None:
    """Run a study of Optuna."""
    study = optuna.create_study(storage=storage, study_name="bench", sampler=RandomSampler(seed=0))
    study.optimize(work, n_trials=trials, callbacks=callbacks)


def callback(trials: int) -> None:
    """Run a study with optuna-integration's callback and Optuna's SQLite storage."""
    if find_spec("optuna_integration") is not None:
        made = importlib.import_module("optuna_integration.mlflow").MLflowCallback(MLFLOW)
        plain(trials, "sqlite:///optuna.db", [made])
        return
    import mlflow

    def log(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """Make the calls of MLflow that `MLflowCallback(uri)` makes at a trial's end."""
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
    """Run a study with nested runs in MLflow's fluent API, as its tutorials do."""
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
    """Run a study with MLflow's own storage for Optuna."""
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
"""Each with a divisor for its number of trials."""


class Cost(NamedTuple):
    """The cost of one study."""

    waits: list[float]
    """Milliseconds from the start of each objective to the start of the next."""
    training: float
    """CPU seconds of the process that ran the study."""
    mirror: float
    """CPU seconds of its child processes that ended before it: the tracker's mirror."""
    rest: float
    """CPU seconds of its child processes that ended with it: the tracker's uploader."""

    @property
    def cpu(self) -> float:
        """CPU seconds of all processes."""
        return self.training + self.mirror + self.rest


def alone(name: str, trials: int) -> None:
    """Run one study in this process, and print its measurements as JSON."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    CONTESTANTS[name][0](trials)
    own, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"begins": BEGINS, "own": _cpu(own), "children": _cpu(children)}))


def _cpu(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def run(name: str, trials: int) -> Cost:
    """Run one study in a separate process.

    Args:
        name: A key of `CONTESTANTS`.
        trials: Trials in the study.

    Raises:
        RuntimeError: The process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = str(Path(__file__).parents[1])
        command = [sys.executable, "-m", "bench.trials", "--alone", name, "--trials", str(trials)]
        env = os.environ | {"PYTHONPATH": root, "MLFLOW_LOGGING_LEVEL": "ERROR"}
        env |= {"MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONWARNINGS": "ignore"}
        for setting in ("TRACKER_INLINE", "TRACKER_OFFLINE", "MLFLOW_RUN_ID"):
            env.pop(setting, None)
        with (Path(folder) / "errors").open("w+") as errors:
            process = subprocess.Popen(
                command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=errors
            )
            assert process.stdout is not None
            with process.stdout as stdout:
                printed = stdout.read().decode()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            errors.seek(0)
            messages = errors.read()
    if process.returncode != 0 or "not yet complete in MLflow" in messages:
        raise RuntimeError(f"{name} failed: {messages}")
    measured = json.loads(printed.splitlines()[-1])
    waits = list(np.diff(measured["begins"]) * 1e3)
    rest = _cpu(usage) - measured["own"] - measured["children"]
    return Cost(waits, measured["own"], measured["children"], rest)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="bench.trials", description=__doc__, formatter_class=RAW)
    parser.add_argument(
        "--trials",
        type=positive_int,
        default=1000,
        metavar="N",
        help="trials in a study of the tracker; slower peers run fewer; default: 1000",
    )
    parser.add_argument(
        "--rounds", type=positive_int, default=3, metavar="N", help="turns of each; default: 3"
    )
    parser.add_argument(
        "--only",
        choices=CONTESTANTS,
        action="append",
        metavar="CONTESTANT",
        help=f"one of: {'; '.join(CONTESTANTS)}; may be repeated; default: all",
    )
    parser.add_argument("--alone", choices=CONTESTANTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone is not None:
        alone(given.alone, given.trials)
        return
    print(f"{machine('optuna', 'mlflow')}; medians of {given.rounds} rounds")
    if find_spec("optuna_integration") is None:
        print("optuna-integration is not installed: the calls of its callback are made here")
    compare(given.only or list(CONTESTANTS), given.trials, given.rounds)


def compare(names: list[str], trials: int, rounds: int) -> None:
    """Run long and short studies of all contestants in turns, and print the table.

    Args:
        names: Keys of `CONTESTANTS`.
        trials: Trials in a study of the tracker.
        rounds: Turns of each.
    """
    long = {name: max(3, trials // CONTESTANTS[name][1]) for name in names}
    short = {name: max(2, trials // 10) for name, trials in long.items()}
    took: dict[str, list[tuple[Cost, Cost]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in shuffled(names):
            took[name].append((run(name, short[name]), run(name, long[name])))

    rows = []
    results: dict[str, tuple[float, float]] = {}
    for name, pairs in took.items():
        waits = [long.waits for _, long in pairs]
        pooled = [wait for each in waits for wait in each]
        results[name] = median(pooled), _slope(pairs, long[name] - short[name], "cpu")
        row = [name, f"{long[name]:,}", f"{median(map(mean, waits)):,.1f}"]
        row += [f"{results[name][0]:,.1f}", f"{np.percentile(pooled, 90):,.1f}"]
        for point in WAYPOINTS:
            near = [wait for each in waits for wait in each[max(0, point - WINDOW) : point]]
            row += [f"{median(near):,.1f}" if point <= long[name] else ""]
        rows.append([*row, f"{results[name][1]:,.1f}"])
    table(
        "A trial with an empty objective, in ms. `trial N`: median of the "
        f"{WINDOW} trials up to it. `CPU`: of all processes, per trial.",
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
            f"{_slope(took[name], long[name] - short[name], part):.1f} {process}"
            for part, process in (
                ("training", "in the study's process"),
                ("rest", "in the uploader"),
                ("mirror", "in the mirror"),
            )
        ]
        print(f"{name}: CPU ms per trial, {', '.join(parts)}.")
    if OURS in results:
        goal(f"{OURS}, ms per trial", results[OURS][0], GOAL_WAIT)
        goal(f"{OURS}, CPU ms per trial", results[OURS][1], GOAL_CPU)


def _slope(pairs: list[tuple[Cost, Cost]], trials: int, part: str) -> float:
    """CPU milliseconds per trial, without start-up."""
    return float(median((getattr(b, part) - getattr(a, part)) / trials * 1e3 for a, b in pairs))


if __name__ == "__main__":
    main()
