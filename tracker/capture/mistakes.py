"""What a classifier takes for what: a confusion matrix, and the samples that it got most wrong."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid

from tracker.capture.images import to_pil
from tracker.errors import ArgumentError
from tracker.training.device import device_of, evaluation_mode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORST = 25
"""How many mistakes are shown."""
_ACROSS = 5


@dataclass(frozen=True)
class Mistakes:
    """A classifier's predictions, summed up."""

    confusion: pd.DataFrame
    """Counts: a row for each true class, a column for each predicted one."""
    worst: pd.DataFrame
    """The wrong predictions with the largest losses, the worst first; see `find_mistakes`."""
    pictures: Sequence[Tensor]
    """The inputs of `worst`, (C, H, W) each, where they are pictures; else none."""


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
    counts = torch.zeros(len(classes) ** 2, dtype=torch.long)
    worst: list[_Mistake] = []
    seen = 0
    for inputs, labels in loader:
        with evaluation_mode(network):
            outputs = network(inputs.to(place))
        logits = (outputs if scores is None else scores(outputs)).float().cpu()
        labels = labels.cpu().long()
        if logits.dim() != 2 or logits.shape[1] != len(classes):
            raise ArgumentError(
                f"classes has {len(classes)} names, and the scores have the shape "
                f"{tuple(logits.shape)}; it must be (N, {len(classes)})."
            )
        losses = F.cross_entropy(logits, labels, reduction="none")
        sure, predicted = logits.softmax(dim=1).max(dim=1)
        counts += torch.bincount(labels * len(classes) + predicted, minlength=len(counts))
        wrong = (predicted != labels).nonzero().flatten()
        # The inputs are kept as they come: a loader that shuffles gives others the next time.
        for i in wrong[losses[wrong].argsort(descending=True, stable=True)][:WORST].tolist():
            names = classes[int(labels[i])], classes[int(predicted[i])]
            worst.append(_Mistake(seen + i, *names, sure[i].item(), losses[i].item(), inputs[i]))
        worst = sorted(worst, key=lambda mistake: -mistake.loss)[:WORST]
        seen += len(labels)
    confusion = pd.DataFrame(
        counts.reshape(len(classes), -1).numpy(), index=list(classes), columns=list(classes)
    ).rename_axis("true")
    columns = ["sample", "label", "predicted", "probability", "loss"]
    table = pd.DataFrame([mistake[:-1] for mistake in worst], columns=columns).round(6)
    if shown is not None:
        table["text"] = [shown[mistake.sample] for mistake in worst]
    inputs = [mistake.input.cpu() for mistake in worst]
    if any(each.dim() != 3 or each.shape[0] not in (1, 3) for each in inputs):
        inputs = []
    return Mistakes(confusion, table, inputs)


class _Mistake(NamedTuple):
    sample: int
    label: str
    predicted: str
    probability: float
    loss: float
    input: Tensor


def confusion_picture(confusion: pd.DataFrame) -> bytes:
    """A PNG of the matrix: counts, shaded by the share of their row."""
    size = len(confusion)
    inches = max(3.0, 1.5 + 0.5 * size)
    figure = _figure(inches, inches)
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
    return _png(figure)


def worst_picture(found: Mistakes) -> bytes | None:
    """A PNG of the worst mistakes, each with what it is and what it was taken for; None: none."""
    if not found.pictures:
        return None
    rows = -(-len(found.pictures) // _ACROSS)
    figure = _figure(1.5 * _ACROSS, 1.8 * rows)
    for place, (picture, mistake) in enumerate(
        zip(found.pictures, found.worst.itertuples(), strict=True), 1
    ):
        axes = figure.add_subplot(rows, _ACROSS, place)
        axes.imshow(to_pil(make_grid(picture, normalize=True, padding=0)))
        axes.set_axis_off()
        axes.set_title(f"{mistake.label}\n\N{RIGHTWARDS ARROW} {mistake.predicted}", size=8)
    return _png(figure)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, once a run
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, dpi=120, format="png")
    return png.getvalue()
