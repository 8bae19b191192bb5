"""Experiment tracking for PyTorch training loops, on MLflow."""

from tracker._version import __version__
from tracker.builder import RunBuilder
from tracker.environment import choose_device, set_seed
from tracker.errors import (
    ArgumentError,
    CallOrderError,
    NonFiniteLossError,
    StoreError,
    TrackerError,
)
from tracker.histograms import load_histograms, load_nonfinite
from tracker.loop import Epoch, evaluate, fit
from tracker.manager import RunManager
from tracker.run import Run, start_run

__all__ = [
    "ArgumentError",
    "CallOrderError",
    "Epoch",
    "NonFiniteLossError",
    "Run",
    "RunBuilder",
    "RunManager",
    "StoreError",
    "TrackerError",
    "__version__",
    "choose_device",
    "evaluate",
    "fit",
    "load_histograms",
    "load_nonfinite",
    "set_seed",
    "start_run",
]
