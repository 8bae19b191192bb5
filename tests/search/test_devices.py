# ruff: noqa: N802 - the fake has the names of pynvml
"""Each worker sees only its own GPUs, from the first line that it runs."""

from __future__ import annotations

import os
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studies.search import main as search
from tests.helpers import Store
from tests.search.conftest import Start
from tracker import ArgumentError, Study
from tracker.cli import main
from tracker.search.cli import mirror_study
from tracker.search.executors.devices import VARIABLE, environment_for, place
from tracker.search.storage import Storage
from tracker.search.stored_study import load


class FakeNvml:
    """NVML with GPUs, of which each has the named instances if it is in MIG mode."""

    class NVMLError(Exception):
        pass

    def __init__(self, *instances: list[str] | None) -> None:
        self._instances = instances

    def nvmlInit(self) -> None:
        if not self._instances:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return len(self._instances)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: int) -> int:
        if self._instances[gpu] is None:
            raise self.NVMLError("Not Supported")
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: int, index: int) -> str:
        instances = self._instances[gpu] or []
        if index >= len(instances):
            raise self.NVMLError("Not Found")
        return instances[index]

    def nvmlDeviceGetUUID(self, handle: int | str) -> str:
        return handle if isinstance(handle, str) else f"GPU-{handle}"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets CUDA_VISIBLE_DEVICES and the machine's GPUs; none of both at first."""

    def set_up(setting: str | None = None, *instances: list[str] | None) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(*instances))
        monkeypatch.delenv(VARIABLE, raising=False)
        if setting is not None:
            monkeypatch.setenv(VARIABLE, setting)

    set_up()
    return set_up


@pytest.mark.parametrize(
    ("setting", "workers", "settings", "places"),
    [
        ("0,1,2,3", 4, {}, ["0", "1", "2", "3"]),
        ("0,1,2,3", 2, {}, ["0", "1"]),
        ("4,5", 3, {}, ["4", "5", "4"]),
        ("4,5", 1, {}, [None]),
        ("4", 2, {}, [None, None]),
        ("", 2, {}, [None, None]),
        ("-1", 2, {}, [None, None]),
        ("0,-1,1", 2, {"devices": "auto"}, ["0", "0"]),
        ("0,0", 2, {"devices": "auto"}, [None, None]),
        (" GPU-a, MIG-b", 2, {}, ["GPU-a", "MIG-b"]),
        ("4,5", 1, {"devices": "auto"}, ["4"]),
        ("4,5", 2, {"devices": "all"}, [None, None]),
        ("4,5", 2, {"devices": ["5"]}, ["5", "5"]),
        ("4,5", 2, {"devices": (5, 4)}, ["5", "4"]),
        ("4,5", 2, {"devices": " 5, 4"}, ["5", "4"]),
        ("0,1,2,3", 2, {"gpus_per_trial": 2}, ["0,1", "2,3"]),
        ("0,1,2,3,4", 2, {"gpus_per_trial": 2.0}, ["0,1", "2,3"]),
        ("0,1", 1, {"gpus_per_trial": 1}, ["0"]),
        ("0,1", 4, {"gpus_per_trial": 0.5}, ["0", "1", "0", "1"]),
        ("0", 10, {"gpus_per_trial": 0.1}, ["0"] * 10),
        ("0", 3, {"gpus_per_trial": 0.3}, ["0"] * 3),
    ],
)
def test_workers_get_devices_by_round_robin(
    machine: Any, setting: str, workers: int, settings: dict[str, Any], places: list[str | None]
) -> None:
    machine(setting)
    assert place(workers, **settings) == places


@pytest.mark.parametrize(
    ("instances", "devices", "places"),
    [
        ([], "auto", [None, None, None]),
        ([None], None, [None, None, None]),
        ([None], "auto", ["0", "0", "0"]),
        ([None, None], None, ["0", "1", "0"]),
        ([None, ["MIG-a", "MIG-b"]], None, ["0", "MIG-a", "MIG-b"]),
        ([[], None], None, ["0", "1", "0"]),
        ([None, None], ["GPU-1", 0], ["GPU-1", "0", "GPU-1"]),
    ],
)
def test_the_driver_shows_the_devices_if_no_variable_does(
    machine: Any, instances: list[list[str] | None], devices: Any, places: list[str | None]
) -> None:
    machine(None, *instances)
    assert place(3, devices) == places


@given(
    gpus=st.integers(1, 16),
    workers=st.integers(1, 64),
    share=st.one_of(st.none(), st.integers(1, 5), st.floats(0.05, 1.0)),
)
def test_no_device_is_shared_by_more_workers_than_were_asked_for(
    gpus: int, workers: int, share: float | None
) -> None:
    with environment_for(",".join(map(str, range(gpus)))):
        try:
            places = place(workers, "auto", share)
        except ArgumentError:
            assert share is not None
            assert workers > (gpus // share if share >= 1 else gpus * int(1 / share))
            return
    used = Counter(name for each in places for name in str(each).split(","))
    assert len(places) == workers
    assert all(len(str(each).split(",")) == max(1, int(share or 1)) for each in places)
    assert max(used.values()) - min(used.values()) <= 1
    if share is not None:
        assert max(used.values()) * share <= 1.0001 or share >= 1
        assert share < 1 or max(used.values()) == 1


@pytest.mark.parametrize(
    ("setting", "settings", "message"),
    [
        ("0,1", {"devices": ["7"]}, "names '7' but CUDA_VISIBLE_DEVICES=0,1 has 0, 1."),
        ("0,1", {"devices": ["cuda:0"]}, "names 'cuda:0' but"),
        ("0,1", {"devices": "0,1,1"}, "devices='0,1,1' is not allowed: it names '1' twice."),
        ("0,1", {"devices": ""}, "names '' but"),
        ("0,1", {"devices": []}, "it must be 'auto', 'all', or a list of GPUs."),
        ("0,1", {"devices": 1}, "devices=1 is not allowed"),
        (None, {"devices": ["0"]}, "names '0' but this machine has no GPU."),
        (None, {"gpus_per_trial": 1}, "gpus_per_trial=1 needs a GPU; this machine has no GPU."),
        ("", {"gpus_per_trial": 0.5}, "needs a GPU; CUDA_VISIBLE_DEVICES= has no GPU."),
        ("0", {"gpus_per_trial": 0.5}, "workers=3 is not allowed: gpus_per_trial=0.5 makes 2 "),
        ("0,1", {"gpus_per_trial": 4}, "gpus_per_trial=4 makes 0 places on the devices 0, 1."),
        ("0", {"gpus_per_trial": 1, "devices": "all"}, "needs devices other than 'all'"),
        *(
            ("0", {"gpus_per_trial": g}, "it must be a whole number from 1, or a part of a GPU")
            for g in (0, -1, 1.5, float("nan"), float("inf"), True, "1")
        ),
    ],
)
def test_a_placement_that_cannot_be_is_refused_in_one_sentence(
    machine: Any, setting: str | None, settings: dict[str, Any], message: str, workdir: Path
) -> None:
    machine(setting)
    study = Study("study", lambda trial: 1.0, trials=1)
    with pytest.raises(ArgumentError) as raised:
        study.run(workers=3, **settings)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "7"], "names '7' but CUDA_VISIBLE_DEVICES=0,1 has 0, 1."),
        (["--gpus-per-trial", "1"], "workers=3 is not allowed"),
        (["--devices", "0", "--device", "cuda:1"], "device='cuda:1' does not go with --devices"),
        (["--gpus-per-trial", "0"], "argument --gpus-per-trial: '0' is not allowed"),
    ],
)
def test_the_command_refuses_them_too(
    machine: Any,
    options: list[str],
    message: str,
    tracking_uri: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine("0,1")
    monkeypatch.setattr("studies.search.choose_device", lambda name: name)
    command = ["--dataset", "digits", "--sampler", "grid", "--workers", "3"]
    try:
        code = search([*command, *options])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err
    assert not Path("studies.journal").exists()


@pytest.mark.parametrize("before", [None, "0,1"])
def test_the_variable_of_this_process_is_restored(machine: Any, before: str | None) -> None:
    machine(before)
    with environment_for("3"):
        assert os.environ[VARIABLE] == "3"
    assert os.environ.get(VARIABLE) == before


FOUR = """
import os, signal, sys
from pathlib import Path

if __name__ == "__mp_main__":  # a worker reads this file before it does anything else
    devices = os.environ["CUDA_VISIBLE_DEVICES"]
    with open(f"began-with-{devices}", "a") as file:
        print("torch" in sys.modules, file=file)
    if devices in "23":
        signal.pause()  # two workers are enough from here on

from tests.programs import wait_for
from tracker import Study

def objective(trial):
    slot, again = trial.params["slot"], Path("again")
    if Path(f"here-{slot}").exists():
        again.touch()
    Path(f"here-{slot}").touch()
    wait_for(lambda: Path("here-0").exists() and Path("here-1").exists(), "two workers")
    if slot == 0 and not again.exists():
        trial.run.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for(again.exists, "the worker that replaces the dead one")
    wait_for(lambda: len(list(Path().glob("began-with-*"))) == 4, "four workers")
    trial.set_user_attr("sees", os.environ["CUDA_VISIBLE_DEVICES"])
    return 1.0

if __name__ == "__main__":
    space = {"slot": [0, 1]}
    Study("s", objective, space=space, sampler="grid", offline=True).run(workers=4)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
"""


def test_workers_have_devices_before_torch_and_a_dead_one_is_replaced_in_its_place(
    start: Start, workdir: Path, store: Store
) -> None:
    program = start(FOUR, CUDA_VISIBLE_DEVICES="0,1,2,3")
    assert program.wait() == 0, program.output()
    began = sorted(workdir.glob("began-with-*"))
    assert [path.name[-1] for path in began] == list("0123")
    assert sorted(word for path in began for word in path.read_text().split()) == ["False"] * 5

    with closing(Storage()) as storage:
        mirror_study(storage, load(storage, "s"), None, Path(".tracker"))
    assert main(["sync"]) == 0
    tags = [run.data.tags for run in store.runs() if "optuna.trial" in run.data.tags]
    done = {t["tracker.devices"] for t in tags if t["optuna.state"] == "COMPLETE"}
    assert done == {"0", "1"}
    assert all(t["user_attrs.sees"] == t["tracker.devices"] for t in tags if "user_attrs.sees" in t)
    dead, again = (t["tracker.devices"] for t in tags if t["tracker.slot"] == "0")
    assert dead == again
