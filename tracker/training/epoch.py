"""An epoch of the user's own loop, from its first batch to its metrics."""

from __future__ import annotations

import time
from typing import Any

from tracker.training.checkpoint import Checkpoint
from tracker.training.meters import EpochMeter
from tracker.training.rng import RandomStates


class OpenEpoch:
    """An epoch between `begin_epoch` and `end_epoch`."""

    def __init__(self, loader: Any, checkpoint: Checkpoint | None, said: set[str]) -> None:
        """Begin an epoch.

        Args:
            loader: Yields the batches.
            checkpoint: The checkpoint in the middle of the epoch from which it continues.
            said: The warnings that were given in this manager's epochs.
        """
        if checkpoint is None:
            self.meter = EpochMeter(loader, said)
            self._random_states = RandomStates.capture(loader)
        else:
            self.meter = EpochMeter.of(checkpoint.extra, loader, said)
            self._random_states = checkpoint.epoch_start
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time since the epoch began."""
        return time.perf_counter() - self._started

    def checkpoint_fields(self) -> dict[str, Any]:
        """Return what a checkpoint in the middle of this epoch needs to continue it."""
        return {
            "position": len(self.meter),
            "epoch_start": self._random_states,
            "extra": self.meter.state(),
        }
