"""The states of all random generators: captured, and put back."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracker.errors import ArgumentError

_OWN_GENERATORS = (
    "generator",
    "sampler.generator",
    "batch_sampler.generator",
    "batch_sampler.sampler.generator",
)


@dataclass(frozen=True, eq=False)
class RandomStates:
    """The states of all generators: python's, numpy's and torch's own, and a DataLoader's."""

    python: tuple[Any, ...]
    """Of `random`."""
    numpy: dict[str, Any]
    """Of numpy's global generator."""
    cpu: Tensor
    """Of torch's generator of the CPU."""
    cuda: list[Tensor]
    """Of each CUDA device; empty where CUDA was not in use."""
    loader: dict[str, Tensor]
    """Of the torch generators that the loader, its sampler or batch sampler was given."""
    persistent: bool
    """Whether the loader's persistent workers were running."""

    @classmethod
    def capture(cls, loader: Iterable[Any] | None = None) -> RandomStates:
        """The states as they are now; cheap enough for the start of each epoch."""
        return cls(
            random.getstate(),
            dict(np.random.get_state(legacy=False)),
            torch.get_rng_state(),
            # Asking for CUDA's states would start CUDA in a process that does not use it.
            torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            {name: generator.get_state() for name, generator in _generators(loader).items()},
            getattr(loader, "_iterator", None) is not None,
        )

    def restore(self, loader: Iterable[Any] | None = None) -> None:
        """Put the states back, those of CUDA devices as far as this process has the devices.

        Raises ArgumentError for a `loader` with generators whose states are not here.
        """
        self.check(loader)
        if self.persistent and loader is not None and getattr(loader, "_iterator", None) is None:
            # Starting its workers draws a seed, which later epochs of the same loader do not.
            iter(loader)
        for name, generator in _generators(loader).items():
            generator.set_state(self.loader[name])
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for index, state in enumerate(self.cuda[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, index)

    def check(self, loader: Iterable[Any] | None) -> None:
        """Raise ArgumentError where these states do not say how `loader` goes on."""
        if lacking := [name for name in _generators(loader) if name not in self.loader]:
            raise ArgumentError(
                f"loader.{lacking[0]} is a generator of its own, whose state was not captured; "
                "the same loader must be given when states are captured and checkpoints saved."
            )
        if self.persistent and not getattr(loader, "persistent_workers", loader is None):
            raise ArgumentError(
                "loader.persistent_workers is False, but the loader whose states were captured "
                "had such workers, and its order cannot be had without them."
            )


def _generators(loader: Iterable[Any] | None) -> dict[str, torch.Generator]:
    found = {}
    for name in _OWN_GENERATORS:
        try:
            generator = attrgetter(name)(loader)
        except AttributeError:
            continue
        if isinstance(generator, torch.Generator):
            found[name] = generator
    return found


def set_seed(seed: int) -> None:
    """Seed python's, numpy's and torch's generators, CUDA's included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Leave every generator (python, numpy, torch, CUDA) as it was found."""
    python, numpy_state = random.getstate(), np.random.get_state()
    # Asking for CUDA's states would start CUDA in a process that does not use it.
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
