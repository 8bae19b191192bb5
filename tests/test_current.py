"""`tracker.log_…` logs to the run that is open in this context."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading

import pytest
from torch import nn

import tracker
from tests.helpers import Store
from tracker import CallOrderError, Run, RunManager, current_run, start_run

NOT_VERBS = {"log_checkpoint", "log_epoch", "log_facts", "log_points", "log_tags"}


def test_every_verb_of_a_run_is_a_function_with_its_signature_and_documentation() -> None:
    verbs = {name for name in dir(Run) if name.startswith(("log_", "set_"))} - NOT_VERBS
    functions = {name for name in tracker.__all__ if name.startswith(("log_", "set_"))}
    assert verbs == functions - {"set_seed"}
    for name in verbs:
        verb, method = getattr(tracker, name), getattr(Run, name)
        ours, (_, *theirs) = (inspect.signature(one).parameters for one in (verb, method))
        assert list(ours) == theirs
        assert verb.__doc__ == method.__doc__


def test_the_innermost_open_run_is_current_until_it_ends(store: Store) -> None:
    with start_run(name="outer") as outer:
        tracker.log_param("which", "outer")
        with start_run(name="inner", parent=outer) as inner:
            assert current_run() is inner
            tracker.set_tag("which", "inner")
            tracker.log_metric("loss", 1.0, step=2)
        assert current_run() is outer
    with pytest.raises(CallOrderError, match=r"no run is open in this context .* start_run\(\)"):
        tracker.log_metrics({"loss": 1.0})
    runs = {run.info.run_name: run for run in store.runs()}
    assert runs["outer"].data.params == {"which": "outer"}
    assert runs["inner"].data.tags["which"] == "inner"
    assert store.history(runs["inner"], "loss") == [(2, 1.0)]


def test_a_run_without_a_block_and_that_of_a_manager_are_current_until_they_end(
    store: Store,
) -> None:
    run = start_run(name="plain")
    manager = RunManager(model=False)
    managed = manager.begin_run({}, nn.Linear(1, 1), [])
    assert current_run() is managed
    tracker.log_text("text", "a.txt")
    manager.end_run()
    assert current_run() is run
    with RunManager(run=run, model=False) as joining:
        joining.begin_run({}, nn.Linear(1, 1), [])
        assert current_run() is run
        joining.end_run()
    assert current_run() is run
    run.end()
    with pytest.raises(CallOrderError):
        current_run()
    manager.close()


def test_a_thread_has_no_run_unless_the_context_is_passed_and_tasks_have_their_own(
    store: Store,
) -> None:
    seen: list[Run | str] = []

    def look() -> None:
        try:
            seen.append(current_run())
        except CallOrderError as error:
            seen.append(str(error))

    async def task(number: int) -> bool:
        assert current_run() is outer
        with start_run(name=str(number)) as run:
            await asyncio.sleep(0)
            return current_run() is run

    async def tasks() -> list[bool]:
        return await asyncio.gather(task(1), task(2))

    with start_run() as outer:
        for target in (look, contextvars.copy_context().run):
            thread = threading.Thread(target=target, args=() if target is look else (look,))
            thread.start()
            thread.join()
        assert asyncio.run(tasks()) == [True, True]
        assert current_run() is outer
    assert "a new thread has none" in str(seen[0])
    assert seen[1] is outer
