"""Names that scripts and subclasses of the tutorial's class read, set, override or misspell."""

from __future__ import annotations

import copy
import pickle
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import Store
from tracker import ArgumentError, CallOrderError, RunManager, start_run

NET = nn.Linear(1, 2)
LOADER = DataLoader(TensorDataset(torch.arange(10.0)), 5)
SCORES, LABELS = torch.eye(2), torch.tensor([0, 1])
PARAMS = namedtuple("PARAMS", ["lr", "batch_size"])(0.5, 5)
NAMES = [
    *("epoch_count", "epoch_loss", "epoch_num_correct", "epoch_start_time", "epoch", "tb"),
    *("run_count", "run_data", "run_params", "run_start_time", "run", "network", "loader"),
]


def quiet(**settings: Any) -> RunManager:
    return RunManager(model=False, histograms=False, **settings)


def an_epoch(manager: RunManager) -> dict[str, float]:
    manager.begin_epoch()
    for _ in LOADER:
        manager.track_loss(0.5, 2)
        manager.track_num_correct(SCORES, LABELS)
    return manager.end_epoch()


def test_the_tutorial_s_names_and_those_of_its_later_versions_agree(store: Store) -> None:
    with quiet() as manager:
        before = time.time()
        manager.begin_run(PARAMS, NET, LOADER)
        an_epoch(manager)
        assert manager.epoch.count == manager.epoch_count == 1
        assert manager.epoch.loss == manager.epoch_loss == 2.0
        assert manager.epoch.num_correct == manager.epoch_num_correct == 4
        assert manager.epoch.start_time == manager.epoch_start_time
        assert before <= manager.run_start_time <= manager.epoch_start_time <= time.time()
        assert before <= manager.run.start_time <= time.time()
        manager.run.log_metrics({"own": 1.0})
        manager.end_run()
        assert manager.run.count == manager.run_count == 1
        assert manager.run.data is manager.run_data
        manager.epoch.best = 0.75  # a name of the script's own
        assert manager.epoch.best == 0.75
        assert manager.run.params._asdict() == {"lr": 0.5, "batch_size": 5}
        assert manager.run.params["lr"] == "0.5"
        assert manager.run.params.lr == 0.5
        assert not hasattr(manager.run.params, "momentum")
        with pytest.raises(CallOrderError, match="the run has ended"):
            manager.run.log_metrics({"late": 1.0})
    assert store.run().data.metrics["own"] == 1.0


def test_a_run_that_the_manager_joins_has_the_names_too(store: Store) -> None:
    with start_run() as run:
        manager = quiet(run=run)
        manager.begin_run(PARAMS, NET, LOADER)
        an_epoch(manager)
        assert manager.run is run
        assert run.params._asdict() == PARAMS._asdict()
        assert [row["epoch"] for row in run.data] == [1]


def test_every_name_may_be_set_before_and_after_initialization(store: Store) -> None:
    class Mine(RunManager):
        def __init__(self, value: Any) -> None:
            self.set_all(value)
            super().__init__(model=False, histograms=False)
            self.set_all(value)

        def set_all(self, value: Any, *without: str) -> None:
            for name in NAMES:
                if name not in without:
                    setattr(self, name, value)

    for value in (None, 0):
        with Mine(value) as manager:
            manager.run_count = 0
            manager.begin_run(PARAMS, NET, LOADER)
            manager.set_all(value, "network", "loader", "epoch_count")
            assert an_epoch(manager)["loss"] == 0.5
            manager.end_run()
    assert [run.info.status for run in store.runs()] == ["FINISHED"] * 2


class ByHand(RunManager):
    """Adds up by itself, as the tutorial does, and calls no `track_…` of the library."""

    def begin_epoch(self) -> None:  # type: ignore[override]
        self.epoch_loss = 0
        super().begin_epoch()
        self.epoch.num_correct = 0

    def track_loss(self, loss: Any, batch: Any = None) -> None:
        self.epoch_loss += loss.item() * self.loader.batch_size

    def track_num_correct(self, preds: Any, labels: Any) -> None:
        self.epoch.num_correct += 3


class Counting(RunManager):
    """Keeps the run's hyperparameters and the number of the epoch under names that ours has."""

    def begin_run(self, run: Any, *data: Any, **more: Any) -> Any:
        self.run, self.epoch = run, 0
        return super().begin_run(run, *data, **more)

    def begin_epoch(self) -> None:  # type: ignore[override]
        self.epoch += 1
        super().begin_epoch()


def test_what_a_subclass_keeps_under_our_names_is_what_it_reads(store: Store) -> None:
    with Counting(model=False) as manager:
        manager.begin_run(PARAMS, NET, LOADER)
        for number in (1, 2):
            an_epoch(manager)
            assert (manager.run.lr, manager.epoch, manager.epoch_count) == (0.5, number, number)
        run_id = manager.run_id
        manager.end_run()
        assert manager.run_id == run_id == store.run().info.run_id


class OwnEpoch:
    """The epoch of a later version of the tutorial, with one field and one method more."""

    def __init__(self) -> None:
        self.count, self.loss, self.num_correct, self.start_time = 0, 0.0, 0, None
        self.val_loss = 0.0

    def mean(self, batches: int) -> float:
        return self.val_loss / batches + self.count


class OwnRun:
    count, data, params, start_time = 0, None, None, None
    best = 0.0


class WithRecords(RunManager):
    def begin_run(self, *arguments: Any, **more: Any) -> Any:
        self.epoch, self.run = OwnEpoch(), OwnRun()
        return super().begin_run(*arguments, **more)


def test_further_fields_of_a_subclass_s_records_are_kept(store: Store) -> None:
    with WithRecords(model=False) as manager:
        for number in (1, 2):
            manager.begin_run(PARAMS, NET, LOADER)
            manager.epoch.val_loss += 4.0
            manager.run.best += number
            an_epoch(manager)
            assert (manager.epoch.val_loss, manager.epoch.mean(2)) == (4.0, 3.0)
            assert (manager.run.best, manager.run.count) == (number, number)
    assert len(store.runs()) == 2


def test_a_subclass_that_replaces_every_verb_is_warned_that_nothing_is_tracked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Own(RunManager):
        def begin_run(self, *unused: Any) -> None:  # type: ignore[override]
            self.run_count += 1

        def begin_epoch(self) -> None:  # type: ignore[override]
            self.epoch_loss = 0.0

        def track_loss(self, loss: Any, batch: Any = None) -> None:
            self.epoch_loss += float(loss)

    with Own() as manager:
        manager.begin_run()
        for _ in range(2):
            manager.begin_epoch()
            manager.track_loss(0.5)
            manager.track_loss(0.5)
            assert manager.epoch_loss == 1.0
    assert caplog.messages == ["Nothing is tracked. Own.begin_run() must call super().begin_run()."]


def test_a_loop_that_sets_the_sums_itself_has_the_tutorial_s_metrics(store: Store) -> None:
    with ByHand(model=False) as manager:
        manager.begin_run(PARAMS, NET, LOADER)
        for _ in range(2):
            manager.begin_epoch()
            for loss in (torch.tensor(0.5), torch.tensor(1.5)):
                manager.track_loss(loss)
                manager.track_num_correct(None, None)
            found = manager.end_epoch()
            assert manager.epoch_loss == 10.0
    assert (found["loss"], found["accuracy"]) == (1.0, 0.6)
    assert store.history(store.run(), "loss") == [(1, 1.0), (2, 1.0)]


def test_a_sum_set_between_tracked_losses_keeps_its_value(store: Store) -> None:
    with quiet() as manager:
        manager.begin_run(PARAMS, NET, LOADER)
        manager.begin_epoch()
        manager.track_loss(1.0, 4)
        manager.epoch_loss += torch.tensor(2.0, requires_grad=True)
        assert manager.epoch_loss == 6.0
        manager.save_checkpoint()
        manager.track_loss(1.0, 4)
        assert manager.epoch_loss == 10.0
        assert manager.end_epoch()["loss"] == 10 / 8


def test_the_table_may_be_replaced(store: Store) -> None:
    with quiet() as manager:
        manager.run_data = [{"run": 0, "epoch": 0}]
        manager.begin_run({}, NET, LOADER)
        an_epoch(manager)
        manager.run_data.append({"run": 9})
        manager.save("results")
    assert Path("results.csv").read_text().count("\n") == 4


# -- tb ----------------------------------------------------------------------------------------


def test_tb_is_the_writer_of_the_open_run(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with quiet(tensorboard="events") as manager:
        manager.begin_run({"lr": 1}, NET, LOADER)
        for epoch in range(3):
            manager.tb.add_scalar("mine", epoch / 2, epoch)
        manager.end_run()
        assert caplog.messages == []
        manager.tb.add_scalar("mine", 9.0, 9)
    events = EventAccumulator(str(next((tmp_path / "events").iterdir()))).Reload()
    assert [(point.step, point.value) for point in events.Scalars("mine")] == [
        *((0, 0.0), (1, 0.5), (2, 1.0)),
    ]
    assert caplog.messages == [
        "tb.add_scalar() writes nothing; call begin_run() first to write TensorBoard's event files."
    ]


def test_tb_without_event_files_says_once_what_to_pass(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with quiet() as manager:
        manager.tb.flush()
        for _ in range(2):
            manager.begin_run({}, NET, LOADER)
            manager.tb.add_graph(NET, torch.ones(1, 1))
            manager.tb.add_histogram("weight", NET.weight, 1)
            with manager.tb as writer:
                writer.add_text("text", "text")
            manager.tb.close()
            manager.end_run()
    assert caplog.messages == [
        "tb.add_graph() writes nothing; pass RunManager(tensorboard=…) to write TensorBoard's "
        "event files."
    ]


def test_tb_may_be_a_writer_of_the_user_s(store: Store) -> None:
    with quiet() as manager:
        manager.tb = mine = [1]
        assert manager.tb is mine


# -- subclasses --------------------------------------------------------------------------------


class Uninitialized(RunManager):
    def __init__(self) -> None:
        self.mine = 3
        self.run_data = []
        self.epoch_loss = 0


@pytest.mark.parametrize(
    "use", ["begin_run", "begin_epoch", "end_run", "close", "save", "track_loss"]
)
def test_a_subclass_that_is_not_initialized_raises_an_error_saying_so(use: str) -> None:
    manager = Uninitialized()
    arguments = {"save": ["x"], "track_loss": [1.0]}.get(use, [])
    with pytest.raises(CallOrderError) as raised:
        getattr(manager, use)(*arguments)
    assert str(raised.value) == (
        "Uninitialized.__init__() must call super().__init__() before the manager is used."
    )
    assert not hasattr(manager, "run_data")
    assert getattr(manager, "other", 5) == 5


def test_a_subclass_that_hides_a_method_is_told_so(store: Store) -> None:
    class Hides(RunManager):
        def begin_epoch(self, *_: Any, **__: Any) -> None: ...

    class HidesEnd(RunManager):
        def end_epoch(self, *_: Any, **__: Any) -> dict[str, float]:
            return {}

    with Hides(model=False) as manager:
        manager.begin_run({}, NET, LOADER)
        manager.begin_epoch()
        with pytest.raises(CallOrderError) as raised:
            manager.track_loss(1.0)
    assert str(raised.value).endswith(" Hides.begin_epoch() must call super().begin_epoch().")
    with HidesEnd(model=False) as other:
        other.begin_run({}, NET, LOADER)
        other.begin_epoch()
        other.end_epoch()
        with pytest.raises(CallOrderError, match=r"must call super\(\)\.end_epoch\(\)\.$"):
            other.begin_epoch()


def test_arguments_without_a_use_are_named_once(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with RunManager(histograms=False) as manager:
        for _ in range(2):
            manager.begin_run({}, None, LOADER)
            for epoch in range(2):
                manager.begin_epoch(epoch)
                manager.end_epoch()
            manager.end_run(NET)  # type: ignore[arg-type]
    assert caplog.messages == [
        "begin_epoch() takes no arguments and ignores those given.",
        "end_run() has no use for a Linear; model_files are texts by name.",
    ]
    assert [run.info.status for run in store.runs()] == ["FINISHED"] * 2


# -- names that do not exist -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("track_num_corect", "track_num_correct"),
        ("track_valid_loss", "track_val_loss"),
        ("begin_epochs", "begin_epoch"),
        ("epoch_start", "epoch_start_time"),
        ("rundata", "run_data"),
    ],
)
def test_a_name_that_does_not_exist_brings_the_nearest(name: str, nearest: str) -> None:
    manager = RunManager()
    with pytest.raises(AttributeError) as raised:
        getattr(manager, name)
    message = f"RunManager has no method or attribute {name!r}; the nearest is {nearest!r}."
    assert str(raised.value) == message
    assert not hasattr(manager, name)
    assert getattr(manager, name, None) is None


def test_a_name_that_is_like_no_other_brings_none() -> None:
    with pytest.raises(AttributeError, match=r"has no method or attribute 'qqqq'\.$"):
        _ = quiet().qqqq


def test_a_run_s_method_is_found_there() -> None:
    with pytest.raises(AttributeError, match=r"a run has it: manager\.run\.log_image\.$"):
        RunManager().log_image  # noqa: B018


def test_a_property_that_raises_says_why() -> None:
    class Mine(RunManager):
        @property
        def best(self) -> Any:
            return self.run_loss

    with pytest.raises(AttributeError, match="no method or attribute 'run_loss'"):
        Mine().best  # noqa: B018


def test_copies_and_displays_ask_for_names_and_get_none() -> None:
    manager = RunManager()
    for name in ("_repr_html_", "_ipython_display_", "__array__", "__deepcopy__"):
        assert not hasattr(manager, name)
    for use in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(ArgumentError, match="cannot be copied or sent"):
            use(manager)
