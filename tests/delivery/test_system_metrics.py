# ruff: noqa: N801, N802, N818 - the fake has the names of pynvml
"""System metrics: MLflow's monitors; one that fails does not stop the others."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest
from mlflow.system_metrics.metrics import gpu_monitor

from tracker.store.system_metrics import SystemMetrics

CPU = {
    "system/cpu_utilization_percentage",
    "system/system_memory_usage_megabytes",
    "system/system_memory_usage_percentage",
}
DISK = {
    "system/disk_usage_percentage",
    "system/disk_usage_megabytes",
    "system/disk_available_megabytes",
}
NETWORK = {"system/network_receive_megabytes", "system/network_transmit_megabytes"}
HOST = CPU | DISK | NETWORK
GPU = {
    "memory_usage_percentage": 20.0,
    "memory_usage_megabytes": 2000.0,
    "utilization_percentage": 50.0,
    "power_usage_watts": 350.0,
    "power_usage_percentage": 50.0,
}


class FakeNvml:
    """NVML with GPUs that can be lost: what MLflow's monitor uses of pynvml."""

    class NVMLError(Exception):
        pass

    class NVMLError_LibraryNotFound(NVMLError):
        pass

    class NVMLError_DriverNotLoaded(NVMLError):
        pass

    def __init__(self) -> None:
        self.gpus = 1
        self.lost: set[int] = set()
        self.without_power = False
        self.init_error: Exception | None = None
        self.starts = 0
        self.is_open = False

    def nvmlInit(self) -> None:
        if self.init_error:
            raise self.init_error
        self.starts += 1
        self.is_open = True

    def nvmlDeviceGetCount(self) -> int:
        return self.gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> tuple[int, int]:
        return self.starts, index

    def nvmlDeviceGetMemoryInfo(self, handle: tuple[int, int]) -> Any:
        self._check(handle)
        return SimpleNamespace(used=2 * 10**9, total=10 * 10**9)

    def nvmlDeviceGetUtilizationRates(self, handle: tuple[int, int]) -> Any:
        self._check(handle)
        return SimpleNamespace(gpu=50, memory=3)

    def nvmlDeviceGetPowerUsage(self, handle: tuple[int, int]) -> int:
        self._check(handle)
        if self.without_power:
            raise self.NVMLError("Not Supported")
        return 350_000

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: tuple[int, int]) -> int:
        return 700_000

    def _check(self, handle: tuple[int, int]) -> None:
        start, index = handle
        if not self.is_open or start != self.starts or index in self.lost:
            raise self.NVMLError("GPU is lost")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(gpu_monitor, "pynvml", fake, raising=False)
    return fake


@pytest.fixture
def no_gpus(nvml: FakeNvml) -> None:
    nvml.init_error = nvml.NVMLError_LibraryNotFound("not here")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def gpus_in(sample: dict[str, float]) -> set[int]:
    """The GPUs of which all values are in the sample."""
    return {i for i in range(9) if {f"system/gpu_{i}_{name}" for name in GPU} <= sample.keys()}


def break_psutil(monkeypatch: pytest.MonkeyPatch, function: str, error: Exception) -> None:
    def fail(*args: object) -> Any:
        raise error

    monkeypatch.setattr(psutil, function, fail)


@pytest.mark.usefixtures("no_gpus")
def test_this_machine_has_the_values_that_mlflows_ui_shows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics = SystemMetrics()
    first, second = metrics.sample(), metrics.sample()
    assert first.keys() == second.keys() == HOST
    assert all(type(value) is float and value >= 0 for value in first.values())
    assert all(value <= 100 for name, value in first.items() if name.endswith("percentage"))
    assert all(second[name] >= first[name] for name in NETWORK)
    assert warnings(caplog) == []


@pytest.mark.usefixtures("no_gpus")
@pytest.mark.parametrize(
    ("function", "missing"),
    [
        ("cpu_percent", CPU),
        ("virtual_memory", CPU),
        ("disk_usage", DISK),
        ("net_io_counters", NETWORK),
    ],
)
@pytest.mark.parametrize("error", [psutil.AccessDenied(), KeyError("kb")])
def test_a_source_that_fails_is_skipped_reported_once_and_tried_again(
    function: str,
    missing: set[str],
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics = SystemMetrics()
    for broken in (False, True, True, False, True):
        with monkeypatch.context() as patch:
            if broken:
                break_psutil(patch, function, error)
            assert metrics.sample().keys() == HOST - (missing if broken else set())
    (warning,) = warnings(caplog)
    assert type(error).__name__ in warning


def test_sources_that_fail_from_the_start_are_used_once_they_work(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nvml.init_error = nvml.NVMLError("version mismatch")
    with monkeypatch.context() as patch:
        for function in ("cpu_percent", "disk_usage", "net_io_counters"):
            break_psutil(patch, function, OSError("no /proc"))
        metrics = SystemMetrics()
        assert [metrics.sample(), metrics.sample()] == [{}, {}]
    assert len(warnings(caplog)) == 4
    nvml.init_error = None
    assert metrics.sample().keys() > HOST


def test_each_gpu_has_all_its_values(nvml: FakeNvml) -> None:
    nvml.gpus = 2
    sample = SystemMetrics().sample()
    for index in range(2):
        values = {name: sample[f"system/gpu_{index}_{name}"] for name in GPU}
        assert values == GPU


def test_a_lost_gpu_is_reported_once_and_the_others_keep_their_numbers(
    nvml: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    nvml.gpus = 3
    metrics = SystemMetrics()
    seen = []
    for lost in ({1}, {1}, set(), {1}):
        nvml.lost = lost
        seen.append(gpus_in(metrics.sample()))
    assert seen == [{0, 2}, {0, 2}, {0, 1, 2}, {0, 2}]
    assert nvml.starts == 1
    (warning,) = warnings(caplog)
    assert "gpu_1" in warning


def test_nvml_is_started_again_when_no_gpu_answers(
    nvml: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    nvml.gpus = 2
    metrics = SystemMetrics()
    nvml.is_open = False  # as when the driver is loaded anew under a running process
    assert gpus_in(metrics.sample()) == set()
    assert gpus_in(metrics.sample()) == {0, 1}
    assert len(warnings(caplog)) == 1


def test_a_gpu_without_a_power_meter_is_not_a_failure(
    nvml: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    nvml.without_power = True
    metrics = SystemMetrics()
    assert [len(metrics.sample()) for _ in range(2)] == [11, 11]
    assert warnings(caplog) == []


@pytest.mark.parametrize("error", ["NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded"])
def test_a_machine_without_a_driver_is_not_a_failure(
    nvml: FakeNvml, error: str, caplog: pytest.LogCaptureFixture
) -> None:
    nvml.init_error = getattr(nvml, error)("not here")
    metrics = SystemMetrics()
    assert [metrics.sample().keys() for _ in range(2)] == [HOST, HOST]
    assert warnings(caplog) == []
    nvml.init_error = None
    assert gpus_in(metrics.sample()) == {0}


def test_a_machine_with_a_driver_and_without_gpus_is_not_a_failure(
    nvml: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    nvml.gpus = 0
    metrics = SystemMetrics()
    assert [metrics.sample().keys() for _ in range(2)] == [HOST, HOST]
    assert warnings(caplog) == []


def test_a_machine_without_nvidia_ml_py_is_not_a_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    assert SystemMetrics().sample().keys() == HOST
    assert warnings(caplog) == []
