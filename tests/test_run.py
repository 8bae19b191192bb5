"""`start_run`: a run without a manager."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.helpers import Store
from tracker import ArgumentError, CallOrderError, StoreError, start_run
from tracker.journal.records import Point, now


def test_everything_that_is_logged_arrives_in_mlflow(store: Store, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a note")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss.csv").write_text("step,loss\n")
    with start_run(params={"lr": 0.01, "layers": [3, 4]}, name="gan", tags={"kind": "gan"}) as run:
        run.log_params({"beta": 0.5})
        for step in range(3):
            run.log_metrics({"g_loss": torch.tensor(2.0**-step), "d_loss": np.float32(step)}, step)
        run.log_artifact("notes.txt", "texts")
        (tmp_path / "notes.txt").unlink()
        run.log_artifact("plots")
        run.log_text("Anna", "samples/epoch-1.txt")
        run.set_tags({"reviewed": True})
        run.log_image(torch.rand(3, 8, 8), "faces/fake", step=2)
        run.log_image(np.zeros((4, 4), dtype=np.uint8), "grid.png")

    found = store.run()
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "gan"
    assert found.data.params == {"lr": "0.01", "layers": "[3, 4]", "beta": "0.5"}
    assert store.history(found, "g_loss") == [(0, 1.0), (1, 0.5), (2, 0.25)]
    assert store.history(found, "d_loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert found.data.tags["kind"] == "gan"
    assert found.data.tags["reviewed"] == "True"
    files = store.artifacts(found)
    images = {file for file in files if file.startswith("images/")}
    assert files - images == {
        *("texts/notes.txt", "plots/loss.csv", "samples/epoch-1.txt", "grid.png"),
    }
    assert {Path(file).suffix for file in images} == {".png", ".webp"}
    assert all(file.startswith("images/faces~fake+step+2+timestamp+") for file in images)
    assert found.data.tags["mlflow.loggedImages"] == "True"
    assert store.text(found, "texts/notes.txt", tmp_path) == "a note"


def test_metrics_have_the_time_of_the_call_not_of_the_delivery(store: Store) -> None:
    with start_run() as run:
        before = now()
        run.log_metrics({"loss": 1.0})
        after = now()
    found = store.run()
    (point,) = store.client.get_metric_history(found.info.run_id, "loss")
    assert before <= point.timestamp <= after
    assert found.info.start_time <= before
    assert found.info.end_time >= after


def test_a_run_can_be_read_in_mlflow_while_it_is_open(store: Store) -> None:
    with start_run() as run:
        run.log_metrics({"loss": 1.0})
        assert run.status is None
        run.flush()
        assert store.run().info.status == "RUNNING"
        assert store.run().info.run_id == run.run_id
        assert store.run().data.metrics == {"loss": 1.0}
    assert run.status == "FINISHED"


def test_the_journal_is_removed_when_the_run_is_delivered(store: Store, workdir: Path) -> None:
    with start_run() as run:
        run.log_text("x", "x.txt")
        assert len(list((workdir / ".tracker").iterdir())) == 1
    assert list((workdir / ".tracker").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("no"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(3), "FAILED"),
        (SystemExit(143), "KILLED"),
        (SystemExit(0), "FINISHED"),
    ],
    ids=str,
)
def test_the_with_block_sets_the_final_status(
    store: Store, error: BaseException, status: str
) -> None:
    def body() -> None:
        with start_run():
            raise error

    with pytest.raises(type(error)):
        body()
    found = store.run()
    assert found.info.status == status
    assert ("tracker.failure" in found.data.tags) == (status != "FINISHED")


def test_logging_to_a_run_that_has_ended_is_an_error(store: Store) -> None:
    with start_run() as run:
        pass
    with pytest.raises(CallOrderError, match=r"the run has ended \(FINISHED\)"):
        run.log_metrics({"loss": 1.0})


# -- names and values that MLflow refuses --------------------------------------------------------

NAMES = ["", "a*b", "a//b", "../up", "/abs", "a/", ".", "x" * 251, "tab\t"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_mlflow_refuses_raises_in_the_call(store: Store, name: str) -> None:
    with start_run() as run:
        for log in (run.log_params, run.log_metrics, run.set_tags):
            with pytest.raises(ArgumentError, match=r"name .* is not allowed"):
                log({name: 1.0})
    assert store.run().info.status == "FINISHED"


@pytest.mark.parametrize("name", ["loss", "a/b", "val loss", "f1: macro", "x.y-z_0", "größe"])
def test_a_name_that_mlflow_accepts_is_accepted(store: Store, name: str) -> None:
    with start_run(params={name: 1}) as run:
        run.log_metrics({name: 1.0})
    assert store.run().data.metrics == {name: 1.0}
    assert store.run().data.params == {name: "1"}


def test_a_value_that_mlflow_would_cut_or_change_is_refused(store: Store) -> None:
    with start_run(params={"lr": 0.1, "text": "x" * 6000}) as run:
        with pytest.raises(ArgumentError, match=r"has 6,001 characters; MLflow keeps 6,000"):
            run.log_params({"long": "x" * 6001})
        with pytest.raises(ArgumentError, match=r"param 'lr' is '0\.1' and cannot become '0\.2'"):
            run.log_params({"lr": 0.2})
        with pytest.raises(ArgumentError, match="metric 'loss' is a str 'low'; it must be one num"):
            run.log_metrics({"loss": "low"})
        with pytest.raises(ArgumentError, match="it must be one number"):
            run.log_metrics({"loss": torch.rand(2)})
        with pytest.raises(ArgumentError, match="local_path='nowhere' does not exist"):
            run.log_artifact("nowhere")
        with pytest.raises(ArgumentError, match="plain relative path inside the run's artifacts"):
            run.log_text("x", "../up.txt")
        with pytest.raises(ArgumentError, match=r"must end in \.png"):
            run.log_image(torch.rand(3, 4, 4), "grid")
        with pytest.raises(ArgumentError, match="has the shape"):
            run.log_image(torch.rand(2, 3, 4, 4), "grid.png")
    assert len(store.run().data.params["text"]) == 6000


def test_a_step_of_none_is_mlflow_s_default(store: Store) -> None:
    with start_run() as run:
        run.log_metrics({"loss": 1.0}, None)
        run.log_metric("accuracy", 0.5, step=None)
    assert store.history(store.run(), "loss") == [(0, 1.0)]
    assert store.history(store.run(), "accuracy") == [(0, 0.5)]


@pytest.mark.parametrize("step", [1.5, "3", 2**63])
def test_a_step_that_is_not_an_integer_is_refused(store: Store, step: Any) -> None:
    with start_run() as run, pytest.raises(ArgumentError, match=r"step=.* 64-bit integer"):
        run.log_metrics({"loss": 1.0}, step)


@pytest.mark.parametrize("name", ["", "a/", "./a.txt", "a//b.txt", "/a.txt", "..", "a/../b"])
def test_an_artifact_path_that_is_not_plain_is_refused(store: Store, name: str) -> None:
    with start_run() as run, pytest.raises(ArgumentError, match="plain relative path"):
        run.log_text("x", name)


def test_a_record_that_the_store_refuses_does_not_affect_others(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with start_run() as run:
        run.log_text("x", "a")
        run.log_text("x", "a/b")  # a file and a folder cannot have the same name
        run.log_metrics({"loss": 1.0})
    lost = [r.getMessage() for r in caplog.records if r.name == "tracker.delivery.inline"]
    assert len(lost) == 1
    assert lost[0].startswith("A record (file) is set aside in ")
    assert store.run().info.status == "FINISHED"
    assert store.run().data.metrics == {"loss": 1.0}


def test_nan_and_infinity_are_recorded_with_one_warning_per_name(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "tracker"), start_run() as run:
        for step in range(3):
            run.log_metrics({"a": math.nan, "b": -math.inf, "c": 1.0}, step)
    assert [record.getMessage() for record in caplog.records] == [
        "a is nan at step 0.",
        "b is -inf at step 0 (MLflow shows infinity as 1.797e+308).",
    ]
    values = [value for _, value in store.history(store.run(), "a")]
    assert len(values) == 3
    assert all(map(math.isnan, values))
    assert store.history(store.run(), "b")[0][1] < -1e308


def test_a_value_that_is_read_late_is_warned_about_too(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "tracker"), start_run() as run:
        run.log_points([Point("late", torch.tensor(math.nan), step, now()) for step in range(3)])
    assert [record.getMessage() for record in caplog.records] == ["late is nan at step 0."]
    assert len(store.history(store.run(), "late")) == 3


def test_a_metric_has_the_value_of_the_call_even_if_its_tensor_changes(store: Store) -> None:
    value = torch.tensor(1.0, requires_grad=True)
    with start_run() as run:
        run.log_metrics({"loss": value, "count": 3, "rate": np.float32(0.5)})
        value.data.fill_(2.0)
    assert store.run().data.metrics == {"loss": 1.0, "count": 3.0, "rate": 0.5}


@pytest.mark.cuda
def test_a_metric_on_a_gpu_is_copied_and_read_late_without_waiting(store: Store) -> None:
    value = torch.ones(1, device="cuda")
    with start_run() as run:
        torch.cuda.set_sync_debug_mode("error")
        run.log_metrics({"loss": value})
        value.fill_(2.0)
        torch.cuda.set_sync_debug_mode("default")
        with pytest.raises(ArgumentError, match="it must be one number"):
            run.log_metrics({"loss": torch.rand(2, device="cuda")})
    assert store.run().data.metrics == {"loss": 1.0}


def test_more_metrics_and_params_than_fit_in_one_request_arrive(store: Store) -> None:
    with start_run(params={f"p{i}": i for i in range(150)}) as run:
        for step in range(1500):
            run.log_metrics({"x": step, "y": -step}, step)
    found = store.run()
    assert len(found.data.params) == 150
    assert store.history(found, "x") == [(step, float(step)) for step in range(1500)]
    assert store.history(found, "y") == [(step, float(-step)) for step in range(1500)]


# -- MLflow projects ------------------------------------------------------------------------------


def test_the_run_that_mlflow_run_created_is_adopted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = store.client.create_run("0", tags={"mlflow.source.type": "PROJECT"}, run_name="made")
    for name, value in {"lr": "1e-2", "shuffle": "true", "device": "auto"}.items():
        store.client.log_param(made.info.run_id, name, value)
    monkeypatch.setenv("MLFLOW_RUN_ID", made.info.run_id)
    with start_run(params={"lr": 0.01, "shuffle": True, "device": "cpu", "new": 1}) as run:
        assert run.run_id == made.info.run_id
    found = store.run()
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "made"
    assert found.data.params == {"lr": "1e-2", "shuffle": "true", "device": "auto", "new": "1"}
    assert found.data.tags["mlflow.source.type"] == "PROJECT"
    assert found.data.tags["tracker.param.device"] == "cpu"
    assert "tracker.param.lr" not in found.data.tags

    with start_run():  # a second run of the same process is a new one
        pass
    assert len(store.runs()) == 2


def test_a_run_id_in_the_environment_that_the_store_does_not_have_is_an_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "f" * 32)
    with pytest.raises(StoreError, match=r"find the run f+ of MLFLOW_RUN_ID"):
        start_run()
    assert store.runs() == []


# -- the network and the model ---------------------------------------------------------------------


class Unexportable(nn.Module):
    """Branches on its data, which a graph cannot express."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, outputs)

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(x) if x.sum().item() > 0 else self.linear(-x)


def test_the_weights_of_a_network_that_cannot_be_exported_are_logged_with_a_warning(
    store: Store, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    network = Unexportable(2)
    with caplog.at_level(logging.WARNING, "tracker"), start_run() as run:
        assert not run.log_model(network, torch.rand(4, 4))
    (warning,) = (r.getMessage() for r in caplog.records if r.name.startswith("tracker"))
    assert warning.startswith("Only the weights are logged, as model.pt: torch.export fails")
    path = store.client.download_artifacts(store.run().info.run_id, "model.pt", str(tmp_path))
    weights = torch.load(path, weights_only=True)
    assert torch.equal(weights["linear.weight"], network.linear.weight)


class KeepsActivations(nn.Module):
    """Stores a tensor that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.features = self.linear(x)
        return self.features * 2


def test_a_network_that_stores_its_activations_is_exported(store: Store) -> None:
    network = KeepsActivations()
    network(torch.rand(3, 4)).sum().backward()
    with start_run() as run:
        run.log_model(network, torch.rand(4, 4))
    assert store.run().info.status == "FINISHED"


def test_a_lazy_network_is_described_without_materialising_it(store: Store) -> None:
    network = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    with start_run() as run:
        run.log_network(network, torch.rand(2, 5))
        run.log_histograms(network, 1)
    assert isinstance(network[0].weight, nn.UninitializedParameter)
    assert "network/layers.csv" in store.artifacts(store.run())


def test_a_data_set_is_recorded_as_an_input_with_its_context(store: Store) -> None:
    from torch.utils.data import TensorDataset

    with start_run() as run:
        run.log_dataset(TensorDataset(torch.arange(10)), "validation", name="ten")
    (found,) = store.run().inputs.dataset_inputs
    assert found.dataset.name == "ten"
    assert json.loads(found.dataset.profile) == {"class": "TensorDataset", "samples": 10}
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "validation")]


def test_a_logged_picture_has_the_same_pixels_in_mlflow(store: Store, tmp_path: Path) -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    with start_run() as run:
        run.log_image(pixels, "picture.png")
        run.log_image("old_order.png", pixels)
        with pytest.raises(ArgumentError, match="artifact_file is a ndarray; it must be text"):
            run.log_image(pixels, pixels)
    for name in ("picture.png", "old_order.png"):
        path = store.client.download_artifacts(store.run().info.run_id, name, str(tmp_path))
        with Image.open(path) as picture:
            assert (np.asarray(picture) == pixels).all()
