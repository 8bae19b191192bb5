"""Confusion matrix and worst misclassifications of a classifier."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracker.capture.images import to_pil, to_range
from tracker.errors import ArgumentError
from tracker.extras import is_missing
from tracker.texts import visible
from tracker.training.device import device_of, evaluation_mode, unwrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORST = 25
"""Maximum number of misclassifications to keep."""
_COLUMNS = 5  # of the picture
_LABEL = 30  # characters of a class in a picture


@dataclass(frozen=True)
class Mistakes:
    """The predictions of a classifier, summarised."""

    confusion: pd.DataFrame
    """Counts: one row for each true class, one column for each predicted class."""
    worst: pd.DataFrame
    """The misclassified samples with the largest losses, in descending order. Columns: sample (its
    number in the loader), label, predicted, probability (of the prediction), loss (cross-entropy
    in nats) and, if `shown` was given, text."""
    pictures: Sequence[Tensor]
    """Inputs of `worst`, (C, H, W) each; empty if they are not pictures."""


class _Mistake(NamedTuple):
    sample: int
    label: str
    predicted: str
    probability: float
    loss: float
    input: Tensor


@torch.no_grad()
def find_mistakes(
    network: nn.Module,
    loader: Iterable[Any],
    *,
    classes: Sequence[str],
    scores: Callable[[Tensor], Tensor] | None = None,
    shown: Sequence[str] | None = None,
) -> Mistakes:
    """Classify every sample of `loader`, in evaluation mode.

    Args:
        network: Its outputs are scores, (N, classes).
        loader: Batches of (inputs, class numbers).
        classes: Name of each class.
        scores: Turns the outputs into such scores, if they are something else.
        shown: A text for each sample, in the loader's order.

    Raises:
        ArgumentError: The number of classes differs from that of the scores.
    """
    device = device_of(network)
    network = unwrap(network)  # DistributedDataParallel would wait for the other ranks
    counts = torch.zeros(len(classes) ** 2, dtype=torch.long)
    worst: list[_Mistake] = []
    seen = 0
    for inputs, labels in loader:
        with evaluation_mode(network):
            outputs = network(inputs.to(device))
        logits = (outputs if scores is None else scores(outputs)).float().cpu()
        labels = labels.cpu().long()
        if logits.dim() != 2 or logits.shape[1] != len(classes):
            raise ArgumentError(
                f"classes has {len(classes)} names, but the scores have the shape "
                f"{tuple(logits.shape)} instead of (N, {len(classes)})."
            )
        losses = F.cross_entropy(logits, labels, reduction="none")
        confidence, predicted = logits.softmax(dim=1).max(dim=1)
        counts += torch.bincount(labels * len(classes) + predicted, minlength=len(counts))
        wrong = (predicted != labels).nonzero().flatten()
        # Keep the inputs now: a loader that shuffles returns other samples the next time.
        for i in wrong[losses[wrong].argsort(descending=True, stable=True)][:WORST].tolist():
            names = classes[int(labels[i])], classes[int(predicted[i])]
            numbers = confidence[i].item(), losses[i].item()
            worst.append(_Mistake(seen + i, *names, *numbers, inputs[i]))
        worst = sorted(worst, key=lambda mistake: -mistake.loss)[:WORST]
        seen += len(labels)
    confusion = pd.DataFrame(
        counts.reshape(len(classes), -1).numpy(), index=list(classes), columns=list(classes)
    ).rename_axis("true")
    table = pd.DataFrame([mistake[:-1] for mistake in worst], columns=_Mistake._fields[:-1])
    if shown is not None:
        table["text"] = [shown[mistake.sample] for mistake in worst]
    pictures = [mistake.input.cpu() for mistake in worst]
    if any(picture.dim() != 3 or picture.shape[0] not in (1, 3) for picture in pictures):
        pictures = []
    return Mistakes(confusion, table.round(6), pictures)


def cannot_plot() -> bool:
    """Return whether Matplotlib is not installed, without which the tables have no pictures."""
    return is_missing("matplotlib", "vision", "Mistakes are not drawn, as this needs Matplotlib")


def confusion_picture(confusion: pd.DataFrame) -> bytes:
    """Draw the confusion matrix as a PNG: counts, shaded by their share of the row."""
    size = len(confusion)
    inches = max(3.0, 1.5 + 0.5 * size)
    figure = _figure(inches, inches)
    axes = figure.add_subplot()
    shares = confusion.div(confusion.sum(axis=1).clip(lower=1), axis=0).to_numpy()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [visible(str(name), _LABEL) for name in confusion.index]
    axes.set_xticks(range(size), names, rotation=90, parse_math=False)  # $ is a dollar sign
    axes.set_yticks(range(size), names, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if size <= 30:  # more counts would not fit their squares
        for (row, column), count in np.ndenumerate(confusion.to_numpy()):
            if count:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=colour, size=8)
    return _png(figure)


def worst_picture(mistakes: Mistakes) -> bytes | None:
    """Draw the worst misclassified pictures with both labels as a PNG; None without pictures."""
    if not mistakes.pictures:
        return None
    rows = -(-len(mistakes.pictures) // _COLUMNS)
    figure = _figure(1.5 * _COLUMNS, 1.8 * rows)
    pairs = zip(mistakes.pictures, mistakes.worst.itertuples(), strict=True)
    for place, (picture, mistake) in enumerate(pairs, 1):
        axes = figure.add_subplot(rows, _COLUMNS, place)
        axes.imshow(to_pil(to_range(picture).expand(3, -1, -1)))
        axes.set_axis_off()
        label, predicted = (visible(str(n), _LABEL) for n in (mistake.label, mistake.predicted))
        title = f"{label}\n\N{RIGHTWARDS ARROW} {predicted}"
        axes.set_title(title, size=8, parse_math=False)
    return _png(figure)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes half a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, dpi=120, format="png")
    return png.getvalue()
