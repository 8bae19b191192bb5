"""The arguments of `begin_run` and `end_epoch`, however copies of the tutorial pass them."""

from __future__ import annotations

import logging
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tracker.errors import ArgumentError
from tracker.training.device import device_of, unwrap
from tracker.training.distributed import is_main
from tracker.training.networks import as_networks

logger = logging.getLogger(__name__)

_OTHER = re.compile(
    r"(?:.*_)?(?:(val|valid|validation|eval|dev)|test)_?(?:data)?_?(?:loader|set|data|dl|ds|iter)?",
    re.IGNORECASE,
)
"""Names of loaders that are not trained on, such as `val_loader`, `testset`, `dev`."""
_PARAMS = ("params", "run_params", "hparams", "hyperparameters", "config", "args")
"""Other names of the argument `run`."""
_NUMBERS = (int, float, str, list, tuple, set, Tensor, np.ndarray, np.generic)
"""What may be metrics without their names."""


@dataclass
class LoopArguments:
    """What a run trains, and on what."""

    network: nn.Module | None = None
    loader: Any = None
    others: dict[str, Any] = field(default_factory=dict)
    """The loaders that are not trained on, by `validation` and `test`."""

    def __post_init__(self) -> None:
        self._unused: list[str] = []
        self._unnamed: list[tuple[str, Any]] = []

    @classmethod
    def of(
        cls,
        network: Any,
        loader: Any,
        more: tuple[Any, ...],
        named: Mapping[str, Any],
        said: set[str],
    ) -> LoopArguments:
        """Sort the arguments by what they are; one warning names those without a use.

        Args:
            network: The network, or networks in a list, tuple or mapping, or None.
            loader: The loader, or None.
            more: Further ones by position: a device, a test loader, a validation and a test loader.
            named: Further ones by name, which says what a loader is for.
            said: The warnings that were given before.

        Raises:
            ArgumentError: `network` is not a module, or `device` not a device.
        """
        sorted_ = cls()
        rest = [(f"argument {place}", value) for place, value in enumerate(more, 4)]
        rest += named.items()
        if _is_network(loader) and not _is_network(network):
            network, loader = loader, network
        elif network is not None and not _is_network(network):
            if not _is_loader(network):
                unwrap(as_networks(network))  # raises
            rest.insert(0, ("argument 3", loader))
            network, loader = None, network
        elif _is_network(loader) or _device(loader) is not None:
            rest.insert(0, ("argument 3", loader))
            loader = None
        sorted_.network = as_networks(network)
        sorted_.loader = loader
        for name, value in rest:
            if value is not None:
                sorted_._add(name, value, said)
        sorted_._settle()
        if sorted_._unused:
            say_once("begin_run() has no use for %s.", ", ".join(sorted_._unused), said=said)
        return sorted_

    def _add(self, name: str, value: Any, said: set[str]) -> None:
        device = _device(value, or_number=name == "device")
        if device is None and name == "device":
            raise ArgumentError(
                f"{name}={value!r} is not a device; allowed are a torch.device and names such as "
                "'cpu' and 'cuda:0'."
            )
        context = _context(name)
        if device is not None:
            self._check_device(device, said)
        elif _is_network(value) and self.network is None:
            self.network = as_networks(value)
        elif not (_is_loader(value) or (context and _is_iterable(value))):
            self._unused.append(_described(name, value))
        elif context and context not in self.others:
            self.others[context] = value
        elif self.loader is None and not context:
            self.loader = value
        elif name.startswith("argument"):
            self._unnamed.append((name, value))
        else:
            self._unused.append(_described(name, value))

    def _settle(self) -> None:
        """Decide what loaders without a name are for: the last is a test, one before validates."""
        free = [context for context in ("test", "validation") if context not in self.others]
        used, unused = self._unnamed[: len(free)], self._unnamed[len(free) :]
        for (_, loader), context in zip(reversed(used), free, strict=False):
            self.others[context] = loader
        self._unused += (_described(name, loader) for name, loader in unused)

    def _check_device(self, device: torch.device, said: set[str]) -> None:
        if self.network is None or not any(True for _ in self.network.parameters()):
            return
        there = device_of(self.network)
        if there.type != device.type or (
            None not in (there.index, device.index) and there.index != device.index
        ):
            what = "begin_run() was given the device %s, but the network is on %s."
            say_once(what, device, there, said=said)

    @property
    def datasets(self) -> dict[str, Any]:
        """The data sets by their use: `training`, `validation`, `test`."""
        loaders = {"training": self.loader, **self.others}
        found = {
            context: loader if isinstance(loader, Dataset) else getattr(loader, "dataset", None)
            for context, loader in loaders.items()
        }
        return {context: dataset for context, dataset in found.items() if dataset is not None}


def params_among(named: dict[str, Any]) -> Any:
    """Remove the hyperparameters from the arguments of `begin_run`, and return them, if given."""
    return next((named.pop(name) for name in _PARAMS if named.get(name) is not None), None)


def given_metrics(
    given: tuple[Any, ...], named: Mapping[str, Any], said: set[str]
) -> dict[str, Any]:
    """Return the metrics that `end_epoch` was given; a warning names what holds no numbers.

    Args:
        given: Mappings, or what copies of the tutorial pass: a network, a loader.
        named: Metrics by name.
        said: The warnings that were given before.

    Raises:
        ArgumentError: Numbers have no names.
    """
    metrics: dict[str, Any] = {}
    unused, nameless = [], []
    for value in given:
        if isinstance(value, Mapping):
            metrics |= value
        elif type(value) is int:  # the epoch's number, in some copies
            unused.append(repr(value))
        elif isinstance(value, _NUMBERS):
            nameless.append(reprlib.repr(value))
        elif value is not None:
            unused.append(f"a {type(value).__name__}")
    for name, value in named.items():
        if _is_network(value) or _is_loader(value) or isinstance(value, torch.device):
            unused.append(_described(name, value))
        else:
            metrics[name] = value
    if nameless:
        raise ArgumentError(
            f"metrics={', '.join(nameless)} is not allowed; it must be a mapping of numbers by "
            "name, or numbers by name such as end_epoch(val_loss=0.3)."
        )
    if unused:
        what = "end_epoch() has no use for %s; it takes a mapping of numbers by name."
        say_once(what, ", ".join(unused), said=said)
    return metrics


def _is_network(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(part, nn.Module) for part in value.values())
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(part, nn.Module) for part in value)
    return isinstance(value, nn.Module)


def _is_loader(value: Any) -> bool:
    return isinstance(value, Dataset) or hasattr(value, "dataset")


def _is_iterable(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(
        value, (str, bytes, Mapping, Tensor, np.ndarray)
    )


def _device(value: Any, *, or_number: bool = False) -> torch.device | None:
    if not isinstance(value, str) and not (or_number and type(value) is int):
        return value if isinstance(value, torch.device) else None
    try:
        return torch.device(value)
    except RuntimeError:
        return None


def _context(name: str) -> str | None:
    if (match := _OTHER.fullmatch(name)) is None:
        return None
    return "validation" if match[1] else "test"


def _described(name: str, value: Any) -> str:
    if not isinstance(value, (str, int, float)) or len(repr(value)) > 80:
        return f"{name} (a {type(value).__name__})"
    no_device = ", not a device" if isinstance(value, str) and " " in name else ""
    return f"{name} ({value!r}{no_device})"


def say_once(message: str, *values: object, said: set[str]) -> None:
    """Log a warning on rank 0 unless it is in `said`."""
    text = message % values
    if text not in said and is_main():
        said.add(text)
        logger.warning(text)
