"""What a server lists as a run's artifacts is data: no path leads out of the download's folder."""

from __future__ import annotations

from mlflow import MlflowClient

from tracker.errors import StoreError

_DEEPEST = 50


def check_listing(client: MlflowClient, run_id: str, folder: str) -> None:
    """Check the paths in a folder of a run's artifacts before they become files.

    Raises:
        StoreError: A path is not plain, or not in the folder that lists it.
    """
    folders = [folder]
    while folders:
        listed = folders.pop()
        for item in client.list_artifacts(run_id, listed):
            head, _, name = item.path.rpartition("/")
            is_plain = head == listed and name not in ("", ".", "..") and not {*"\0\\"} & {*name}
            if not is_plain or item.path.count("/") > _DEEPEST:
                raise StoreError(
                    f"run_id={run_id!r} lists {item.path!r:.200} in {listed!r}, which is not a "
                    "path of a file there; it is not downloaded."
                )
            if item.is_dir:
                folders.append(item.path)
