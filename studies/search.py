"""Search the hyperparameters of one network on one data set, each trial a tracked run.

python -m studies.fashion_mnist --sampler grid --workers 2 --epochs 1 --dataset digits
python -m studies.fashion_mnist --sampler tpe --pruner median --trials 20 --epochs 5
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import FloatDistribution

from models import DATASETS, MODELS, Data, ModelsError, build, load
from studies import training
from studies.arguments import (
    boolean,
    booleans,
    natural,
    numbers,
    positive_float,
    positive_int,
    seed,
    whole_numbers,
)
from studies.train import ui_command
from tracker import ArgumentError, Study, TrackerError, Trial, choose_device
from tracker.cli import OneSentenceParser
from tracker.redaction import public_command, public_uri
from tracker.search.leases import GRACE_SECONDS
from tracker.search.samplers import PRUNERS, SAMPLERS
from tracker.search.storage import DEFAULT
from tracker.tracking_uri import resolve

METRICS = {
    "val_accuracy": "maximize",
    "val_loss": "minimize",
    "accuracy": "maximize",
    "loss": "minimize",
    "epoch_duration": "minimize",
}
GRID: Mapping[str, Any] = {
    "lr": [0.01, 0.001],
    "batch_size": [100, 1000],
    "shuffle": [True, False],
}
"""The tutorial's."""
RANGES: Mapping[str, Any] = {
    "lr": FloatDistribution(1e-4, 1e-1, log=True),
    "batch_size": [50, 100, 200, 500, 1000],
    "shuffle": [True, False],
}
_TRIALS = 20  # of a sampler that has no end of its own


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = OneSentenceParser(
        prog="studies.fashion_mnist",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    study = parser.add_argument_group("the study")
    study.add_argument("--sampler", default="tpe", help=", ".join(SAMPLERS))
    study.add_argument("--pruner", default="none", help=", ".join(PRUNERS))
    study.add_argument(
        "--trials", type=_budget, help=f"how many in all; auto: the whole grid, else {_TRIALS}"
    )
    study.add_argument("--workers", type=positive_int, default=1, help="trials at a time")
    study.add_argument("--study", default="fashion-mnist", help="its name")
    study.add_argument("--storage", type=_or_auto, help=f"where it lies, by default {DEFAULT}")
    study.add_argument(
        "--resume", type=boolean, nargs="?", const=True, default=False, help="if it exists"
    )
    study.add_argument("--retries", type=natural, default=0, help="of a trial that fails")
    study.add_argument("--grace-seconds", type=positive_float, default=GRACE_SECONDS)
    study.add_argument(
        "--metric", nargs="+", default=["val_accuracy"], help=", ".join(METRICS), metavar="NAME"
    )
    study.add_argument("--warm-start-study", metavar="NAME", help="begin with its trials")
    study.add_argument("--warm-start-experiment", metavar="NAME", help="begin with its runs")
    study.add_argument("--models", default="best", help="which are kept: best, all, none")
    study.add_argument("--register", metavar="NAME", help="register the best model")
    study.add_argument("--alias", help="the alias that it gets")
    study.add_argument("--replay", type=natural, metavar="TRIAL", help="train one again")
    space = parser.add_argument_group("the space: values A,B,C or a range LOW:HIGH[:log]")
    space.add_argument("--lr", type=numbers, help="Adam's learning rate")
    space.add_argument("--batch-size", type=whole_numbers)
    space.add_argument("--shuffle", type=booleans)
    train = parser.add_argument_group("a training, as of studies.train")
    train.add_argument("--model", default="fashion-cnn", help=", ".join(MODELS))
    train.add_argument("--dataset", default="auto", help=", ".join(DATASETS))
    train.add_argument("--data-dir", default="data", help="where data sets lie or go")
    train.add_argument("--epochs", type=positive_int, default=3)
    train.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda")
    train.add_argument("--seed", type=seed, default=0)
    train.add_argument("--tracking-uri", help="by default the one that MLflow itself would use")
    train.add_argument("--experiment", help="by default MLFLOW_EXPERIMENT_NAME, else Default")
    train.add_argument("--offline", action="store_true", default=None)
    return parser.parse_args(arguments)


def _budget(text: str) -> int | None:
    return None if text == "auto" else positive_int(text)


def _or_auto(text: str) -> str | None:
    return None if text == "auto" else text


@dataclass(frozen=True)
class Objective:
    """Trains one trial; the same in each worker."""

    model: str
    dataset: str
    data_dir: str
    epochs: int
    device: str
    seed: int
    metrics: tuple[str, ...]

    def __call__(self, trial: Trial) -> list[float]:
        """Train with the trial's hyperparameters; returns its metrics after the last epoch."""
        data = self.data()
        with trial.manager() as manager:
            # The one that an earlier attempt may have ended with.
            metrics = manager.checkpoint.metrics if manager.checkpoint else {}
            _, epochs = training.begin(
                manager,
                data,
                model=self.model,
                epochs=self.epochs,
                device=choose_device(self.device),
                params={},
                **trial.params,
            )
            for epoch in epochs:
                metrics = epoch.metrics
                if len(self.metrics) == 1:
                    trial.report(metrics[self.metrics[0]], epoch.number)
                    if epoch.number < self.epochs and trial.should_prune():
                        raise optuna.TrialPruned()
        return [metrics[name] for name in self.metrics]

    def data(self) -> Data:
        """The data, split by the study's seed: the same for every trial."""
        return load(self.dataset, self.data_dir, seed=self.seed)


def make(given: argparse.Namespace, arguments: Sequence[str]) -> Study:
    """The study that the command line describes; ArgumentError where it cannot be."""
    for name in given.metric:
        if name not in METRICS:
            raise ArgumentError(f"metric={name!r} is not known; allowed: {', '.join(METRICS)}.")
    objective = Objective(
        given.model,
        given.dataset,
        given.data_dir,
        given.epochs,
        given.device,
        given.seed,
        tuple(given.metric),
    )
    choose_device(given.device)
    build(given.model)
    objective.data()  # what is wrong with it shows now, not in every trial
    is_grid = given.sampler == "grid"
    default = GRID if is_grid else RANGES
    space = {name: getattr(given, name) or domain for name, domain in default.items()}
    command = public_command(["python", "-m", "studies.fashion_mnist", *arguments])
    study = Study(
        given.study,
        objective,
        space=space,
        sampler=given.sampler,
        pruner=given.pruner,
        trials=given.trials or (None if is_grid else _TRIALS),
        direction=[METRICS[name] for name in given.metric],
        metric=given.metric,
        storage=given.storage,
        seed=given.seed,
        retries=given.retries,
        steps=given.epochs,
        experiment=given.experiment,
        tracking_uri=given.tracking_uri,
        models=given.models,
        register=given.register,
        alias=given.alias,
        replay=command + " --replay {number}",
        grace_seconds=given.grace_seconds,
        offline=given.offline,
    )
    if given.warm_start_study:
        study.warm_start_from_study(given.warm_start_study)
    if given.warm_start_experiment:
        study.warm_start_from_runs(given.warm_start_experiment, given.metric[0])
    return study


def report(study: optuna.Study, given: argparse.Namespace) -> None:
    """Print what the study came to."""
    states = [trial.state.name for trial in study.get_trials(deepcopy=False)]
    print("trials        " + ", ".join(f"{states.count(s)} {s}" for s in sorted(set(states))))
    if "COMPLETE" in states:
        for trial in study.best_trials:
            values = ", ".join(
                f"{name} {value:.6g}"
                for name, value in zip(given.metric, trial.values, strict=True)
            )
            params = " ".join(f"{name}={value}" for name, value in trial.params.items())
            print(f"best          trial {trial.number}: {values} with {params}")
    uri = public_uri(resolve(given.tracking_uri))
    print(f"tracking URI  {uri}")
    print(f"look at it    {ui_command(uri)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, 2 for a mistake in the arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parse(arguments)
    try:
        study = make(given, [word for word in arguments if word != "--resume"])
        if given.replay is not None:
            print(f"values        {study.replay(given.replay)}")
            return 0
        report(study.run(workers=given.workers, resume=given.resume), given)
    except (TrackerError, ModelsError) as error:
        print(f"studies.fashion_mnist: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("studies.fashion_mnist: stopped; --resume goes on from here.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
