"""Ranks of a distributed training: which one this process is, and sums over all of them.

Under torchrun each process is a rank. Only rank 0 writes, for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist


def rank() -> int:
    """Return this process's rank: that of the process group, else torchrun's, else 0.

    With a launcher other than torchrun, every process is rank 0 outside the lifetime of the
    process group, so call this when a run begins and keep the result.
    """
    return dist.get_rank() if _has_group() else _torchrun_variable("RANK", 0)


def world_size() -> int:
    """Return the number of ranks: that of the process group, else torchrun's, else 1."""
    return dist.get_world_size() if _has_group() else _torchrun_variable("WORLD_SIZE", 1)


def is_main() -> bool:
    """Return whether this process is rank 0, the one that writes."""
    return rank() == 0


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Sum each value over all ranks, in float64. A collective: all ranks must call it.

    The sum runs on the CPU if the backend of the process group supports it. NCCL does not; a rank
    whose `device` is the CPU then uses the GPU bound to the group, or else the current one, so it
    must have called `torch.cuda.set_device`.

    Args:
        values: As many on each rank. Whole numbers are exact up to 2**53.
        device: Where this rank trains.

    Returns:
        The sums, the same on each rank; `values` without a process group or with one rank.
    """
    if not _has_group() or dist.get_world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=_reduction_device(device))
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Run the block on rank 0, then on the others, and leave it together. A collective."""
    cpu, is_first = torch.device("cpu"), is_main()
    if not is_first:
        sum_over_ranks((0.0,), cpu)  # waits for rank 0
    try:
        yield
    finally:  # an error must not keep the other ranks waiting
        for _ in range(2 if is_first else 1):
            sum_over_ranks((0.0,), cpu)


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _torchrun_variable(name: str, default: int) -> int:
    # Other tools set RANK or WORLD_SIZE alone, with another meaning.
    if all(variable in os.environ for variable in ("LOCAL_RANK", "RANK", "WORLD_SIZE")):
        return int(os.environ[name])
    return default


def _reduction_device(device: torch.device) -> torch.device:
    """Return a device on which the default process group can reduce tensors.

    Its type depends only on the group: if one rank used the CPU and another a GPU, two backends
    would wait for each other.
    """
    types = [pair.partition(":")[0] for pair in dist.get_backend_config().split(",")]
    if "cpu" in types:
        return torch.device("cpu")
    if device.type == types[0]:
        return device
    bound = None if dist.group.WORLD is None else dist.group.WORLD.bound_device_id
    return bound or torch.device(types[0])
