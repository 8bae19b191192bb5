"""Train one network on one data set, as a tracked run.

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
    default_value,
    given_parameters,
    hyphenated,
    positive_int,
    refuse_unused,
    value,
)
from tracker import ArgumentError, Keep, RunManager, TrackerError, choose_device, set_seed
from tracker.arguments import OneSentenceParser
from tracker.redaction import public_uri


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `params` holds the recipe's hyperparameters."""
    arguments = hyphenated(sys.argv[1:] if arguments is None else arguments)
    parser = OneSentenceParser(
        prog="studies.train", description=__doc__, formatter_class=RAW, allow_abbrev=False
    )
    recipe = add_model(parser, arguments)
    parser.add_argument("--resume", metavar="RUN_ID", help="continue a run from its checkpoint")
    parser.add_argument(
        "--checkpoints",
        type=positive_int,
        default=1,
        metavar="N",
        help="keep the checkpoints of the last N epochs; default: 1",
    )
    add_parameters(parser, recipe, value, default_value)
    given = parser.parse_args(arguments)
    explicit = given_parameters(given, recipe)
    given.params = recipe.defaults() | explicit
    refuse_unused(parser, explicit, recipe.unused(given.params))
    return given


def train(given: argparse.Namespace) -> tuple[str | None, str]:
    """Train.

    Args:
        given: The parsed command line.

    Returns:
        The run's id, None if it is not uploaded yet, and its tracking URI.
    """
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


def _check_same(task: training.Task, seed: int, logged: Mapping[str, str]) -> None:
    """Raise ArgumentError if an option differs from the params of the run to resume."""
    options = {"model": task.name, "dataset": task.data.name, "seed": seed, **task.params}
    for name, current in options.items():
        parameter = task.recipe.parameters.get(name)
        # A run older than the parameter trained as the default does. Without "optimizer" the run
        # ended before it logged its params.
        missing = parameter.default if parameter and "optimizer" in logged else current
        before = logged.get(name, str(missing))
        with suppress(ValueError):  # `mlflow run -P lr=1e-2` logs the value as typed
            if parameter is not None and parameter.parse(before) == current:
                continue
        if before != str(current):
            raise ArgumentError(
                f"{name}={current!r} differs from the run to resume, which has {before!r}; "
                "repeat the options of that run."
            )


def ui_command(tracking_uri: str) -> str:
    """Return the command, or address, that shows the runs at `tracking_uri`."""
    mlflow = Path(sys.executable).with_name("mlflow")
    if mlflow.is_relative_to(Path.cwd()):
        mlflow = mlflow.relative_to(Path.cwd())
    allow = "MLFLOW_ALLOW_FILE_STORE=true " if tracking_uri.startswith("file:") else ""
    if tracking_uri.startswith("http"):
        return tracking_uri
    return allow + shlex.join([str(mlflow), "ui", "--backend-store-uri", tracking_uri])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; 2: invalid arguments."""
    given = parse(arguments)
    try:
        run_id, tracking_uri = train(given)
    except (TrackerError, ModelsError) as error:
        print(f"studies.train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(f"run           {run_id or 'not uploaded yet, see: tracker status'}")
    tracking_uri = public_uri(tracking_uri)
    print(f"tracking URI  {tracking_uri}")
    print(f"compare runs  {ui_command(tracking_uri)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
