"""GPUs of any maker are chosen, described, and their generators restored."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tracker import ArgumentError, choose_device
from tracker.training.checkpoint import load_checkpoint, save_checkpoint
from tracker.training.checkpoint_files import read_files, write_files
from tracker.training.device import describe_device
from tracker.training.rng import RandomStates, preserve_rng


class FakeModule(SimpleNamespace):
    """`torch.mps` or `torch.xpu` of a machine with two such GPUs."""

    def __init__(self, kind: str) -> None:
        super().__init__(states=[torch.zeros(4, dtype=torch.uint8) for _ in range(2)])
        if kind == "xpu":  # MPS is always ready
            self.is_initialized = lambda: True
        self.is_available = lambda: True
        self.device_count = lambda: len(self.states)
        self.get_device_name = lambda device: "Arc"

    def get_rng_state(self, index: int) -> Tensor:
        state: Tensor = self.states[index]
        return state.clone()

    def set_rng_state(self, state: Tensor, index: int) -> None:
        self.states[index] = state.clone()


@pytest.fixture(params=["mps", "xpu"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Any]:
    """A machine with GPUs of one kind, and their module."""
    kind, module = request.param, FakeModule(request.param)
    monkeypatch.setattr(torch, kind, module)
    monkeypatch.setattr(torch, "get_device_module", lambda device: getattr(torch, device.type))

    def current(check_available: bool = False) -> torch.device:
        return torch.device(kind)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    return kind, module


def test_auto_takes_the_gpu_of_the_machine(gpu: tuple[str, Any]) -> None:
    assert choose_device("auto") == choose_device() == torch.device(gpu[0])
    assert choose_device("cpu") == torch.device("cpu")


def test_auto_takes_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)

    assert choose_device() == torch.device("cpu")


def test_a_device_that_is_missing_is_refused_with_those_that_exist(gpu: tuple[str, Any]) -> None:
    message = f"device='hpu:1' cannot be used on this machine; allowed here: auto, cpu, {gpu[0]}."
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        choose_device("hpu:1")


def test_a_device_is_described_with_the_name_of_the_gpu(
    gpu: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M3", raising=False)
    device = torch.device(gpu[0], 0)

    assert describe_device(device) == {"mps": "mps:0 (Apple M3)", "xpu": "xpu:0 (Arc)"}[gpu[0]]
    assert describe_device(torch.device("cpu")) == "cpu"
    assert describe_device(torch.device("meta")) == "meta"


def test_the_random_states_of_every_gpu_are_saved_and_restored(
    gpu: tuple[str, Any], tmp_path: Path
) -> None:
    module = gpu[1]
    module.states[1].fill_(7)
    with preserve_rng():
        module.states[0].fill_(9)
    assert module.states[0].tolist() == [0] * 4

    save_checkpoint(tmp_path / "a", network=nn.Linear(1, 1), epoch=1, step=1)
    module.states = [torch.full((4,), 5, dtype=torch.uint8)]  # a machine with fewer
    load_checkpoint(tmp_path / "a").restore()
    assert [state.tolist() for state in module.states] == [[0] * 4]
    module.states = [torch.full((4,), 5, dtype=torch.uint8) for _ in range(3)]
    load_checkpoint(tmp_path / "a").restore()
    assert [state.tolist() for state in module.states] == [[0] * 4, [7] * 4, [5] * 4]


def test_the_states_of_another_kind_of_gpu_are_left_alone(
    gpu: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "a", network=nn.Linear(1, 1), epoch=1, step=1)
    gpu[1].states[0].fill_(9)
    monkeypatch.delattr(torch, gpu[0])
    load_checkpoint(tmp_path / "a").restore()

    assert gpu[1].states[0].tolist() == [9] * 4


def test_a_gpu_that_is_not_in_use_is_not_started(
    gpu: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu[1].is_initialized = lambda: False

    assert RandomStates.capture().devices == {}


def test_checkpoints_with_states_of_cuda_alone_can_be_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "new", network=nn.Linear(1, 1), epoch=1, step=1)
    state, tensors = read_files(tmp_path / "new")
    before = {**state["random"], "cuda": []}
    del before["devices"]
    write_files(tmp_path / "old", tensors, {**state, "random": before})

    load_checkpoint(tmp_path / "old").restore()
    assert load_checkpoint(tmp_path / "old").epoch_start.devices == {"cuda": []}


@pytest.mark.cuda
def test_auto_is_cuda_on_a_machine_with_cuda() -> None:
    assert choose_device() == torch.device("cuda")
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    assert describe_device(torch.device("cuda", 0)).startswith("cuda:0 (")
