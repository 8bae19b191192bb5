"""Several processes may create a run under one key, and MLflow has exactly one afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from mlflow.exceptions import MlflowException

from tests.helpers import Store
from tracker import StoreError
from tracker.delivery.uploader import Uploader
from tracker.journal.reader import Journal
from tracker.journal.records import Begin, End, Metrics, Params, Tags, now
from tracker.journal.writer import JournalWriter
from tracker.store.client import MlflowStore

KEY = "study-7"


class Deliverer:
    """A journal with the beginning of the run KEY, and a separate store to deliver it to."""

    def __init__(self, directory: Path, uri: str, *, placeholder: bool) -> None:
        self.writer = JournalWriter(directory)
        self.writer.append(
            KEY,
            Begin(
                *("Default", None, None, {"tracker.run": KEY}),
                keyed=True,
                placeholder=placeholder,
            ),
        )
        self.writer.append(KEY, Params({"lr": "0.1"}))
        self.writer.flush()
        self.journal = Journal(self.writer.folder)
        self.store = MlflowStore(uri)
        self.uploader = Uploader(self.journal, self.store)

    def deliver(self) -> None:
        self.writer.flush()
        self.uploader.drain()

    def around_creation(self, wrap: Callable[[Callable[[], Any]], Any]) -> None:
        """Let `wrap` create the run: it is given the call that does, between both look-ups."""
        create: Any = self.store.client.create_run
        vars(self.store.client)["create_run"] = lambda *given: wrap(lambda: create(*given))

    def close(self) -> None:
        self.journal.close()
        self.writer.close()


@pytest.fixture
def real_and_placeholder(store: Store, tmp_path: Path) -> Iterator[tuple[Deliverer, Deliverer]]:
    with ExitStack() as stack:
        real, placeholder = (
            stack.enter_context(
                closing(Deliverer(tmp_path / "journals", store.uri, placeholder=is_placeholder))
            )
            for is_placeholder in (False, True)
        )
        yield real, placeholder


def check(store: Store, real: Deliverer, placeholder: Deliverer) -> None:
    """Check that both continue with one run, which has everything that either logs."""
    real.writer.append(KEY, Metrics([("loss", 0.5, 1, 2)]))
    placeholder.writer.append(KEY, Tags({"optuna.state": "COMPLETE"}))
    for each in (placeholder, real):
        each.deliver()
        assert each.journal.notices() == []
    real.writer.append(KEY, End("FINISHED"))
    real.deliver()

    run = store.run()
    assert run.info.run_id == real.journal.run_id(KEY) == placeholder.journal.run_id(KEY)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1"}
    assert run.data.metrics == {"loss": 0.5}
    assert run.data.tags["optuna.state"] == "COMPLETE"


def test_a_run_replaces_its_placeholder(
    store: Store, real_and_placeholder: tuple[Deliverer, Deliverer]
) -> None:
    real, placeholder = real_and_placeholder
    placeholder.deliver()
    real.deliver()
    assert "tracker.placeholder" not in store.run().data.tags
    check(store, real, placeholder)


def test_a_placeholder_joins_the_run_that_exists(
    store: Store, real_and_placeholder: tuple[Deliverer, Deliverer]
) -> None:
    real, placeholder = real_and_placeholder
    real.deliver()
    created = store.run().info.run_id
    placeholder.deliver()
    assert store.run().info.run_id == created
    check(store, real, placeholder)


@pytest.mark.parametrize("first", ["real", "placeholder"])
def test_one_run_is_left_if_another_is_delivered_between_look_up_and_creation(
    first: str, store: Store, real_and_placeholder: tuple[Deliverer, Deliverer]
) -> None:
    real, placeholder = real_and_placeholder
    inner, outer = (real, placeholder) if first == "real" else (placeholder, real)

    def create_late(create: Callable[[], Any]) -> Any:
        inner.deliver()
        return create()

    outer.around_creation(create_late)
    outer.deliver()
    check(store, real, placeholder)


def test_a_run_whose_creation_is_in_doubt_is_not_taken_for_its_placeholder(
    store: Store, real_and_placeholder: tuple[Deliverer, Deliverer]
) -> None:
    real, placeholder = real_and_placeholder
    no_answer = patch.object(real.store.client, "create_run", side_effect=MlflowException("gone"))
    with no_answer, pytest.raises(StoreError, match="gone"):
        real.deliver()
    placeholder.deliver()
    real.deliver()
    assert "tracker.placeholder" not in store.run().data.tags
    check(store, real, placeholder)


def test_one_run_is_left_if_both_are_created_at_once(
    store: Store, real_and_placeholder: tuple[Deliverer, Deliverer]
) -> None:
    both = threading.Barrier(2)

    def create_together(create: Callable[[], Any]) -> Any:
        both.wait(60)  # neither has found a run
        run = create()
        both.wait(60)  # both will find two runs
        return run

    threads = [threading.Thread(target=each.deliver) for each in real_and_placeholder]
    for each in real_and_placeholder:
        each.around_creation(create_together)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(store, *real_and_placeholder)


def test_a_second_run_that_a_killed_process_left_is_deleted(
    store: Store, real_and_placeholder: tuple[Deliverer, Deliverer]
) -> None:
    """It died between the creation and the second look-up."""
    real, placeholder = real_and_placeholder
    store.client.create_run("0", tags={"tracker.run": KEY, "tracker.placeholder": "true"})
    store.client.create_run("0", tags={"tracker.run": KEY})
    real.deliver()
    check(store, real, placeholder)


def test_a_placeholder_changes_neither_the_metrics_nor_the_end_of_the_run_it_joins(
    store: Store, real_and_placeholder: tuple[Deliverer, Deliverer]
) -> None:
    for each, status in zip(real_and_placeholder, ("KILLED", "FAILED"), strict=True):
        each.writer.append(KEY, Metrics([("loss", 0.5, 1, now())]))
        each.writer.append(KEY, Tags({status: "true"}))
        each.writer.append(KEY, End(status))
        each.deliver()
    run = store.run()
    assert run.info.status == "KILLED"
    assert store.history(run, "loss") == [(1, 0.5)]
    assert run.data.tags["FAILED"] == "true"
