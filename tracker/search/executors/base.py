"""The protocol between a search and the executor that runs its trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tracker.delivery.base import Mode
from tracker.search.interrupts import Interrupts
from tracker.search.policy import Catch
from tracker.search.stored_study import StoredStudy

if TYPE_CHECKING:
    from tracker.search.session import Search


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """What all trials of a study share; picklable but for the objective."""

    record: StoredStudy
    """The study."""
    objective: Any
    """Called with a `tracker.Trial`; returns its value or values."""
    directory: Path
    """Holds the journals and, in `checkpoints`, what trials continue from."""
    tracking_uri: str | None
    """The MLflow store, with its password."""
    mode: Mode
    """How runs get to MLflow."""
    environment: Mapping[str, str]
    """Tags that describe the environment."""
    catch: Catch = None
    """Exceptions of the objective that only fail their trial; None for the default policy."""
    is_replay: bool = False
    """Whether a trial is trained again, as a separate run."""

    @property
    def checkpoints(self) -> Path:
        """The folder of the study's checkpoints."""
        return self.directory.absolute() / "checkpoints" / self.record.key

    def folder(self, slot: int) -> Path:
        """Return the folder of a slot's checkpoints."""
        return self.checkpoints / f"{slot:06d}"


class Executor(Protocol):
    """Runs the trials of one search."""

    def run(self, search: Search, interrupts: Interrupts) -> None:
        """Run trials until the study is done, or interrupted.

        An implementation takes trials with `search.claim()` and calls `run_trial` for each with a
        `Channel` to the search. It must call `search.finish()` for a trial that ends without doing
        so itself.

        Args:
            search: Where trials come from. It is not thread-safe.
            interrupts: If `count` is 1, interrupt the trials and wait for them; if 2, kill them.

        Raises:
            Exception: The objective raised an exception that ends the study.
        """

    def settle(self, timeout: float) -> bool:
        """Deliver the runs of this process and release what `run` used.

        Args:
            timeout: The longest to wait, in seconds.

        Returns:
            Whether MLflow has them all.
        """
