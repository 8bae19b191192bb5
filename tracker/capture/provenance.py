"""Tags that help to repeat a run: source, command line, versions and git commit."""

from __future__ import annotations

import getpass
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from tracker._version import __version__
from tracker.redaction import public_command
from tracker.validation import flag


def environment_tags() -> dict[str, str]:
    """Return tags with the source, the command line, versions and git commit.

    Secrets in the command line are masked, unless TRACKER_REDACT is false.
    """
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if main and Path(main).name == "ipykernel_launcher.py":
        main = None
    folder = Path(main).resolve().parent if main else Path.cwd()
    join = shlex.join if flag("TRACKER_REDACT") is False else public_command
    tags = {
        "mlflow.source.name": main or "notebook",
        "mlflow.source.type": "LOCAL",
        "tracker.command": join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "tracker.version": __version__,
        "tracker.python": platform.python_version(),
        "tracker.torch": str(torch.__version__),
        "tracker.mlflow": version("mlflow"),
        "tracker.platform": platform.platform(),
    }
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (OSError, KeyError):  # a container's uid without a name
        pass
    return tags | _git_tags(folder)


def _git_tags(folder: Path) -> dict[str, str]:
    """Commit and state of the work tree around `folder`; empty outside a repository."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        dirty = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": commit, "tracker.git.dirty": str(bool(dirty)).lower()}


def _git(folder: Path, *arguments: str) -> str:
    # The timeout keeps a huge repository on a slow disk from delaying training.
    return subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=5,
    ).stdout.strip()
