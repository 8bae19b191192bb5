"""What the project installs, ships and exports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import tracker
from tests.test_imports import imports, modules

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    """The version of each package in requirements.txt, for the Python that conda.yaml names."""
    found = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if not re.match(r"[\w.-]+==", line):
            continue
        requirement = Requirement(line.rstrip(" \\"))
        python = {"python_version": "3.11", "python_full_version": "3.11.0"}
        if requirement.marker is None or requirement.marker.evaluate(python):
            found[requirement.name] = str(requirement.specifier)
    return found


def test_conda_installs_the_dependencies_at_the_tested_versions(
    project: dict[str, Any], pins: dict[str, str]
) -> None:
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())
    python, _, pip = conda["dependencies"]
    assert python == "python=3.11"
    extras = project["project"]["optional-dependencies"]
    lines = [*project["project"]["dependencies"], *chain(*every_extra(extras))]
    assert pip["pip"] == [pinned(Requirement(line), pins) for line in lines]


def every_extra(extras: dict[str, list[str]]) -> list[list[str]]:
    """What each extra brings; the extra `all` names the others."""
    (every,) = map(Requirement, extras["all"])
    assert every.name == "mlflow-runmanager"
    assert every.extras == set(extras) - {"all"}
    return [lines for name, lines in extras.items() if name != "all"]


def pinned(requirement: Requirement, pins: dict[str, str]) -> str:
    extras = f"[{','.join(requirement.extras)}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{pins[requirement.name]}"


DISTRIBUTIONS = {
    "PIL": "pillow",
    "psycopg": "psycopg",
    "pynvml": "nvidia-ml-py",
    "typing_extensions": "typing-extensions",
    "yaml": "pyyaml",
}
"""The names of packages that are installed under another one than they are imported by."""

NOT_OURS = {"IPython", "pytest", "sqlalchemy", "urllib3"}
"""A notebook, a test, MLflow's stores: who uses what imports them has them."""


def test_what_the_package_imports_is_a_dependency_or_in_an_extra(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    lines = [*project["project"]["dependencies"], *chain(*every_extra(extras))]
    installed = {Requirement(line).name for line in lines}
    imported = {
        name.split(".")[0] for path in modules().values() for name in imports(path, lazy=True)
    }
    third = imported - set(sys.stdlib_module_names) - {"tracker"} - NOT_OURS
    assert {DISTRIBUTIONS.get(name, name) for name in third} <= installed


def test_an_installation_brings_the_tracker_alone(project: dict[str, Any]) -> None:
    """Nothing of what a search, a picture or another format needs, unless MLflow needs it."""
    extras = project["project"]["optional-dependencies"]
    brought = {Requirement(line).name for line in project["project"]["dependencies"]}
    optional = {Requirement(line).name for line in chain(*every_extra(extras))}
    assert brought == {
        *("torch", "mlflow", "numpy", "pandas", "tqdm", "psutil", "nvidia-ml-py"),
        *("filelock", "pydantic", "typing-extensions", "pyyaml"),
    }
    assert not brought & optional


def test_requirements_are_pinned_with_hashes_and_name_no_registry() -> None:
    text = (ROOT / "requirements.txt").read_text()
    for block in re.split(r"\n(?=\S)", text.strip()):
        if not block.startswith("#"):
            assert "==" in block
            assert "--hash=sha256:" in block
    assert "://" not in text
    assert "--index" not in text


def test_the_wheel_contains_the_package_tracker_and_nothing_else(
    tmp_path: Path, project: dict[str, Any]
) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"mlflow_runmanager-{tracker.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "tracker = tracker.cli:main" in archive.read(entry_points).decode()
    inside = {name for name in names if ".dist-info/" not in name}
    tracked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tracker").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == tracked


def test_every_public_name_exists_and_has_a_docstring() -> None:
    assert tracker.__all__ == sorted(tracker.__all__)
    for name in tracker.__all__:
        assert hasattr(tracker, name)
        if name != "__version__":
            assert getattr(tracker, name).__doc__, name


def test_type_checkers_see_the_same_public_names_as_python() -> None:
    tree = ast.parse((ROOT / "tracker/__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    declared = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == {name: f"tracker.{module}" for name, module in tracker._MODULES.items()}
    assert {*declared, "__version__"} == set(tracker.__all__)


def test_the_console_script_prints_its_version() -> None:
    script = Path(sys.executable).with_name("tracker")
    shown = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == tracker.__version__
