"""`RunManager(histograms=Every(…))`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import Store
from tracker import ArgumentError, Every, RunManager, fit, load_histograms, start_run


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (True, {("epoch", e, n, k) for e in (1, 2) for n in "01" for k in ("weight", "gradient")}),
        (False, set()),
        (Every(epochs=2, only="1.*", gradients=False), {("epoch", 2, "1", "weight")}),
        (Every(steps=3, weights=False), {("step", s, n, "gradient") for s in (3, 6) for n in "01"}),
    ],
)
def test_histograms_are_logged_when_and_of_what_every_says(
    store: Store, every: Any, expected: set[Any]
) -> None:
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with RunManager(model=False, histograms=every) as manager:
        manager.begin_run({}, network, [])
        for _ in range(2):
            manager.begin_epoch()
            for _ in range(3):
                loss = network(torch.ones(1, 2)).sum()
                loss.backward()
                manager.track_loss(loss, 1)
            manager.end_epoch()
        manager.end_run()
    if not expected:
        assert not any("histogram" in file for file in store.artifacts(store.run()))
        return
    table = load_histograms(store.run().info.run_id, store.uri)
    keys = zip(table["unit"], table["step"], table["tensor"].str[0], table["kind"], strict=True)
    assert set(keys) == expected


# -- activations --------------------------------------------------------------------------------


class Numbered(nn.Module):
    """Outputs the inputs: 1, 2, 4, … so that each batch has a bin of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.out.weight)

    def forward(self, inputs: Tensor) -> Any:
        return self.out(inputs)


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())


def activations(store: Store) -> list[tuple[str, int, list[float]]]:
    """Unit and step of each histogram of activations, and the outputs in it."""
    table = load_histograms(store.run().info.run_id, store.uri)
    table = table.query("kind == 'activation' and tensor == 'out'")
    groups = table.groupby(["unit", "step"])
    return [(unit, step, sorted(rows["left"])) for (unit, step), rows in groups]


def loop(manager: RunManager, network: nn.Module, numbers: Iterator[int], steps: int) -> None:
    """An epoch of `steps` batches of two micro-batches, and a validation."""
    manager.begin_epoch()
    for _ in range(steps):
        for part in (1, 3):  # both are in the batch's bins
            loss = network(torch.tensor([[part * 2.0 ** next(numbers)]])).sum()
            loss.backward()
        manager.track_loss(loss, 2)
    network.eval()
    network(torch.ones(1, 1))
    network.train()
    manager.end_epoch()


def of_batch(number: int) -> list[float]:
    """The bins of a batch: its micro-batches are number 2n and 2n + 1."""
    return [2.0 ** (2 * number), 3 * 2.0 ** (2 * number + 1)]


@pytest.mark.parametrize(
    ("every", "lengths", "loader", "expected"),
    [
        ({"epochs": 1}, [3, 3], 3, [("epoch", 1, 2), ("epoch", 2, 5)]),
        ({"epochs": 2}, [3, 3, 1, 2], 3, [("epoch", 2, 5), ("epoch", 4, 7)]),
        ({"epochs": 1}, [3, 3], 0, [("epoch", 1, 0), ("epoch", 2, 5)]),  # of unknown length
        ({"epochs": 1}, [1, 1], 1, [("epoch", 1, 0), ("epoch", 2, 1)]),
        ({"epochs": 1}, [2, 2], 4, [("epoch", 2, 3)]),  # the first one ends early
        ({"epochs": 1}, [4, 4], 2, [("epoch", 1, 1), ("epoch", 2, 7)]),
        ({"steps": 1}, [2], 2, [("step", 1, 0), ("step", 2, 1)]),
        ({"steps": 3}, [2, 2, 3], 2, [("step", 3, 2), ("step", 6, 5)]),
    ],
)
def test_activations_are_those_of_the_step_or_of_the_epochs_last_batch(
    every: Any, lengths: list[int], loader: int, expected: Any, store: Store, caplog: Any
) -> None:
    network, numbers = Numbered(), iter(range(99))
    settings = Every(**every, activations=True)
    with RunManager(model=False, histograms=settings) as manager:
        manager.begin_run({}, network, [torch.ones(1, 1)] * loader)
        for length in lengths:
            loop(manager, network, numbers, length)
        manager.end_run()
    assert activations(store) == [(unit, at, of_batch(batch)) for unit, at, batch in expected]
    kinds = load_histograms(store.run().info.run_id, store.uri)["kind"]
    assert set(kinds) == {"weight", "gradient", "activation"}
    assert hooks(network) == 0
    said = "Epoch 1 has no histograms of activations"
    assert [said in message for message in caplog.messages] == [True] * (lengths == [2, 2])


def test_the_network_is_only_watched_in_the_steps_that_are_due(store: Store) -> None:
    network, watched = Numbered(), []
    network.register_forward_pre_hook(
        lambda *_: watched.append(hooks(network)) if network.training else None
    )
    with RunManager(model=False, histograms=Every(steps=4, activations=True)) as manager:
        manager.begin_run({}, network, [])
        loop(manager, network, iter(range(99)), 9)
    in_step = {0: 0, 1: 0, 2: 0, 3: 1, 4: 0, 5: 0, 6: 0, 7: 1, 8: 0}
    assert watched == [hooks for hooks in in_step.values() for _ in range(2)]


def test_a_training_is_the_same_with_histograms_of_activations(store: Store) -> None:
    trained = []
    for every in (False, Every(steps=2, activations=True)):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 9), nn.Dropout(), nn.BatchNorm1d(9), nn.ReLU(True))
        optimizer = torch.optim.Adam(network.parameters())
        with RunManager(model=False, histograms=every) as manager:
            manager.begin_run({}, network, [])
            manager.begin_epoch()
            for _ in range(5):
                optimizer.zero_grad()
                loss = network(torch.randn(4, 3)).sum()
                loss.backward()
                optimizer.step()
                manager.track_loss(loss, 4)
        trained.append([*network.state_dict().values(), torch.rand(1)])
    assert all(map(torch.equal, *trained))


def ended(manager: RunManager) -> None:
    manager.end_run()


def begun_anew(manager: RunManager) -> None:
    manager.begin_run({}, Numbered(), [])


def raised(manager: RunManager) -> None:
    with pytest.raises(ZeroDivisionError), manager:
        raise ZeroDivisionError


@pytest.mark.parametrize("end", [ended, begun_anew, raised, RunManager.close])
def test_no_hook_is_left_when_a_run_ends(end: Any, store: Store) -> None:
    network = Numbered()
    manager = RunManager(model=False, histograms=Every(steps=1, activations=True))
    manager.begin_run({}, network, [])
    assert hooks(network) == 1
    end(manager)
    assert hooks(network) == 0


def test_no_hook_is_left_when_the_manager_is_dropped(store: Store) -> None:
    network = Numbered()
    manager = RunManager(model=False, histograms=Every(steps=1, activations=True))
    manager.begin_run({}, network, [])
    assert hooks(network) == 1
    del manager
    assert hooks(network) == 0


def test_a_run_resumed_in_the_middle_of_an_epoch_has_its_activations(store: Store) -> None:
    network, loader = Numbered(), [torch.ones(1, 1)] * 3
    every = Every(epochs=1, activations=True)
    with RunManager(model=False, histograms=every) as manager:
        manager.begin_run({}, network, loader)
        manager.begin_epoch()
        network(torch.ones(1, 1)).sum().backward()
        manager.track_loss(1.0, 1)
        manager.save_checkpoint()
    run_id = store.run().info.run_id
    with RunManager.resume(run_id, model=False, histograms=every) as manager:
        manager.begin_run({}, network, loader)
        manager.begin_epoch()
        for number in (1, 2):
            network(torch.tensor([[2.0**number]])).sum().backward()
            manager.track_loss(1.0, 1)
        manager.end_epoch()
    assert activations(store) == [("epoch", 1, [4.0])]


def test_each_of_several_networks_has_its_activations(store: Store) -> None:
    networks = {"g": Numbered(), "d": Numbered()}
    every = Every(steps=1, only="d.*", activations=True)
    with RunManager(model=False, histograms=every) as manager:
        manager.begin_run({}, networks, [])
        manager.begin_epoch()
        networks["d"](networks["g"](torch.ones(1, 1))).sum().backward()
        manager.track_loss(1.0, 1)
    table = load_histograms(store.run().info.run_id, store.uri)
    assert set(zip(table["tensor"], table["kind"], strict=True)) == {
        ("d.out", "activation"),
        ("d.out.weight", "weight"),
        ("d.out.weight", "gradient"),
    }


# -- fit ----------------------------------------------------------------------------------------


class Loader:
    """Three batches of one sample, whose numbers go on from one epoch to the next."""

    def __init__(self, numbers: Iterator[int]) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        for _ in range(3):
            yield torch.tensor([[2.0 ** next(self.numbers)]]), torch.zeros(1)


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        ({"steps": 2}, [("step", 2, 1), ("step", 4, 3), ("step", 6, 5)]),
        ({"epochs": 1}, [("epoch", 1, 2), ("epoch", 2, 5)]),
    ],
)
@pytest.mark.parametrize("is_seen", [True, False])
def test_fit_has_the_histograms_of_steps_if_the_manager_sees_them(
    every: Any, expected: Any, is_seen: bool, store: Store, caplog: Any
) -> None:
    network = Numbered()
    still = torch.optim.SGD(network.parameters(), lr=0.0)
    with RunManager(
        model=False, batch_loss=True, histograms=Every(**every, activations=True)
    ) as manager:
        loader = Loader(iter(range(99)))
        manager.begin_run({}, network, loader)
        shown: Any = manager.progress(loader) if is_seen else loader
        validation = [(torch.ones(1, 1), torch.zeros(1))]
        for epoch in fit(
            network, shown, still, lambda one, _: one.sum(), epochs=2, val_loader=validation
        ):
            manager.log_epoch(epoch)
        assert manager.step == 6
        manager.end_run()
    assert (activations(store) if is_seen or "epochs" in every else []) == [
        (unit, at, [2.0**batch]) for unit, at, batch in expected if is_seen
    ]
    assert len(store.history(store.run(), "batch_loss")) == 6
    said = [message for message in caplog.messages if "manager.progress(loader)" in message]
    assert len(said) == (0 if is_seen else 1)


@pytest.mark.parametrize(
    "fields", [{"steps": 0}, {"epochs": 1.5}, {"steps": 1, "epochs": 1}, {"only": ""}]
)
def test_what_every_does_not_allow_is_refused(fields: Any) -> None:
    with pytest.raises(ArgumentError, match=r"not allowed|exclude"):
        Every(**fields)
    with pytest.raises(ArgumentError, match="histograms=3 is not allowed"):
        RunManager(histograms=3)  # type: ignore[arg-type]


def test_a_pattern_of_a_module_s_tensors_takes_its_outputs_too() -> None:
    every = Every(only="fc.*", activations=True)
    assert every.takes("fc.weight", "weight")
    assert every.takes("fc", "activation")
    assert not every.takes("fc2", "activation")


def test_a_histogram_has_no_negative_step(store: Store) -> None:
    with start_run() as run, pytest.raises(ArgumentError, match=r"^step=-1 is not allowed"):
        run.log_histogram("latent", [1.0], -1)
