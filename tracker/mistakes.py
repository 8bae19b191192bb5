"""What a classifier takes for what: a confusion matrix, and the samples that it got most wrong."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracker.environment import device_of, evaluation_mode
from tracker.errors import ArgumentError

WORST = 25
"""How many mistakes are shown."""


@dataclass(frozen=True)
class Mistakes:
    """A classifier's predictions, summed up."""

    confusion: pd.DataFrame
    """Counts: a row for each true class, a column for each predicted one."""
    worst: pd.DataFrame
    """The wrong predictions with the largest losses, the worst first; see `find_mistakes`."""
    pictures: Tensor | None
    """The inputs of `worst`, (N, C, H, W), where they are pictures."""


@torch.no_grad()
def find_mistakes(
    network: nn.Module,
    loader: Iterable[Any],
    *,
    classes: Sequence[str],
    scores: Callable[[Tensor], Tensor] | None = None,
    shown: Sequence[str] | None = None,
) -> Mistakes:
    """Classify every sample of `loader`, whose batches are (inputs, class numbers), in its order.

    `scores` makes scores (N, classes) of the network's outputs, where they are none. `shown` is a
    text for each sample. The table `worst` has the columns sample, its number in `loader`; label;
    predicted; probability, of the prediction; loss, the cross-entropy in nats; and text.
    Raises ArgumentError for classes of another number than the scores have.
    """
    place = device_of(network)
    every: list[tuple[Tensor, Tensor]] = []
    for inputs, labels in loader:
        with evaluation_mode(network):
            outputs = network(inputs.to(place))
        found = outputs if scores is None else scores(outputs)
        every.append((found.float().cpu(), labels.cpu().long()))
    logits, labels = (torch.cat(parts) for parts in zip(*every, strict=True))
    if logits.dim() != 2 or logits.shape[1] != len(classes):
        raise ArgumentError(
            f"classes has {len(classes)} names, and the scores have the shape "
            f"{tuple(logits.shape)}; it must be (N, {len(classes)})."
        )
    losses = F.cross_entropy(logits, labels, reduction="none")
    sure, predicted = logits.softmax(dim=1).max(dim=1)
    counts = torch.bincount(labels * len(classes) + predicted, minlength=len(classes) ** 2)
    confusion = pd.DataFrame(
        counts.reshape(len(classes), -1).numpy(), index=list(classes), columns=list(classes)
    ).rename_axis("true")
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[losses[wrong].argsort(descending=True, stable=True)][:WORST]
    worst = pd.DataFrame(
        {
            "sample": wrong.numpy(),
            "label": [classes[int(i)] for i in labels[wrong]],
            "predicted": [classes[int(i)] for i in predicted[wrong]],
            "probability": sure[wrong].numpy().round(6),
            "loss": losses[wrong].numpy().round(6),
        }
    )
    if shown is not None:
        worst["text"] = [shown[int(i)] for i in wrong]
    return Mistakes(confusion, worst, _pictures(loader, wrong))


def confusion_picture(confusion: pd.DataFrame) -> bytes:
    """A PNG of the matrix: counts, shaded by the share of their row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, once a run
    from matplotlib.figure import Figure

    size = len(confusion)
    inches = max(3.0, 1.5 + 0.5 * size)
    figure = Figure(figsize=(inches, inches), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = confusion.div(confusion.sum(axis=1).clip(lower=1), axis=0).to_numpy()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(size), confusion.columns, rotation=90)
    axes.set_yticks(range(size), confusion.index)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if size <= 30:  # else they do not fit their squares
        for row in range(size):
            for column in range(size):
                if count := confusion.iat[row, column]:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axes.text(
                        column, row, str(count), ha="center", va="center", color=colour, size=8
                    )
    png = io.BytesIO()
    figure.savefig(png, dpi=120, format="png")
    return png.getvalue()


def _pictures(loader: Iterable[Any], wanted: Tensor) -> Tensor | None:
    """The inputs of the wanted samples, where they are pictures."""
    if not len(wanted):
        return None
    found: dict[int, Tensor] = {}
    numbers = set(wanted.tolist())
    for number, sample in enumerate(sample for inputs, _ in loader for sample in inputs):
        if sample.dim() != 3 or sample.shape[0] not in (1, 3):
            return None
        if number in numbers:
            found[number] = sample
    return torch.stack([found[number] for number in wanted.tolist()])
