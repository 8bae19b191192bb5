"""The recipes for pictures beside what they may be compared with, on one split.

python -m bench.recipes --data-dir data [--part accuracy|transfer] [--seeds 10] [--epochs 100]

For each data set: logistic regression from scikit-learn on the pixels, its strength of
regularisation chosen on the validation part, then `fashion-mlp` and `fashion-cnn` after their last
epoch, trained in each of some ways; all on the same training part, judged on the test part. A seed
draws the split and the weights. Then `transfer` from a `fashion-cnn` that was trained on MNIST, to
Fashion-MNIST, beside one from scratch: the validation accuracy epoch by epoch.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bench.measuring import table
from models import RECIPES, ModelsError, load, rebuild, spec
from models.recipe import Source, scheduler
from tracker import evaluate, fit, set_seed

COMMON = {"lr": 0.004, "batch_size": 50, "normalize": True}
ONE_CYCLE = {**COMMON, "schedule": "one-cycle", "dropout": 0.2}
WAYS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "fashion-mnist": {
        "constant rate": COMMON,
        "one-cycle, dropout 0.2": ONE_CYCLE,
        "and mirrored": {**ONE_CYCLE, "mirror": True},
        "and mirrored, shifted by 1 pixel": {**ONE_CYCLE, "mirror": True, "shift": 1},
    },
    "mnist": {  # a mirrored digit is none
        "constant rate": COMMON,
        "one-cycle, dropout 0.2": ONE_CYCLE,
        "and shifted by 1 pixel": {**ONE_CYCLE, "shift": 1},
    },
}
SHARE = {"fashion-mnist": 1.0, "mnist": 0.2}
"""Of `--epochs`: the steps are as many on five times the pictures."""
CURVE = 30
"""Epochs of the transfer."""


def logistic_regression(source: Source) -> float:
    """Its accuracy on the test part."""
    data = load(source.dataset, source.data_dir, seed=source.seed)
    best, accuracy = 0.0, 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says where it stopped before it had converged
        for strength in (0.003, 0.01, 0.03, 0.1):
            model = LogisticRegression(C=strength, max_iter=200)
            model.fit(data.train.images.flatten(1).numpy(), data.train.labels.numpy())
            validation, test = (
                model.score(part.images.flatten(1).numpy(), part.labels.numpy())
                for part in (data.validation, data.test)
            )
            if validation > best:
                best, accuracy = validation, test
    return accuracy


def train(
    name: str,
    source: Source,
    epochs: int,
    changed: Mapping[str, Any],
    backbone: nn.Module | None = None,
) -> tuple[list[float], float, nn.Module]:
    """The accuracy on the validation part by epoch, that on the test part, and the network."""
    recipe = RECIPES[name]
    params = {**recipe.defaults(), **changed}
    data = recipe.load(source, params)
    facts = {**data.facts, "backbone": spec("fashion-cnn", RECIPES["fashion-cnn"].defaults(), {})}
    set_seed(source.seed)
    network = rebuild(spec(name, params, facts))
    if recipe.weights is not None:
        state: Mapping[str, Tensor] | None = None if backbone is None else backbone.state_dict()
        recipe.weights(network, params, state)
    loader = DataLoader(data.train, params["batch_size"], shuffle=params["shuffle"])
    optimizer = recipe.optimizer(network, params)
    passes = fit(
        network,
        loader,
        optimizer,
        F.cross_entropy,
        epochs=epochs,
        val_loader=DataLoader(data.validation, 500),
        accuracy=True,
        scheduler=scheduler(optimizer, params, loader, epochs),
    )
    curve: list[float] = []
    for number in range(1, epochs + 1):
        if recipe.before_epoch is not None:
            recipe.before_epoch(network, params, number)
        curve.append(next(passes).metrics["val_accuracy"])
    tested = evaluate(network, DataLoader(data.test, 500), F.cross_entropy, accuracy=True)
    return curve, tested["accuracy"], network


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the tables."""
    parser = argparse.ArgumentParser(prog="bench.recipes", description=__doc__)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--part", choices=("accuracy", "transfer"), help="by default both")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=100, help="on Fashion-MNIST")
    given = parser.parse_args(arguments)
    try:
        for name in WAYS:
            load(name, given.data_dir)
    except ModelsError as error:
        parser.error(str(error))
    seeds = range(given.seeds)
    if given.part != "transfer":
        for name in WAYS:
            accuracies([Source(name, given.data_dir, seed) for seed in seeds], given.epochs)
    if given.part != "accuracy":
        curves(given.data_dir, seeds)


def accuracies(sources: Sequence[Source], epochs: int) -> None:
    """Print the mean over the seeds, and the deviation, of each way to train on one data set."""
    name = sources[0].dataset
    linear = _spread([logistic_regression(source) for source in sources])
    rows = []
    for way, changed in WAYS[name].items():
        row = [way, linear]
        for model in ("fashion-mlp", "fashion-cnn"):
            count = max(1, round(epochs * SHARE[name]))
            row.append(_spread([train(model, each, count, changed)[1] for each in sources]))
        rows.append(row)
    columns = ["training", "logistic regression", "fashion-mlp", "fashion-cnn"]
    table(f"Test accuracy on {name}, mean and deviation of {len(sources)} seeds", columns, rows)


def _spread(accuracies: Sequence[float]) -> str:
    deviation = stdev(accuracies) if len(accuracies) > 1 else 0.0
    return f"{mean(accuracies):.3f} ± {deviation:.3f}"


def curves(data_dir: str, seeds: range) -> None:
    """Print the validation accuracy by epoch, with features from digits and without."""
    common = {"lr": 0.001, "batch_size": 50}
    own = {**common, "weights": "runs:/ID/model"}
    found: dict[str, list[list[float]]] = {"from scratch": [], "head alone": [], "thaw 1": []}
    for seed in seeds:
        digits, fashion = (Source(name, data_dir, seed) for name in ("mnist", "fashion-mnist"))
        backbone = train("fashion-cnn", digits, 5, {"lr": 0.001})[2]
        found["from scratch"].append(train("fashion-cnn", fashion, CURVE, common)[0])
        for label, thaw in (("head alone", 0), ("thaw 1", 1)):
            changed = {**own, "thaw": thaw}
            found[label].append(train("transfer", fashion, CURVE, changed, backbone)[0])
    rows = [
        [str(epoch + 1), *(f"{median(c[epoch] for c in curve):.3f}" for curve in found.values())]
        for epoch in [*range(5), *range(9, CURVE, 5)]
    ]
    table(f"Validation accuracy, medians of {len(seeds)} seeds", ["epoch", *found], rows)


if __name__ == "__main__":
    main()
