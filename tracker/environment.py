"""Where a run happens: device, seeds, random states, versions, git and command line."""

from __future__ import annotations

import getpass
import platform
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tracker._version import __version__
from tracker.errors import ArgumentError
from tracker.redaction import public_command


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


def environment_tags() -> dict[str, str]:
    """Tags that tell how to run the same thing again: source, command, versions, git."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if main and Path(main).name == "ipykernel_launcher.py":
        main = None
    folder = Path(main).resolve().parent if main else Path.cwd()
    tags = {
        "mlflow.source.name": main or "notebook",
        "mlflow.source.type": "LOCAL",
        "tracker.command": public_command([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "tracker.version": __version__,
        "tracker.python": platform.python_version(),
        "tracker.torch": str(torch.__version__),
        "tracker.mlflow": version("mlflow"),
        "tracker.platform": platform.platform(),
    }
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (OSError, KeyError):  # a container's uid without a name
        pass
    return tags | _git_tags(folder)


def _git_tags(folder: Path) -> dict[str, str]:
    """Commit and state of the work tree around `folder`; empty outside a repository."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        dirty = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": commit, "tracker.git.dirty": str(bool(dirty)).lower()}


def _git(folder: Path, *words: str) -> str:
    # A huge repository on a slow disk must not hold up training.
    return subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=5
    ).stdout.strip()
