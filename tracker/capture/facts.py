"""What a run trains, as params and tags."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tracker.capture.dataset import dataset_name
from tracker.training.device import describe_device, device_of, unwrap
from tracker.training.networks import Networks


def training_facts(network: nn.Module | None, loader: Any) -> dict[str, Any]:
    """Return the names of the model, data set and device, the seed and the batch size, if known."""
    facts: dict[str, Any] = {}
    if network is not None:
        networks = network.parts.values() if isinstance(network, Networks) else [network]
        facts["model"] = ", ".join(type(unwrap(each)).__name__ for each in networks)
        facts["device"] = str(device_of(network))
    if loader is not None:
        facts["dataset"] = dataset_name(getattr(loader, "dataset", loader))
    facts["seed"] = torch.initial_seed()
    if isinstance(size := getattr(loader, "batch_size", None), int):
        facts["batch_size"] = size
    return facts


def training_tags(network: nn.Module | None) -> dict[str, str]:
    """Return the device of a network, with the name of a GPU."""
    return {} if network is None else {"tracker.device": describe_device(device_of(network))}
