"""The tracker alone: what works without the extras, and what an absent one says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.programs import ForkServer

ABSENT = ("torchvision", "optuna", "plotly", "PIL", "matplotlib", "cmaes", "tensorboard", "psycopg")
HEAVY = {
    *("torchvision", "optuna", "plotly", "PIL", "matplotlib", "scipy", "sklearn", "tensorboard"),
    *("pandas", "pyarrow", "mlflow", "sqlalchemy", "IPython", "psutil", "requests", "yaml"),
    *("torch.export", "torch._dynamo", "torch._inductor", "torch.utils.tensorboard", "torch.onnx"),
}
"""Modules that take long to import: only what uses them may import them."""

PROGRAM = f"""
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
at_first = set(sys.modules)
from tracker import RunManager, fit, start_run
manager = RunManager(checkpoints=__import__("tracker").Keep(last=1))
imported = sorted(set(sys.modules) - at_first)

import logging
said = []
class Said(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("tracker").addHandler(Said())

import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
data = TensorDataset(torch.rand(20, 1, 8, 8), torch.arange(20) % 3)
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
optimizer = optim.Adam(network.parameters(), lr=0.01)
loader = DataLoader(data, 10)
managed = manager.begin_run({{"lr": 0.01}}, network, loader)
for epoch in fit(network, manager.progress(loader), optimizer, F.cross_entropy, epochs=2):
    manager.log_epoch(epoch)
    manager.save_checkpoint(optimizer=optimizer)
manager.end_run()
with start_run() as run:
    run.log_image(torch.rand(8, 8), "mine", step=1)
    run.log_image(torch.rand(8, 8), "mine.png")
    run.log_mistakes(network, loader, classes=["a", "b", "c"])

def error(call):
    try:
        call()
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"

import tracker
from tracker import *
from tracker.cli import main
errors = {{
    "Study": error(lambda: tracker.Study),
    "Trial": error(lambda: tracker.Trial),
    "tensorboard": error(lambda: RunManager(tensorboard="events")),
    "mirror": main(["mirror", "--study", "mine"]),
    "status": main(["status"]),
}}
ids = [managed.run_id, run.run_id]
print(json.dumps({{"imported": imported, "said": said, "ids": ids, "errors": errors}}))
"""


@pytest.fixture(scope="module")
def only_torch() -> Iterator[ForkServer]:
    """Forks programs that have imported torch and nothing else that is slow."""
    server = ForkServer("torch", "torch.nn", "torch.optim", "torch.utils.data", "numpy")
    yield server
    server.close()


def test_the_tracker_works_alone_and_says_what_it_leaves_out(
    only_torch: ForkServer, store: Any, workdir: Path
) -> None:
    done = only_torch.run(PROGRAM, MLFLOW_TRACKING_URI=store.uri, TRACKER_INLINE="1")

    assert done.code == 0, done.output()
    told = json.loads(done.stdout.splitlines()[-1])
    slow = [m for m in told["imported"] if m in HEAVY or m.split(".")[0] in HEAVY]
    assert slow == []
    assert told["said"] == [
        'Pictures are left out, as they need Pillow; pip install "mlflow-runmanager[vision]"'
    ]
    managed, started = (store.client.get_run(run_id) for run_id in told["ids"])
    assert managed.info.status == started.info.status == "FINISHED"
    assert len(store.history(managed, "loss")) == 2
    assert store.artifacts(managed) >= {
        *("epochs.csv", "histograms.html", "network/graph.svg", "network/layers.csv"),
        "histograms/000002.json",
    }
    assert "samples.png" not in store.artifacts(managed)
    (model,) = store.client.search_logged_models([managed.info.experiment_id])
    assert model.source_run_id == managed.info.run_id
    assert {"mistakes/confusion.csv", "mistakes/worst.csv"} == store.artifacts(started)
    search = 'pip install "mlflow-runmanager[search]"'
    assert told["errors"] == {
        "Study": f"MissingError: Studies need the package optuna; {search}",
        "Trial": f"MissingError: Studies need the package optuna; {search}",
        "tensorboard": "ArgumentError: tensorboard='events' needs the package tensorboard; "
        'pip install "mlflow-runmanager[tensorboard]"',
        "mirror": 2,
        "status": 0,
    }
    assert f"tracker: Studies need the package optuna; {search}" in done.stderr
