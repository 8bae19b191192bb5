"""Loss and accuracy of an epoch, summed without waiting for the device.

Each step appends scalars that stay on the device. They are read, and summed over all ranks, only
when the metrics are computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from tracker.errors import ArgumentError
from tracker.training.accuracy import (
    OTHERWISE,
    Count,
    Readings,
    arranged,
    classes_correct,
    decide,
    has_classes,
    numbers_correct,
)
from tracker.training.batches import batch_size
from tracker.training.distributed import sum_over_ranks
from tracker.transfers import check_computed, whole

_PAIRS = (list, tuple)
_CHUNK = 512  # scalars to collect before joining them: on a GPU each one takes 512 bytes

logger = logging.getLogger(__name__)


class _Scalars:
    """A growing series of scalars: numbers, and tensors that stay on their device."""

    def __init__(self, values: Tensor | None = None) -> None:
        self._joined: list[tuple[Sequence[int], Tensor]] = []  # values and their places
        self._recent: list[Tensor | float] = []
        self._before = 0  # the number of scalars before the recent ones
        self.add_number = self._recent.append  # `append` of a float, without a call in each step
        if values is not None:
            self._joined.append((range(len(values)), values))
            self._before = len(values)

    def append(self, scalar: Tensor | float) -> None:
        self._recent.append(scalar)
        if len(self._recent) >= _CHUNK:
            self._joined += _join(self._recent, self._before)
            self._before += len(self._recent)
            self._recent.clear()

    def __len__(self) -> int:
        return self._before + len(self._recent)

    @property
    def device(self) -> torch.device:
        """The device of the scalars; the CPU if all of them are numbers."""
        tensors = (value for value in self._recent if isinstance(value, Tensor))
        joined = (values for _, values in self._joined)
        away = (tensor.device for tensor in (*tensors, *joined) if not tensor.is_cpu)
        return next(away, torch.device("cpu"))

    def read(self) -> npt.NDArray[np.float64]:
        """Return all scalars on the host, float64 (len,). Waits for the device."""
        scalars = np.empty(len(self))
        for places, values in (*self._joined, *_join(self._recent, self._before)):
            scalars[places] = values.cpu().double().numpy()
        return scalars


def _join(scalars: Sequence[Tensor | float], start: int) -> list[tuple[Sequence[int], Tensor]]:
    """Join the scalars of each device and dtype as one tensor, with their places from `start`."""
    if all(isinstance(scalar, float) for scalar in scalars):  # the usual case on the CPU
        return [(range(start, start + len(scalars)), torch.tensor(scalars, dtype=torch.float64))]
    kinds: dict[tuple[torch.device, torch.dtype] | None, list[int]] = {}
    for place, scalar in enumerate(scalars):
        kind = (scalar.device, scalar.dtype) if isinstance(scalar, Tensor) else None
        kinds.setdefault(kind, []).append(place)
    joined: list[tuple[Sequence[int], Tensor]] = []
    for kind, places in kinds.items():
        values: list[Any] = [scalars[place] for place in places]
        tensor = torch.tensor(values, dtype=torch.float64) if kind is None else torch.stack(values)
        joined.append(([start + place for place in places], tensor))
    return joined


@dataclass
class EpochMeter:
    """Loss and accuracy of one epoch on this rank; only `compute` covers all ranks."""

    loader: Any = None
    """The source of the batches; tells their sizes if the loop does not."""
    said: set[str] = field(default_factory=set)
    """The warnings that were given; a manager passes the same set to all of its meters."""
    _losses: _Scalars = field(default_factory=_Scalars)
    _sizes: list[int | None] = field(default_factory=list)
    _correct: _Scalars = field(default_factory=_Scalars)
    _labels: list[tuple[int, int]] = field(default_factory=list)  # batch size, number of labels
    _own_loss: float = 0.0  # what the loop set in addition to the tracked sums
    _own_correct: float = 0.0
    _counted: _Scalars = field(default_factory=_Scalars)  # labels, by a function of the user's
    _readings: Readings = field(default_factory=Readings)

    def __post_init__(self) -> None:
        self._is_collated = getattr(self.loader, "collate_fn", None) is default_collate

    def size_of(self, batch: Any) -> int | None:
        """Return the samples in a batch, or None without one; a guess is said once.

        Raises:
            ArgumentError: The batch has no size.
        """
        if batch is None:
            return None
        if type(batch) in _PAIRS and len(batch) == 2:  # what most loops pass in every step
            inputs, labels = batch
            if type(inputs) is type(labels) is Tensor and labels.dim() == 1:
                samples: int = labels.size(0)
                if inputs.dim() > 1 and inputs.size(0) == samples:
                    return samples
        return batch_size(batch, self._say_guess, is_collated=self._is_collated)

    def _say_guess(self, samples: int) -> None:
        self._say("the batch can be read in several ways and is taken for %d samples", samples)

    def _say_reading(self, what: str) -> None:
        if what not in self.said:
            self.said.add(what)
            logger.warning("track_num_correct(): %s", what)

    def _say(self, what: str, *values: object) -> None:
        if what not in self.said:
            self.said.add(what)
            logger.warning(f"{what}; pass the number of samples to track_loss().", *values)

    def add_loss(self, loss: Tensor | float, size: int | None = None) -> Tensor | float:
        """Add the mean loss of a batch without waiting for its device.

        Args:
            loss: One number of any float dtype, on any device.
            size: Samples in the batch, if known.

        Returns:
            A copy of the loss: a float, or a detached scalar on its device.

        Raises:
            ArgumentError: The loss is not one number, or a graph is being captured.
        """
        if not isinstance(loss, Tensor):
            try:
                loss = torch.from_numpy(np.array(loss, dtype=float))
            except (TypeError, ValueError) as error:
                kind = type(loss).__name__
                raise ArgumentError(f"loss is a {kind}; it must be one number.") from error
        if loss.dim() and loss.numel() != 1:
            raise ArgumentError(
                f"loss has the shape {tuple(loss.shape)}; it must be one number, the mean of the "
                "batch."
            )
        if not loss.is_cpu:
            check_computed(loss, "loss", "track_loss")
        if type(loss) is not Tensor:
            loss = whole(loss.detach())
        # Copy: the loop may modify its loss in place. On the CPU a float is six times faster.
        copied = float(loss.item()) if loss.is_cpu else loss.detach().reshape(()).clone()
        if loss.is_cpu:
            self._losses.add_number(copied)
        else:
            self._losses.append(copied)
        self._sizes.append(size)
        return copied

    def add_correct(self, preds: Tensor, labels: Tensor) -> None:
        """Add the number of correct predictions of a batch without waiting for its device.

        Args:
            preds, labels: Scores, (N, classes, …), and class numbers, (N, …), or other ones that
                the module `accuracy` knows.

        Raises:
            ArgumentError: The shapes do not match.
        """
        if has_classes(preds, labels):  # in most loops
            if preds.dim() > 2 and labels.shape == preds.shape[:-1]:
                self._say_reading(
                    f"preds {tuple(preds.shape)} have their classes in dimension 1, not in the "
                    f"last one; {OTHERWISE}"
                )
            self._add_classes(preds, labels)
            return
        preds, labels, kind = arranged(preds, labels)
        if kind in ("columns", "flags"):
            self._readings.add(preds, labels, kind)
            self._labels.append((len(labels), 0))
            return
        self._add_classes(preds, labels, classes_correct if kind == "classes" else numbers_correct)

    def _add_classes(
        self,
        preds: Tensor,
        labels: Tensor,
        count: Callable[[Tensor, Tensor], Tensor] = classes_correct,
    ) -> None:
        """Add class numbers; negative ones, such as torch's `ignore_index=-100`, do not count."""
        self._correct.append(count(preds, labels))
        size, total = len(labels), labels.numel()
        if labels.dtype.is_signed:
            labels = labels if type(labels) is Tensor else whole(labels.detach())
            if not labels.is_cpu or (total and labels.min().item() < 0):
                self._counted.append(labels.ge(0).sum())
                total = 0
        self._labels.append((size, total))

    def add_counted(self, counted: Any, labels: Any) -> None:
        """Add what a function of the user's has counted, without waiting for a device.

        Args:
            counted: The number of correct predictions, out of the batch; or that and the number
                of labels that were counted.
            labels: The labels of the batch.

        Raises:
            ArgumentError: These are no numbers.
        """
        try:
            size = batch_size(labels)
        except ArgumentError:
            size = 1
        if isinstance(counted, Count):
            counted = counted, counted.labels
        correct, total = counted if isinstance(counted, tuple) else (counted, size)
        self._correct.append(_scalar(correct))
        self._counted.append(_scalar(total))
        self._labels.append((size, 0))

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint. Waits for the device."""
        return {
            "losses": torch.from_numpy(self._losses.read()),
            "sizes": list(self._sizes),
            "correct": torch.from_numpy(self._correct.read()),
            "labels": list(self._labels),
            "own": [self._own_loss, self._own_correct],
            "counted": torch.from_numpy(self._counted.read()),
            "readings": self._readings.read(),
        }

    @classmethod
    def of(cls, state: Mapping[str, Any], loader: Any, said: set[str]) -> EpochMeter:
        """Return a meter that continues from `state`."""
        losses, correct = _Scalars(state["losses"]), _Scalars(state["correct"])
        sizes, labels = list(state["sizes"]), list(state["labels"])
        meter = cls(loader, said, losses, sizes, correct, labels, *state.get("own", ()))
        if "readings" in state:
            meter._counted, meter._readings = (
                _Scalars(state["counted"]),
                Readings(state["readings"]),
            )
        return meter

    def __len__(self) -> int:
        return len(self._losses)

    @property
    def sizes(self) -> npt.NDArray[np.float64]:
        """Samples in each batch, shape (batches,).

        An unknown size is that of the batch's labels if every batch has some, else the loader's
        batch size, else 1. Labels are also believed if they contradict the sizes that were given.
        """
        guesses = [size for size, _ in self._labels]
        if len(guesses) != len(self._sizes):
            if None not in self._sizes:
                return np.array(self._sizes, dtype=float)
            guesses = _loader_batch_sizes(self.loader, len(self._sizes))
        elif _contradict(self._sizes, guesses):
            self._say(
                "the labels of track_num_correct() are counted, not the batch of track_loss()"
            )
            return np.array(guesses, dtype=float)
        pairs = zip(self._sizes, guesses, strict=True)
        return np.array([guess if size is None else size for size, guess in pairs], dtype=float)

    def samples(self, first: int = 0) -> int | None:
        """Return the number of samples from the batch `first` on; None if it is only guessed."""
        is_told = len(self._labels) == len(self._sizes) or None not in self._sizes
        if not is_told and not isinstance(getattr(self.loader, "batch_size", None), int):
            return None
        return int(self.sizes[first:].sum())

    @property
    def losses(self) -> npt.NDArray[np.float64]:
        """Mean loss of each batch, shape (batches,). Waits for the device."""
        return self._losses.read()

    @property
    def loss_sum(self) -> float:
        """Sum of the loss over all samples. Waits for the device. A loop may set it."""
        return self._own_loss + float(self.losses @ self.sizes)

    @loss_sum.setter
    def loss_sum(self, value: Any) -> None:
        self._own_loss = 0.0
        self._own_loss = _number(value) - self.loss_sum

    @property
    def correct(self) -> int:
        """Number of correct predictions. Waits for the device. A loop may set it."""
        return int(self._correct_sum + decide(self._readings.read(), set())[0])

    @correct.setter
    def correct(self, value: Any) -> None:
        self._own_correct = 0.0
        self._own_correct = _number(value) - self.correct

    @property
    def count(self) -> Count:
        """Number of correct predictions, and of labels. Waits for the device."""
        more_correct, more_labels = decide(self._readings.read(), set())
        *_, correct, labels = self._sums()[:4]
        return Count(correct + more_correct, labels + more_labels)

    @property
    def _correct_sum(self) -> float:
        return self._own_correct + float(self._correct.read().sum())

    @property
    def _samples(self) -> int:
        """Samples that the loader yields in an epoch; 0 if that is not known."""
        for owner in (getattr(self.loader, "sampler", None), getattr(self.loader, "dataset", None)):
            try:
                return len(owner)  # type: ignore[arg-type]
            except Exception:  # noqa: BLE001 - its own length may raise anything
                continue
        return 0

    def compute(self) -> dict[str, float]:
        """Return the mean `loss` per sample and the `accuracy` per label, if tracked.

        Waits for the device. In a process group this is one collective, see `compute_all`.
        """
        return compute_all({"": self})

    def _sums(self) -> tuple[float, ...]:
        """Return this rank's sums: loss, samples, correct predictions, labels, and readings."""
        size = float(self.sizes.sum()) or (self._samples if self._own_loss else 0.0)
        labels = sum(labels for _, labels in self._labels) + float(self._counted.read().sum())
        labels = labels or (self._samples if self._own_correct else 0.0)
        # Without samples the mean losses are NaN: leave them out.
        loss = self.loss_sum if size else 0.0
        return loss, size, self._correct_sum, labels, *self._readings.read()

    def _metrics(self, sums: Sequence[float], prefix: str) -> dict[str, float]:
        loss, samples, correct, labels, *readings = sums
        known = {name for name in ("several", "logits") if f"{prefix}{name}" in self.said}
        more_correct, more_labels = decide(readings, known, self._say_reading)
        self.said |= {f"{prefix}{name}" for name in known}
        correct, labels = correct + more_correct, labels + more_labels
        metrics = {}
        if samples:
            metrics["loss"] = loss / samples
        if labels:
            metrics["accuracy"] = correct / labels
        return metrics

    @property
    def _device(self) -> torch.device:
        """The GPU if either series is there: losses may be numbers, and predictions on a GPU."""
        counted = (self._counted.device, self._readings.device)
        return _busiest(self._losses.device, self._correct.device, *counted)


def compute_all(meters: Mapping[str, EpochMeter]) -> dict[str, float]:
    """Return the `loss` and `accuracy` of several meters, each name behind the meter's prefix.

    Waits for the device. In a process group this is one collective, which all ranks must call with
    as many meters, even without batches: only rank 0 may have validated. The result covers all
    ranks and is the same on each. A sample that several ranks saw counts several times: a
    DistributedSampler repeats some if the number of samples is not a multiple of the ranks.
    """
    sums = [meter._sums() for meter in meters.values()]
    devices = (meter._device for meter in meters.values())
    total = sum_over_ranks([number for each in sums for number in each], _busiest(*devices))
    metrics: dict[str, float] = {}
    start = 0
    for (prefix, meter), each in zip(meters.items(), sums, strict=True):
        found = meter._metrics(total[start : start + len(each)], prefix)
        metrics |= {f"{prefix}{name}": value for name, value in found.items()}
        start += len(each)
    return metrics


def _scalar(value: Any) -> Tensor | float:
    """Return a copy of one number, which stays on its device."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = whole(value.detach())
        return float(value.item()) if value.is_cpu else value.reshape(()).clone()
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise ArgumentError(
            f"the function that counts correct predictions returned a {type(value).__name__}"
            f"{shape}; it must return their number, or that and the number of labels."
        ) from error


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value or 0.0)


def _busiest(*devices: torch.device) -> torch.device:
    """A device that is not the CPU if there is one."""
    return max(devices, key=lambda device: device.type != "cpu")


def _contradict(sizes: Sequence[int | None], labels: Sequence[int]) -> bool:
    """Whether the labels are not those of the samples, or the same number for each of them."""
    pairs = [(size, count) for size, count in zip(sizes, labels, strict=True) if size is not None]
    if all(size == count for size, count in pairs):
        return False
    # Labels (N * T,) of sequences are T for each sample. A size of 1 is rather a flag.
    each = {count / size if size else 0.0 for size, count in pairs}
    return len(each) > 1 or not each.pop().is_integer() or all(size == 1 for size, _ in pairs)


def _loader_batch_sizes(loader: Any, batches: int) -> list[int]:
    """The sizes of the first `batches` batches on this rank; 1 if the loader does not tell."""
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
