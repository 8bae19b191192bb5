"""The accuracy of the image recipes and of a baseline, on the same splits.

python -m bench.recipes --data-dir data [--part accuracy|transfer] [--rotate] [--turns 10]

For each data set: scikit-learn's logistic regression on the pixels, with the regularisation chosen
on the validation part, then `fashion-mlp` and `fashion-cnn`, each trained with several settings, of
which each turn chooses the best on its validation part. All train on the same training part and are
judged on the test part. The turn's number seeds the validation split and the weights. With
`--rotate` the test part changes from turn to turn: first the published one, then the other images
in order.

Then `transfer` to Fashion-MNIST from a `fashion-cnn` trained on MNIST, and one trained from
scratch: the validation accuracy by epoch.
"""

from __future__ import annotations

import argparse
import struct
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bench.measuring import table
from models import RECIPES, ModelsError, load, rebuild, spec
from models.data import load_images
from models.idx import read_part
from models.recipe import Source, scheduler
from studies.arguments import RAW, positive_int
from tracker import fit, set_seed

COMMON = {"lr": 0.004, "batch_size": 50, "normalize": True}
ONE_CYCLE = {**COMMON, "schedule": "one-cycle", "dropout": 0.2}
SHIFTED = {**ONE_CYCLE, "shift": 1}
BETTER = {"batch_norm": True, "width": 2}
SETTINGS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "fashion-mnist": {
        "constant rate": COMMON,
        "one-cycle, dropout 0.2": ONE_CYCLE,
        "and mirrored": {**ONE_CYCLE, "mirror": True},
        "and shifted by 1 pixel": {**SHIFTED, "mirror": True},
        "and batch norm, width 2": {**SHIFTED, "mirror": True, **BETTER},
    },
    "mnist": {  # a mirrored digit is not a digit
        "constant rate": COMMON,
        "one-cycle, dropout 0.2": ONE_CYCLE,
        "and shifted by 1 pixel": SHIFTED,
        "and batch norm, width 2": {**SHIFTED, **BETTER},
    },
}
NETWORKS = ("fashion-mlp", "fashion-cnn")
SHARE = {"fashion-mnist": 1.0, "mnist": 0.2}
"""Share of `--epochs` to train: MNIST has five times as many images, so the steps are the same."""
CURVE = 30
"""Epochs of the transfer."""


def logistic_regression(source: Source) -> Tensor:
    """Return which test images the regression classifies correctly, bool (N,)."""
    data = load(source.dataset, source.data_dir, seed=source.seed)
    best, right = -1.0, torch.empty(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of stopping before convergence
        for strength in (0.003, 0.01, 0.03, 0.1, 0.3):
            model = LogisticRegression(C=strength, max_iter=200)
            model.fit(data.train.images.flatten(1).numpy(), data.train.labels.numpy())
            validation, test = (
                torch.from_numpy(model.predict(part.images.flatten(1).numpy())) == part.labels
                for part in (data.validation, data.test)
            )
            if (accuracy := validation.float().mean().item()) > best:
                best, right = accuracy, test
    return right


def train(
    name: str,
    source: Source,
    epochs: int,
    changed: Mapping[str, Any],
    backbone: nn.Module | None = None,
) -> tuple[list[float], Tensor, nn.Module]:
    """Train a recipe.

    Args:
        name: The recipe's name.
        source: The data.
        epochs: Epochs to train.
        changed: Parameters that differ from their defaults.
        backbone: The `fashion-cnn` that `transfer` starts from.

    Returns:
        The validation accuracy by epoch, which test images are classified correctly, bool (N,), and
        the network.
    """
    recipe = RECIPES[name]
    params = {**recipe.defaults(), **changed}
    data = load_images(source, params)
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
    with torch.no_grad():
        right = network.eval()(data.test.images).argmax(1) == data.test.labels
    return curve, right, network


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the tables."""
    parser = argparse.ArgumentParser(prog="bench.recipes", description=__doc__, formatter_class=RAW)
    parser.add_argument(
        "--data-dir", default="data", metavar="FOLDER", help="where data sets are; default: data"
    )
    parser.add_argument(
        "--part", choices=("accuracy", "transfer"), help="print one part; default: both"
    )
    parser.add_argument("--rotate", action="store_true", help="change the test part in each turn")
    parser.add_argument(
        "--turns",
        type=positive_int,
        default=10,
        metavar="N",
        help="repetitions, at least 2; default: 10",
    )
    parser.add_argument(
        "--epochs",
        type=positive_int,
        default=100,
        metavar="N",
        help="epochs on Fashion-MNIST; default: 100",
    )
    given = parser.parse_args(arguments)
    if given.turns < 2:
        parser.error(f"--turns {given.turns} gives no deviation; it must be at least 2.")
    try:
        for name in SETTINGS:
            load(name, given.data_dir)
    except ModelsError as error:
        parser.error(str(error))
    turns = range(given.turns)
    if given.part != "transfer":
        for name in SETTINGS:
            with TemporaryDirectory() as folder:
                parts = rotated(name, given.data_dir, folder) if given.rotate else [given.data_dir]
                sources = [Source(name, parts[turn % len(parts)], turn) for turn in turns]
                accuracies(sources, len(parts), given.epochs)
    if given.part != "accuracy":
        curves(given.data_dir, turns)


def rotated(name: str, data_dir: str, into: str) -> list[str]:
    """Write copies of a data set that differ in their test parts.

    Args:
        name: The data set.
        data_dir: The folder it is in.
        into: The folder to write to.

    Returns:
        A folder for each copy; the first has the published test part.
    """
    folder = Path(load(name, data_dir).source)
    (train, train_labels), (test, test_labels) = (
        read_part(folder, part) for part in ("train", "t10k")
    )
    pixels, labels = torch.cat([test, train]), torch.cat([test_labels, train_labels])
    size = len(test)
    folders = []
    for first in range(0, len(pixels) - size + 1, size):
        root = Path(into, str(first))
        raw = root.joinpath(*folder.parts[-2:])
        raw.mkdir(parents=True)
        is_test = torch.zeros(len(pixels), dtype=torch.bool)
        is_test[first : first + size] = True
        for part, chosen in (("train", ~is_test), ("t10k", is_test)):
            for kind, values in (("images-idx3", pixels), ("labels-idx1", labels)):
                write_idx(raw / f"{part}-{kind}-ubyte", values[chosen])
        folders.append(str(root))
    return folders


def write_idx(path: Path, values: Tensor) -> None:
    """Write bytes as an idx file: type and rank, the shape as big-endian integers, the bytes."""
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(header + values.to(torch.uint8).numpy().tobytes())


def accuracies(sources: Sequence[Source], parts: int, epochs: int) -> None:
    """Print the accuracy of each setting over the turns, and which settings are chosen.

    Args:
        sources: The data of each turn.
        parts: Number of different test parts among them.
        epochs: Epochs to train on Fashion-MNIST.
    """
    name, turns = sources[0].dataset, range(len(sources))
    count = max(1, round(epochs * SHARE[name]))
    validated: dict[str, dict[str, list[float]]] = {model: {} for model in NETWORKS}
    right: dict[str, dict[str, list[Tensor]]] = {model: {} for model in NETWORKS}
    rows = []
    for setting, changed in SETTINGS[name].items():
        row = [setting]
        for model in NETWORKS:
            if changed.keys() <= RECIPES[model].parameters.keys():
                trained = [train(model, source, count, changed) for source in sources]
                validated[model][setting] = [curve[-1] for curve, _, _ in trained]
                right[model][setting] = [correct for _, correct, _ in trained]
                row += [_spread(validated[model][setting]), _accuracy(right[model][setting])]
            else:
                row += ["", ""]
        rows.append(row)
    columns = ["training", *(f"{n}: {part}" for n in NETWORKS for part in ("validation", "test"))]
    table(f"Accuracy on {name}, mean and standard deviation of {len(turns)} turns", columns, rows)

    tested = {"logistic regression": [logistic_regression(source) for source in sources]}
    rows = [["logistic regression", _accuracy(tested["logistic regression"]), ""]]
    for model in NETWORKS:
        best = [max(validated[model], key=lambda s: validated[model][s][t]) for t in turns]
        tested[model] = [right[model][setting][turn] for turn, setting in enumerate(best)]
        counts = [f"{best.count(each)}x {each}" for each in right[model] if each in best]
        rows.append([model, _accuracy(tested[model]), "; ".join(counts)])
    table("Settings chosen on the validation parts", ["", "test", "training"], rows)
    for worse, better in pairwise(tested):
        gain = _by_picture(tested[better], parts) - _by_picture(tested[worse], parts)
        error = gain.std().item() / len(gain) ** 0.5
        print(
            f"{better} minus {worse}: {gain.mean():+.3f}, "
            f"standard error of {len(gain)} images {error:.3f}"
        )


def _by_picture(right: list[Tensor], parts: int) -> Tensor:
    """The share of turns in which each image was right, of one test part after another."""
    return torch.cat(
        [torch.stack(right[p::parts]).float().mean(0) for p in range(min(parts, len(right)))]
    )


def _accuracy(right: Sequence[Tensor]) -> str:
    return _spread([each.float().mean().item() for each in right])


def _spread(accuracies: Sequence[float]) -> str:
    return f"{mean(accuracies):.3f} ± {stdev(accuracies):.3f}"


def curves(data_dir: str, turns: range) -> None:
    """Print the validation accuracy by epoch, from scratch and with features from MNIST.

    Args:
        data_dir: The folder with the data sets.
        turns: Their numbers are the seeds.
    """
    common = {"lr": 0.001, "batch_size": 50}
    tracked = {**common, "weights": "runs:/ID/model"}
    results: dict[str, list[list[float]]] = {"from scratch": [], "head alone": [], "thaw 1": []}
    for seed in turns:
        digits, fashion = (Source(name, data_dir, seed) for name in ("mnist", "fashion-mnist"))
        backbone = train("fashion-cnn", digits, 5, {"lr": 0.001})[2]
        results["from scratch"].append(train("fashion-cnn", fashion, CURVE, common)[0])
        for label, thaw in (("head alone", 0), ("thaw 1", 1)):
            changed = {**tracked, "thaw": thaw}
            results[label].append(train("transfer", fashion, CURVE, changed, backbone)[0])
    rows = [
        [str(epoch + 1), *(f"{median(c[epoch] for c in runs):.3f}" for runs in results.values())]
        for epoch in [*range(5), *range(9, CURVE, 5)]
    ]
    table(f"Validation accuracy, medians of {len(turns)} turns", ["epoch", *results], rows)


if __name__ == "__main__":
    main()
