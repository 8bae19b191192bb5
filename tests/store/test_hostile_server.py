"""What a server says at resume is data: nothing is written elsewhere, and errors are sentences."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import FileInfo
from mlflow.utils import server_info

from tests.helpers import Store
from tests.journal.helpers import snapshot
from tests.rest import Answer, Request, StandIn
from tracker import load_histograms
from tracker.errors import StoreError
from tracker.store.client import MlflowStore
from tracker.store.history import epoch_rows, load_resume_state
from tracker.store.listing import check_listing

HOSTILE = [
    "../evil",
    "../../evil",
    "../" * 9 + "tmp/evil",
    "/evil",
    "//evil",
    "..",
    ".",
    "",
    "a/../../evil",
    "checkpoints/../../evil",
    "..\\evil",
    "C:\\evil",
    "evil\\..\\..\\evil",
    "x\0y",
    "%2e%2e/%2e%2e/evil",
    "file:///evil",
    "e" * 300,
    "9" * 5_000,
    "٣",
]
LEVELS = ["", "checkpoints", "checkpoints/00000001", "histograms"]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    downloads = tmp_path / "deep" / "down" / "here"
    downloads.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(downloads))
    server_info._clear_server_info_cache()
    with StandIn() as server:
        yield server


def listing(at: str, evil: str, *, is_dir: bool) -> dict[str, list[dict[str, Any]]]:
    """The files of a run by folder, with a hostile one in the folder `at`."""
    folders = {
        "": ["checkpoints/", "histograms/", "epochs.json"],
        "checkpoints": ["00000001/"],
        "checkpoints/00000001": ["state.json", "tensors.pt"],
        "histograms": ["000001.json"],
    }
    listed = {
        folder: [{"path": name.rstrip("/"), "is_dir": name.endswith("/")} for name in names]
        for folder, names in folders.items()
    }
    listed[at].append({"path": evil, "is_dir": is_dir})
    return listed


@pytest.mark.parametrize("is_dir", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("at", LEVELS)
def test_hostile_paths_never_lead_out_of_the_folder_of_a_download(
    at: str, is_dir: bool, server: StandIn, tmp_path: Path
) -> None:
    run_id = MlflowStore(server.uri).begin_run(
        experiment_id="0", name=None, start_time=1, tags={"tracker.run": "a"}
    )
    server.runs[run_id]["status"] = "FINISHED"
    before = snapshot(tmp_path)
    for evil in HOSTILE:
        if at and len(evil) > 200:
            continue  # MLflow would leave the answer of the download open that fails
        listed = listing(at, evil, is_dir=is_dir)

        def answer(request: Request, listed: Any = listed) -> Answer | None:
            if "mlflow-artifacts" not in request.path:
                return None
            if request.path.endswith("mlflow-artifacts/artifacts"):
                asked = str(request.body["path"]).partition("artifacts")[2].strip("/")
                return Answer(200, json.dumps({"files": listed.get(asked, [])}).encode())
            return Answer(200, b"[]")

        server.answer = answer
        said = ""
        try:
            assert load_resume_state(run_id, server.uri).checkpoint is None
        except StoreError as error:
            said = str(error)
        assert len(said.splitlines()) <= 1
        assert len(said) < 700
        assert snapshot(tmp_path) == before, evil
        assert not Path("/evil").exists()
        assert not Path("/tmp/evil").exists()


class Listing:
    """A client whose artifacts MLflow does not check, as those of other stores than its servers."""

    def __init__(self, path: str) -> None:
        self._path = path

    def list_artifacts(self, run_id: str, folder: str) -> list[FileInfo]:
        return [FileInfo(self._path, True, None)] if folder == "histograms" else []


@pytest.mark.parametrize(
    "evil",
    [
        *(path for path in HOSTILE if len(path) < 100 and path[:1] not in ("%", "٣")),
        *("histograms", "histograms/", "histograms/..", "histograms/a\\b", "histograms/a\0b"),
        *("histograms/a/b", "histograms//b", "histograms/../b", "other/b"),
    ],
)
def test_a_listed_path_outside_of_its_folder_is_refused(evil: str) -> None:
    with pytest.raises(StoreError, match=r"^run_id='a' lists .* not downloaded\.$"):
        check_listing(Listing(evil), "a", "histograms")  # type: ignore[arg-type]
    check_listing(Listing("histograms/000001 (copy).json"), "a", "histograms")  # type: ignore[arg-type]


def test_a_listing_without_an_end_is_refused() -> None:
    class Endless:
        def list_artifacts(self, run_id: str, folder: str) -> list[FileInfo]:
            return [FileInfo(f"{folder}/deeper", True, None)]

    with pytest.raises(StoreError, match="not downloaded"):
        check_listing(Endless(), "a", "histograms")  # type: ignore[arg-type]


ROWS: dict[str, bytes] = {
    "cut off": b'[\n{"epoch": 1, "loss": 0.5},\n{"epoch": 2, "lo',
    "empty": b"",
    "an object": b'{"epoch": 1}',
    "numbers": b"[1, 2]",
    "a row without an epoch": b'[{"loss": 1.0}]',
    "a text as an epoch": b'[{"epoch": "1"}]',
    "a flag as an epoch": b'[{"epoch": true}]',
    "a text as a loss": b'[{"epoch": 1, "loss": "much"}]',
    "a list as a loss": b'[{"epoch": 1, "loss": [1.0]}]',
    "null": b'[{"epoch": 1, "loss": null}]',
    "deep": b"[" * 200_000,
    "no text": b"\xff\xfe\x00",
}
HISTOGRAMS: dict[str, bytes] = {
    "cut off": b'{"step": 1, "histogr',
    "a list": b"[1]",
    "no step": b'{"histograms": []}',
    "a text as a step": b'{"step": "1", "histograms": []}',
    "foreign items": b'{"step": 1, "histograms": [1]}',
    "no counts": b'{"step": 1, "histograms": [{"tensor": "a", "kind": "weight", "bins": []}]}',
    "deep": b"[" * 200_000,
    "no text": b"\xff\xfe\x00",
}


def ended_run(store: Store, folder: str, name: str, content: bytes, tmp_path: Path) -> str:
    """The id of an ended run with one artifact."""
    run_id = str(store.client.create_run("0").info.run_id)
    (tmp_path / name).write_bytes(content)
    store.client.log_artifact(run_id, str(tmp_path / name), folder or None)
    store.client.set_terminated(run_id, "KILLED")
    return run_id


@pytest.mark.parametrize("what", ROWS)
def test_a_foreign_table_of_epochs_is_one_sentence(what: str, store: Store, tmp_path: Path) -> None:
    run_id = ended_run(store, "", "epochs.json", ROWS[what], tmp_path)
    with pytest.raises(StoreError, match=rf"^epochs\.json of run_id='{run_id}' cannot be read: "):
        load_resume_state(run_id, store.uri)


@pytest.mark.parametrize("what", HISTOGRAMS)
def test_a_foreign_record_of_histograms_is_one_sentence(
    what: str, store: Store, tmp_path: Path
) -> None:
    run_id = ended_run(store, "histograms", "000001.json", HISTOGRAMS[what], tmp_path)
    sentence = rf"^histograms/000001\.json of run_id='{run_id}' cannot be read: [^\n]+\.$"
    with pytest.raises(StoreError, match=sentence):
        load_resume_state(run_id, store.uri)
    with pytest.raises(StoreError, match=sentence):
        load_histograms(run_id, store.uri)


def test_rows_with_values_that_json_lacks_are_read() -> None:
    (row,) = epoch_rows('[{"epoch": 1, "loss": "NaN", "top": "-Infinity", "lr": 1}]')
    assert repr(row) == "{'epoch': 1, 'loss': nan, 'top': -inf, 'lr': 1}"
