"""The file format of a checkpoint: two files, written as a whole and verified when read."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tracker.errors import ArgumentError, StoreError, first_line

_VERSION = 1
_FILES = {"tensors.pt", "state.json"}


def write_files(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a new folder, then rename it to `folder`.

    A folder cannot be renamed onto another, so the old one is renamed first. After a crash between
    the two renames, `read_files` reads the old one and the next save puts it back.

    Args:
        folder: The folder of the checkpoint.
        tensors: Saved as `tensors.pt`.
        state: JSON data, saved as `state.json` with the version of the format.

    Raises:
        ArgumentError: The folder contains other files.
        StoreError: The folder cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    fresh, replaced = _siblings(folder)
    try:
        if folder.exists() and not {path.name for path in folder.iterdir()} <= _FILES:
            raise ArgumentError(
                f"folder={str(folder)!r} contains other files; it must be new or a checkpoint."
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        for leftover in (fresh, replaced):
            if leftover.exists():
                shutil.rmtree(leftover)
        fresh.mkdir()
        with open(fresh / "tensors.pt", "w+b") as file:
            torch.save(tensors, file)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        state = state | {"sha256": digest}
        document = {"checkpoint": _VERSION, "crc32": _checksum(state), "state": state}
        with open(fresh / "state.json", "w", encoding="utf-8") as text:
            json.dump(document, text, allow_nan=False)
            text.flush()
            os.fsync(text.fileno())
        _sync_folder(fresh)
        if folder.exists():
            folder.rename(replaced)
        fresh.rename(folder)
        _sync_folder(folder.parent)
        if replaced.exists():
            shutil.rmtree(replaced)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        shutil.rmtree(fresh, ignore_errors=True)
        raise StoreError(
            f"folder={str(folder)!r} cannot be written: {first_line(error)}."
        ) from error


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the state and the tensors, which stay on the CPU.

    Raises:
        StoreError: The folder is missing or damaged, is not a checkpoint, or has an unknown
            version.
    """
    path = Path(os.path.realpath(folder))
    if not path.exists() and (replaced := _siblings(path)[1]).exists():
        path = replaced
    try:
        state = _read_state(path / "state.json")
        with open(path / "tensors.pt", "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != state["sha256"]:
                raise ValueError("tensors.pt is damaged")
            file.seek(0)
            return state, torch.load(file, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        missing = Path(error.filename).name if path.exists() else "it"
        raise StoreError(
            f"folder={str(folder)!r} is not a checkpoint: {missing} does not exist."
        ) from error
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise StoreError(
            f"folder={str(folder)!r} cannot be read as a checkpoint: {first_line(error)}."
        ) from error


def read_state(path: Path) -> dict[str, Any]:
    """Read the `state.json` of a checkpoint.

    Raises:
        StoreError: The file is missing or damaged.
    """
    try:
        return _read_state(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as a checkpoint: {first_line(error)}.") from error


def _read_state(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError("state.json is damaged") from error
    if not isinstance(document, dict) or "checkpoint" not in document:
        raise ValueError("state.json does not belong to a checkpoint")
    if document["checkpoint"] != _VERSION:
        raise ValueError(f"its version is {document['checkpoint']!r}; only {_VERSION} is supported")
    state = document.get("state")
    if not isinstance(state, dict) or document.get("crc32") != _checksum(state):
        raise ValueError("state.json is damaged")
    return state


def _siblings(folder: Path) -> tuple[Path, Path]:
    """Temporary names next to `folder`, for the new checkpoint and the one it replaces."""
    return folder.with_name(f".{folder.name}.writing"), folder.with_name(f".{folder.name}.replaced")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(state: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(state).encode())
