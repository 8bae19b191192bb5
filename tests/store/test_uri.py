"""A path with any characters is the same path in every part of the store."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracker import start_run
from tracker.store.uri import local_path, resolve

NAMES = [
    "my%20project",
    "feature%2Fx",
    "100%",
    "a#b",
    "a&b",
    "a@b",
    "a+b",
    "a'b\"c",
    "ü 漢",
    "why?",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_relative_path_stays_in_the_work_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    for uri in ("sqlite:///mlflow.db", "mlruns", "file:mlruns"):
        assert local_path(resolve(uri)).parent == tmp_path / name
        assert resolve(resolve(uri)) == resolve(uri)


@pytest.mark.parametrize("name", ["feature%2Fx", "a#b @+&'ü"])
def test_the_store_is_created_in_the_work_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with start_run(inline=True, tracking_uri="sqlite:///mlflow.db") as run:
        run.log_metrics({"a": 1})
        run.log_text("text", "a.txt")

    assert run.run_id is not None
    assert (tmp_path / name / "mlflow.db").is_file()
    # MLflow makes an empty folder that is named like the quoted path.
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path).parts[0] for path in files} == {name}
    assert list((tmp_path / name / "mlruns").rglob("a.txt"))
