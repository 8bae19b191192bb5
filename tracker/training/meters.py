"""Loss and accuracy of an epoch, summed without waiting for the device.

A step appends scalars that stay on the device; they are read once, when somebody asks. Where
several processes train, their sums are added up then, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tracker.errors import ArgumentError
from tracker.training.distributed import sum_over_ranks

_CHUNK = 512  # scalars kept one by one before they become one tensor: each costs 512 bytes on a GPU


def num_correct(preds: Tensor, labels: Tensor) -> Tensor:
    """How many predictions are right, as a scalar on the device of `preds`.

    `preds` are scores of shape (N, classes, …), `labels` class numbers of shape (N, …).
    Raises ArgumentError for other shapes, which might be compared each with each.
    """
    if preds.dim() < 2 or preds.shape[1] < 2 or labels.shape != preds.shape[:1] + preds.shape[2:]:
        raise ArgumentError(
            f"preds has the shape {tuple(preds.shape)} and labels {tuple(labels.shape)}; they must "
            "be scores (N, classes, …) of two classes or more, and class numbers (N, …)."
        )
    if labels.device != preds.device:
        labels = labels.to(preds.device, non_blocking=True)
    return preds.argmax(dim=1).eq(labels).sum()


def batch_size(batch: Any) -> int:
    """Samples in a batch: a number, a tensor, or a list, tuple or mapping whose first item is one.

    Raises ArgumentError for anything else.
    """
    if isinstance(batch, (list, tuple)) and batch:
        return batch_size(batch[0])
    if isinstance(batch, Tensor) and batch.dim() > 0:
        return batch.shape[0]
    if isinstance(batch, Mapping) and batch:
        return batch_size(next(iter(batch.values())))
    if isinstance(batch, Integral) and not isinstance(batch, bool) and int(batch) > 0:
        return int(batch)
    shown = batch if isinstance(batch, Integral) else type(batch).__name__
    raise ArgumentError(
        f"batch={shown} has no size; allowed: a tensor, a tuple, list or mapping "
        "that begins with one, or the number of samples."
    )


class _Scalars:
    """A growing row of scalars: tensors, on whatever device they are, and numbers."""

    def __init__(self, before: Tensor | None = None) -> None:
        self._before = torch.zeros(0) if before is None else before  # on the host
        self._chunks: list[Tensor] = []
        self._last: list[Tensor | float] = []

    def append(self, scalar: Tensor | float) -> None:
        self._last.append(scalar)
        if len(self._last) == _CHUNK:
            self._chunks.append(_row(self._last))
            self._last.clear()

    def __len__(self) -> int:
        return len(self._before) + len(self._chunks) * _CHUNK + len(self._last)

    @property
    def device(self) -> torch.device:
        """Where the last of them is; the CPU where there is none."""
        newest = (self._last or self._chunks or [0.0])[-1]
        return newest.device if isinstance(newest, Tensor) else torch.device("cpu")

    def read(self) -> npt.NDArray[np.float64]:
        """All of them on the host; the one point that waits for the device."""
        rows = [*self._chunks, *([_row(self._last)] if self._last else [])]
        read = torch.cat(rows).cpu().double() if rows else torch.zeros(0).double()
        return torch.cat([self._before.double(), read]).numpy()


def _row(scalars: Sequence[Tensor | float]) -> Tensor:
    if all(isinstance(scalar, float) for scalar in scalars):
        return torch.tensor(scalars, dtype=torch.float64)
    double = torch.float64
    return torch.stack(
        [s if isinstance(s, Tensor) else torch.tensor(s, dtype=double) for s in scalars]
    )


@dataclass
class EpochMeter:
    """The sums of one epoch, in this process; `compute` alone speaks for all ranks."""

    loader: Any = None
    """What the batches come from; says how large they are where the loop does not."""
    _losses: _Scalars = field(default_factory=_Scalars)
    _sizes: list[int | None] = field(default_factory=list)
    _correct: _Scalars = field(default_factory=_Scalars)
    _labels: list[tuple[int, int]] = field(default_factory=list)  # batch size, labels in all

    def add_loss(self, loss: Tensor | float, size: int | None = None) -> Tensor | float:
        """Add the mean loss of a batch of `size` samples; None where it is not known yet.

        Returns the copy of it that is kept: a number, or a scalar on its device. Raises
        ArgumentError for a loss that is not one number.
        """
        if not isinstance(loss, Tensor):
            loss = torch.from_numpy(np.array(loss, dtype=float))
        if loss.dim():
            if loss.numel() != 1:
                raise ArgumentError(
                    f"loss has the shape {tuple(loss.shape)}; it must be one number, the batch's "
                    "mean."
                )
            loss = loss.reshape(())
        # A copy: what the loop goes on to do with its loss is none of ours. Where nothing waits
        # for it, a number costs a sixth of a tensor.
        kept = float(loss.item()) if loss.is_cpu else loss.detach().clone()
        self._losses.append(kept)
        self._sizes.append(size)
        return kept

    def add_correct(self, preds: Tensor, labels: Tensor) -> None:
        """Add a batch's right predictions; shapes as in `num_correct`."""
        self._correct.append(num_correct(preds, labels))
        self._labels.append((len(labels), labels.numel()))

    def state(self) -> dict[str, Any]:
        """All it holds, for a checkpoint. Waits for the device."""
        return {
            "losses": torch.from_numpy(self._losses.read()),
            "sizes": list(self._sizes),
            "correct": torch.from_numpy(self._correct.read()),
            "labels": list(self._labels),
        }

    @classmethod
    def of(cls, state: Mapping[str, Any], loader: Any) -> EpochMeter:
        """A meter that goes on from `state`."""
        losses, correct = _Scalars(state["losses"]), _Scalars(state["correct"])
        return cls(loader, losses, list(state["sizes"]), correct, list(state["labels"]))

    def __len__(self) -> int:
        return len(self._losses)

    @property
    def sizes(self) -> npt.NDArray[np.float64]:
        """The size of each batch whose loss was added.

        Where `track_loss(loss)` did not say it: the number of its labels if every batch's were
        tracked, else what the loader makes of its length, else all alike.
        """
        if None not in self._sizes:
            return np.array(self._sizes, dtype=float)
        if len(self._labels) == len(self._sizes):
            known = [size for size, _ in self._labels]
        else:
            known = loader_batch_sizes(self.loader, len(self._sizes))
        pairs = zip(self._sizes, known, strict=True)
        return np.array([guess if size is None else size for size, guess in pairs], dtype=float)

    @property
    def losses(self) -> npt.NDArray[np.float64]:
        """The loss of each batch. Waits for the device."""
        return self._losses.read()

    @property
    def loss_sum(self) -> float:
        """The batches' losses, each times its size. Waits for the device."""
        return float(self.losses @ self.sizes)

    @property
    def correct(self) -> int:
        """How many predictions were right. Waits for the device."""
        return int(self._correct.read().sum())

    def compute(self) -> dict[str, float]:
        """`loss` and `accuracy`, as far as they were tracked. Waits for the device.

        In a process group they are those of all its ranks together, the same on each. That is one
        collective: all ranks must call, those too that saw no batch. A rank that tracks nothing
        of its own gets what others tracked. A sample that several ranks saw counts as often: a
        DistributedSampler repeats some where the ranks do not divide the number of samples.
        """
        size = float(self.sizes.sum())
        labels = sum(labels for _, labels in self._labels)
        # The losses of no samples are not read: their mean is NaN.
        own = (self.loss_sum if size else 0.0, size, self.correct, labels)
        loss, seen, correct, answers = sum_over_ranks(own, self._device)
        metrics = {}
        if seen:
            metrics["loss"] = loss / seen
        if answers:
            metrics["accuracy"] = correct / answers
        return metrics

    @property
    def _device(self) -> torch.device:
        """A GPU if anything is there: losses may be plain numbers, and predictions on a GPU."""
        devices = (self._losses.device, self._correct.device)
        return max(devices, key=lambda device: device.type != "cpu")


def loader_batch_sizes(loader: Any, batches: int) -> list[int]:
    """The sizes of the first `batches` batches of `loader`; all 1 where it does not tell.

    They are those of this process: the length of a DistributedSampler is that of its own share.
    """
    size = getattr(loader, "batch_size", None)
    if not isinstance(size, int):
        return [1] * batches
    sizes = [size] * batches
    if isinstance(loader, DataLoader) and batches:
        try:
            samples = len(loader.sampler)  # type: ignore[arg-type]
        except TypeError:  # a stream has no length
            return sizes
        if batches == -(-samples // size):
            sizes[-1] = samples - size * (batches - 1)
    return sizes
