"""An epoch of the user's own loop, from its first batch to its metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from tracker.training.checkpoint import Checkpoint
from tracker.training.meters import EpochMeter, compute_all
from tracker.training.rng import RandomStates
from tracker.training.watch import LoopWatch

PARTS = {"val": "validation", "test": "test"}
"""The prefixes of metrics of what is not trained on, and the use of their data."""


class OpenEpoch:
    """An epoch between `begin_epoch` and `end_epoch`."""

    def __init__(
        self,
        loader: Any,
        others: Mapping[str, Any],
        checkpoint: Checkpoint | None,
        said: set[str],
        watch: LoopWatch,
    ) -> None:
        """Begin an epoch.

        Args:
            loader: Yields the batches.
            others: The loaders of validation and test, by `PARTS`, if they are known.
            checkpoint: The checkpoint in the middle of the epoch from which it continues.
            said: The warnings that were given in this manager's epochs.
            watch: Watches the loop of the run.
        """
        # Not in checkpoints: a loop that continues in the middle of an epoch validates anew.
        self._others = {
            part: EpochMeter(others.get(context), said) for part, context in PARTS.items()
        }
        if checkpoint is None:
            self.meter = EpochMeter(loader, said)
            self._random_states = RandomStates.capture(loader)
            self._skipped = 0
        else:
            self.meter = EpochMeter.of(checkpoint.extra, loader, said)
            self._random_states = checkpoint.epoch_start
            self._skipped = checkpoint.position
        self._watch = watch
        self.taken: int | None = None
        """Batches of the epoch up to the last one that `Rest` has yielded."""
        self._started = time.perf_counter()
        watch.begin(len(self.meter))

    def meter_of(self, part: str) -> EpochMeter:
        """Return the meter of `val` or `test`."""
        return self._others[part]

    def compute(self) -> dict[str, float]:
        """Return all sums as metrics, on every rank at once: see `compute_all`."""
        others = {f"{part}_": meter for part, meter in self._others.items()}
        return compute_all({"": self.meter, **others})

    @property
    def position(self) -> int:
        """Batches that the loop has had; 0 if that is not known.

        It is what the loop took from `Rest`, else calls of `track_loss`, unless the loader has
        yielded another number of batches: a loop that accumulates gradients may track the loss of
        several batches in one call.
        """
        if self.taken is not None:
            return self.taken
        steps = len(self.meter)
        drawn = self._watch.drawn
        return steps if not drawn or drawn == steps - self._skipped else 0

    @property
    def untracked_steps(self) -> int:
        """Batches that the loop took from `Rest` if it never calls `track_loss`."""
        return 0 if len(self.meter) or self.taken is None else self.taken - self._skipped

    @property
    def seconds(self) -> float:
        """Time since the epoch began."""
        return time.perf_counter() - self._started

    def checkpoint_fields(self) -> dict[str, Any]:
        """Return what a checkpoint in the middle of this epoch needs to continue it."""
        return {
            "position": self.position,
            "epoch_start": self._random_states,
            "extra": self.meter.state(),
        }


class Rest:
    """The batches that are left of an epoch, which counts those that its loop takes."""

    def __init__(self, epoch: OpenEpoch, loader: Any, checkpoint: Checkpoint | None) -> None:
        """Begin after the batches before `checkpoint`, if there is one.

        Raises:
            ArgumentError: As `Checkpoint.remaining`.
        """
        self._epoch, self._loader = epoch, loader
        self._skipped = 0 if checkpoint is None else checkpoint.position
        self._batches = loader if checkpoint is None else checkpoint.remaining(loader)

    def __iter__(self) -> Iterator[Any]:
        epoch, epoch.taken = self._epoch, self._skipped
        for batch in self._batches:
            epoch.taken += 1
            yield batch

    def __len__(self) -> int:
        return len(self._loader) - self._skipped
