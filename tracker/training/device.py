"""The device a network is on, and the network inside its wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tracker.errors import ArgumentError


def choose_device(name: str = "auto") -> torch.device:
    """The device that `name` asks for; `auto` is CUDA where there is one, else the CPU.

    Raises ArgumentError where torch does not know the device or this machine has none of it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cpu" and device.index:
            raise RuntimeError("there is one CPU")
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(
            f"device={name!r} cannot be used on this machine; "
            f"allowed here: auto, cpu{', cuda' if torch.cuda.is_available() else ''}."
        ) from error
    return device


def device_of(network: nn.Module) -> torch.device:
    """The device of the first parameter or buffer of `network`, the CPU if it has none."""
    for tensor in (*network.parameters(), *network.buffers()):
        return tensor.device
    return torch.device("cpu")


def describe_device(device: torch.device) -> str:
    """`cpu`, or the device with the GPU's name: `cuda:0 (NVIDIA H200)`."""
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put `network` in evaluation mode, then give each module its own mode back."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def unwrap(network: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DataParallel and DistributedDataParallel wrappers."""
    while True:
        inner = getattr(network, "_orig_mod", None)
        if inner is None and isinstance(
            network, (nn.DataParallel, nn.parallel.DistributedDataParallel)
        ):
            inner = network.module
        if not isinstance(inner, nn.Module):
            return network
        network = inner
