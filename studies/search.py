"""Search the hyperparameters of one recipe, each trial a tracked run.

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
from models.recipe import Source
from studies import training
from studies.arguments import (
    RAW,
    add_model,
    add_parameters,
    boolean,
    default_space,
    domain,
    given_parameters,
    hyphenated,
    natural,
    positive_int,
    refuse_unused,
    usual_domain,
)
from studies.train import ui_command
from tracker import ArgumentError, Study, TrackerError, Trial, choose_device
from tracker.arguments import OneSentenceParser, positive_float
from tracker.redaction import public_command, public_uri
from tracker.search.leases import GRACE_SECONDS
from tracker.search.sampler import PRUNERS, SAMPLERS
from tracker.search.storage import DEFAULT
from tracker.store.uri import resolve

_TRIALS = 20  # of a sampler that has no end of its own


def parse(
    arguments: Sequence[str] | None = None, prog: str = "studies.search", study_name: str = ""
) -> argparse.Namespace:
    """The command line; `space` is what is searched, `fixed` the other hyperparameters."""
    arguments = hyphenated(sys.argv[1:] if arguments is None else arguments)
    parser = OneSentenceParser(
        prog=prog, description=__doc__, formatter_class=RAW, allow_abbrev=False
    )
    recipe = add_model(parser, arguments)
    study = parser.add_argument_group("the study")
    study.add_argument("--sampler", default="tpe", help=", ".join(SAMPLERS))
    study.add_argument("--pruner", default="none", help=", ".join(PRUNERS))
    study.add_argument(
        "--trials", type=_budget, help=f"how many in all; auto: the whole grid, else {_TRIALS}"
    )
    study.add_argument("--workers", type=positive_int, default=1, help="trials at a time")
    name = study_name or recipe.name.replace(":", ".")
    study.add_argument("--study", default=name, help=f"its name, by default {name}")
    study.add_argument("--storage", type=_or_auto, help=f"where it lies, by default {DEFAULT}")
    study.add_argument(
        "--resume", type=boolean, nargs="?", const=True, default=False, help="if it exists"
    )
    study.add_argument("--retries", type=natural, default=0, help="of a trial that fails")
    study.add_argument("--grace-seconds", type=positive_float, default=GRACE_SECONDS)
    study.add_argument(
        "--metric",
        nargs="+",
        default=list(recipe.metrics)[:1],
        help=", ".join(recipe.metrics),
        metavar="NAME",
    )
    study.add_argument("--warm-start-study", metavar="NAME", help="begin with its trials")
    study.add_argument("--warm-start-experiment", metavar="NAME", help="begin with its runs")
    study.add_argument("--models", default="best", help="which are kept: best, all, none")
    study.add_argument("--register", metavar="NAME", help="register the best model")
    study.add_argument("--alias", help="the alias that it gets")
    study.add_argument("--replay", type=natural, metavar="TRIAL", help="train one again")
    add_parameters(
        parser, recipe, domain, usual_domain, "; a value, several (A,B) or a range (LOW:HIGH[:log])"
    )
    given = parser.parse_args(arguments)
    usual = default_space(recipe, grid=given.sampler == "grid")
    explicit = given_parameters(given, recipe)
    asked = usual | explicit
    # A single value of what is not searched by default is not a search either.
    once = {
        name: values[0]
        for name, values in asked.items()
        if name not in usual and isinstance(values, list) and len(values) == 1
    }
    searched = asked.keys() - once
    told = {n: once.get(n, d) for n, d in recipe.defaults().items() if n not in searched}
    refuse_unused(parser, explicit, recipe.unused(told))
    searched -= set(recipe.unused(told))
    given.space = {name: asked[name] for name in recipe.parameters if name in searched}
    given.fixed = {
        name: once.get(name, default)
        for name, default in recipe.defaults().items()
        if name not in given.space
    }
    return given


def _budget(text: str) -> int | None:
    return None if text == "auto" else positive_int(text)


def _or_auto(text: str) -> str | None:
    return None if text == "auto" else text


@dataclass(frozen=True)
class Objective:
    """Trains one trial; the same in each worker."""

    model: str
    fixed: Mapping[str, Any]
    source: Source
    epochs: int
    device: str
    metrics: tuple[str, ...]
    tracking_uri: str | None

    def __call__(self, trial: Trial) -> list[float]:
        """Train with the trial's hyperparameters; returns its metrics after the last epoch."""
        task = self.task(trial.params)
        with trial.manager(model=task.recipe.is_model) as manager:
            # The one that an earlier attempt may have ended with.
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
        """The recipe and its data, split by the study's seed: the same for every trial."""
        params = {**self.fixed, **params}
        return training.Task.of(self.model, params, self.source, self.tracking_uri)


def make(given: argparse.Namespace, arguments: Sequence[str], prog: str) -> Study:
    """The study that the command line describes; ArgumentError where it cannot be."""
    recipe = find(given.model)
    for name in given.metric:
        if name not in recipe.metrics:
            raise ArgumentError(
                f"metric={name!r} is not known; allowed: {', '.join(recipe.metrics)}."
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
        raise ArgumentError(f"register={given.register!r}: {recipe.name} makes no model.")
    choose_device(given.device)
    # What is wrong with it shows now, not in every trial.
    objective.task({name: _first(values) for name, values in given.space.items()}).check()
    is_grid = given.sampler == "grid"
    command = public_command(["python", "-m", prog, *arguments])
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
        # Without the defaults: a parameter that a later version has is no other study.
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
    """A value that a trial may have."""
    if isinstance(values, list):
        return values[0]
    assert isinstance(values, (FloatDistribution, IntDistribution))
    return values.low


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


def main(
    arguments: Sequence[str] | None = None, prog: str = "studies.search", study_name: str = ""
) -> int:
    """Run the command; returns its exit code, 2 for a mistake in the arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parse(arguments, prog, study_name)
    try:
        study = make(given, _without_resume(arguments), prog)
        if given.replay is not None:
            values = study.replay(given.replay)
            print(f"values        {'none: it failed' if values is None else list(values)}")
            return 0 if values is not None else 1
        report(study.run(workers=given.workers, resume=given.resume), given)
    except (TrackerError, ModelsError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # which carries the name of another signal
        print(f"{prog}: stopped; --resume goes on from here.", file=sys.stderr)
        return 128 + signal.Signals[str(stop) or "SIGINT"]
    return 0


def _without_resume(arguments: Sequence[str]) -> list[str]:
    """The command line of a study that begins: what trains one of its trials again."""
    words = [word for word in arguments if not word.startswith("--resume=")]
    while "--resume" in words:
        at = words.index("--resume")
        has_value = words[at + 1 : at + 2] and words[at + 1].lower() in ("true", "false")
        del words[at : at + 1 + bool(has_value)]
    return words


if __name__ == "__main__":
    sys.exit(main())
