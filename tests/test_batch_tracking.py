"""What a manager tracks of each batch: training, validation and test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import Store
from tracker import CallOrderError, Keep, RunManager

LOADER = DataLoader(TensorDataset(torch.arange(10.0)), 4)
SCORES, LABELS = torch.eye(2), torch.tensor([0, 1])


def quiet(**settings: Any) -> RunManager:
    return RunManager(model=False, histograms=False, **settings)


def test_validation_and_test_have_their_own_sums(store: Store) -> None:
    with quiet(batch_loss=True) as manager:
        manager.begin_run({}, nn.Linear(1, 1), LOADER)
        for _ in range(2):
            manager.begin_epoch()
            manager.track_val_loss(8.0, 1)  # before the training part
            manager.track_loss(1.0, LABELS)
            manager.track_num_correct(SCORES, LABELS)
            manager.track_val_loss(torch.tensor(4.0), 3)
            manager.track_val_num_correct(SCORES, 1 - LABELS)
            manager.track_test_loss(torch.tensor(3.0), LABELS)
            manager.track_test_num_correct(SCORES, torch.tensor([0, 0]))
            found = manager.end_epoch()
            assert manager.epoch_loss == 2.0
            assert manager.epoch_num_correct == 2
        manager.end_run()
    expected = {"loss": 1.0, "accuracy": 1.0, "val_loss": 5.0, "val_accuracy": 0.0}
    expected |= {"test_loss": 3.0, "test_accuracy": 0.5}
    assert {name: found[name] for name in expected} == expected
    run = store.run()
    for name, value in expected.items():
        assert store.history(run, name) == [(1, value), (2, value)]
    assert len(store.history(run, "batch_loss")) == 2


def test_the_sizes_of_validation_batches_are_those_of_its_loader(store: Store) -> None:
    losses = [1.0, 2.0, 7.0]  # of 4, 4 and 2 samples
    with quiet() as manager:
        manager.begin_run({}, None, None, val_loader=LOADER)
        manager.begin_epoch()
        for loss in losses:
            manager.track_val_loss(loss)
            manager.track_test_loss(loss)
        found = manager.end_epoch()
    assert found["val_loss"] == pytest.approx((4 * 1 + 4 * 2 + 2 * 7) / 10)
    assert found["test_loss"] == pytest.approx(10 / 3)
    assert "loss" not in found


def test_an_explicit_metric_replaces_a_tracked_one(store: Store) -> None:
    with quiet() as manager:
        manager.begin_run({}, None, None)
        manager.begin_epoch()
        manager.track_val_loss(1.0, 2)
        assert manager.end_epoch({"val_loss": 9.0})["val_loss"] == 9.0


@pytest.mark.parametrize("part", ["val", "test"])
def test_validation_belongs_to_an_epoch(part: str, store: Store) -> None:
    with quiet() as manager:
        manager.begin_run({}, None, None)
        with pytest.raises(CallOrderError, match=rf"^track_{part}_loss\(\) was called outside"):
            getattr(manager, f"track_{part}_loss")(1.0)
        with pytest.raises(CallOrderError, match=rf"^track_{part}_num_correct\(\) was called"):
            getattr(manager, f"track_{part}_num_correct")(SCORES, LABELS)


def test_a_run_resumed_while_it_validated_validates_anew(store: Store) -> None:
    network = nn.Linear(1, 1)
    with quiet() as manager:
        manager.begin_run({}, network, LOADER)
        manager.begin_epoch()
        manager.track_loss(1.0, 4)
        manager.track_loss(2.0, 4)
        manager.track_val_loss(100.0, 4)
        manager.save_checkpoint()
    with RunManager.resume(store.run().info.run_id, model=False) as manager:
        manager.begin_run({}, network, LOADER)
        manager.begin_epoch()
        (last,) = manager.rest_of_epoch()
        manager.track_loss(3.0, last)
        manager.track_val_loss(5.0, 4)
        found = manager.end_epoch()
    assert found["loss"] == pytest.approx((4 * 1 + 4 * 2 + 2 * 3) / 10)
    assert found["val_loss"] == 5.0


def accumulates(manager: RunManager, number: int, batch: Any) -> None:
    """Tracks two batches of `number` and `number - 1` at once."""
    if number % 2 == 0:
        manager.track_loss(number - 0.5, 2 * len(batch[0]))


def sums(manager: RunManager, number: int, batch: Any) -> None:
    manager.epoch_loss += number * len(batch[0])


@pytest.mark.parametrize("track", [accumulates, sums])
def test_a_loop_that_does_not_track_each_batch_continues_after_the_last_one(
    track: Any, store: Store
) -> None:
    loader = DataLoader(TensorDataset(torch.arange(8.0)), 1)
    settings: dict[str, Any] = {"model": False, "histograms": False, "checkpoints": Keep(last=9)}

    def batches(manager: RunManager, first: int, last: int) -> list[float]:
        drawn = []
        rest: Any = manager.rest_of_epoch()
        assert len(rest) == 9 - first
        for number, batch in enumerate(rest, first):
            drawn.append(float(batch[0]))
            track(manager, number, batch)
            if number == last:
                break
        return drawn

    with RunManager(**settings) as manager:
        manager.begin_run({}, nn.Linear(1, 1), loader)
        manager.begin_epoch()
        batches(manager, 1, 8)
        assert manager.end_epoch()["loss"] == 4.5
        manager.save_checkpoint()
        manager.begin_epoch()
        batches(manager, 1, 6)
        manager.save_checkpoint()
    run_id = store.run().info.run_id
    with RunManager.resume(run_id, **settings) as manager:
        manager.begin_run({}, nn.Linear(1, 1), loader)
        manager.begin_epoch()
        assert batches(manager, 7, 8) == [6.0, 7.0]
        assert manager.end_epoch()["loss"] == 4.5
        manager.save_checkpoint()
    assert (
        len({path.split("/")[1] for path in store.artifacts(store.run()) if "checkp" in path}) == 3
    )


def tracks_twice(manager: RunManager, number: int, batch: Any) -> None:
    """Tracks the losses of a generator and of its critic."""
    manager.track_loss(1.0, batch)
    manager.track_loss(2.0, batch)


@pytest.mark.parametrize("track", [sums, accumulates, tracks_twice])
def test_a_loop_whose_batches_cannot_be_counted_repeats_the_epoch_with_a_warning(
    track: Any, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with quiet(checkpoints=Keep(last=9)) as manager:
        manager.begin_run({}, nn.Linear(1, 1), LOADER)
        for _ in range(2):
            manager.begin_epoch()
            for number, batch in enumerate(LOADER):
                track(manager, number, batch)
                if manager.epoch_count == 2:
                    manager.save_checkpoint()
            manager.end_epoch()
            manager.save_checkpoint()
    (message,) = (text for text in caplog.messages if "save_checkpoint" in text)
    assert "a resumed run repeats it; loop over rest_of_epoch()" in message
    artifacts = store.artifacts(store.run())
    assert len([path for path in artifacts if path.endswith("/state.json")]) >= 2
    with RunManager.resume(store.run().info.run_id, model=False) as manager:
        manager.begin_run({}, nn.Linear(1, 1), LOADER)
        assert manager.checkpoint is not None
        assert manager.checkpoint.position == 0


# -- accuracy of the user's own ----------------------------------------------------------------


class Counts(RunManager):
    """Counts in one of the ways in which copies of the class do."""

    def _get_num_correct(self, preds: torch.Tensor, labels: torch.Tensor) -> Any:
        return (preds.flatten() > 0).eq(labels.flatten()).sum()


class CountsWithoutGradients(RunManager):
    @staticmethod
    @torch.no_grad()
    def _get_num_correct(preds: torch.Tensor, labels: torch.Tensor) -> int:
        return int((preds.flatten() > 0).eq(labels.flatten()).sum().item())


def counts(preds: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (preds.flatten() > 0).eq(labels.flatten()).sum(), labels.numel()


@pytest.mark.parametrize(
    "manager",
    [
        Counts(inline=True, model=False, histograms=False),
        CountsWithoutGradients(inline=True, model=False, histograms=False),
        quiet(inline=True, accuracy=counts),
    ],
    ids=["method", "static", "argument"],
)
def test_a_function_of_the_user_counts_in_training_validation_and_test(
    manager: RunManager, store: Store
) -> None:
    preds, labels = torch.tensor([[1.0], [-1.0], [1.0], [1.0]]), torch.tensor([1, 1, 1, 0])
    with manager:
        manager.begin_run({}, nn.Linear(1, 1), LOADER)
        manager.begin_epoch()
        for track in ("track", "track_val", "track_test"):
            getattr(manager, f"{track}_num_correct")(preds, labels)
        found = manager.end_epoch()
        assert manager.epoch_num_correct == 2
    assert {found[name] for name in ("accuracy", "val_accuracy", "test_accuracy")} == {0.5}
    assert store.run().data.metrics["val_accuracy"] == 0.5


def test_a_script_may_count_with_the_tutorial_s_own_function() -> None:
    assert RunManager()._get_num_correct(torch.eye(3), torch.tensor([0, 1, 0])) == 2


def test_a_dropped_subclass_that_counts_ends_its_run(store: Store) -> None:
    manager = Counts(model=False)
    manager.begin_run({}, nn.Linear(1, 1), LOADER)
    manager.begin_epoch()
    manager.track_num_correct(torch.ones(2), torch.ones(2))
    del manager
    assert store.run().info.status == "FAILED"
