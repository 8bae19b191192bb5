# ruff: noqa: N801, N802, N818 - the fake has the names of pynvml
"""System metrics: MLflow's names, and no failure that ends them."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest
from mlflow.system_metrics.metrics import gpu_monitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

import tracker
from tracker.delivery.system_metrics import SystemMetrics

PACKAGE = Path(tracker.__file__).parent

GPU_NAMES = {
    "system/gpu_{}_memory_usage_percentage",
    "system/gpu_{}_memory_usage_megabytes",
    "system/gpu_{}_utilization_percentage",
    "system/gpu_{}_power_usage_watts",
    "system/gpu_{}_power_usage_percentage",
}


class FakeNvml:
    """NVML with GPUs that can be lost: what the tracker uses of pynvml."""

    class NVMLError(Exception):
        pass

    class NVMLError_LibraryNotFound(NVMLError):
        pass

    class NVMLError_DriverNotLoaded(NVMLError):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    class NVMLError_Uninitialized(NVMLError):
        pass

    class NVMLError_GpuIsLost(NVMLError):
        pass

    def __init__(self, gpus: int = 1) -> None:
        self.gpus = gpus
        self.lost: set[int] = set()
        self.without_power = False
        self.init_error: Exception | None = None
        self.shutdown_error: Exception | None = None
        self.open = 0
        self.starts = 0

    def nvmlInit(self) -> None:
        if self.init_error:
            raise self.init_error
        self.open += 1
        self.starts += 1

    def nvmlShutdown(self) -> None:
        self._needs_init()
        if self.shutdown_error:
            raise self.shutdown_error
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        self._needs_init()
        return self.gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> tuple[int, int]:
        self._needs_init()
        return self.starts, index

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        return SimpleNamespace(used=(1 + self._index(handle)) * 10**9, total=10 * 10**9)

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:
        return SimpleNamespace(gpu=50 + self._index(handle), memory=3)

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:
        self._index(handle)
        if self.without_power:
            raise self.NVMLError_NotSupported("Not Supported")
        return 350_000

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Any) -> int:
        self._index(handle)
        return 700_000

    def _index(self, handle: tuple[int, int]) -> int:
        self._needs_init()
        start, index = handle
        assert start == self.starts, "a handle of an NVML that was shut down"
        if index in self.lost:
            raise self.NVMLError_GpuIsLost("GPU is lost")
        return index

    def _needs_init(self) -> None:
        if not self.open:
            raise self.NVMLError_Uninitialized("Uninitialized")

    def die(self) -> None:
        """Forget every start, as when the driver is loaded anew under a running process."""
        self.open = 0


class FailingHost:
    """psutil whose functions named in `broken` raise `error`."""

    def __init__(self, error: Exception, *broken: str) -> None:
        self.error = error
        self.broken = set(broken)

    def __getattr__(self, name: str) -> Any:
        def fail(*args: object) -> Any:
            raise self.error

        return fail if name in self.broken else getattr(psutil, name)


@pytest.fixture(autouse=True)
def reports(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "tracker.delivery.system_metrics")
    return caplog


def levels(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        one.levelname for one in caplog.records if one.name == "tracker.delivery.system_metrics"
    ]


def mlflow_names(*monitors: Any) -> set[str]:
    names = set()
    for monitor in monitors:
        monitor.collect_metrics()
        names |= {f"system/{name}" for name in monitor.aggregate_metrics()}
    return names


def test_the_names_are_those_of_mlflow_s_monitors(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(gpus=2)
    # MLflow finds NVML in its own imports, and nowhere else.
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(gpu_monitor, "pynvml", nvml, raising=False)
    names = mlflow_names(CPUMonitor(), DiskMonitor(), NetworkMonitor(), gpu_monitor.GPUMonitor())
    assert set(SystemMetrics(nvml=FakeNvml(gpus=2)).sample()) == names


def test_the_values_are_those_of_mlflow_s_monitors(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(gpus=2)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(gpu_monitor, "pynvml", nvml, raising=False)
    theirs: dict[str, float] = {}
    for monitor in (CPUMonitor(), DiskMonitor(), gpu_monitor.GPUMonitor()):
        monitor.collect_metrics()
        theirs |= monitor.aggregate_metrics()
    ours = SystemMetrics(nvml=FakeNvml(gpus=2)).sample()
    del theirs["cpu_utilization_percentage"]  # of another interval
    for name, value in theirs.items():  # other work may go on between the two
        assert ours[f"system/{name}"] == pytest.approx(value, rel=0.2), name


def test_this_machine() -> None:
    metrics = SystemMetrics(nvml=None)
    first, second = metrics.sample(), metrics.sample()
    metrics.close()
    assert first.keys() == second.keys()
    assert all(type(value) is float for value in first.values())
    assert all(value >= 0 for value in first.values())
    assert all(value <= 100 for name, value in first.items() if name.endswith("percentage"))
    sent = "system/network_transmit_megabytes"
    assert second[sent] >= first[sent]


def test_network_counts_from_the_construction() -> None:
    counts = iter([(5_000_000, 1_000_000), (7_500_000, 1_000_001)])
    host = FailingHost(OSError())
    host.net_io_counters = lambda: SimpleNamespace(  # type: ignore[attr-defined]
        **dict(zip(("bytes_recv", "bytes_sent"), next(counts), strict=True))
    )
    sample = SystemMetrics(host=host, nvml=None).sample()
    assert sample["system/network_receive_megabytes"] == 2.5
    assert sample["system/network_transmit_megabytes"] == 1e-06


@pytest.mark.parametrize(
    ("function", "gone"),
    [
        ("cpu_percent", {"system/cpu_utilization_percentage"}),
        (
            "virtual_memory",
            {"system/system_memory_usage_megabytes", "system/system_memory_usage_percentage"},
        ),
        (
            "disk_usage",
            {
                "system/disk_usage_percentage",
                "system/disk_usage_megabytes",
                "system/disk_available_megabytes",
            },
        ),
        (
            "net_io_counters",
            {"system/network_receive_megabytes", "system/network_transmit_megabytes"},
        ),
    ],
)
@pytest.mark.parametrize(
    "error", [psutil.AccessDenied(), OSError("no /proc"), RuntimeError("?"), KeyError("kb")]
)
def test_a_source_that_fails_is_left_out_reported_once_and_tried_again(
    function: str, gone: set[str], error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    everything = set(SystemMetrics(nvml=FakeNvml(gpus=0)).sample())
    host = FailingHost(error)
    metrics = SystemMetrics(host=host, nvml=FakeNvml(gpus=0))
    for broken in (False, True, True, False, True):
        host.broken = {function} if broken else set()
        assert set(metrics.sample()) == everything - (gone if broken else set())
    assert levels(caplog) == ["WARNING"]
    assert type(error).__name__ in caplog.text


def test_everything_fails_from_the_start(caplog: pytest.LogCaptureFixture) -> None:
    host = FailingHost(OSError("no /proc"), *dir(psutil))
    nvml = FakeNvml()
    nvml.init_error = RuntimeError("version mismatch")
    metrics = SystemMetrics(host=host, nvml=nvml)
    assert [metrics.sample() for _ in range(3)] == [{}, {}, {}]
    assert levels(caplog) == ["WARNING"] * 5
    host.broken.clear()
    nvml.init_error = None
    assert len(metrics.sample()) == 13
    metrics.close()
    assert nvml.open == 0


def test_no_network_interface(caplog: pytest.LogCaptureFixture) -> None:
    host = FailingHost(OSError())
    host.net_io_counters = lambda: None  # type: ignore[attr-defined]
    metrics = SystemMetrics(host=host, nvml=FakeNvml(gpus=0))
    assert not any("network" in name for name in metrics.sample())
    assert levels(caplog) == []


def test_gpus() -> None:
    nvml = FakeNvml(gpus=2)
    metrics = SystemMetrics(nvml=nvml)
    for _ in range(3):
        sample = metrics.sample()
    assert {name: value for name, value in sample.items() if "gpu_1" in name} == {
        "system/gpu_1_memory_usage_percentage": 20.0,
        "system/gpu_1_memory_usage_megabytes": 2000.0,
        "system/gpu_1_utilization_percentage": 51.0,
        "system/gpu_1_power_usage_watts": 350.0,
        "system/gpu_1_power_usage_percentage": 50.0,
    }
    assert nvml.starts == 1


def gpus_in(sample: dict[str, float]) -> set[int]:
    """The GPUs of which all values are in `sample`."""
    return {index for index in range(9) if {n.format(index) for n in GPU_NAMES} <= set(sample)}


def test_a_lost_gpu_leaves_the_others_their_numbers(caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml(gpus=3)
    metrics = SystemMetrics(nvml=nvml)
    seen = []
    for lost in ({1}, {1}, set(), {1}):
        nvml.lost = lost
        sample = metrics.sample()
        seen.append(gpus_in(sample))
        assert len(sample) == 8 + 5 * len(seen[-1])
    assert seen == [{0, 2}, {0, 2}, {0, 1, 2}, {0, 2}]
    assert nvml.starts == 1
    assert levels(caplog) == ["WARNING"]
    assert "GPU 1" in caplog.text


def test_nvml_that_dies_is_started_again(caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml(gpus=2)
    metrics = SystemMetrics(nvml=nvml)
    assert gpus_in(metrics.sample()) == {0, 1}
    nvml.die()
    assert len(metrics.sample()) == 8
    assert gpus_in(metrics.sample()) == {0, 1}
    nvml.lost = {0, 1}
    assert len(metrics.sample()) == 8
    nvml.lost = set()
    assert gpus_in(metrics.sample()) == {0, 1}
    metrics.close()
    assert nvml.open == 0
    # NVML, its shutdown when it was dead, and each of the GPUs
    assert levels(caplog) == ["WARNING"] * 4


def test_a_gpu_without_a_power_meter_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml()
    nvml.without_power = True
    metrics = SystemMetrics(nvml=nvml)
    assert [len(metrics.sample()) for _ in range(3)] == [11, 11, 11]
    assert levels(caplog) == ["DEBUG"]
    nvml.lost = {0}  # is still reported
    metrics.sample()
    assert levels(caplog) == ["DEBUG", "WARNING"]


@pytest.mark.parametrize("error", ["NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded"])
def test_a_machine_without_a_driver(error: str, caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml()
    nvml.init_error = getattr(nvml, error)("not here")
    metrics = SystemMetrics(nvml=nvml)
    assert [len(metrics.sample()) for _ in range(3)] == [8, 8, 8]
    metrics.close()
    assert levels(caplog) == ["DEBUG"]
    nvml.init_error = None  # a driver that comes later is found
    assert gpus_in(metrics.sample()) == {0}


def test_without_nvidia_ml_py(caplog: pytest.LogCaptureFixture) -> None:
    metrics = SystemMetrics(nvml=None)
    assert [len(metrics.sample()) for _ in range(2)] == [8, 8]
    metrics.close()
    assert levels(caplog) == ["DEBUG"]


def test_a_machine_with_a_driver_and_no_gpu(caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml(gpus=0)
    metrics = SystemMetrics(nvml=nvml)
    assert [len(metrics.sample()) for _ in range(2)] == [8, 8]
    metrics.close()
    assert levels(caplog) == []
    assert nvml.open == 0


def test_close_never_raises_and_may_come_twice(caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml()
    metrics = SystemMetrics(nvml=nvml)
    metrics.sample()
    nvml.shutdown_error = RuntimeError("busy")
    metrics.close()
    metrics.close()
    assert levels(caplog) == ["WARNING"]


@pytest.mark.parametrize("module", ["system_metrics.py", "redaction.py"])
def test_the_module_needs_neither_torch_nor_mlflow(module: str) -> None:
    code = f"""
import runpy, sys
runpy.run_path({str(PACKAGE / module)!r})
assert not {{"torch", "mlflow", "tracker"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
