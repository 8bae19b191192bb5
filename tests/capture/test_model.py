"""The logged model computes the same as the network, on any machine."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import FashionCNN
from tests.helpers import Store
from tests.programs import ForkServer
from tracker import start_run
from tracker.capture.model import save_model

LOAD_ELSEWHERE = """
import sys
import numpy as np
import mlflow
for name in ("tracker", "models", "studies"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported, so the test proves nothing")
images = np.load("images.npy")
model = mlflow.pytorch.load_model(sys.argv[1])
import torch
with torch.no_grad():
    np.save("logits.npy", model(torch.from_numpy(images)).numpy())
np.save("pyfunc.npy", mlflow.pyfunc.load_model(sys.argv[1]).predict(images))
"""


def test_a_model_loads_in_a_process_that_cannot_import_this_project(
    store: Store, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    network = FashionCNN()
    images = torch.rand(7, 1, 28, 28)
    with start_run() as run:
        assert run.log_model(network, images[:4])
    (output,) = store.run().outputs.model_outputs
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    np.save(elsewhere / "images.npy", images.numpy())
    path = mlflow.artifacts.download_artifacts(
        f"models:/{output.model_id}", tracking_uri=store.uri, dst_path=str(elsewhere / "model")
    )
    # -S omits the path to this project that an editable installation adds.
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    program = f"import sys; sys.path.append({packages!r}){LOAD_ELSEWHERE}"
    loaded = subprocess.run(
        [sys.executable, "-S", "-c", program, path],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=False,
    )
    assert loaded.returncode == 0, loaded.stderr
    expected = network.eval()(images).detach().numpy()
    np.testing.assert_allclose(np.load(elsewhere / "logits.npy"), expected, atol=1e-5)
    np.testing.assert_allclose(np.load(elsewhere / "pyfunc.npy"), expected, atol=1e-5)


def test_a_model_s_signature_allows_any_batch_size(store: Store) -> None:
    with start_run() as run:
        run.log_model(FashionCNN(), torch.rand(1, 1, 28, 28))
    (output,) = store.run().outputs.model_outputs
    signature = mlflow.models.get_model_info(f"models:/{output.model_id}").signature
    assert [spec.shape for spec in signature.inputs] == [(-1, 1, 28, 28)]
    assert [spec.shape for spec in signature.outputs] == [(-1, 10)]


def test_a_model_loads_by_its_run_s_uri(store: Store) -> None:
    with start_run() as run:
        run.log_model(FashionCNN(), torch.rand(2, 1, 28, 28))
    model = mlflow.pytorch.load_model(f"runs:/{run.run_id}/model")
    assert model(torch.rand(5, 1, 28, 28)).shape == (5, 10)


def trained_mode() -> nn.Module:
    """A network whose output differs between training and evaluation mode."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)
    ).train()


def test_saving_does_not_change_the_network_or_the_generators(tmp_path: Path) -> None:
    network = trained_mode()
    network(torch.rand(4, 16)).sum().backward()
    before = copy.deepcopy(network.state_dict())
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    torch.manual_seed(5)
    drawn = torch.rand(2)
    torch.manual_seed(5)
    assert (
        save_model(network, torch.rand(4, 16, generator=torch.Generator()), tmp_path / "m") is None
    )
    assert torch.equal(torch.rand(2), drawn)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    for gradient, parameter in zip(gradients, network.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)


def test_the_saved_model_is_in_evaluation_mode(tmp_path: Path) -> None:
    network = trained_mode()
    assert save_model(network, torch.rand(2, 16), tmp_path / "m") is None
    loaded = mlflow.pytorch.load_model(str(tmp_path / "m"))
    images = torch.rand(6, 16)
    assert torch.allclose(loaded(images), network.eval()(images), atol=1e-6)
    assert torch.equal(loaded(images), loaded(images))


class Outputs(nn.Module):
    """A linear layer whose output is wrapped."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.linear, self.wrap = nn.Linear(5, 2), wrap

    def forward(self, x: torch.Tensor) -> Any:
        return self.wrap(self.linear(x))


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, -1) * 1.0


def live(change: Any, exported: Any = lambda y: y * 1) -> Any:
    """A function that is `change`, but `exported` in an exported program."""
    return lambda y: (exported if torch.compiler.is_exporting() else change)(y)


@pytest.mark.parametrize(
    ("network", "problem"),
    [
        (Outputs(lambda y: (y, "text")), "the network returns tuple, which holds a str"),
        (nn.Linear(3, 3), "a copy of the network fails on a batch of 2"),
        (FixedBatch(), "it fails on a batch of 3"),
        (Outputs(live(lambda y: (y, y))), "the saved model returns 1 instead of 2 outputs on a b"),
        (Outputs(live(lambda y: y[:, :1])), "returns the shape (2, 2) instead of (2, 1) on a bat"),
        (Outputs(live(Tensor.double)), "the dtype torch.float32 instead of torch.float64 on a ba"),
        (Outputs(live(lambda y: y + 1)), "saved model returns an output that differs by 1 on a b"),
        (Outputs(live(lambda y: y > 9, lambda y: y < 9)), "returns an output that differs by 1 o"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_unsupported_network_is_reported_in_one_line(
    network: nn.Module, problem: str, tmp_path: Path
) -> None:
    result = save_model(network, torch.rand(2, 5), tmp_path / "m")
    assert result is not None
    assert problem in result
    assert "\n" not in result


@pytest.mark.parametrize(
    "wrap",
    [lambda y: (y, y.sum()), lambda y: {"scores": y, "more": [y * 2]}],
    ids=["tuple", "dict"],
)
def test_a_network_that_returns_several_tensors_is_saved(wrap: Any, tmp_path: Path) -> None:
    network = Outputs(wrap)
    assert save_model(network, torch.rand(3, 5), tmp_path / "m") is None
    inputs = torch.rand(4, 5)
    loaded = mlflow.pytorch.load_model(str(tmp_path / "m"))(inputs)
    torch.testing.assert_close(loaded, network(inputs))


def test_a_compiled_network_is_saved_as_the_network_inside(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(3, 2))
    compiled = torch.compile(network)
    assert save_model(compiled, torch.rand(2, 3), tmp_path / "m") is None


@pytest.mark.cuda
def test_a_network_on_cuda_is_saved_for_the_cpu(tmp_path: Path) -> None:
    network = FashionCNN().cuda()
    assert save_model(network, torch.rand(2, 1, 28, 28).cuda(), tmp_path / "m") is None
    loaded = mlflow.pytorch.load_model(str(tmp_path / "m"))
    assert next(loaded.parameters()).device.type == "cpu"
    assert next(network.parameters()).device.type == "cuda"


LOGS_MEANWHILE = """
import logging, threading, time, torch
from pathlib import Path
from tracker.capture.model import save_model

def warn():
    global count
    while not saved:
        count += 1
        logging.getLogger("meanwhile").warning("here")
        time.sleep(0.01)

count, saved = 0, False
thread = threading.Thread(target=warn)
thread.start()
assert save_model(torch.nn.Linear(2, 1), torch.ones(2, 2), Path("m")) is None
saved = True
thread.join()
assert logging.root.handlers == []
assert logging.root.level == logging.WARNING
print(count)
"""


def test_saving_does_not_change_the_program_s_logging(trainers: ForkServer) -> None:
    program = trainers.run(LOGS_MEANWHILE)
    assert program.code == 0, program.output()
    assert program.stderr.splitlines().count("here") == int(program.stdout) > 5
