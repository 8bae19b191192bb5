"""A full disk neither stops training nor loses what is on it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.helpers import Store
from tests.journal.helpers import PROJECT, Output, left_behind, one_sentence, said
from tracker.cli import main


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> None:
    """Leave not a single byte free on a disk."""
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while ballast.write(bytes(size)):
                    pass
            except OSError:
                pass


@pytest.mark.parametrize("torn", [False, True], ids=["whole", "damaged"])
def test_a_journal_on_a_full_disk_stays_until_there_is_room(
    torn: bool, store: Store, tiny_disk: Path, capsys: Output
) -> None:
    folder = left_behind(tiny_disk, store.uri, points=2)
    if torn:
        with closing(sqlite3.connect(folder / "journal.sqlite")) as db, db:
            db.execute("DROP TABLE notices")
    fill(tiny_disk)

    for _ in range(2):
        assert main(["sync", str(folder)]) == 2
        assert one_sentence("\n".join(said(capsys))).startswith("tracker: ")
    assert main(["status", str(folder)]) == 0
    assert len(said(capsys)) in (2, 3)  # SQLite may need room even to read

    (tiny_disk / "ballast").unlink()
    assert main(["sync", str(folder)]) == 0
    assert store.history(store.run(), "loss") == [(0, 1.0), (1, 0.5)]
    assert store.run().info.status == "FINISHED"


# -- a disk that fills up during training -------------------------------------------------------

TRAINING = """
import json, logging, resource, sys
from pathlib import Path
import torch
from PIL import Image
from torch import nn
from tracker import start_run
import tracker.run
sys.path.insert(0, sys.argv[3])
from tests.journal.test_full_disk import fill

directory, uri, _, how = sys.argv[1:]
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
network, example = nn.Linear(2, 2), torch.zeros(1, 2)
optimizer = torch.optim.Adam(network.parameters())
folder = Path("folder")
(folder / "below").mkdir(parents=True)
(folder / "below" / "x.bin").write_bytes(bytes(100_000))
run = start_run(tracking_uri=uri, directory=directory, offline=True)

def log(step):
    run.log_metrics({"loss": 0.5}, step)
    run.log_metrics({"norm": torch.tensor(2.0)}, step)
    run.log_params({f"p{step}": step})
    run.log_text("text" * 1000, f"{step}/text.txt")
    run.log_image(f"{step}.png", torch.rand(3, 32, 32))
    run.log_image("noise", torch.rand(3, 32, 32), step)
    run.log_artifact("folder", f"{step}")
    run.log_artifact("folder/below/x.bin", f"{step}/file")
    run.log_histograms(network, step)
    run.log_checkpoint(step=step, network=network, optimizer=optimizer, epoch=step)
    if how == "limit" and step > 1:  # takes its time
        run.log_model(network, example, f"model{step}", step)
    run.log_epoch({"epoch": step})

journal = run._delivery.journal
log(0)
assert journal.flush(60)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
if how == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
else:
    fill(Path(directory))
for step in (1, 2):
    log(step)
    assert not journal.flush(60)
print("LOST", journal.lost)
if how == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
else:
    (Path(directory) / "ballast").unlink()
log(3)
assert journal.flush(60)
run.end()
"""


def check_full_disk(how: str, directory: Path, store: Store, tmp_path: Path) -> None:
    arguments = [str(directory), store.uri, str(PROJECT), how]
    env = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    env.pop("TRACKER_INLINE")
    training = subprocess.run(
        [sys.executable, "-c", TRAINING, *arguments],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert training.returncode == 0, training.stderr
    warned = [line for line in training.stdout.splitlines() if not line.startswith("LOST")]
    (lost,) = [line.split()[1] for line in training.stdout.splitlines() if line.startswith("LOST")]
    full, lost_records, undelivered = (line for line in warned if "gradients" not in line)
    assert "training continues" in full
    assert lost_records == f"WARNING {lost} records are lost: they could not be read or written."
    assert "Finish it with: tracker sync" in undelivered

    assert main(["sync", str(directory)]) == 0
    run = store.run()
    assert run.info.status == "FINISHED"
    for name in ("loss", "norm"):
        assert [step for step, _ in store.history(run, name)] == [0, 1, 2, 3]
    assert run.data.params == {f"p{step}": str(step) for step in range(4)}
    files = store.artifacts(run)
    for step in (0, 3):
        assert {
            *(f"{step}/text.txt", f"{step}/folder/below/x.bin", f"{step}/file/x.bin"),
            *(f"{step}.png", f"checkpoints/{step:08d}/tensors.pt"),
        } <= files
    for step in (1, 2):
        assert not any(file.startswith((f"{step}/", f"{step}.", f"model{step}")) for file in files)
        assert f"histograms/{step:06d}.json" in files
    models = store.client.search_logged_models([run.info.experiment_id])
    assert [model.name for model in models] == (["model3"] if how == "limit" else [])
    # Of each step a text, a picture, one in two files, a folder, a file, a checkpoint.
    assert int(lost) == 2 * 7 + (how == "limit")


@pytest.mark.skipif(sys.platform != "linux", reason="limits a file's size as Linux does")
def test_training_continues_if_no_file_may_grow(store: Store, tmp_path: Path) -> None:
    check_full_disk("limit", tmp_path / "journals", store, tmp_path)


@pytest.mark.slow
def test_training_continues_if_the_disk_is_full(
    store: Store, tmp_path: Path, tiny_disk: Path
) -> None:
    check_full_disk("disk", tiny_disk, store, tmp_path)
