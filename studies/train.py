"""Train one network on one data set, tracked.

python -m studies.train --model fashion-cnn --dataset auto --lr 0.01 --epochs 3
python -m studies.train --model char-lstm --help
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from models import ModelsError
from models.recipe import Source
from studies import training
from studies.arguments import (
    RAW,
    add_model,
    add_parameters,
    given_parameters,
    hyphenated,
    positive_int,
    refuse_unused,
    usual_value,
    value,
)
from tracker import ArgumentError, Keep, RunManager, TrackerError, choose_device, set_seed
from tracker.arguments import OneSentenceParser
from tracker.redaction import public_uri


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `params` holds the recipe's hyperparameters."""
    arguments = hyphenated(sys.argv[1:] if arguments is None else arguments)
    parser = OneSentenceParser(
        prog="studies.train", description=__doc__, formatter_class=RAW, allow_abbrev=False
    )
    recipe = add_model(parser, arguments)
    parser.add_argument("--resume", metavar="RUN_ID", help="continue a run from its checkpoint")
    parser.add_argument(
        "--checkpoints", type=positive_int, default=1, help="how many of the last epochs' to keep"
    )
    add_parameters(parser, recipe, value, usual_value)
    given = parser.parse_args(arguments)
    asked = given_parameters(given, recipe)
    given.params = recipe.defaults() | asked
    refuse_unused(parser, asked, recipe.unused(given.params))
    return given


def train(given: argparse.Namespace) -> tuple[str | None, str]:
    """Train as `given` says; returns the run's id and tracking URI."""
    device = choose_device(given.device)
    set_seed(given.seed)
    source = Source(given.dataset, given.data_dir, given.seed)
    task = training.Task.of(given.model, given.params, source, given.tracking_uri)
    settings: dict[str, Any] = {
        "experiment": given.experiment,
        "tracking_uri": given.tracking_uri,
        "offline": given.offline,
        "checkpoints": Keep(last=given.checkpoints),
        "model": task.recipe.is_model,
    }
    if given.resume is None:
        manager = RunManager(**settings)
    else:
        manager = RunManager.resume(given.resume, **settings)
        _check_same(task, given.seed, manager.resumed_params)
    with manager:
        run, epochs = training.begin(
            manager,
            task,
            epochs=given.epochs,
            device=device,
            params={"seed": given.seed},
            final=True,
        )
        for _ in epochs:
            pass
        return run.run_id, run.tracking_uri


def _check_same(task: training.Task, seed: int, earlier: Mapping[str, str]) -> None:
    """Raise ArgumentError where the run that is continued began with something else."""
    told = {"model": task.name, "dataset": task.data.name, "seed": seed, **task.params}
    for name, now in told.items():
        parameter = task.recipe.parameters.get(name)
        # What had begun to train without a parameter did as its default does.
        missing = parameter.default if parameter and "optimizer" in earlier else now
        had = earlier.get(name, str(missing))
        with suppress(ValueError):  # `mlflow run -P lr=1e-2` has it as it was typed
            if parameter is not None and parameter.parse(had) == now:
                continue
        if had != str(now):
            raise ArgumentError(
                f"{name}={now!r} is not what the run began with, {had!r}; "
                "it goes on with the same options."
            )


def ui_command(tracking_uri: str) -> str:
    """The command that shows the runs at `tracking_uri`."""
    mlflow = Path(sys.executable).with_name("mlflow")
    if mlflow.is_relative_to(Path.cwd()):
        mlflow = mlflow.relative_to(Path.cwd())
    allow = "MLFLOW_ALLOW_FILE_STORE=true " if tracking_uri.startswith("file:") else ""
    if tracking_uri.startswith("http"):
        return tracking_uri
    return allow + shlex.join([str(mlflow), "ui", "--backend-store-uri", tracking_uri])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, 2 for a mistake in the arguments."""
    given = parse(arguments)
    try:
        run_id, tracking_uri = train(given)
    except (TrackerError, ModelsError) as error:
        print(f"studies.train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(f"run           {run_id or 'not delivered yet: tracker status'}")
    tracking_uri = public_uri(tracking_uri)
    print(f"tracking URI  {tracking_uri}")
    print(f"compare runs  {ui_command(tracking_uri)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
