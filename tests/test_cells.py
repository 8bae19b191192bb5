"""A run in a notebook's cell that raises or is interrupted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from tests.helpers import Store
from tests.programs import ForkServer

MANAGER = "manager = RunManager(model=False, histograms=False)"
BEGIN = "manager.begin_run({}, nn.Linear(1, 1), [torch.rand(1, 1)])"
BATCH = "manager.begin_epoch(); manager.track_loss(torch.tensor(1.0), 1)"


@pytest.fixture
def shell(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    """A shell as in a notebook, in which the tutorial's names are imported."""
    monkeypatch.setenv("IPYTHONDIR", str(Path.cwd()))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # the shell replaces it
    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    callbacks = {event: list(each) for event, each in shell.events.callbacks.items()}
    shell.run_cell(
        "import asyncio, torch\nfrom torch import nn\nfrom tracker import RunManager, start_run"
    )
    yield shell
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        vars(sys).pop(name, None)
    for name in ("run", "manager"):
        shell.user_ns.pop(name, None)
    InteractiveShell.clear_instance()
    assert shell.events.callbacks == callbacks


def cell(shell: InteractiveShell, *lines: str) -> None:
    shell.run_cell("\n".join(lines))


@pytest.mark.parametrize(
    ("statement", "status", "reason"),
    [
        ("raise KeyboardInterrupt", "KILLED", "KeyboardInterrupt"),
        ("raise ValueError('the loss is odd')", "FAILED", "ValueError: the loss is odd"),
        ("await asyncio.sleep(0); raise asyncio.CancelledError", "KILLED", "KeyboardInterrupt"),
        ("await asyncio.sleep(0); raise OSError('no')", "FAILED", "OSError: no"),
        ("get_ipython().run_line_magic('run', 'missing.py')", "FAILED", "missing.py"),
        ("get_ipython().run_cell_magic('time', '', '1 / 0')", "FAILED", "ZeroDivisionError"),
    ],
)
@pytest.mark.parametrize("begin", [f"{MANAGER}; {BEGIN}; {BATCH}", "run = start_run()"])
def test_a_cell_that_fails_ends_the_run_that_began_in_it(
    store: Store, shell: InteractiveShell, begin: str, statement: str, status: str, reason: str
) -> None:
    cell(shell, begin, statement)
    run = store.run()
    assert run.info.status == status
    assert reason in run.data.tags["tracker.failure"].partition("\n")[0]
    if "manager" in shell.user_ns:
        assert run.data.params["epochs"] == "0"


@pytest.mark.parametrize("inner", ["1 / 0", "2 / 1", "", "run.deliver()", "1 +"])
@pytest.mark.parametrize(
    ("after", "status"), [("3 / 0", "FAILED"), ("run.run_id", "RUNNING"), ("run.end()", "FINISHED")]
)
def test_a_cell_that_runs_another_ends_its_run_only_when_it_fails_itself(
    store: Store, shell: InteractiveShell, inner: str, after: str, status: str
) -> None:
    nested = f"get_ipython().run_cell({inner!r})"
    cell(shell, "run = start_run()", nested, nested, "during = run.status", after)
    run = store.run()
    assert shell.user_ns["during"] is None
    assert run.info.status == status
    assert ("tracker.failure" in run.data.tags) == (status == "FAILED")
    cell(shell, "run.end()")


def test_a_run_of_an_inner_cell_ends_with_that(store: Store, shell: InteractiveShell) -> None:
    inner = "get_ipython().run_cell('run = start_run(); 1 / 0')"
    cell(shell, "outer = start_run()", inner, "during = run.status, outer.status")
    assert shell.user_ns["during"] == ("FAILED", None)
    cell(shell, "outer.end()")
    shell.user_ns.pop("outer")


def test_the_next_run_of_the_manager_begins_as_usual(store: Store, shell: InteractiveShell) -> None:
    cell(shell, MANAGER, BEGIN, BATCH, "raise KeyboardInterrupt")
    cell(shell, BEGIN, BATCH, "manager.end_epoch(); manager.end_run()")
    assert [run.info.status for run in store.runs()] == ["KILLED", "FINISHED"]


def test_a_run_of_an_earlier_cell_is_left_alone(store: Store, shell: InteractiveShell) -> None:
    cell(shell, MANAGER, BEGIN, BATCH)
    cell(shell, "run = start_run()")
    cell(shell, "1 / 0")
    cell(shell, "manager.track_loss('?')")
    cell(shell, "raise KeyboardInterrupt")
    cell(shell, "manager.run.deliver()")
    assert [run.info.status for run in store.runs()] == ["RUNNING", "RUNNING"]
    cell(shell, "manager.end_epoch(); manager.end_run(); run.end()")
    assert [run.info.status for run in store.runs()] == ["FINISHED", "FINISHED"]


def test_runs_that_have_ended_keep_their_status(store: Store, shell: InteractiveShell) -> None:
    lines = [MANAGER, "for _ in range(2):", f"    {BEGIN}", "    manager.end_run()"]
    cell(shell, *lines, BEGIN, "with start_run() as run: pass", "1 / 0")
    statuses = ["FINISHED", "FINISHED", "FAILED", "FINISHED"]
    assert [run.info.status for run in store.runs()] == statuses


def test_a_manager_that_joined_a_run_ends_without_an_error(
    store: Store, shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    cell(shell, "run = start_run()", MANAGER.replace("(", "(run=run, "), BEGIN, BATCH, "1 / 0")
    assert store.run().info.status == "FAILED"
    assert "Error in callback" not in "".join(capsys.readouterr())


def test_managers_dropped_within_a_cell_are_not_kept(store: Store, shell: InteractiveShell) -> None:
    count = "sum(type(one).__name__ == 'RunManager' for one in gc.get_objects())"
    cell(shell, "import gc", "gc.collect()", f"before = {count}")
    cell(shell, "for _ in range(3):", f"    {MANAGER}; {BEGIN}", "gc.collect()", f"after = {count}")
    assert shell.user_ns["after"] - shell.user_ns["before"] == 1


def test_tracking_does_not_import_ipython(trainers: ForkServer) -> None:
    program = (
        "import sys; from tracker import start_run\n"
        "with start_run(offline=True): pass\n"
        "assert 'IPython' not in sys.modules"
    )
    assert trainers.run(program).code == 0
