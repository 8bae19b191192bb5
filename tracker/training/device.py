"""The device of a network, its modes, and the network inside its wrappers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tracker.errors import ArgumentError


def choose_device(name: str = "auto") -> torch.device:
    """Return the named device; `auto` is a GPU (CUDA, MPS, XPU, …) if there is one, else the CPU.

    Raises:
        ArgumentError: Torch does not know the device, or this machine does not have it.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        if device.type == "cpu" and device.index:
            raise RuntimeError("there is only one CPU device")
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:  # hpu needs a package
        raise ArgumentError(
            f"device={name!r} cannot be used on this machine; "
            f"allowed here: auto, cpu{f', {accelerator.type}' if accelerator else ''}."
        ) from error
    return device


def device_of(network: nn.Module) -> torch.device:
    """Return the device of the network's first parameter or buffer, or the CPU."""
    network = unwrap(network)
    for tensor in (*network.parameters(), *network.buffers()):
        return tensor.device
    return torch.device("cpu")


def describe_device(device: torch.device) -> str:
    """Return the device as text, with the name of a GPU: `cuda:0 (NVIDIA H200)`."""
    name = ""
    if device.type == "mps":
        name = getattr(torch.backends.mps, "get_name", str)()  # some versions have none
    elif device.type in ("cuda", "xpu"):
        name = getattr(torch, device.type).get_device_name(device)
    return f"{device} ({name})" if name else str(device)


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put `network` in evaluation mode, and restore the mode of each module on exit."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def is_sharded(network: nn.Module) -> bool:
    """Return whether other ranks have parts of the network, and must take part in each forward.

    Its parameters or buffers are DTensors, or modules are wrapped by FSDP, whose parameters are
    plain tensors between forward and backward.
    """
    network = unwrap(network)
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and imported by its users
    kinds = (getattr(fsdp, name, ()) for name in ("FSDPModule", "FullyShardedDataParallel"))
    wrappers = tuple(kinds)
    return any(isinstance(module, wrappers) for module in network.modules()) or any(
        hasattr(type(tensor), "full_tensor")
        for tensor in (*network.parameters(), *network.buffers())
    )


def unwrap(network: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`, DataParallel and DistributedDataParallel.

    Raises:
        ArgumentError: `network` is not a module.
    """
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise ArgumentError(f"network is a {kind}; it must be a torch.nn.Module.")
    while True:
        inner = getattr(network, "_orig_mod", None)
        if inner is None and isinstance(
            network, (nn.DataParallel, nn.parallel.DistributedDataParallel)
        ):
            inner = network.module
        if not isinstance(inner, nn.Module):
            return network
        network = inner
