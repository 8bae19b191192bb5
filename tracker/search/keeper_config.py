"""What the keeper of a study is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SETTLE_SECONDS = 60.0
"""How long the end of a study waits for what MLflow has not got yet."""


@dataclass(frozen=True)
class KeeperConfig:
    """What a keeper must know."""

    storage: str
    study: str
    search: str
    """The search that it serves."""
    tracking_uri: str | None
    directory: str
    environment: Mapping[str, str]
    adopt: str | None
    """The run that `mlflow run` made for the study."""
    started: int
    """When the search began, in milliseconds since 1970."""
    grace: float
    """How long another search may be silent, in seconds."""
