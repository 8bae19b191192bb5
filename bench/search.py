"""TPE with pruning against the tutorial's grid, with the same number of training epochs.

python -m bench.search --data-dir data [--seeds 5] [--epochs 10]

Both train `fashion-cnn` with Adam on Fashion-MNIST and maximise the validation accuracy. The grid
is the tutorial's, 8 combinations of lr, batch_size and shuffle, each trained to the end. TPE gets
as many epochs in all, over the ranges of `studies.search`, and the median pruner stops trials
early. The best of each is then trained again and judged on the test part.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch.nn.functional as F
from optuna.trial import FrozenTrial
from torch.optim import Adam
from torch.utils.data import DataLoader

from bench.measuring import table
from models import RECIPES, FashionCNN, load
from models.recipe import Source
from studies.arguments import RAW, default_space, positive_int
from studies.search import Objective
from tracker import Study, evaluate, fit, set_seed


def search(kind: str, seed: int, epochs: int, data_dir: str, folder: Path) -> FrozenTrial:
    """Return the best trial of a study.

    Args:
        kind: The sampler, "grid" or "tpe".
        seed: Seeds the sampler, the weights and the validation split.
        epochs: Epochs per trial; the study trains 8 times as many, TPE up to one trial more.
        data_dir: The folder with the data set.
        folder: Where the study's files go.
    """
    objective = Objective(
        "fashion-cnn",
        RECIPES["fashion-cnn"].defaults(),
        Source("fashion-mnist", data_dir, seed),
        epochs,
        "auto",
        ("val_accuracy",),
        None,
    )
    trials, trained = 8, 0
    while trained < 8 * epochs:
        study = Study(
            f"{kind} {seed}",
            objective,
            space=default_space(RECIPES["fashion-cnn"], grid=kind == "grid"),
            sampler=kind,
            pruner="none" if kind == "grid" else "median",
            trials=trials,
            direction="maximize",
            metric="val_accuracy",
            storage=f"journal:///{folder}/studies.journal",
            directory=folder / "journals",
            seed=seed,
            steps=epochs,
            models="none",
            offline=True,
        ).run(resume=True)
        trained = sum(trial.last_step or 0 for trial in study.get_trials(deepcopy=False))
        trials += 1
    return study.best_trial


def test_accuracy(best: FrozenTrial, seed: int, epochs: int, data_dir: str) -> float:
    """Train with the parameters of a trial, and return the accuracy on the test part.

    Args:
        best: The trial.
        seed: Seeds the weights and the validation split.
        epochs: Epochs to train.
        data_dir: The folder with the data set.
    """
    data = load("fashion-mnist", data_dir, seed=seed)
    set_seed(seed)
    network = FashionCNN()
    loader = DataLoader(data.train, best.params["batch_size"], shuffle=best.params["shuffle"])
    optimizer = Adam(network.parameters(), best.params["lr"])
    for _ in fit(network, loader, optimizer, F.cross_entropy, epochs=epochs):
        pass
    test = DataLoader(data.test, 500)
    return evaluate(network, test, F.cross_entropy, accuracy=True)["accuracy"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the studies and print the table."""
    parser = argparse.ArgumentParser(prog="bench.search", description=__doc__, formatter_class=RAW)
    parser.add_argument(
        "--data-dir", default="data", metavar="FOLDER", help="where data sets are; default: data"
    )
    parser.add_argument(
        "--seeds", type=positive_int, default=5, metavar="N", help="repetitions; default: 5"
    )
    parser.add_argument(
        "--epochs", type=positive_int, default=10, metavar="N", help="epochs per trial; default: 10"
    )
    given = parser.parse_args(arguments)
    results: dict[str, list[tuple[float, float]]] = {"grid": [], "tpe": []}
    rows = []
    for seed in range(given.seeds):
        row = [str(seed)]
        for kind, accuracies in results.items():
            with tempfile.TemporaryDirectory() as folder:
                best = search(kind, seed, given.epochs, given.data_dir, Path(folder))
            test = test_accuracy(best, seed, given.epochs, given.data_dir)
            accuracies.append((best.values[0], test))
            row += [f"{best.values[0]:.3f}", f"{test:.3f}"]
        rows.append(row)
        print(" ".join(row), flush=True)
    medians = [median(each) for kind in results for each in zip(*results[kind], strict=True)]
    rows.append(["median", *(f"{value:.3f}" for value in medians)])
    columns = ["seed", "grid: validation", "test", "TPE, pruned: validation", "test"]
    table(f"Accuracy of the best trial after {8 * given.epochs} epochs in all", columns, rows)


if __name__ == "__main__":
    main()
