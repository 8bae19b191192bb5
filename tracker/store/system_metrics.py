"""System metrics, read by MLflow's own monitors: CPU, memory, disk, network and GPUs.

The names are MLflow's, `system/cpu_utilization_percentage` for one, so that its UI shows them under
"System metrics". MLflow's own thread is not used: it ends for good after one failed request.
All values are of the machine, not of this process or its container. GPUs are NVIDIA's (numbered as
`nvidia-smi` does, whatever CUDA_VISIBLE_DEVICES says), or AMD's if `pyrsmi` is installed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

from tracker.errors import first_line
from tracker.logs import muted

logger = logging.getLogger(__name__)

_SOURCES: Mapping[str, Callable[[], BaseMetricsMonitor]] = {
    "CPU and memory": CPUMonitor,
    "disk": DiskMonitor,
    "network": NetworkMonitor,
    "AMD GPUs": ROCMMonitor,
    "NVIDIA GPUs": GPUMonitor,
}
_ABSENT = ("NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded")


class SystemMetrics:
    """Samples the machine; values that cannot be read at the moment are left out.

    A source that fails is reported by one warning and tried again at every sample. Use it in one
    thread: psutil measures the CPU from the last call in the same thread.
    """

    def __init__(self) -> None:
        """Open the monitors, from which the CPU and the network are counted; never raises."""
        self._monitors: dict[str, BaseMetricsMonitor] = {}
        self._names: dict[str, set[str]] = {name: set() for name in _SOURCES}
        self._reported: set[str] = set()
        self.sample()

    def sample(self) -> dict[str, float]:
        """Return the values that can be read now, by name; never raises."""
        values: dict[str, float] = {}
        for source in _SOURCES:
            values |= self._read(source)
        return {f"system/{name}": float(value) for name, value in values.items()}

    def _read(self, source: str) -> dict[str, float]:
        try:
            if source not in self._monitors:
                self._monitors[source] = _SOURCES[source]()
            monitor = self._monitors[source]
            monitor.clear_metrics()
            with muted("mlflow.system_metrics"):  # it warns of a lost GPU at every sample
                monitor.collect_metrics()
            values = dict(monitor.aggregate_metrics())
        except Exception as error:  # noqa: BLE001 - drivers and /proc fail in many ways
            if not _is_absent(error):
                self._report(source, f"{type(error).__name__}: {first_line(error)}")
            return {}
        if missing := self._names[source] - values.keys():
            self._report(source, f"{min(missing)} is missing")
        self._names[source] |= values.keys()
        if not values:  # NVML works again only after a new start, if no GPU answers at all
            del self._monitors[source]
        return values

    def _report(self, source: str, problem: str) -> None:
        if source not in self._reported:
            self._reported.add(source)
            logger.warning("System metrics of %s are incomplete: %s.", source, problem)


def _is_absent(error: Exception) -> bool:
    """Return whether a GPU monitor failed because the machine has no such GPU."""
    cause = error.__context__ or error
    return isinstance(error, ImportError) or type(cause).__name__ in _ABSENT
