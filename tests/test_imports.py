"""Which layer of `tracker` may import which: data flows one way, and so do the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tracker"

LAYERS = {
    "base": set(),
    "training": {"base"},
    "capture": {"base", "training"},
    "journal": {"base"},
    "store": {"base", "training", "capture"},
    "views": {"base", "training", "capture"},
    "delivery": {"base", "journal", "store", "views"},
    "media_recorder": {"base", "capture", "journal"},
    "torch_recorder": {"base", "training", "capture", "journal", "store", "media_recorder"},
    "run": {
        *("base", "training", "capture", "journal", "store", "views", "delivery"),
        "torch_recorder",
    },
    "current": {"base", "run"},
    "first_batch": {"base", "training", "capture", "views", "run"},
    "due_histograms": {"base", "training", "capture", "views", "run"},
    "managed_runs": {"base", "training", "store", "delivery", "run", "grid"},
    "batch_tracking": {
        *("base", "training", "capture", "journal"),
        *("run", "first_batch", "due_histograms", "tutorial_names", "loop_arguments"),
    },
    "tutorial_names": {"base", "training", "views", "run", "managed_runs", "loop_arguments"},
    "loop_arguments": {"base", "training"},
    "manager": {
        *("base", "training", "capture", "journal", "store", "views", "delivery"),
        *("torch_recorder", "run", "first_batch", "due_histograms", "managed_runs", "grid"),
        *("batch_tracking", "tutorial_names", "loop_arguments"),
    },
    "grid": {"base"},
    "deploy": {"base"},
    "testing": {"base"},
    "search": {
        *("base", "training", "capture", "journal", "store", "views", "delivery"),
        *("run", "manager", "grid"),
    },
    "cli": {"base", "delivery", "search"},
}
"""What each folder, or module at the top, may import besides itself, in the order of the flow."""

BASE = {
    "_version",
    "cells",
    "arguments",
    "errors",
    "statuses",
    "texts",
    "validation",
    "redaction",
    "locks",
    "logs",
    "exported",
    "extras",
    "transfers",
}
"""Modules at the top that every layer may import, and that import only each other."""

SECOND_PROCESSES = {
    *("tracker.delivery.process", "tracker.store.client", "tracker.store.system_metrics"),
    *("tracker.search.keeper", "tracker.search.mirror"),
}
"""The modules that the uploader and the keeper start with, and those they import later."""

MLFLOW = {"store", "capture/model.py", "testing.py"}


def modules() -> dict[str, Path]:
    """The modules of the package by their dotted names, `__init__` files of folders included."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def layer(module: str) -> str:
    """The layer that a dotted name belongs to: its folder, or the module itself at the top."""
    name = module.split(".")[1] if "." in module else "__init__"
    return "base" if name in BASE else name


def imports(path: Path, *, lazy: bool = True) -> set[str]:
    """The dotted names that a file imports at run time; with `lazy` those in functions too."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.FunctionDef) and not lazy:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def edges(*, lazy: bool) -> dict[str, set[str]]:
    """The modules of the package that each of them imports."""
    known = modules()
    return {
        name: {other for other in imports(path, lazy=lazy) if other in known and other != name}
        - {"tracker"}
        for name, path in known.items()
    }


def test_every_layer_imports_only_layers_below_it() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in edges(lazy=True).items()
        for other in others
        if module != "tracker"
        and layer(other) != layer(module)
        and layer(other) not in LAYERS[layer(module)]
    ]
    assert wrong == []


def test_the_layers_do_not_depend_on_each_other_in_a_circle() -> None:
    reached: dict[str, set[str]] = {}

    def below(name: str) -> set[str]:
        if name not in reached:
            reached[name] = set().union(*({one} | below(one) for one in LAYERS[name]))
        return reached[name]

    for name in LAYERS:  # a circle would recurse forever
        assert name not in below(name)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = edges(lazy=True)
    open_: list[str] = []
    done: set[str] = set()

    def visit(module: str) -> None:
        assert module not in open_, " → ".join([*open_[open_.index(module) :], module])
        if module in done:
            return
        open_.append(module)
        for other in sorted(graph[module]):
            visit(other)
        open_.pop()
        done.add(module)

    for module in graph:
        visit(module)


def test_mlflow_is_imported_only_in_store_capture_model_and_testing() -> None:
    importers = {
        path.relative_to(PACKAGE).as_posix()
        for path in modules().values()
        if any(name.split(".")[0] == "mlflow" for name in imports(path))
    }
    assert {name for name in importers if name not in MLFLOW and name.split("/")[0] != "store"} == (
        set()
    )


def test_the_second_processes_do_not_import_torch() -> None:
    """It takes seconds and 700 MB in addition to each training and each study."""
    graph, reached = edges(lazy=False), set(SECOND_PROCESSES)
    while more := set().union(*(graph[name] for name in reached)) - reached:
        reached |= more
    paths = modules()
    assert [name for name in reached if "torch" in imports(paths[name], lazy=False)] == []


def test_optuna_is_imported_only_by_the_search() -> None:
    importers = {
        path.relative_to(PACKAGE).parts[0]
        for path in modules().values()
        if any(name.split(".")[0] == "optuna" for name in imports(path))
    }
    assert importers == {"search"}


@pytest.mark.parametrize(
    ("folder", "package"),
    [
        ("tracker", "models"),
        ("tracker", "studies"),
        ("models", "tracker"),
        ("models", "studies"),
        ("models", "mlflow"),
    ],
)
def test_the_packages_do_not_import_each_other(folder: str, package: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        assert package not in {name.split(".")[0] for name in imports(path)}, path


def test_importing_tracker_imports_no_mlflow_and_changes_no_global_state() -> None:
    program = (
        "import os, sys, logging, random\n"
        "before = dict(os.environ), random.getstate()\n"
        "import tracker\n"
        "assert not {'mlflow', 'optuna', 'torch'} & set(sys.modules)\n"
        "assert before == (dict(os.environ), random.getstate())\n"
        "assert not logging.getLogger('tracker').handlers\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
