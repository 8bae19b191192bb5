"""The verbs of a run, as functions that log to the run that is open in this context."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from tracker.run import Run, current_run

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _on_current(method: Callable[Concatenate[Run, _P], _R]) -> Callable[_P, _R]:
    """Return a function that calls this method of the current run."""
    name = method.__name__

    @functools.wraps(method)
    def verb(*arguments: _P.args, **options: _P.kwargs) -> _R:
        result: _R = getattr(current_run(), name)(*arguments, **options)
        return result

    signature = inspect.signature(method)
    without_self = list(signature.parameters.values())[1:]
    verb.__signature__ = signature.replace(parameters=without_self)  # type: ignore[attr-defined]
    verb.__module__, verb.__qualname__ = __name__, name
    del verb.__wrapped__
    return verb


log_artifact = _on_current(Run.log_artifact)
log_artifacts = _on_current(Run.log_artifacts)
log_audio = _on_current(Run.log_audio)
log_dataset = _on_current(Run.log_dataset)
log_dict = _on_current(Run.log_dict)
log_figure = _on_current(Run.log_figure)
log_histogram = _on_current(Run.log_histogram)
log_histograms = _on_current(Run.log_histograms)
log_html = _on_current(Run.log_html)
log_image = _on_current(Run.log_image)
log_metric = _on_current(Run.log_metric)
log_metrics = _on_current(Run.log_metrics)
log_mistakes = _on_current(Run.log_mistakes)
log_model = _on_current(Run.log_model)
log_network = _on_current(Run.log_network)
log_param = _on_current(Run.log_param)
log_params = _on_current(Run.log_params)
log_table = _on_current(Run.log_table)
log_text = _on_current(Run.log_text)
log_video = _on_current(Run.log_video)
set_tag = _on_current(Run.set_tag)
set_tags = _on_current(Run.set_tags)
