"""Correct predictions of a batch, for the scores and labels that classifiers have.

- scores (N, classes, …) or (N, …, classes), class numbers (N, …) or (N, 1, …)
- class numbers for both, of one shape
- one score for each label, (N, …) or (N, 1, …): a yes or no each, logits or probabilities
- a column for each class in both, (N, classes, …): labels are one-hot, soft, or several of them yes

Which of the last ones it is depends on the values. They are not read in the loop: each reading is
counted on the device, and the epoch's sums decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tracker.errors import ArgumentError
from tracker.transfers import check_computed, to_device, whole

_COUNTS = 8
OTHERWISE = "RunManager(accuracy=…) counts otherwise."
"""The end of a sentence that says what was assumed."""


class Count(int):
    """A number of correct predictions, which knows out of how many labels."""

    labels: int

    def __new__(cls, correct: float, labels: float) -> Count:
        """Make it of two whole numbers."""
        count = super().__new__(cls, int(correct))
        count.labels = int(labels)
        return count


def has_classes(preds: Tensor, labels: Tensor) -> bool:
    """Return whether these are scores (N, classes, …) and class numbers (N, …)."""
    if not (isinstance(preds, Tensor) and isinstance(labels, Tensor)):
        kinds = f"preds is a {type(preds).__name__} and labels a {type(labels).__name__}"
        raise ArgumentError(f"{kinds}; they must be tensors.")
    return (
        preds.dim() >= 2
        and preds.shape[1] >= 2
        and labels.shape == preds.shape[:1] + preds.shape[2:]
    )


def classes_correct(preds: Tensor, labels: Tensor) -> Tensor:
    """Return the number of correct predictions for which `has_classes`, a scalar on its device."""
    if not (type(preds) is type(labels) is Tensor and preds.is_cpu and labels.is_cpu):
        preds, labels = _together(preds, labels)
    return preds.argmax(dim=1).eq(labels).sum()


def num_correct(preds: Tensor, labels: Tensor) -> Tensor:
    """Count the correct predictions.

    Args:
        preds: Scores, (N, classes, …), with at least two classes.
        labels: Class numbers, (N, …).

    Returns:
        The count, an int64 scalar on the device of `preds`.

    Raises:
        ArgumentError: The shapes do not match. Comparing them might broadcast.
    """
    if not has_classes(preds, labels):
        raise _misfit(preds, labels)
    return classes_correct(preds, labels)


def arranged(preds: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, str]:
    """Return predictions and labels for which `has_classes` is false, in shapes that fit.

    Returns:
        Predictions, labels, and what they are: `classes`, as for `num_correct`; `numbers`, to be
        compared one by one; `columns`, scores and labels with a column for each class; or `flags`,
        a score for each label.

    Raises:
        ArgumentError: The shapes do not match.
    """
    scores, answers = (tensor if tensor.dim() else tensor.reshape(1) for tensor in (preds, labels))
    is_swapped = answers.is_floating_point() and not scores.is_floating_point()
    if is_swapped and scores.dim() < answers.dim() and has_classes(answers, scores):
        return answers, scores, "classes"
    squeezed = _without_column(answers)
    if squeezed is not answers and has_classes(scores, squeezed):
        return scores, squeezed, "classes"
    if scores.dim() > 2 and scores.shape[-1] >= 2 and answers.shape == scores.shape[:-1]:
        return scores.movedim(-1, 1), answers, "classes"
    kind = "columns" if scores.dim() >= 2 and scores.shape[1] >= 2 else "flags"
    if scores.dim() == answers.dim() + 1 and scores.shape[-1] == 1:
        scores, kind = scores.squeeze(-1), "flags"
    if scores.shape != answers.shape:
        scores, answers, kind = _without_column(scores), squeezed, "flags"
    if scores.shape != answers.shape or scores.is_complex():
        raise _misfit(preds, labels)
    return scores, answers, kind if scores.is_floating_point() else "numbers"


def _without_column(tensor: Tensor) -> Tensor:
    return tensor.squeeze(1) if tensor.dim() >= 2 and tensor.shape[1] == 1 else tensor


def _misfit(preds: Tensor, labels: Tensor) -> ArgumentError:
    return ArgumentError(
        f"preds has the shape {tuple(preds.shape)} and labels {tuple(labels.shape)}; they must be "
        "scores (N, classes, …) and class numbers (N, …), or of one shape; "
        f"{OTHERWISE}"
    )


def _together(preds: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as plain tensors on the device of `preds`."""
    if not preds.is_cpu:
        check_computed(preds, "preds", "track_num_correct")
    if not type(preds) is type(labels) is Tensor:
        preds, labels = whole(preds), whole(labels)
    if labels.device != preds.device:
        labels = to_device(labels, preds.device)
    return preds, labels


def numbers_correct(preds: Tensor, labels: Tensor) -> Tensor:
    """Return how many numbers of one shape are equal, a scalar on their device."""
    preds, labels = _together(preds, labels)
    return preds.eq(labels).sum()


class Readings:
    """Counts for each way to read scores that have the shape of their labels."""

    def __init__(self, counts: Sequence[int] = (0,) * _COUNTS) -> None:
        """Start with the counts that `read` returned."""
        self._before = list(counts)
        self._sums: dict[torch.device, Tensor] = {}

    def add(self, preds: Tensor, labels: Tensor, kind: str) -> None:
        """Count the batch, without waiting for its device; arguments are those of `arranged`."""
        preds, labels = _together(preds.detach(), labels.detach())
        is_yes = labels > 0.5
        nothing = torch.zeros((), dtype=torch.int64, device=preds.device)
        highest, not_one_hot, columns = nothing, nothing + 1, 0
        if kind == "columns":
            columns = labels.numel() // labels.shape[1]
            highest = preds.argmax(dim=1).eq(labels.float().argmax(dim=1)).sum()
            not_one_hot = ((labels.float().sum(dim=1) - 1).abs() > 1e-2).any() | (labels < 0).any()
        counts = [
            highest,
            (preds > 0).eq(is_yes).sum(),
            (preds > 0.5).eq(is_yes).sum(),
            not_one_hot,
            ((preds < 0) | (preds > 1)).any(),
            ((labels < -1) | (labels > 1)).any(),
            nothing + columns,
            nothing + labels.numel(),
        ]
        summed = torch.stack([count.long() for count in counts])
        before = self._sums.get(preds.device)
        self._sums[preds.device] = summed if before is None else before + summed

    def read(self) -> list[int]:
        """Return the counts. Waits for the devices."""
        each = [self._before, *(summed.tolist() for summed in self._sums.values())]
        return [sum(counts) for counts in zip(*each, strict=True)]

    @property
    def device(self) -> torch.device:
        """A device of the batches that is not the CPU, if there is one."""
        away = (device for device in self._sums if device.type != "cpu")
        return next(away, torch.device("cpu"))


def decide(
    counts: Sequence[float], known: set[str], say: Callable[[str], object] = lambda _: None
) -> tuple[float, float]:
    """Return the number of correct predictions and of labels.

    Args:
        counts: What `Readings.read` returned, summed over the ranks.
        known: What earlier epochs have decided; it grows.
        say: Called with what was assumed.
    """
    highest, logits, probabilities, not_one_hot, outside, strange, columns, labels = counts
    if not labels:
        return 0.0, 0.0
    if strange:
        say(f"there is no accuracy: labels are no class numbers and not in [-1, 1]; {OTHERWISE}")
        return 0.0, 0.0
    known |= {name for name, is_so in (("several", not_one_hot), ("logits", outside)) if is_so}
    if "several" not in known:
        say(f"labels are taken for one-hot or soft ones: the highest is the class; {OTHERWISE}")
        return highest, columns
    if "logits" in known:
        say(f"preds are taken for logits: above 0 is a yes; {OTHERWISE}")
        return logits, labels
    say(f"preds are taken for probabilities: above 0.5 is a yes; {OTHERWISE}")
    return probabilities, labels
