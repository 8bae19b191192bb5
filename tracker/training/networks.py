"""Several networks that are trained in one run, such as a generator and its critic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tracker.errors import ArgumentError
from tracker.training.device import unwrap


class Networks(nn.ModuleDict):
    """The networks of one run by their names; it is not called itself."""

    given: Any
    """What the user has given: a tuple, list or mapping."""
    parts: dict[str, nn.Module]
    """The networks as they were given, wrapped or not."""

    def __init__(self, given: Any, parts: Mapping[str, nn.Module]) -> None:
        """Hold `parts`, the networks from the tuple, list or mapping that the user has `given`."""
        super().__init__({name: unwrap(part) for name, part in parts.items()})
        vars(self).update(given=given, parts=dict(parts))  # no second time among the modules


def as_networks(network: Any) -> Any:
    """Return several networks as one module, and anything else as it is.

    Args:
        network: A module, or a tuple, list or mapping of modules. Those without names get those of
            their classes, or 0, 1, … if two are the same.

    Raises:
        ArgumentError: Something in it is not a module, or a name is not allowed.
    """
    if not isinstance(network, (tuple, list, Mapping)):
        return network
    if isinstance(network, Mapping):
        parts = dict(network)
    else:
        names = [type(unwrap(part)).__name__ for part in network]
        both = list(zip(names, network, strict=True))
        are_distinct = len(set(names)) == len(names)
        parts = {n if are_distinct else str(i): p for i, (n, p) in enumerate(both)}
    if not parts:
        raise ArgumentError("network is empty; it must hold at least one torch.nn.Module.")
    for name in parts:
        if not isinstance(name, str) or (not name.isidentifier() and not name.isdecimal()):
            raise ArgumentError(
                f"network has the name {name!r}; allowed are letters, digits and _ ({{'g': g}})."
            )
    try:
        return Networks(network, parts)
    except KeyError as error:  # nn.ModuleDict has attributes of this name
        raise ArgumentError(f"network has a name that is not allowed: {error.args[0]}.") from error
