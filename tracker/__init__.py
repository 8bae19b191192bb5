"""Experiment tracking for PyTorch training loops, on MLflow."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tracker._version import __version__ as __version__

if TYPE_CHECKING:
    from tracker.capture.every import Every as Every
    from tracker.capture.model import Predictor as Predictor
    from tracker.current import log_artifact as log_artifact
    from tracker.current import log_artifacts as log_artifacts
    from tracker.current import log_audio as log_audio
    from tracker.current import log_dataset as log_dataset
    from tracker.current import log_dict as log_dict
    from tracker.current import log_figure as log_figure
    from tracker.current import log_histogram as log_histogram
    from tracker.current import log_histograms as log_histograms
    from tracker.current import log_html as log_html
    from tracker.current import log_image as log_image
    from tracker.current import log_metric as log_metric
    from tracker.current import log_metrics as log_metrics
    from tracker.current import log_mistakes as log_mistakes
    from tracker.current import log_model as log_model
    from tracker.current import log_network as log_network
    from tracker.current import log_param as log_param
    from tracker.current import log_params as log_params
    from tracker.current import log_table as log_table
    from tracker.current import log_text as log_text
    from tracker.current import log_video as log_video
    from tracker.current import set_tag as set_tag
    from tracker.current import set_tags as set_tags
    from tracker.errors import ArgumentError as ArgumentError
    from tracker.errors import CallOrderError as CallOrderError
    from tracker.errors import NonFiniteLossError as NonFiniteLossError
    from tracker.errors import StoreError as StoreError
    from tracker.errors import TrackerError as TrackerError
    from tracker.grid import RunBuilder as RunBuilder
    from tracker.manager import RunManager as RunManager
    from tracker.run import Run as Run
    from tracker.run import current_run as current_run
    from tracker.run import start_run as start_run
    from tracker.search.slot_sampler import SlotSampler as SlotSampler
    from tracker.search.study import Study as Study
    from tracker.search.tracked import tracked as tracked
    from tracker.search.trial import Trial as Trial
    from tracker.store.readback import Trained as Trained
    from tracker.store.readback import load_histograms as load_histograms
    from tracker.store.readback import load_nonfinite as load_nonfinite
    from tracker.store.readback import load_trained as load_trained
    from tracker.training.checkpoint import Checkpoint as Checkpoint
    from tracker.training.checkpoint import Keep as Keep
    from tracker.training.device import choose_device as choose_device
    from tracker.training.loop import Epoch as Epoch
    from tracker.training.loop import evaluate as evaluate
    from tracker.training.loop import fit as fit
    from tracker.training.loop import run_epochs as run_epochs
    from tracker.training.rng import set_seed as set_seed

# Imported on first use: the uploader and the command line do not need torch, which takes seconds
# and half a gigabyte to import. Type checkers use the imports above; a test compares both.
_NAMES = {
    "capture.every": "Every",
    "capture.model": "Predictor",
    "current": (
        "log_artifact log_artifacts log_audio log_dataset log_dict log_figure "
        "log_histogram log_histograms log_html log_image log_metric log_metrics log_mistakes "
        "log_model log_network log_param log_params log_table log_text log_video set_tag set_tags"
    ),
    "errors": "ArgumentError CallOrderError NonFiniteLossError StoreError TrackerError",
    "grid": "RunBuilder",
    "manager": "RunManager",
    "run": "Run current_run start_run",
    "search.slot_sampler": "SlotSampler",
    "search.study": "Study",
    "search.tracked": "tracked",
    "search.trial": "Trial",
    "store.readback": "Trained load_histograms load_nonfinite load_trained",
    "training.checkpoint": "Checkpoint Keep",
    "training.device": "choose_device",
    "training.loop": "Epoch evaluate fit run_epochs",
    "training.rng": "set_seed",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}


def _names() -> list[str]:
    """The public names; `from tracker import *` works without the extra `search`."""
    try:
        found = find_spec("optuna")
    except (ImportError, ValueError):  # an import hook, or None in sys.modules, forbids it
        found = None
    absent = () if found else ("SlotSampler", "Study", "Trial", "tracked")
    return sorted({*_MODULES, "__version__"}.difference(absent))


__all__ = _names()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
