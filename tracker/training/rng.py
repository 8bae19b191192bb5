"""States of all random generators: captured and restored."""

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

_LOADER_GENERATORS = (
    "generator",
    "sampler.generator",
    "batch_sampler.generator",
    "batch_sampler.sampler.generator",
)


@dataclass(frozen=True, eq=False)
class RandomStates:
    """The states of Python's, NumPy's and torch's global generators, and of a loader's own."""

    python: tuple[Any, ...]
    """State of `random`."""
    numpy: dict[str, Any]
    """State of NumPy's global generator."""
    cpu: Tensor
    """State of torch's CPU generator, uint8."""
    devices: dict[str, list[Tensor]]
    """State of each generator of a kind of GPU (cuda, mps, xpu); empty if none was in use."""
    loader: dict[str, Tensor]
    """State of each torch generator of the loader, its sampler and its batch sampler."""
    persistent: bool
    """Whether the loader's persistent workers were running."""

    @classmethod
    def capture(cls, loader: Iterable[Any] | None = None) -> RandomStates:
        """Return the current states; fast enough for the start of every epoch."""
        return cls(
            random.getstate(),
            dict(np.random.get_state(legacy=False)),
            torch.get_rng_state(),
            _device_states(),
            {name: generator.get_state() for name, generator in _generators(loader).items()},
            getattr(loader, "_iterator", None) is not None,
        )

    def restore(self, loader: Iterable[Any] | None = None) -> None:
        """Set all generators to these states, as far as this process has the devices.

        Raises:
            ArgumentError: The loader has a generator that was not captured, or it does not keep
                its workers although the captured one did.
        """
        self.check(loader)
        if self.persistent and loader is not None and getattr(loader, "_iterator", None) is None:
            # Starting persistent workers draws a seed; later epochs of the loader draw none.
            iter(loader)
        for name, generator in _generators(loader).items():
            generator.set_state(self.loader[name])
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for kind, states in self.devices.items():
            module: Any = getattr(torch, kind, None)
            for index in range(min(len(states), module.device_count() if module else 0)):
                module.set_rng_state(states[index], index)

    def check(self, loader: Iterable[Any] | None) -> None:
        """Raise the ArgumentError that `restore` would raise for `loader`."""
        if missing := [name for name in _generators(loader) if name not in self.loader]:
            raise ArgumentError(
                f"loader.{missing[0]} is a generator whose state was not captured; "
                "pass the same loader when capturing random states and saving checkpoints."
            )
        if self.persistent and not getattr(loader, "persistent_workers", loader is None):
            raise ArgumentError(
                "loader.persistent_workers is False, but it was True when the random states were "
                "captured; without it the order of the batches cannot be reproduced."
            )


def _device_states() -> dict[str, list[Tensor]]:
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return {}
    module: Any = torch.get_device_module(accelerator)
    # Reading the states would start CUDA or XPU in a process that does not use it.
    if not getattr(module, "is_initialized", module.is_available)():
        return {}
    states = [module.get_rng_state(index) for index in range(module.device_count())]
    return {accelerator.type: states}


def _generators(loader: Iterable[Any] | None) -> dict[str, torch.Generator]:
    generators = {}
    for name in _LOADER_GENERATORS:
        try:
            generator = attrgetter(name)(loader)
        except AttributeError:
            continue
        if isinstance(generator, torch.Generator):
            generators[name] = generator
    return generators


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, those of GPUs too."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore every global generator (Python, NumPy, torch, GPUs) on exit."""
    states = RandomStates.capture()
    try:
        yield
    finally:
        states.restore()
