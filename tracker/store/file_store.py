"""What MLflow's file store leaves half-written when its process is killed, and how to mend it.

It writes several files for one thing, and its meta files in place (mlflow 3.17, file_store.py):
one that was cut off makes every later call fail, for its run and for a search.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_COPY = "meta.yaml.before"
_WRITING_SECONDS = 3.0  # a meta file is written within milliseconds, by a process that lives


def complete_run(folder: Path) -> None:
    """Make the folders that `create_run` had not got to."""
    for name in ("metrics", "params", "artifacts"):
        (folder / name).mkdir(exist_ok=True)


def remove_unborn_runs(experiment: Path) -> None:
    """Remove the runs whose process was killed while it made them: their meta file is empty.

    Each would fail every search of the experiment. `create_run` writes that file first, and once
    more with the run's name, which is a tag.
    """
    _remove_unborn(experiment, "*/meta.yaml")


def _remove_unborn(root: Path, metas: str) -> None:
    until = time.monotonic() + _WRITING_SECONDS
    while unborn := [meta for meta in root.glob(metas) if _is_unborn(meta)]:
        if time.monotonic() > until:
            for meta in unborn:
                shutil.rmtree(meta.parent)
            return
        time.sleep(0.05)


def _is_unborn(meta: Path) -> bool:
    try:
        if meta.stat().st_size or meta.with_name(_COPY).exists():
            return False
        logged = (path for path in meta.parent.rglob("*") if path.is_file() and path != meta)
        return all(path.parent.name == "tags" for path in logged)
    except FileNotFoundError:  # somebody else has removed it
        return False


@contextmanager
def guarded(root: Path, run_id: str) -> Iterator[None]:
    """Keep a copy of a run's meta file while MLflow writes it anew, in place."""
    mend_run(root, run_id)
    for meta in root.glob(f"*/{run_id}/meta.yaml"):
        fresh = meta.with_name(f".{_COPY}")
        shutil.copyfile(meta, fresh)
        fresh.replace(meta.with_name(_COPY))
    yield
    for copy in root.glob(f"*/{run_id}/{_COPY}"):
        copy.unlink()


def mend_run(root: Path, run_id: str) -> None:
    """Put a run's meta file back that a process was killed while it wrote.

    Only for runs of a journal that this process delivers: nobody else writes them.
    """
    for copy in root.glob(f"*/{run_id}/{_COPY}"):
        meta = copy.with_name("meta.yaml")
        if not meta.exists() or meta.stat().st_size == 0:
            copy.replace(meta)


def mend_model(root: Path, run_id: str, tag: str, value: str) -> None:
    """Remove what is cut off of the model that carries our `tag`, and of the run's links to models.

    Nobody else writes either of them: the tag names one record of one journal. A model that was cut
    off before it had tags, whosever it was, fails every search of its experiment: it goes too.
    """
    for meta in root.glob("*/models/*/meta.yaml"):
        mark = meta.parent / "tags" / tag
        if meta.stat().st_size == 0 and mark.is_file() and mark.read_text() == value:
            shutil.rmtree(meta.parent)
    _remove_unborn(root, "*/models/*/meta.yaml")
    for kind in ("inputs", "outputs"):
        for link in root.glob(f"*/{run_id}/{kind}/*"):
            meta = link / "meta.yaml"
            if not meta.is_file() or meta.stat().st_size == 0:
                shutil.rmtree(link)
