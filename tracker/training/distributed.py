"""Several processes that train one network: which of them this is, and sums over all of them.

Under torchrun each process is a rank. Rank 0 alone writes; what it writes holds for all ranks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist


def rank() -> int:
    """The number of this process: that of the process group, else torchrun's, else 0.

    Before `init_process_group` only torchrun tells. With another launcher, and once the group is
    destroyed, every process is rank 0: ask when a run begins, and keep the answer.
    """
    return dist.get_rank() if _has_group() else _of_torchrun("RANK", 0)


def world_size() -> int:
    """How many processes there are: those of the process group, else torchrun's, else 1."""
    return dist.get_world_size() if _has_group() else _of_torchrun("WORLD_SIZE", 1)


def is_main() -> bool:
    """Whether this is the process that writes: rank 0."""
    return rank() == 0


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Each of `values`, summed over the ranks in float64: one collective, so all ranks must call.

    They are summed on the CPU if the process group's backend can; NCCL cannot, and sums on
    `device`, or for a rank whose `device` is a CPU, on the GPU that the group was bound to, else
    on the current one: `torch.cuda.set_device` must then have been called. Whole numbers stay
    exact up to 2**53. With one rank, or without a process group, the values come back as they are.
    """
    if not _has_group() or dist.get_world_size() == 1:
        return list(values)
    summed = torch.tensor(values, dtype=torch.float64, device=_device_of_group(device))
    dist.all_reduce(summed)
    return [float(value) for value in summed.tolist()]


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _of_torchrun(name: str, default: int) -> int:
    # Other tools set RANK or WORLD_SIZE alone, and mean something else by it.
    if all(variable in os.environ for variable in ("LOCAL_RANK", "RANK", "WORLD_SIZE")):
        return int(os.environ[name])
    return default


def _device_of_group(device: torch.device) -> torch.device:
    """Where the default process group can reduce a tensor.

    The kind of device depends on the group alone: were it the CPU for one rank and a GPU for
    another, two backends would wait for each other.
    """
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config().split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    if device.type == kinds[0]:
        return device
    group = dist.group.WORLD
    bound = None if group is None else group.bound_device_id
    return bound or torch.device(kinds[0])
