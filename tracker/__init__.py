"""Experiment tracking for PyTorch training loops, on MLflow."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tracker._version import __version__

if TYPE_CHECKING:
    from tracker.builder import RunBuilder
    from tracker.checkpoint import Checkpoint, Keep
    from tracker.environment import choose_device, set_seed
    from tracker.errors import (
        ArgumentError,
        CallOrderError,
        NonFiniteLossError,
        StoreError,
        TrackerError,
    )
    from tracker.export import Predictor
    from tracker.histograms import load_histograms, load_nonfinite
    from tracker.loop import Epoch, evaluate, fit, run_epochs
    from tracker.manager import RunManager
    from tracker.run import Run, start_run
    from tracker.search.study import Study
    from tracker.search.trial import Trial
    from tracker.trained import Trained, load_trained

# Imported when they are asked for: the uploader and the command line need no torch, which takes
# seconds and half a gigabyte.
_MODULES = {
    "builder": ["RunBuilder"],
    "checkpoint": ["Checkpoint", "Keep"],
    "environment": ["choose_device", "set_seed"],
    "errors": [
        "ArgumentError",
        "CallOrderError",
        "NonFiniteLossError",
        "StoreError",
        "TrackerError",
    ],
    "export": ["Predictor"],
    "histograms": ["load_histograms", "load_nonfinite"],
    "loop": ["Epoch", "evaluate", "fit", "run_epochs"],
    "manager": ["RunManager"],
    "run": ["Run", "start_run"],
    "search.study": ["Study"],
    "search.trial": ["Trial"],
    "trained": ["Trained", "load_trained"],
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ArgumentError",
    "CallOrderError",
    "Checkpoint",
    "Epoch",
    "Keep",
    "NonFiniteLossError",
    "Predictor",
    "Run",
    "RunBuilder",
    "RunManager",
    "StoreError",
    "Study",
    "TrackerError",
    "Trained",
    "Trial",
    "__version__",
    "choose_device",
    "evaluate",
    "fit",
    "load_histograms",
    "load_nonfinite",
    "load_trained",
    "run_epochs",
    "set_seed",
    "start_run",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
