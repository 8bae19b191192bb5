"""Search the hyperparameters of one recipe; each trial is a tracked run.

python -m studies.search --sampler grid --workers 2 --epochs 1 --dataset digits
python -m studies.search --model char-lstm --dataset TEXT --sampler tpe --pruner median --trials 20
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from models import ModelsError, find
from models.recipe import Recipe, Source
from studies import training
from studies.arguments import (
    RAW,
    add_model,
    add_parameters,
    boolean,
    default_domain,
    default_space,
    domain,
    given_parameters,
    hyphenated,
    natural,
    positive_int,
    refuse_unused,
)
from studies.train import ui_command
from tracker import ArgumentError, Study, TrackerError, Trial, choose_device
from tracker.arguments import OneSentenceParser, positive_float
from tracker.redaction import public_command, public_uri
from tracker.search.best import best_trials
from tracker.search.leases import GRACE_SECONDS
from tracker.search.sampler import PRUNERS, SAMPLERS
from tracker.search.storage import DEFAULT
from tracker.store.uri import resolve

_TRIALS = 20  # default budget of a sampler without a natural end


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `space` is what is searched, `fixed` the other hyperparameters."""
    arguments = hyphenated(sys.argv[1:] if arguments is None else arguments)
    parser = OneSentenceParser(
        prog="studies.search", description=__doc__, formatter_class=RAW, allow_abbrev=False
    )
    recipe = add_model(parser, arguments)
    _add_study_options(parser, recipe)
    syntax = "; a value, several (A,B) or a range (LOW:HIGH[:log])"
    add_parameters(parser, recipe, domain, default_domain, syntax)
    given = parser.parse_args(arguments)
    defaults = recipe.defaults()
    searched = default_space(recipe, grid=given.sampler == "grid")
    explicit = given_parameters(given, recipe)
    domains = searched | explicit
    # A single value fixes a hyperparameter, unless it is searched by default.
    single = {
        name: values[0]
        for name, values in domains.items()
        if name not in searched and isinstance(values, list) and len(values) == 1
    }
    fixed = {n: single.get(n, d) for n, d in defaults.items() if n not in domains or n in single}
    unused = recipe.unused(fixed)
    refuse_unused(parser, explicit, unused)
    given.space = {
        name: domains[name]
        for name in recipe.parameters
        if name in domains and name not in single and name not in unused
    }
    given.fixed = {n: single.get(n, d) for n, d in defaults.items() if n not in given.space}
    return given


def _add_study_options(parser: argparse.ArgumentParser, recipe: Recipe) -> None:
    study = parser.add_argument_group("study")
    study.add_argument(
        "--sampler", default="tpe", help=f"one of: {', '.join(SAMPLERS)}; default: tpe"
    )
    study.add_argument(
        "--pruner", default="none", help=f"one of: {', '.join(PRUNERS)}; default: none"
    )
    study.add_argument(
        "--trials",
        type=_budget,
        metavar="N",
        help=f"trials in all; default: auto, the whole grid or {_TRIALS}",
    )
    study.add_argument(
        "--workers", type=positive_int, default=1, metavar="N", help="trials at a time; default: 1"
    )
    study.add_argument(
        "--devices",
        metavar="GPUS",
        help="GPUs that the workers share: auto, all (each sees all) or a list such as 0,1; "
        "default: auto with several workers, unless --device names one device",
    )
    study.add_argument(
        "--gpus-per-trial",
        type=positive_float,
        metavar="G",
        help="GPUs of each trial, or which part of one: 1, 2, 0.5, …",
    )
    name = recipe.name.replace(":", ".")
    study.add_argument(
        "--study", default=name, metavar="NAME", help=f"name of the study; default: {name}"
    )
    study.add_argument(
        "--storage", type=_or_auto, metavar="URL", help=f"where it is stored; default: {DEFAULT}"
    )
    study.add_argument(
        "--resume",
        type=boolean,
        nargs="?",
        const=True,
        default=False,
        metavar="true|false",
        help="continue the study if it exists; default: false",
    )
    study.add_argument(
        "--retries",
        type=natural,
        default=0,
        metavar="N",
        help="how often a failed trial is repeated; default: 0",
    )
    study.add_argument(
        "--grace-seconds",
        type=positive_float,
        default=GRACE_SECONDS,
        metavar="S",
        help="silence after which another machine's search counts as dead; "
        f"default: {GRACE_SECONDS:g}",
    )
    metrics = list(recipe.metrics)
    study.add_argument(
        "--metric",
        nargs="+",
        default=metrics[:1],
        metavar="NAME",
        help=f"one or more objectives of: {', '.join(metrics)}; default: {metrics[0]}",
    )
    study.add_argument(
        "--warm-start-study", metavar="NAME", help="start with the trials of another study"
    )
    study.add_argument(
        "--warm-start-experiment", metavar="NAME", help="start with the runs of an experiment"
    )
    study.add_argument(
        "--models", default="best", help="models to keep: best, all or none; default: best"
    )
    study.add_argument("--register", metavar="NAME", help="register the best model under NAME")
    study.add_argument("--alias", help="alias of the registered model")
    study.add_argument(
        "--replay", type=natural, metavar="TRIAL", help="train one trial again instead of searching"
    )


def _budget(text: str) -> int | None:
    return None if text == "auto" else positive_int(text)


def _or_auto(text: str) -> str | None:
    return None if text == "auto" else text


@dataclass(frozen=True)
class Objective:
    """Trains one trial. Workers in other processes receive a copy."""

    model: str
    fixed: Mapping[str, Any]
    source: Source
    epochs: int
    device: str
    metrics: tuple[str, ...]
    tracking_uri: str | None

    def __call__(self, trial: Trial) -> list[float]:
        """Train with the trial's hyperparameters and return its metrics after the last epoch."""
        task = self.task(trial.params)
        with trial.manager(model=task.recipe.is_model) as manager:
            # A retry may start from a checkpoint of the last epoch, with nothing left to train.
            metrics = manager.checkpoint.metrics if manager.checkpoint else {}
            _, epochs = training.begin(
                manager,
                task,
                epochs=self.epochs,
                device=choose_device(self.device),
                params={},
                final=False,
            )
            for epoch in epochs:
                metrics = epoch.metrics
                if len(self.metrics) == 1:
                    trial.report(metrics[self.metrics[0]], epoch.number)
                    if epoch.number < self.epochs and trial.should_prune():
                        raise optuna.TrialPruned()
        return [metrics[name] for name in self.metrics]

    def task(self, params: Mapping[str, Any]) -> training.Task:
        """Load the recipe and its data, split by the study's seed: the same for every trial."""
        params = {**self.fixed, **params}
        return training.Task.of(self.model, params, self.source, self.tracking_uri)


def make(given: argparse.Namespace, arguments: Sequence[str]) -> Study:
    """Make the study that the command line describes.

    Args:
        given: The parsed command line.
        arguments: The command line, which replays a trial if `--replay` is added.

    Raises:
        ArgumentError: An option is not allowed.
        ModelsError: The recipe or its data is absent or unsuitable.
    """
    recipe = find(given.model)
    for name in given.metric:
        if name not in recipe.metrics:
            raise ArgumentError(
                f"metric={name!r} is unknown; allowed: {', '.join(recipe.metrics)}."
            )
    objective = Objective(
        given.model,
        given.fixed,
        Source(given.dataset, given.data_dir, given.seed),
        given.epochs,
        given.device,
        tuple(given.metric),
        given.tracking_uri,
    )
    if given.register and not recipe.is_model:
        raise ArgumentError(
            f"register={given.register!r} is not allowed: {recipe.name} does not make a model."
        )
    choose_device(given.device)
    # Fail now rather than in every trial.
    objective.task({name: _first(values) for name, values in given.space.items()}).check()
    is_grid = given.sampler == "grid"
    command = public_command(["python", "-m", "studies.search", *arguments])
    study = Study(
        given.study,
        objective,
        space=given.space,
        sampler=given.sampler,
        pruner=given.pruner,
        trials=given.trials or (None if is_grid else _TRIALS),
        direction=[recipe.metrics[name] for name in given.metric],
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
        # Without defaults: a parameter added by a later version does not make it another study.
        fixed={
            "model": given.model,
            "dataset": given.dataset,
            **{k: v for k, v in given.fixed.items() if v != recipe.parameters[k].default},
        },
        grace_seconds=given.grace_seconds,
        offline=given.offline,
    )
    if given.warm_start_study:
        study.warm_start_from_study(given.warm_start_study)
    if given.warm_start_experiment:
        study.warm_start_from_runs(given.warm_start_experiment, given.metric[0])
    return study


def _first(values: list[Any] | BaseDistribution) -> Any:
    """A value that a trial may take."""
    if isinstance(values, list):
        return values[0]
    assert isinstance(values, (FloatDistribution, IntDistribution))
    return values.low


def report(study: optuna.Study, given: argparse.Namespace) -> None:
    """Print a study's outcome."""
    trials = study.get_trials(deepcopy=False)
    states = [trial.state.name for trial in trials]
    print("trials        " + ", ".join(f"{states.count(s)} {s}" for s in sorted(set(states))))
    for trial in best_trials(trials, [direction.name.lower() for direction in study.directions]):
        pairs = zip(given.metric, trial.values, strict=True)
        values = ", ".join(f"{name} {value:.6g}" for name, value in pairs)
        params = " ".join(f"{name}={value}" for name, value in trial.params.items())
        print(f"best          trial {trial.number}: {values} with {params}")
    uri = public_uri(resolve(given.tracking_uri))
    print(f"tracking URI  {uri}")
    print(f"compare runs  {ui_command(uri)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; 2: invalid arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parse(arguments)
    try:
        study = make(given, _without_resume(arguments))
        if given.replay is not None:
            values = study.replay(given.replay)
            print(f"values        {'none, the trial failed' if values is None else list(values)}")
            return 0 if values is not None else 1
        done = study.run(
            workers=given.workers,
            resume=given.resume,
            devices=_devices(given),
            gpus_per_trial=given.gpus_per_trial,
        )
        report(done, given)
    except (TrackerError, ModelsError) as error:
        print(f"studies.search: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # its message is the name of a signal other than SIGINT
        print("studies.search: stopped; continue with --resume.", file=sys.stderr)
        return 128 + signal.Signals[str(stop) or "SIGINT"]
    return 0


def _devices(given: argparse.Namespace) -> str | None:
    """The GPUs to share: by default all, unless `--device` names one of them or the CPU."""
    is_named = given.device not in ("auto", "cuda")
    if is_named and (given.devices not in (None, "all") or given.gpus_per_trial is not None):
        raise ArgumentError(
            f"device={given.device!r} does not go with --devices and --gpus-per-trial; it must be "
            "auto or cuda."
        )
    return "all" if is_named else given.devices


def _without_resume(arguments: Sequence[str]) -> list[str]:
    """The command line of a new study, which is what a replay repeats."""
    words = [word for word in arguments if not word.startswith("--resume=")]
    while "--resume" in words:
        at = words.index("--resume")
        has_value = words[at + 1 : at + 2] and words[at + 1].lower() in ("true", "false")
        del words[at : at + 1 + bool(has_value)]
    return words


if __name__ == "__main__":
    sys.exit(main())
