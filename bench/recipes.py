"""The recipes for pictures beside what they may be compared with, on one split.

python -m bench.recipes --data-dir data [--part accuracy|transfer] [--seeds 3] [--epochs 40]

For each data set: logistic regression from scikit-learn on the pixels, `fashion-mlp` and
`fashion-cnn`, each trained on the training part and judged on the test part; the logistic
regression's strength of regularisation, and each network's epoch, are chosen on the validation
part. Then `transfer` from a `fashion-cnn` that was trained on MNIST, to Fashion-MNIST, beside one
from scratch: the validation accuracy epoch by epoch.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bench.measuring import table
from models import RECIPES, ImageData, ModelsError, load, rebuild, spec
from tracker import evaluate, fit, set_seed


def logistic_regression(data: ImageData) -> float:
    """Its accuracy on the test part."""
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
    data: ImageData,
    seed: int,
    epochs: int,
    changed: Mapping[str, Any] | None = None,
    backbone: nn.Module | None = None,
) -> tuple[list[float], float, nn.Module]:
    """The accuracy on the validation part by epoch, that of its best on the test part, and it."""
    recipe = RECIPES[name]
    params = {**recipe.defaults(), **(changed or {})}
    facts = {**data.facts, "backbone": spec("fashion-cnn", RECIPES["fashion-cnn"].defaults(), {})}
    set_seed(seed)
    network = rebuild(spec(name, params, facts))
    if recipe.weights is not None:
        state: Mapping[str, Tensor] | None = None if backbone is None else backbone.state_dict()
        recipe.weights(network, params, state)
    loader = DataLoader(data.train, params["batch_size"], shuffle=params["shuffle"])
    passes = fit(
        network,
        loader,
        recipe.optimizer(network, params),
        F.cross_entropy,
        epochs=epochs,
        val_loader=DataLoader(data.validation, 500),
        accuracy=True,
    )
    curve: list[float] = []
    best = network
    for number in range(1, epochs + 1):
        if recipe.before_epoch is not None:
            recipe.before_epoch(network, params, number)
        curve.append(next(passes).metrics["val_accuracy"])
        if curve[-1] == max(curve):
            best = copy.deepcopy(network)
    test = evaluate(best, DataLoader(data.test, 500), F.cross_entropy, accuracy=True)["accuracy"]
    return curve, test, best


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the tables."""
    parser = argparse.ArgumentParser(prog="bench.recipes", description=__doc__)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--part", choices=("accuracy", "transfer"), help="by default both")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    given = parser.parse_args(arguments)
    seeds = range(given.seeds)
    try:
        data = {
            name: [load(name, given.data_dir, seed=seed) for seed in seeds]
            for name in ("fashion-mnist", "mnist")
        }
    except ModelsError as error:
        parser.error(str(error))
    if given.part != "transfer":
        accuracies(data, given.epochs)
    if given.part != "accuracy":
        curves(data["mnist"], data["fashion-mnist"], given.epochs)


def accuracies(data: Mapping[str, Sequence[ImageData]], epochs: int) -> None:
    """Print the medians over the splits, by number of the seed, of each data set."""
    changed = {"lr": 0.003, "batch_size": 50, "normalize": True}
    rows = []
    for name, splits in data.items():
        found = [median(logistic_regression(split) for split in splits)]
        for model in ("fashion-mlp", "fashion-cnn"):
            tests = [
                train(model, each, seed, epochs, changed)[1] for seed, each in enumerate(splits)
            ]
            found.append(median(tests))
        parts = (splits[0].train, splits[0].validation, splits[0].test)
        sizes = "/".join(str(len(part)) for part in parts)
        rows.append([name, sizes, *(f"{accuracy:.3f}" for accuracy in found)])
    columns = ["data set", "pictures", "logistic regression", "fashion-mlp", "fashion-cnn"]
    table(f"Test accuracy, medians of {len(splits)} seeds", columns, rows)


def curves(digits: Sequence[ImageData], fashion: Sequence[ImageData], epochs: int) -> None:
    """Print the validation accuracy by epoch, with features from `digits` and without."""
    common = {"lr": 0.001, "batch_size": 50}
    own = {**common, "weights": "runs:/ID/model"}
    found: dict[str, list[list[float]]] = {"from scratch": [], "head alone": [], "thaw 1": []}
    for seed, (before, after) in enumerate(zip(digits, fashion, strict=True)):
        _, _, backbone = train("fashion-cnn", before, seed, 5, {"lr": 0.001})
        found["from scratch"].append(train("fashion-cnn", after, seed, epochs, common)[0])
        for label, thaw in (("head alone", 0), ("thaw 1", 1)):
            changed = {**own, "thaw": thaw}
            curve = train("transfer", after, seed, epochs, changed, backbone)[0]
            found[label].append(curve)
    rows = [
        [str(epoch + 1), *(f"{median(c[epoch] for c in curve):.3f}" for curve in found.values())]
        for epoch in [*range(5), *range(9, epochs, 5)]
    ]
    table(f"Validation accuracy, medians of {len(digits)} seeds", ["epoch", *found], rows)


if __name__ == "__main__":
    main()
