"""Several networks in one run: a generator and its critic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from torch import Tensor, nn

from tests.helpers import Store
from tracker import ArgumentError, RunManager, StoreError, load_histograms, load_trained


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 12)

    def forward(self, noise: Tensor) -> Tensor:
        return self.linear(noise).view(-1, 3, 2, 2)


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.linear(pictures.flatten(1))


def train(manager: RunManager, networks: Any, parts: list[Any], **begin: Any) -> Any:
    """Train for one epoch of two batches as in pytorch/examples' dcgan; the optimizers."""
    generator, critic = parts
    optimizers = [torch.optim.Adam(part.parameters()) for part in parts]
    manager.begin_run({}, networks, [], **begin)
    manager.begin_epoch()
    for _ in range(2):
        real = torch.rand(5, 3, 2, 2)
        loss = critic(real).mean() - critic(generator(torch.randn(5, 2)).detach()).mean()
        loss.backward()
        loss = critic(generator(torch.randn(5, 2))).mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        manager.track_loss(loss, real)
    manager.end_epoch()
    return optimizers


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (lambda g, d: (g, d), ["Generator", "Critic"]),
        (lambda g, d: {"g": g, "d": d}, ["g", "d"]),
    ],
    ids=["tuple", "mapping"],
)
def test_each_network_has_its_layers_graph_histograms_and_model(
    given: Any, names: list[str], store: Store
) -> None:
    parts: list[Any] = [Generator(), Critic()]
    with RunManager() as manager:
        optimizers = train(manager, given(*parts), parts)
        manager.save_checkpoint(optimizer=optimizers)
        assert list(manager.network) == list(given(*parts))
        manager.end_run()
    run = store.run()
    assert run.data.params["model"] == "Generator, Critic"
    artifacts = store.artifacts(run)
    assert "samples.png" in artifacts
    for name in names:
        assert {f"network/{name}/layers.csv", f"network/{name}/graph.svg"} <= artifacts
    histograms = load_histograms(run.info.run_id, store.uri)
    assert set(histograms["tensor"]) == {
        f"{name}.linear.{kind}" for name in names for kind in ("weight", "bias")
    }
    for name, part, inputs in zip(names, parts, (torch.rand(3, 2), torch.rand(3, 12)), strict=True):
        uri = f"runs:/{run.info.run_id}/model-{name}"
        inputs = inputs if part is parts[0] else inputs.view(3, 3, 2, 2)
        torch.testing.assert_close(mlflow.pytorch.load_model(uri)(inputs), part(inputs))
        fresh = type(part)()
        assert torch.equal(load_trained(uri, into=fresh).linear.weight, part.linear.weight)

    with pytest.raises(StoreError, match=f"it has model-{min(names)}, model-{max(names)}"):
        load_trained(run.info.run_id, into=Critic())
    both: list[Any] = [Generator(), Critic()]
    loaded = load_trained(run.info.run_id, into=given(*both))
    assert list(loaded) == list(given(*both))
    for part, other in zip(parts, both, strict=True):
        assert torch.equal(part.linear.weight, other.linear.weight)

    resumed = RunManager.resume(run.info.run_id)
    others = [Generator(), Critic()]
    fresh_optimizers = [torch.optim.Adam(part.parameters()) for part in others]
    assert resumed.checkpoint is not None
    resumed.checkpoint.restore(network=given(*others), optimizer=fresh_optimizers)
    assert torch.equal(others[1].linear.weight, parts[1].linear.weight)
    assert fresh_optimizers[1].state_dict()["state"][0]["step"] == 2


def test_a_network_that_is_never_called_has_its_weights(store: Store, tmp_path: Path) -> None:
    parts: list[Any] = [Generator(), Critic()]
    with RunManager(histograms=False) as manager:
        train(manager, [*parts, nn.Sequential(nn.Linear(2, 1))], parts)
        manager.end_run()
    artifacts = store.artifacts(store.run())
    assert {"model-Sequential.pt", "network/Sequential/layers.csv"} <= artifacts
    assert "network/Generator/graph.svg" in artifacts
    assert "network/Sequential/graph.svg" not in artifacts


@pytest.mark.parametrize(
    ("networks", "example", "problem"),
    [
        ([], None, "network is empty"),
        ({"a.b": nn.Linear(1, 1)}, None, "network has the name 'a.b'; allowed are letters"),
        ({"keys": nn.Linear(1, 1)}, None, "network has a name that is not allowed"),
        ([nn.Linear(1, 1), 3], None, "network is a int; it must be a torch.nn.Module"),
        ([nn.Linear(1, 1), nn.Linear(1, 1)], torch.rand(2, 1), "an example for each of '0', '1'"),
    ],
)
def test_what_is_not_a_set_of_networks_is_refused_before_the_run(
    networks: Any, example: Any, problem: str, tmp_path: Path
) -> None:
    manager = RunManager(offline=True, directory=tmp_path / "journal")
    with pytest.raises(ArgumentError) as caught:
        manager.begin_run({}, networks, [], example=example)
    assert problem in str(caught.value)
    assert not (tmp_path / "journal").exists()
