"""Checkpoints: all that training needs to go on as if it had never stopped.

    save_checkpoint(folder, network=network, optimizer=optimizer, epoch=2, step=800, loader=loader)
    ...
    checkpoint = load_checkpoint(folder)
    checkpoint.restore(network=network, optimizer=optimizer)
    for batch in checkpoint.remaining(loader):

A checkpoint is a folder of two files: `tensors.pt`, a flat dict of tensors, and `state.json`, all
the rest. Nothing in it is unpickled but tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tracker.errors import ArgumentError, StoreError
from tracker.training.device import unwrap
from tracker.training.rng import RandomStates
from tracker.training.states import decode, encode
from tracker.validation import checked_number

_VERSION = 1
_FILES = {"tensors.pt", "state.json"}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What `load_checkpoint` read."""

    epoch: int
    """Epochs that are complete."""
    step: int
    """Steps done in all."""
    position: int
    """Batches done in the epoch that goes on; 0 between epochs."""
    metrics: dict[str, float]
    """The metrics that were given."""
    extra: Any
    """What was given besides."""
    _state: dict[str, Any] = field(repr=False)
    _tensors: dict[str, Tensor] = field(repr=False)

    def restore(
        self,
        *,
        network: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        scaler: GradScaler | None = None,
        loader: Iterable[Any] | None = None,
        random_states: bool = True,
    ) -> None:
        """Load the states into what is given, wherever its tensors are, then the random states.

        `loader` gets the states of its own generators back, for the epoch that comes next; in the
        middle of one, `remaining` does that. Raises ArgumentError, and has changed nothing, for an
        object that differs from the one that was saved, or that was not.
        """
        given = _given(network, optimizer, scheduler, scaler)
        for name, item in given.items():
            self._check(name, item)
        states = self._random("random")
        if random_states:
            states.check(loader)
        for name, item in given.items():
            state = decode(self._state["objects"][name]["state"], self._tensors)
            if metadata := decode(self._state["objects"][name].get("metadata"), self._tensors):
                state._metadata = metadata
            if isinstance(item, Optimizer):
                _move_groups(state["param_groups"], item.param_groups)
            item.load_state_dict(state)
        if random_states:
            states.restore(loader)

    def remaining(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The rest of the epoch that went on when the checkpoint was saved, or the next epoch.

        The batches that were trained on are drawn again and dropped, from the random states of
        the epoch's start; then the random states are those of the moment of saving. `position`
        must be that of the loop: batches taken from the loader. What is not the same as without
        interruption: what an IterableDataset, a data set or a sampler keeps for itself (but for a
        sampler's torch generator); random numbers drawn in persistent workers, beyond their first
        epoch; the order of a sampler that draws global random numbers after its first index; a
        loader with `in_order=False`. `DistributedSampler.set_epoch` is the caller's. Raises
        ArgumentError for a loader with fewer batches, or with generators that were not captured.
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
                f"loader has {skipped} batches, but the checkpoint was saved after {self.position} "
                "of the epoch; it must be the loader that was trained on."
            )
        # Without its state here, a generator of the loader's is where the skipping left it.
        states.restore(loader if states.loader else None)
        return batches

    @property
    def epoch_start(self) -> RandomStates:
        """The random states at the start of the epoch that went on; those of now between two."""
        return self._random("epoch_start" if self.position else "random")

    def _random(self, name: str) -> RandomStates:
        return RandomStates(**decode(self._state[name], self._tensors))

    def _check(self, name: str, item: Any) -> None:
        if name not in self._state["objects"]:
            there = ", ".join(self._state["objects"])
            raise ArgumentError(f"{name} is not in the checkpoint, which has {there}.")
        saved, ours = self._state["objects"][name]["outline"], _outline(item)
        differences = [
            *(f"it has no {key}" for key in saved if key not in ours),
            *(f"it has {key} besides" for key in ours if key not in saved),
            *(
                f"its {key} is {ours[key]} instead of {value}"
                for key, value in saved.items()
                if None not in (value, ours.get(key)) and value != ours[key]
            ),
        ]
        if differences:
            more = [f"and {len(differences) - 3} differences more"] if differences[3:] else []
            shown = ", ".join(differences[:3] + more)
            raise ArgumentError(f"{name} differs from the one in the checkpoint: {shown}.")


def _given(network: Any, optimizer: Any, scheduler: Any, scaler: Any) -> dict[str, Any]:
    """Those that have a state; a scaler that is disabled has none."""
    found = {
        "network": network if network is None else unwrap(network),
        "optimizer": optimizer,
        "scheduler": scheduler,
        "scaler": scaler if scaler is not None and scaler.is_enabled() else None,
    }
    return {name: item for name, item in found.items() if item is not None}


def _outline(item: Any) -> dict[str, Any]:
    """What must be the same for a state to fit; None for what may be anything."""
    if isinstance(item, nn.Module):
        return {
            key: list(value.shape)
            if isinstance(value, Tensor) and not nn.parameter.is_lazy(value)
            else None
            for key, value in item.state_dict().items()
        }
    outline: dict[str, Any] = {"class": type(item).__name__}
    if isinstance(item, Optimizer):
        for number, group in enumerate(item.param_groups):
            for place, parameter in enumerate(group["params"]):
                outline[f"parameter {place} of group {number}"] = list(parameter.shape)
    for number, inner in enumerate(getattr(item, "_schedulers", ())):  # Sequential, Chained
        outline[f"scheduler {number}"] = type(inner).__name__
    return outline


def _move_groups(saved: list[dict[str, Any]], ours: list[dict[str, Any]]) -> None:
    """Tensors among the hyperparameters (a learning rate) go where the optimizer has its own.

    Torch moves only the states of parameters.
    """
    for group, own in zip(saved, ours, strict=True):
        for key, value in group.items():
            if isinstance(value, Tensor) and isinstance(own.get(key), Tensor):
                group[key] = value.to(own[key].device)


def save_checkpoint(
    folder: Path,
    *,
    network: nn.Module,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    scaler: GradScaler | None = None,
    loader: Iterable[Any] | None = None,
    epoch: int,
    step: int,
    position: int = 0,
    epoch_start: RandomStates | None = None,
    metrics: Mapping[str, float] | None = None,
    extra: Any = None,
) -> None:
    """Write the states of what is given, and the random states, to `folder`: all or nothing.

    `epoch` are those complete, `step` those done in all, `position` the batches done in the epoch
    that goes on; with it comes `epoch_start`, the states captured before that epoch's first batch.
    `extra` is whatever else is to be kept, of the same kinds as states.
    `loader` is needed if it, or its sampler, was given a generator, or keeps its workers. A
    checkpoint that is there is replaced. One process at a time may save to a folder.

    Raises ArgumentError, before it writes, for a state that is not made of tensors, arrays,
    numbers, texts and collections of them, and StoreError where the folder cannot be written.
    """
    for name, number in (("epoch", epoch), ("step", step), ("position", position)):
        if not isinstance(number, int) or number < 0:
            raise ArgumentError(
                f"{name}={number!r} is not allowed; it must be a whole number, 0 or more."
            )
    if position and epoch_start is None:
        raise ArgumentError(
            f"position={position} needs epoch_start, the random states at the epoch's start."
        )
    if epoch_start is not None:
        epoch_start.check(loader)
    tensors: dict[str, Tensor] = {}
    objects: dict[str, Any] = {}
    for name, item in _given(network, optimizer, scheduler, scaler).items():
        state = item.state_dict()
        objects[name] = {"outline": _outline(item), "state": encode(state, name, tensors)}
        if isinstance(item, nn.Module):  # the versions of its modules' states
            metadata = getattr(state, "_metadata", None)
            objects[name]["metadata"] = encode(metadata, "network._metadata", tensors)
    numbers = {name: checked_number(name, value) for name, value in (metrics or {}).items()}
    states = {"random": RandomStates.capture(loader)}
    if epoch_start is not None:
        states["epoch_start"] = epoch_start
    _write(
        Path(os.path.realpath(folder)),
        tensors,
        {
            "epoch": epoch,
            "step": step,
            "position": position,
            "metrics": encode(numbers, "metrics", tensors),
            "extra": encode(extra, "extra", tensors),
            **{name: encode(vars(each), name, tensors) for name, each in states.items()},
            "objects": objects,
        },
    )


def _write(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write beside `folder`, then rename.

    A folder cannot be renamed onto another, so the old one is renamed first. A crash between the
    two renames leaves no `folder`, but the old one whole under a name where `load_checkpoint`
    looks for it, and whence the next save puts it back before it begins.
    """
    fresh, replaced = _siblings(folder)
    try:
        if folder.exists() and not {path.name for path in folder.iterdir()} <= _FILES:
            raise ArgumentError(
                f"folder={str(folder)!r} has other files in it; it must be new, or a checkpoint."
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        for leftover in (fresh, replaced):
            if leftover.exists():
                shutil.rmtree(leftover)
        fresh.mkdir()
        with open(fresh / "tensors.pt", "w+b") as file:
            torch.save(tensors, file)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        state = state | {"sha256": digest}
        document = {"checkpoint": _VERSION, "crc32": _checksum(state), "state": state}
        with open(fresh / "state.json", "w", encoding="utf-8") as text:
            json.dump(document, text, allow_nan=False)
            text.flush()
            os.fsync(text.fileno())
        _sync_folder(fresh)
        if folder.exists():
            folder.rename(replaced)
        fresh.rename(folder)
        _sync_folder(folder.parent)
        if replaced.exists():
            shutil.rmtree(replaced)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        shutil.rmtree(fresh, ignore_errors=True)
        raise StoreError(f"folder={str(folder)!r} cannot be written: {_reason(error)}.") from error


def _siblings(folder: Path) -> tuple[Path, Path]:
    """Where a checkpoint is written, and where the one that it replaces is put."""
    name = f".{folder.name}"
    return folder.with_name(f"{name}.writing"), folder.with_name(f"{name}.replaced")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(state: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(state).encode())


def _reason(error: Exception) -> str:
    """The first line of an error's text, without its stop."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read the checkpoint in `folder`, its tensors to the CPU.

    Raises StoreError for a folder that is missing, damaged, not a checkpoint, or of a version that
    this library does not know.
    """
    path = Path(os.path.realpath(folder))
    if not path.exists() and (replaced := _siblings(path)[1]).exists():
        path = replaced
    try:
        state = _read_state(path)
        with open(path / "tensors.pt", "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != state["sha256"]:
                raise ValueError("tensors.pt is damaged")
            file.seek(0)
            tensors = torch.load(file, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        missing = Path(error.filename).name if path.exists() else "it"
        raise StoreError(
            f"folder={str(folder)!r} is not a checkpoint: {missing} does not exist."
        ) from error
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise StoreError(
            f"folder={str(folder)!r} cannot be read as a checkpoint: {_reason(error)}."
        ) from error
    metrics, extra = (decode(state[name], tensors) for name in ("metrics", "extra"))
    counts = state["epoch"], state["step"], state["position"]
    return Checkpoint(*counts, metrics, extra, state, tensors)


def load_metrics(path: Path) -> dict[str, float]:
    """The metrics in the `state.json` of a checkpoint; StoreError where it is damaged."""
    try:
        return dict(decode(_read_state(path.parent)["metrics"], {}))
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{path} cannot be read as a checkpoint: {_reason(error)}.") from error


def _read_state(path: Path) -> dict[str, Any]:
    try:
        document = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError("state.json is damaged") from error
    if not isinstance(document, dict) or "checkpoint" not in document:
        raise ValueError("state.json is of something else")
    if document["checkpoint"] != _VERSION:
        raise ValueError(f"it has version {document['checkpoint']!r} and must have {_VERSION}")
    state = document.get("state")
    if not isinstance(state, dict) or document.get("crc32") != _checksum(state):
        raise ValueError("state.json is damaged")
    return state


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints to keep: the last ones, and the best besides."""

    last: int = 1
    """How many of the latest."""
    best: str | None = None
    """The metric by which one is the best, the first of equals; None keeps none for that."""
    mode: Literal["min", "max"] = "min"
    """Whether the best has the least or the greatest value."""

    def __post_init__(self) -> None:
        if not isinstance(self.last, int) or self.last < 1:
            raise ArgumentError(f"last={self.last!r} is not allowed; it must be at least 1.")
        if self.best is not None and (not isinstance(self.best, str) or not self.best):
            raise ArgumentError(f"best={self.best!r} is not allowed; it must be a metric's name.")
        if self.mode not in ("min", "max"):
            raise ArgumentError(f"mode={self.mode!r} is not allowed; allowed are min and max.")

    def superseded(self, checkpoints: Mapping[int, Mapping[str, float]]) -> list[int]:
        """The steps, of these with their metrics, whose checkpoints may go, in order.

        A checkpoint without the metric, or where it is NaN, is not the best. Raises ArgumentError
        for a metric that none of them has, unless none has any: the first epoch is not over.
        """
        steps = sorted(checkpoints)
        kept = set(steps[-self.last :])
        if self.best is not None and steps:
            found = [step for step in steps if self.best in checkpoints[step]]
            if not found and any(checkpoints.values()):
                names = ", ".join(sorted({name for each in checkpoints.values() for name in each}))
                raise ArgumentError(
                    f"best={self.best!r} is a metric that no checkpoint has; they have {names}."
                )
            values = {step: float(checkpoints[step][self.best]) for step in found}
            ranked = [step for step in found if not math.isnan(values[step])]
            choose = min if self.mode == "min" else max
            kept |= {choose(ranked, key=values.__getitem__)} if ranked else set()
        return [step for step in steps if step not in kept]


class Retention:
    """The checkpoints that a run has, pruned by `Keep`."""

    def __init__(self, keep: Keep, saved: Mapping[int, Mapping[str, float]] | None = None) -> None:
        """Start with the checkpoints that are already saved.

        Args:
            keep: Which checkpoints to keep.
            saved: Metrics of the existing checkpoints, by step.
        """
        self._keep = keep
        self._saved = dict(saved or {})

    def add(self, step: int, metrics: Mapping[str, float]) -> list[int]:
        """Record a saved checkpoint and return the steps of those to delete, in order.

        Raises:
            ArgumentError: No checkpoint has the metric `keep.best`.
        """
        self._saved[step] = metrics
        superseded = self._keep.superseded(self._saved)
        for each in superseded:
            del self._saved[each]
        return superseded
