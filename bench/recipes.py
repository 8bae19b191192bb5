"""The recipes for pictures beside what they may be compared with, on the same splits.

python -m bench.recipes --data-dir data [--part accuracy|transfer] [--rotate] [--turns 10]

For each data set: logistic regression from scikit-learn on the pixels, its strength of
regularisation chosen on the validation part, then `fashion-mlp` and `fashion-cnn` after their last
epoch, trained in each of some ways, of which each turn's validation part chooses one for each
network; all on the same training part, judged on the test part. The turn's number draws the
validation part and the weights. With `--rotate` another part of all the pictures is the test part
in each turn, first the published one, then the rest in their order. Then `transfer` from a
`fashion-cnn` that was trained on MNIST, to Fashion-MNIST, beside one from scratch: the validation
accuracy epoch by epoch.
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
from models.idx import read_part
from models.recipe import Source, scheduler
from tracker import fit, set_seed

COMMON = {"lr": 0.004, "batch_size": 50, "normalize": True}
ONE_CYCLE = {**COMMON, "schedule": "one-cycle", "dropout": 0.2}
SHIFTED = {**ONE_CYCLE, "shift": 1}
BETTER = {"batch_norm": True, "width": 2}
WAYS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "fashion-mnist": {
        "constant rate": COMMON,
        "one-cycle, dropout 0.2": ONE_CYCLE,
        "and mirrored": {**ONE_CYCLE, "mirror": True},
        "and shifted by 1 pixel": {**SHIFTED, "mirror": True},
        "and batch norm, width 2": {**SHIFTED, "mirror": True, **BETTER},
    },
    "mnist": {  # a mirrored digit is none
        "constant rate": COMMON,
        "one-cycle, dropout 0.2": ONE_CYCLE,
        "and shifted by 1 pixel": SHIFTED,
        "and batch norm, width 2": {**SHIFTED, **BETTER},
    },
}
NETWORKS = ("fashion-mlp", "fashion-cnn")
SHARE = {"fashion-mnist": 1.0, "mnist": 0.2}
"""Of `--epochs`: the steps are as many on five times the pictures."""
CURVE = 30
"""Epochs of the transfer."""


def logistic_regression(source: Source) -> Tensor:
    """Which pictures of the test part it is right about, bool (N,)."""
    data = load(source.dataset, source.data_dir, seed=source.seed)
    best, right = -1.0, torch.empty(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says where it stopped before it had converged
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
    """The accuracy on the validation part by epoch, what of the test part is right, the network."""
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
    with torch.no_grad():
        right = network.eval()(data.test.images).argmax(1) == data.test.labels
    return curve, right, network


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the tables."""
    parser = argparse.ArgumentParser(prog="bench.recipes", description=__doc__)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--part", choices=("accuracy", "transfer"), help="by default both")
    parser.add_argument("--rotate", action="store_true", help="another test part in each turn")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=100, help="on Fashion-MNIST")
    given = parser.parse_args(arguments)
    if given.turns < 2:
        parser.error(f"--turns {given.turns} gives no deviation; allowed: from 2.")
    try:
        for name in WAYS:
            load(name, given.data_dir)
    except ModelsError as error:
        parser.error(str(error))
    turns = range(given.turns)
    if given.part != "transfer":
        for name in WAYS:
            with TemporaryDirectory() as folder:
                parts = rotated(name, given.data_dir, folder) if given.rotate else [given.data_dir]
                sources = [Source(name, parts[turn % len(parts)], turn) for turn in turns]
                accuracies(sources, len(parts), given.epochs)
    if given.part != "accuracy":
        curves(given.data_dir, turns)


def rotated(name: str, data_dir: str, into: str) -> list[str]:
    """Folders of the same pictures, each with another test part; the published one comes first."""
    folder = Path(load(name, data_dir).source)
    (train, known), (test, wanted) = (read_part(folder, part) for part in ("train", "t10k"))
    pixels, labels, size = torch.cat([test, train]), torch.cat([wanted, known]), len(test)
    made = []
    for first in range(0, len(pixels) - size + 1, size):
        root = Path(into, str(first))
        raw = root.joinpath(*folder.parts[-2:])
        raw.mkdir(parents=True)
        tested = torch.zeros(len(pixels), dtype=torch.bool)
        tested[first : first + size] = True
        for part, chosen in (("train", ~tested), ("t10k", tested)):
            for kind, values in (("images-idx3", pixels), ("labels-idx1", labels)):
                write_idx(raw / f"{part}-{kind}-ubyte", values[chosen])
        made.append(str(root))
    return made


def write_idx(path: Path, values: Tensor) -> None:
    """Write bytes as idx files have them: type and rank, the shape big-endian, then the bytes."""
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(header + values.to(torch.uint8).numpy().tobytes())


def accuracies(sources: Sequence[Source], parts: int, epochs: int) -> None:
    """Print what each way to train one data set gives over the turns, and what they choose."""
    name, turns = sources[0].dataset, range(len(sources))
    count = max(1, round(epochs * SHARE[name]))
    validated: dict[str, dict[str, list[float]]] = {model: {} for model in NETWORKS}
    right: dict[str, dict[str, list[Tensor]]] = {model: {} for model in NETWORKS}
    rows = []
    for way, changed in WAYS[name].items():
        row = [way]
        for model in NETWORKS:
            if changed.keys() <= RECIPES[model].parameters.keys():
                done = [train(model, source, count, changed) for source in sources]
                validated[model][way] = [curve[-1] for curve, _, _ in done]
                right[model][way] = [tested for _, tested, _ in done]
                row += [_spread(validated[model][way]), _accuracy(right[model][way])]
            else:
                row += ["", ""]
        rows.append(row)
    columns = ["training", *(f"{n}: {part}" for n in NETWORKS for part in ("validation", "test"))]
    table(f"Accuracy on {name}, mean and deviation of {len(turns)} turns", columns, rows)

    tested = {"logistic regression": [logistic_regression(source) for source in sources]}
    rows = [["logistic regression", _accuracy(tested["logistic regression"]), ""]]
    for model in NETWORKS:
        ways = [max(validated[model], key=lambda w: validated[model][w][t]) for t in turns]
        tested[model] = [right[model][way][turn] for turn, way in enumerate(ways)]
        chosen = "; ".join(f"{ways.count(way)}x {way}" for way in right[model] if way in ways)
        rows.append([model, _accuracy(tested[model]), chosen])
    table("What the validation parts choose", ["", "test", "training"], rows)
    for worse, better in pairwise(tested):
        gain = _by_picture(tested[better], parts) - _by_picture(tested[worse], parts)
        error = gain.std().item() / len(gain) ** 0.5
        print(
            f"{better} minus {worse}: {gain.mean():+.3f}, "
            f"standard error of {len(gain)} pictures {error:.3f}"
        )


def _by_picture(right: list[Tensor], parts: int) -> Tensor:
    """How often each picture was right of the turns that tested it, of one part after another."""
    return torch.cat(
        [torch.stack(right[p::parts]).float().mean(0) for p in range(min(parts, len(right)))]
    )


def _accuracy(right: Sequence[Tensor]) -> str:
    return _spread([each.float().mean().item() for each in right])


def _spread(accuracies: Sequence[float]) -> str:
    return f"{mean(accuracies):.3f} ± {stdev(accuracies):.3f}"


def curves(data_dir: str, turns: range) -> None:
    """Print the validation accuracy by epoch, with features from digits and without."""
    common = {"lr": 0.001, "batch_size": 50}
    own = {**common, "weights": "runs:/ID/model"}
    found: dict[str, list[list[float]]] = {"from scratch": [], "head alone": [], "thaw 1": []}
    for seed in turns:
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
    table(f"Validation accuracy, medians of {len(turns)} turns", ["epoch", *found], rows)


if __name__ == "__main__":
    main()
