"""Train one network on one data set, tracked.

python -m studies.train --model fashion-cnn --dataset auto --lr 0.01 --epochs 3
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models import DATASETS, MODELS, ModelsError, load
from studies import training
from studies.arguments import boolean, positive_float, positive_int, seed
from tracker import Keep, RunManager, TrackerError, choose_device, set_seed
from tracker.cli import OneSentenceParser
from tracker.redaction import public_uri


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = OneSentenceParser(prog="studies.train", description=__doc__)
    parser.add_argument("--model", default="fashion-cnn", help=", ".join(MODELS))
    parser.add_argument("--dataset", default="auto", help=", ".join(DATASETS))
    parser.add_argument("--data-dir", default="data", help="where data sets lie or go")
    parser.add_argument("--lr", type=positive_float, default=0.01, help="Adam's learning rate")
    parser.add_argument("--batch-size", type=positive_int, default=100)
    parser.add_argument("--epochs", type=positive_int, default=3)
    parser.add_argument("--shuffle", type=boolean, default=True, help="true or false")
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--tracking-uri", help="by default the one that MLflow itself would use")
    parser.add_argument("--experiment", help="by default MLFLOW_EXPERIMENT_NAME, else Default")
    parser.add_argument("--resume", metavar="RUN_ID", help="continue a run from its checkpoint")
    parser.add_argument(
        "--checkpoints", type=positive_int, default=1, help="how many of the last epochs' to keep"
    )
    parser.add_argument(
        "--offline", action="store_true", default=None, help="keep the run for `tracker sync`"
    )
    return parser.parse_args(arguments)


def train(given: argparse.Namespace) -> tuple[str | None, str]:
    """Train as `given` says; returns the run's id and tracking URI."""
    device = choose_device(given.device)
    set_seed(given.seed)
    data = load(given.dataset, given.data_dir, seed=given.seed)
    settings: dict[str, Any] = {
        "experiment": given.experiment,
        "tracking_uri": given.tracking_uri,
        "offline": given.offline,
        "checkpoints": Keep(last=given.checkpoints),
    }
    if given.resume is None:
        manager = RunManager(**settings)
    else:
        manager = RunManager.resume(given.resume, **settings)
    with manager:
        run, epochs = training.begin(
            manager,
            data,
            model=given.model,
            lr=given.lr,
            batch_size=given.batch_size,
            shuffle=given.shuffle,
            epochs=given.epochs,
            device=device,
            params={"seed": given.seed},
        )
        for _ in epochs:
            pass
        return run.run_id, run.tracking_uri


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
