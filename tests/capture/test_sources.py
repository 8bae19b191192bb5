"""Networks that torch.export cannot follow, or that are wanted with their classes."""

from __future__ import annotations

import importlib
import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers import Store
from tracker import ArgumentError, RunManager, StoreError, load_trained, start_run
from tracker.capture.model import save_model
from tracker.capture.sources import builder, copy_sources

PACKAGE = {
    "net.py": "from parts.flow import Flow\n\nclass Net(Flow):\n    pass\n",
    "parts/__init__.py": "",
    "parts/flow.py": (
        "import torch\nfrom torch import nn\nfrom shared import double\n\n"
        "class Flow(nn.Module):\n"
        "    def __init__(self, width):\n"
        "        super().__init__()\n"
        "        self.linear, self.drop = nn.Linear(4, width), nn.Dropout()\n"
        "    def forward(self, x):\n"
        "        y = self.drop(self.linear(x))\n"
        "        return double(y) if y.sum() > 0 else y\n"
    ),
    "shared.py": "def double(y):\n    return y * 2\n",
    "parts/data.bin": "no code",
    "unused.py": "raise SystemExit\n",
}


class Flow(nn.Module):
    """Its graph depends on its data, which torch.export refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y * 2 if y.sum() > 0 else y


def forget() -> None:
    for name in ("net", "parts", "parts.flow", "shared"):
        sys.modules.pop(name, None)


def local() -> nn.Module:
    class Local(Flow):
        pass

    return Local()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class of the user's, in a file that imports from others."""
    for name, text in PACKAGE.items():
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    yield importlib.import_module("net").Net
    forget()


def test_the_files_that_a_class_needs_are_copied_without_data(own: Any, tmp_path: Path) -> None:
    paths = copy_sources(nn.Sequential(own(3)), tmp_path / "code")
    assert [Path(path).name for path in paths] == ["net.py", "parts", "shared.py"]
    copied = {
        str(path.relative_to(tmp_path / "code")) for path in (tmp_path / "code").rglob("*.py")
    }
    assert copied == {"net.py", "parts/__init__.py", "parts/flow.py", "shared.py"}
    assert not list((tmp_path / "code").rglob("*.bin"))


def test_a_network_of_installed_classes_needs_no_files(tmp_path: Path) -> None:
    assert copy_sources(nn.Sequential(nn.Linear(2, 3), nn.LSTM(3, 4)), tmp_path) == []


def test_a_pickled_model_loads_with_its_class_and_its_modes(
    own: Any, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    network = own(3)
    network.linear.bias.requires_grad_(False)
    with start_run() as run:
        assert run.log_model(network, torch.rand(5, 4), pickle=True)
    path = mlflow.artifacts.download_artifacts(f"runs:/{run.run_id}/model")
    forget()
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path / "own")])
    with pytest.raises(ImportError):
        importlib.import_module("net")
    loaded = mlflow.pytorch.load_model(path)
    inputs = torch.rand(3, 4)
    assert type(loaded).__name__ == "Net"
    torch.testing.assert_close(loaded(inputs), network.eval()(inputs))
    assert loaded.train().drop.training
    assert [p.requires_grad for p in loaded.parameters()] == [True, False]
    with pytest.raises(StoreError, match="holds more than weights, and reading it would run"):
        load_trained(run, into=own(3))


@dataclass
class Config:
    width: int = 3
    rates: tuple[float, ...] = (0.5, math.inf)


class Configured(Flow):
    def __init__(self, config: Config, activation: type[nn.Module], names: Any = None) -> None:
        super().__init__()
        self.config, self.activation, self._names = config, activation, names
        self.linear = nn.Sequential(nn.Linear(4, config.width), activation())


class Twice(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(x)
        return y + self.part(x)


class Forgetful(Flow):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, width)


class Wrong(Flow):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.factor = scale

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


def test_a_network_that_torch_export_refuses_is_logged_as_weights_and_source(
    own: Any,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    network = own(3)
    network.width = 3
    with start_run() as run:
        assert run.log_model(network, torch.rand(5, 4))
    (message,) = [r.getMessage() for r in caplog.records if r.name == "tracker.capture.model"]
    assert message.startswith("The model is logged as weights and source, because torch.export")
    assert message.endswith("mlflow.pytorch.load_model makes net.Net(width=3).")
    path = mlflow.artifacts.download_artifacts(f"runs:/{run.run_id}/model")
    forget()
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path / "own")])
    loaded, inputs = mlflow.pytorch.load_model(path), torch.rand(3, 4)
    torch.testing.assert_close(loaded(inputs), network.eval()(inputs))
    assert loaded.train().drop.training
    served = mlflow.pyfunc.load_model(path, suppress_warnings=True)
    np.testing.assert_allclose(served.predict(inputs.numpy()), network(inputs).detach(), rtol=1e-5)
    other = own(3)
    assert torch.equal(load_trained(run, into=other).linear.weight, network.linear.weight)


@pytest.mark.parametrize(
    ("network", "made"),
    [
        (Flow(), "Flow()"),
        (
            Configured(Config(5), nn.ReLU, {"a": [1, None], "b": ()}),
            "Configured(config=HERE.Config(width=5, rates=(0.5, float('inf'),)), "
            "activation=TORCH.ReLU, names={'a': [1, None], 'b': ()})",
        ),
    ],
    ids=["no arguments", "a configuration"],
)
def test_a_network_is_made_with_the_arguments_that_it_keeps(network: nn.Module, made: str) -> None:
    source, called = builder(network)
    called = called.replace(f"_module({__name__!r})", "HERE")
    called = called.replace("_module('torch.nn.modules.activation')", "TORCH")
    assert called == f"HERE.{made}"
    space: dict[str, Any] = {"_module": importlib.import_module}
    assert type(eval(builder(network)[1], space)) is type(network)
    assert "class Unpickler" in source


@pytest.mark.parametrize(
    ("network", "problem"),
    [
        (Forgetful(3), "Forgetful keeps its argument width in no attribute of plain values"),
        (local(), "Local is defined in a function"),
        (Wrong(3.0), "Wrong() is another network: the saved model returns an output that differs"),
    ],
    ids=["forgotten", "local", "wrong"],
)
def test_a_network_that_cannot_be_made_again_has_its_weights_logged(
    network: nn.Module, problem: str, tmp_path: Path
) -> None:
    result = save_model(network, torch.rand(5, 4), tmp_path / "m")
    assert result is not None
    assert problem in result
    assert "\n" not in result


PROGRAM = """
import argparse
from torch import nn
from tracker import RunManager

SECRET = "hidden"
SCALE = 2.0
parser = argparse.ArgumentParser()
args = parser.parse_args([])


def scaled(y):
    return y * SCALE


class Flow(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.linear = nn.Linear(4, width)

    def forward(self, x):
        y = self.linear(x)
        return scaled(y) if y.sum() > 0 else y


class Needy(Flow):
    def forward(self, x):
        return super().forward(x) if args else x

"""


def test_a_network_made_of_others_is_made_again(tmp_path: Path) -> None:
    network = Twice(nn.Sequential(Flow(), nn.Linear(3, 2, bias=False), nn.Dropout(0.25)))
    assert save_model(network, torch.rand(5, 4), tmp_path / "m") is None
    loaded, inputs = mlflow.pytorch.load_model(str(tmp_path / "m")), torch.rand(3, 4)
    torch.testing.assert_close(loaded(inputs), network.eval()(inputs))
    assert loaded.part[2].p == 0.25


@pytest.mark.parametrize("is_notebook", [False, True])
def test_of_a_program_only_the_definitions_that_the_class_needs_are_logged(
    is_notebook: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = ModuleType("__main__")
    if is_notebook:
        program.In = ["", "%matplotlib inline", *PROGRAM.split("\n\n\n")]
    else:
        program.__file__ = str(tmp_path / "train.py")
        (tmp_path / "train.py").write_text(PROGRAM)
    monkeypatch.setitem(sys.modules, "__main__", program)
    exec(PROGRAM, program.__dict__)

    assert save_model(program.Flow(), torch.rand(5, 4), tmp_path / "m") is None
    (code,) = (tmp_path / "m").rglob("network_*.py")
    text = code.read_text()
    assert "class Flow" in text
    assert "SCALE" in text
    assert not any(word in text for word in ("argparse", "tracker", "Needy", "hidden"))
    loaded = mlflow.pytorch.load_model(str(tmp_path / "m"))
    assert loaded(torch.rand(2, 4)).shape == (2, 3)
    problem = save_model(program.Needy(), torch.rand(5, 4), tmp_path / "n")
    assert "it needs `args = parser.parse_args([])`, which the program runs" in str(problem)


RUNS_AGAIN = {
    "args = get_args()": "def get_args():\n    raise SystemExit(2)\n\nargs = 1\n",
    "width = int(sys.argv[1])": "import sys\nsys.argv = ['train.py', '3']\n",
    "home = os.environ['HOME']": "import os\n",
    "table = np.loadtxt('table.txt')": (
        "import numpy as np\nnp.savetxt('table.txt', np.ones(3))\n"
    ),
    "words = Path('words.txt').read_text()": (
        "from pathlib import Path\nPath('words.txt').write_text('a')\n"
    ),
    "weights = torch.load('weights.pt')": (
        "import torch\ntorch.save(torch.ones(1), 'weights.pt')\n"
    ),
    "settings = Settings()": (
        "class Settings:\n    def __init__(self):\n        print('reads a file')\n"
    ),
    "class Table:\n    rows = read()": "def read():\n    return 1\n",
}
STAYS_THE_SAME = {
    "device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')": "import torch\n",
    "scale = math.sqrt(2.0)": "import math\n",
    "names = sorted(set('a b'.split()))": "",
    "table = torch.exp(torch.arange(4.0))": "import torch\n",
    "settings = Settings(width=3)": (
        "from dataclasses import dataclass\n\n@dataclass\nclass Settings:\n    width: int = 4\n"
    ),
    "Pair = namedtuple('Pair', 'a b')\npair = Pair(1, b=2)": "from collections import namedtuple\n",
    "act = nn.ReLU()": "",
    "read = lambda: open('words.txt')": "",
}


def of_program(line: str, before: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> nn.Module:
    """A network of a program in which `line` defines what its class uses."""
    name = line.split(" =")[0].split(":")[0].removeprefix("class ")
    body = f"        return x * 2 if x.sum() > 0 and {name} is not None else x\n"
    head = "from torch import nn\n" + before
    network = f"\nclass Net(nn.Module):\n    def forward(self, x):\n{body}"
    program = ModuleType("__main__")
    program.__file__ = str(folder / "train.py")
    Path(program.__file__).write_text(f"{head}\n{line}\n{network}")
    monkeypatch.setitem(sys.modules, "__main__", program)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", sys.argv)
    is_over = "get_args" in line  # the program has replaced its result
    exec(f"{head}\n{'' if is_over else line}\n{network}", program.__dict__)
    made: nn.Module = program.Net()
    return made


@pytest.mark.parametrize("line", RUNS_AGAIN)
def test_loading_a_model_runs_nothing_that_only_its_program_may_run(
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    network = of_program(line, RUNS_AGAIN[line], monkeypatch, tmp_path)
    capfd.readouterr()
    problem = save_model(network, torch.rand(5, 4), tmp_path / "m")
    assert "".join(capfd.readouterr()) == ""  # torch.export prints what it cannot follow
    assert problem is not None
    assert "its class cannot be made again: it needs `" in problem


@pytest.mark.parametrize("line", STAYS_THE_SAME)
def test_what_has_one_value_everywhere_is_part_of_the_source(
    line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    network = of_program(line, STAYS_THE_SAME[line], monkeypatch, tmp_path)
    assert save_model(network, torch.rand(5, 4), tmp_path / "m") is None


def test_names_from_stars_branches_and_tries_are_part_of_the_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = (
        "from math import *\nif sqrt(4.0) > 1:\n    width = 3\nelse:\n    width = 4\n"
        "try:\n    import json as reader\nexcept ImportError:\n    reader = None\n"
    )
    line = "table = [width, pi, reader.loads]"
    network = of_program(line, before, monkeypatch, tmp_path)
    assert save_model(network, torch.rand(5, 4), tmp_path / "m") is None


@pytest.mark.parametrize("is_pickled", [False, True])
def test_a_module_that_ends_the_program_ends_nothing_when_a_model_is_saved(
    is_pickled: bool, own: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def leave(*unused: Any) -> None:
        raise SystemExit(2)

    network = own(3)
    network.width = 3
    monkeypatch.setattr(mlflow.pytorch, "load_model", leave)
    monkeypatch.setattr("tracker.capture.model._save_graph", lambda *unused: "there is no graph")
    problem = save_model(network, torch.rand(5, 4), tmp_path / "m", pickle=is_pickled)
    assert str(problem).endswith(": SystemExit: 2")


def test_a_manager_logs_the_network_itself_if_asked(store: Store) -> None:
    network = Flow()
    with RunManager(model="pickle") as manager:
        run = manager.begin_run({}, network, [])
        manager.begin_epoch()
        manager.track_loss(network(torch.rand(5, 4)).sum(), 5)
        manager.end_epoch()
        manager.end_run()
    loaded = mlflow.pytorch.load_model(f"runs:/{run.run_id}/model")
    inputs = torch.rand(2, 4)
    assert torch.equal(loaded.train()(inputs), network(inputs))


def test_a_network_that_cannot_be_pickled_is_reported_in_one_line(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    network = Flow()
    network.generator = (number for number in range(3))
    with start_run() as run:
        assert not run.log_model(network, torch.rand(5, 4), pickle=True)
    (message,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert message.startswith("Only the weights are logged, as model.pt: ")
    assert "generator" in message
    assert "\n" not in message


# -- load_trained(into=network) ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "named_by"),
    [
        (Flow, lambda run: run),
        (local, lambda run: run.run_id),
        (local, "runs:/{}/model"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), lambda run: run),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "runs:/{}/model"),
    ],
)
def test_weights_are_restored_into_a_network_whatever_was_logged(
    kind: Any, named_by: Any, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    network, fresh = kind(), kind()
    network(torch.rand(9, 4))
    with start_run(tracking_uri=store.uri) as run:
        assert run.log_model(network, torch.rand(5, 4)) == (kind is not local)
        named = named_by.format(run.run_id) if isinstance(named_by, str) else named_by(run)
    assert load_trained(named, store.uri, into=fresh) is fresh
    assert fresh.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name])
    if kind is local:
        assert "its class cannot be made again: Local is defined in a function" in caplog.text
        assert "tracker.load_trained(run_id, into=network) restores them" in caplog.text


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (nn.Linear(4, 2), "weight has the shape (2, 4) instead of (3, 4); bias has the shape (2,)"),
        (nn.Linear(4, 3, bias=False), "bias is not in the network"),
        (nn.ModuleDict({"a": nn.BatchNorm1d(3)}), "a.weight is not in the model; a.bias is not"),
    ],
    ids=["shapes", "missing", "others"],
)
def test_a_network_that_does_not_fit_is_refused_in_one_sentence(
    other: nn.Module, problem: str, store: Store
) -> None:
    with start_run() as run:
        run.log_model(nn.Linear(4, 3), torch.rand(5, 4))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ArgumentError) as caught:
        load_trained(run, into=other)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], other.state_dict()[name]) for name in before)


def test_a_model_is_named_by_a_run_an_id_or_a_uri(store: Store) -> None:
    with pytest.raises(ArgumentError, match="model is a int; it must be a Run"):
        load_trained(3, into=nn.Linear(2, 2))
    with pytest.raises(StoreError):
        load_trained("0" * 32, store.uri, into=nn.Linear(2, 2))
