"""What the machine does while it trains: CPU, memory, disk, network and NVIDIA GPUs.

The names and units are those of MLflow's own monitors, which its UI shows under "System metrics".
Their classes are not used: they know NVML only while all is well (a GPU that fails is warned of at
each sample, and NVML is neither started again nor shut down), and they take psutil from nowhere
but their own imports. A test holds the names to theirs.

=======================================  =====================================================
`system/cpu_utilization_percentage`      % of all cores of the machine, since the last sample
`system/system_memory_usage_megabytes`   10^6 bytes
`system/system_memory_usage_percentage`  %
`system/disk_usage_percentage`           % of the disk that holds `/`
`system/disk_usage_megabytes`            10^6 bytes
`system/disk_available_megabytes`        10^6 bytes
`system/network_receive_megabytes`       10^6 bytes since `SystemMetrics` was made
`system/network_transmit_megabytes`      10^6 bytes since `SystemMetrics` was made
`system/gpu_0_memory_usage_percentage`   %
`system/gpu_0_memory_usage_megabytes`    10^6 bytes
`system/gpu_0_utilization_percentage`    % of the time with a kernel running, as NVML averages it
`system/gpu_0_power_usage_watts`         W
`system/gpu_0_power_usage_percentage`    % of the enforced power limit
=======================================  =====================================================

All are of the machine, not of this process or its container. GPUs are numbered as `nvidia-smi`
does, and all that NVML sees are shown: CUDA_VISIBLE_DEVICES, which renumbers them, is ignored
here as it is by MLflow.

Nothing here imports torch or mlflow: the process that samples must stay small.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import psutil  # type: ignore[import-untyped, unused-ignore]

try:
    import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError:  # it is of no use on a machine without an NVIDIA GPU
    pynvml = None

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_ABSENT = ("NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded", "NVMLError_NotSupported")
"""The errors of NVML that tell what a machine has, not that something broke."""


class SystemMetrics:
    """Samples the machine; what cannot be read is left out of that sample alone.

    Each source (CPU, memory, disk, network, each GPU) that fails is reported once through
    `logging`, as a warning, and tried again at every sample; a machine without an NVIDIA GPU, or
    a GPU that does not measure its power, is a debug message. Use it in one thread: psutil
    measures the CPU from the last call in the same thread.
    """

    def __init__(self, *, host: Any = psutil, nvml: Any = pynvml) -> None:
        """Begin the counts of CPU and network; never raises.

        `host` has the functions of psutil that are used here. `nvml` has those of pynvml (package
        nvidia-ml-py) and its error classes, or is None, for no GPUs.
        """
        self._host = host
        self._nvml = nvml
        self._nvml_is_open = False
        self._reported: set[tuple[str, int]] = set()
        self._network_before: tuple[int, int] | None = None
        if nvml is None:
            logger.debug("System metrics go without GPUs: nvidia-ml-py is not installed.")
        self._supervised("CPU", self._cpu)
        self._supervised("network", self._network)

    def sample(self) -> dict[str, float]:
        """The values that can be read now, by the names MLflow gives them; never raises."""
        sources = {
            "CPU": self._cpu,
            "memory": self._memory,
            "disk": self._disk,
            "network": self._network,
        }
        values = self._gpus()
        for source, read in sources.items():
            values |= self._supervised(source, read) or {}
        return {f"system/{name}": float(value) for name, value in values.items()}

    def close(self) -> None:
        """Shut NVML down; never raises. A later sample would start it again."""
        if self._nvml_is_open:
            self._nvml_is_open = False
            self._supervised("NVML's shutdown", self._nvml.nvmlShutdown)

    def _supervised(self, source: str, read: Callable[[], _T]) -> _T | None:
        try:
            return read()
        except Exception as error:  # noqa: BLE001 - drivers and /proc fail in ways of their own
            self._report(source, error)
            return None

    def _report(self, source: str, error: Exception) -> None:
        absent = tuple(getattr(self._nvml, name, ()) for name in _ABSENT)
        level = logging.DEBUG if isinstance(error, absent) else logging.WARNING
        if (source, level) not in self._reported:
            self._reported.add((source, level))
            problem = f"{type(error).__name__}: {error}"
            logger.log(level, "System metrics go without %s while it fails: %s.", source, problem)

    def _cpu(self) -> dict[str, float]:
        return {"cpu_utilization_percentage": self._host.cpu_percent()}

    def _memory(self) -> dict[str, float]:
        memory = self._host.virtual_memory()
        return _usage("system_memory", memory.used, memory.total)

    def _disk(self) -> dict[str, float]:
        disk = self._host.disk_usage(os.sep)
        return {
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": _megabytes(disk.used),
            "disk_available_megabytes": _megabytes(disk.free),
        }

    def _network(self) -> dict[str, float]:
        counted = self._host.net_io_counters()
        if counted is None:  # a machine without any network interface
            return {}
        now = (counted.bytes_recv, counted.bytes_sent)
        before = self._network_before = self._network_before or now
        return {
            "network_receive_megabytes": (now[0] - before[0]) / 1e6,
            "network_transmit_megabytes": (now[1] - before[1]) / 1e6,
        }

    def _gpus(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for index in range(self._supervised("NVIDIA GPUs", self._count_gpus) or 0):
            for read in (self._gpu_memory, self._gpu_utilization, self._gpu_power):
                values |= self._supervised(f"GPU {index}", partial(read, index)) or {}
        if not values:
            # NVML may have died; it works again only when started again. Not so while any GPU
            # answers: a new start may renumber the GPUs when one is lost.
            self.close()
        return values

    def _count_gpus(self) -> int:
        if self._nvml is None:
            return 0
        if not self._nvml_is_open:
            self._nvml.nvmlInit()
            self._nvml_is_open = True
        return int(self._nvml.nvmlDeviceGetCount())

    # Handles are not kept: they are void when NVML was started again, and cost microseconds.

    def _gpu_memory(self, index: int) -> dict[str, float]:
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._nvml.nvmlDeviceGetHandleByIndex(index))
        return _usage(f"gpu_{index}_memory", memory.used, memory.total)

    def _gpu_utilization(self, index: int) -> dict[str, float]:
        handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        rates = self._nvml.nvmlDeviceGetUtilizationRates(handle)
        return {f"gpu_{index}_utilization_percentage": rates.gpu}

    def _gpu_power(self, index: int) -> dict[str, float]:
        handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        milliwatts = self._nvml.nvmlDeviceGetPowerUsage(handle)
        limit = self._nvml.nvmlDeviceGetEnforcedPowerLimit(handle)
        return {
            f"gpu_{index}_power_usage_watts": round(milliwatts / 1000, 1),
            f"gpu_{index}_power_usage_percentage": round(100 * milliwatts / limit, 1),
        }


def _usage(what: str, used: int, total: int) -> dict[str, float]:
    return {
        f"{what}_usage_megabytes": _megabytes(used),
        f"{what}_usage_percentage": round(100 * used / total, 1),
    }


def _megabytes(count: int) -> float:
    return round(count / 1e6, 1)
