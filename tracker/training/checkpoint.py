"""Checkpoints: everything that training needs to continue as if it had never stopped.

    save_checkpoint(folder, network=network, optimizer=optimizer, epoch=2, step=800, loader=loader)
    ...
    checkpoint = load_checkpoint(folder)
    checkpoint.restore(network=network, optimizer=optimizer)
    for batch in checkpoint.remaining(loader):

A checkpoint is a folder with two files: `tensors.pt`, a flat dict of tensors, and `state.json`,
everything else. Only tensors are unpickled.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from tracker.errors import ArgumentError, StoreError
from tracker.training.checkpoint_files import read_files, read_state, write_files
from tracker.training.device import is_sharded, unwrap
from tracker.training.rng import RandomStates
from tracker.training.states import decode, encode
from tracker.validation import checked_number

Stateful = Any
"""An object with `state_dict` and `load_state_dict`, or a list, tuple or dict of such objects."""

_FOREIGN = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, struct.error)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint read by `load_checkpoint`."""

    epoch: int
    """Completed epochs."""
    step: int
    """Steps in total."""
    position: int
    """Batches completed in the current epoch; 0 between epochs."""
    metrics: dict[str, float]
    """The metrics passed to `save_checkpoint`."""
    extra: Any
    """The `extra` passed to `save_checkpoint`."""
    _state: dict[str, Any] = field(repr=False)
    _tensors: dict[str, Tensor] = field(repr=False)

    def restore(
        self,
        *,
        network: Stateful | None = None,
        optimizer: Stateful | None = None,
        scheduler: Stateful | None = None,
        scaler: Stateful | None = None,
        loader: Iterable[Any] | None = None,
        random_states: bool = True,
        **objects: Stateful,
    ) -> None:
        """Load the saved states into the given objects, on the device where each object is.

        Args:
            network: Wrapped (DataParallel, `torch.compile`, …) or not.
            optimizer: An optimizer of the saved class.
            scheduler: A scheduler of the saved class.
            scaler: Ignored if it is disabled.
            loader: Its generators are restored for the next epoch. To finish an epoch that the
                checkpoint interrupted, call `remaining` instead.
            random_states: Whether to restore the global random states too.
            objects: Other objects, by the names under which they were saved.

        Raises:
            ArgumentError: An object does not match the saved one, or none was saved. Nothing is
                changed.
        """
        parts = _parts({**_four(network, optimizer, scheduler, scaler), **objects})
        for name, part in parts.items():
            self._check(name, part)
        states = self._random("random")
        if random_states:
            states.check(loader)
        for name, part in parts.items():
            saved = self._state["objects"][name]
            state = decode(saved["state"], self._tensors)
            if metadata := decode(saved.get("metadata"), self._tensors):
                state._metadata = metadata
            if isinstance(part, Optimizer):
                _move_hyperparameters(state["param_groups"], part.param_groups)
            part.load_state_dict(state)
        if random_states:
            states.restore(loader)

    def remaining(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Return the rest of the interrupted epoch, or the next epoch if none was interrupted.

        The epoch starts again from its first random states, and the batches already used for
        training are drawn and dropped. Then the random states of the checkpoint are restored.
        `position` must count the batches taken from the loader, and the caller must call
        `DistributedSampler.set_epoch`. The result differs from uninterrupted training for:

        - state kept by an IterableDataset, a data set or a sampler (except a torch generator);
        - random numbers drawn in persistent workers after their first epoch;
        - a sampler that draws global random numbers after its first index;
        - a loader with `in_order=False`.

        Raises:
            ArgumentError: The loader has too few batches, or a generator that was not captured.
        """
        states = self._random("random")
        if not self.position:
            states.restore(loader)
            return iter(loader)
        self._random("epoch_start").restore(loader)
        batches = iter(loader)
        skipped = sum(1 for _ in islice(batches, self.position))
        if skipped < self.position:
            raise ArgumentError(
                f"loader has only {skipped} batches, but the checkpoint was saved after batch "
                f"{self.position} of an epoch; pass the loader used in training."
            )
        # If the saved states have no loader, skipping has advanced its generators far enough.
        states.restore(loader if states.loader else None)
        return batches

    @property
    def epoch_start(self) -> RandomStates:
        """The random states at the start of the interrupted epoch, or of the next epoch."""
        return self._random("epoch_start" if self.position else "random")

    def _random(self, name: str) -> RandomStates:
        fields = decode(self._state[name], self._tensors)
        if "cuda" in fields:  # of earlier commits
            fields["devices"] = {"cuda": fields.pop("cuda")}
        return RandomStates(**fields)

    def _check(self, name: str, part: Any) -> None:
        """Raise ArgumentError if `part` does not match the saved object of that name."""
        objects = self._state["objects"]
        if name not in objects:
            raise ArgumentError(f"{name} is not in the checkpoint; it has {', '.join(objects)}.")
        saved, given = objects[name]["outline"], _outline(part)
        differences = [
            f"{key}: expected {saved.get(key, 'nothing')}, got {given.get(key, 'nothing')}"
            for key in saved | given
            if not (key in saved and key in given and _fits(saved[key], given[key]))
        ]
        if differences:
            more = [f"and {len(differences) - 3} more"] if differences[3:] else []
            raise ArgumentError(
                f"{name} does not match the checkpoint ({'; '.join(differences[:3] + more)})."
            )


def _four(*usual: Any) -> dict[str, Any]:
    return dict(zip(("network", "optimizer", "scheduler", "scaler"), usual, strict=True))


def _parts(given: Mapping[str, Any]) -> dict[str, Any]:
    """The objects by name, `optimizer[0]` in lists, without a disabled scaler: it has no state."""
    parts: dict[str, Any] = {}
    for name, part in given.items():
        if isinstance(part, nn.Module):
            parts[name] = unwrap(part)
        elif isinstance(part, GradScaler) and not part.is_enabled():
            continue
        elif callable(getattr(part, "state_dict", None)):
            parts[name] = part
        elif isinstance(part, (list, tuple, dict)):
            items = part.items() if isinstance(part, dict) else enumerate(part)
            parts |= _parts({f"{name}[{key!r}]": item for key, item in items})
        elif part is not None:
            raise ArgumentError(
                f"{name} is a {type(part).__name__}; allowed are objects with state_dict() and "
                "load_state_dict(), such as networks and optimizers, and lists and dicts of them."
            )
    return parts


def _outline(part: Any) -> dict[str, Any]:
    """What must match for a state to fit: shapes and classes; None fits anything."""
    if isinstance(part, nn.Module):
        return {
            key: list(value.shape)
            if isinstance(value, Tensor) and not nn.parameter.is_lazy(value)
            else None
            for key, value in part.state_dict().items()
        }
    outline: dict[str, Any] = {"class": type(part).__name__}
    if isinstance(part, Optimizer):
        for number, group in enumerate(part.param_groups):
            for place, parameter in enumerate(group["params"]):
                outline[f"parameter {place} of group {number}"] = list(parameter.shape)
    for number, inner in enumerate(getattr(part, "_schedulers", ())):  # Sequential, Chained
        outline[f"scheduler {number}"] = type(inner).__name__
    return outline


def _fits(saved: Any, given: Any) -> bool:
    return None in (saved, given) or bool(saved == given)


def _move_hyperparameters(saved: list[dict[str, Any]], given: list[dict[str, Any]]) -> None:
    """Move tensor hyperparameters (a learning rate) to their device; torch moves only states."""
    for group, target in zip(saved, given, strict=True):
        for key, value in group.items():
            if isinstance(value, Tensor) and isinstance(target.get(key), Tensor):
                group[key] = value.to(target[key].device)


def save_checkpoint(
    folder: Path,
    *,
    network: Stateful,
    optimizer: Stateful | None = None,
    scheduler: Stateful | None = None,
    scaler: Stateful | None = None,
    objects: Mapping[str, Stateful] | None = None,
    loader: Iterable[Any] | None = None,
    epoch: int,
    step: int,
    position: int = 0,
    epoch_start: RandomStates | None = None,
    metrics: Mapping[str, float] | None = None,
    extra: Any = None,
) -> None:
    """Write the states of the given objects and all random states to `folder`, atomically.

    Args:
        folder: New, empty or a checkpoint, which is replaced. One process at a time may write it.
        network: Wrapped (DataParallel, `torch.compile`, …) or not; several in a list or a dict.
        optimizer: Saved if given, like `scheduler` and `scaler`; several in a list or a dict.
        scheduler: See `optimizer`.
        scaler: See `optimizer`.
        objects: Other objects with `state_dict` and `load_state_dict`, by name.
        loader: Required if it or its sampler has its own generator, or if it keeps its workers.
        epoch: Completed epochs.
        step: Steps in total.
        position: Batches completed in the current epoch.
        epoch_start: Random states captured before the first batch of the current epoch; required
            with `position`.
        metrics: Numbers to keep with the checkpoint.
        extra: Other data, of the types that states may have.

    Raises:
        ArgumentError: A value is not allowed, or a state contains something other than tensors,
            arrays, numbers, strings and collections of these. Nothing is written.
        StoreError: The folder cannot be written.
    """
    for name, number in (("epoch", epoch), ("step", step), ("position", position)):
        if not isinstance(number, int) or number < 0:
            raise ArgumentError(
                f"{name}={number!r} is not allowed; it must be a whole number, 0 or more."
            )
    if position and epoch_start is None:
        raise ArgumentError(
            f"position={position} requires epoch_start, the random states at the epoch's start."
        )
    parts = _parts({**_four(network, optimizer, scheduler, scaler), **(objects or {})})
    if any(is_sharded(part) for part in parts.values() if isinstance(part, nn.Module)):
        raise ArgumentError(
            "each rank has a part of network, and a checkpoint must hold all of it; save it with "
            "torch.distributed.checkpoint."
        )
    random_states = {"random": RandomStates.capture(loader)}
    if epoch_start is not None:
        epoch_start.check(loader)
        random_states["epoch_start"] = epoch_start
    tensors: dict[str, Tensor] = {}
    saved: dict[str, Any] = {}
    for name, part in parts.items():
        state = part.state_dict()
        saved[name] = {"outline": _outline(part), "state": encode(state, name, tensors)}
        if isinstance(part, nn.Module):  # the versions of its modules' states
            metadata = getattr(state, "_metadata", None)
            saved[name]["metadata"] = encode(metadata, f"{name}._metadata", tensors)
    numbers = {name: checked_number(name, value) for name, value in (metrics or {}).items()}
    write_files(
        folder,
        tensors,
        {
            "epoch": epoch,
            "step": step,
            "position": position,
            "metrics": encode(numbers, "metrics", tensors),
            "extra": encode(extra, "extra", tensors),
            **{name: encode(vars(each), name, tensors) for name, each in random_states.items()},
            "objects": saved,
        },
    )


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read the checkpoint in `folder`, with its tensors on the CPU.

    Raises:
        StoreError: The folder is missing or damaged, is not a checkpoint, or has an unknown
            version.
    """
    state, tensors = read_files(folder)
    with _checked(folder):
        epoch, step, position = (state[name] for name in ("epoch", "step", "position"))
        if not all(type(number) is int and number >= 0 for number in (epoch, step, position)):
            raise ValueError("its place is not a number")
        metrics = _numbers(decode(state["metrics"], tensors))
        extra = decode(state["extra"], tensors)
        return Checkpoint(epoch, step, position, metrics, extra, state, tensors)


def load_metrics(path: Path) -> dict[str, float]:
    """Read only the metrics, from the `state.json` of a checkpoint.

    Raises:
        StoreError: The file is missing or damaged.
    """
    with _checked(path):
        return _numbers(decode(read_state(path)["metrics"], {}))


@contextmanager
def _checked(path: Path) -> Iterator[None]:
    """Raise StoreError for a state that another program has written."""
    try:
        yield
    except _FOREIGN as error:
        raise StoreError(f"{path} is not a checkpoint of tracker.") from error


def _numbers(metrics: Any) -> dict[str, float]:
    for name, value in dict(metrics).items():
        if not isinstance(name, str) or not isinstance(value, int | float):
            raise ValueError(f"{name!r} is not a metric")
    return dict(metrics)


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints to keep: the latest, and optionally the best one."""

    last: int = 1
    """Number of latest checkpoints."""
    best: str | None = None
    """Metric that decides which checkpoint is the best; the earliest wins a tie."""
    mode: Literal["min", "max"] = "min"
    """Whether the best has the smallest or the largest value."""

    def __post_init__(self) -> None:
        if not isinstance(self.last, int) or self.last < 1:
            raise ArgumentError(f"last={self.last!r} is not allowed; it must be at least 1.")
        if self.best is not None and (not isinstance(self.best, str) or not self.best):
            raise ArgumentError(f"best={self.best!r} is not allowed; it must be a metric's name.")
        if self.mode not in ("min", "max"):
            raise ArgumentError(f"mode={self.mode!r} is not allowed; use 'min' or 'max'.")

    def superseded(self, checkpoints: Mapping[int, Mapping[str, float]]) -> list[int]:
        """Return the steps of the checkpoints that can be deleted, in order.

        Args:
            checkpoints: The metrics of each checkpoint, by step. One without the metric, or with
                NaN, is never the best.

        Raises:
            ArgumentError: Checkpoints have metrics, but none has the metric `best`.
        """
        steps = sorted(checkpoints)
        kept = set(steps[-self.last :])
        names = sorted({name for metrics in checkpoints.values() for name in metrics})
        if self.best is not None and names:  # without any metrics, the first epoch is not over
            if self.best not in names:
                raise ArgumentError(
                    f"best={self.best!r} is not a metric of any checkpoint; "
                    f"available: {', '.join(names)}."
                )
            values = {step: float(checkpoints[step].get(self.best, math.nan)) for step in steps}
            ranked = [step for step in steps if not math.isnan(values[step])]
            if ranked:
                choose = min if self.mode == "min" else max
                kept.add(choose(ranked, key=values.__getitem__))
        return [step for step in steps if step not in kept]


class Retention:
    """The checkpoints of one run, pruned by `Keep`."""

    def __init__(self, keep: Keep, saved: Mapping[int, Mapping[str, float]] | None = None) -> None:
        """Start with the metrics of the checkpoints `saved` so far, by step."""
        self._keep = keep
        self._saved = dict(saved or {})

    def add(self, step: int, metrics: Mapping[str, float]) -> list[int]:
        """Record a saved checkpoint.

        Args:
            step: The step of the checkpoint.
            metrics: Its metrics by name.

        Returns:
            The steps of the checkpoints to delete, in order.

        Raises:
            ArgumentError: No checkpoint has the metric `keep.best`.
        """
        self._saved[step] = metrics
        superseded = self._keep.superseded(self._saved)
        for each in superseded:
            del self._saved[each]
        return superseded
