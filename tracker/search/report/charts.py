"""The charts of a study's page: Optuna's, capped and in one style.

Each function yields figures and remarks (HTML). It raises ValueError with the reason if the study
has too little to draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from optuna import visualization as draw
from optuna.importance import get_param_importances
from optuna.trial import FrozenTrial, TrialState

from tracker.search.best import best_trials, feasible
from tracker.search.report.trials import Selection, changed, evenly, is_finite, varied

Part = str | Any
"""A piece of a section: a remark in HTML, or a figure of plotly's."""

# At most so many trials in a chart: what a browser draws at once and a reader can tell apart.
_POINTS, _BARS, _CURVES = 2000, 500, 100
_COMPARED = 100  # where parameters are compared; a contour is a square matrix of its trials
_STEPS, _PARAMS, _CONTOUR_PARAMS = 200, 10, 4
_ENOUGH, _RELIABLE = 10, 50  # complete trials for an importance, and for a reliable one

BLUE, ORANGE, GREY = "#2767b5", "#c2570c", "#b9bfc9"
STATES = {
    "COMPLETE": ("complete", BLUE),
    "PRUNED": ("pruned", "#e09a3e"),
    "FAIL": ("failed", "#c0262d"),
    "RUNNING": ("running", "#3c9a5f"),
    "WAITING": ("waiting", GREY),
    "INFEASIBLE": ("breaks a constraint", GREY),
}


class Objective:
    """One objective as a study of its own, so that every chart knows its direction."""

    def __init__(self, whole: Selection, index: int) -> None:
        self.name = whole.metric_names[index]
        self.whole = Selection(
            [_alone(trial, index) for trial in whole.get_trials()],
            [whole.directions[index]],
            [self.name],
        )
        trials = self.whole.get_trials(states=(TrialState.COMPLETE,))
        self.study = self.whole.of(trials)
        """Complete trials with a finite value."""
        self.omitted = len(whole.get_trials(states=(TrialState.COMPLETE,))) - len(trials)
        compared = evenly(sorted(trials, key=_value), max(30, _COMPARED // len(whole.directions)))
        self.compared = self.whole.of(sorted(compared, key=lambda trial: trial.number))
        """Those of the charts that compare parameters, evenly spread from best to worst."""
        self.varied = varied(trials)
        self.shares: dict[str, float] = {}
        """The importance of each parameter; empty if unknown."""
        if len(self.varied) > 1 and len(trials) >= _ENOUGH:
            with suppress(ValueError, RuntimeError):  # too degenerate for Optuna
                self.shares = get_param_importances(self.study, params=self.varied)
        ranked = [*self.shares] or self.varied
        self.params = [name for name in ranked if name in varied(compared)][:_PARAMS]
        """Parameters to compare, the most important first."""


def _alone(trial: FrozenTrial, index: int) -> FrozenTrial:
    """Return a trial with one objective's value; as a failed one if that cannot be drawn."""
    if trial.state == TrialState.COMPLETE and is_finite(trial.values[index]):
        return changed(trial, values=[trial.values[index]])
    return changed(trial, state=TrialState.FAIL, values=None)


def pareto_front(whole: Selection) -> Iterator[Part]:
    """Draw the trials of two or three objectives."""
    count = len(whole.directions)
    _require(count <= 3, "Optuna draws two or three objectives; the table lists the front")
    complete = whole.get_trials(states=(TrialState.COMPLETE,))
    trials = [trial for trial in complete if all(map(is_finite, trial.values))]
    _require(trials, "no complete trial has finite values only")
    best = best_trials(trials, [each.name.lower() for each in whole.directions])
    numbers = {trial.number for trial in best}
    others = [trial for trial in trials if trial.number not in numbers]
    shown = best + evenly(others, _POINTS)
    figure = draw.plot_pareto_front(whole.of(shown))
    for trace in figure.data:  # Optuna's two colour bars would take a third of the width
        word, colour = "Dominated", BLUE
        if "Best" in trace.hovertemplate:
            word, colour = "On the Pareto front", ORANGE
        elif "Infeasible" in trace.hovertemplate:
            word, colour = "Breaks a constraint", GREY
        trace.marker = {"color": colour, "size": 5 if count == 3 else 8}
        trace.update(name=word, showlegend=len(trace.x) > 0)
    yield figure.update_layout(height=460 if count == 2 else 620)
    yield from _capped(len(shown), len(trials), "trials.")


def history(objective: Objective) -> Iterator[Part]:
    """Draw the value of each trial and the best so far."""
    trials = objective.study.get_trials()
    _require(trials, "no trial is complete with a finite value")
    figure = draw.plot_optimization_history(objective.whole, target_name=objective.name)
    for trace in figure.select_traces(selector={"mode": "markers"}):
        points = evenly(list(zip(trace.x, trace.y, strict=True)), _POINTS)
        trace.update(x=[x for x, _ in points], y=[y for _, y in points])
    line = {"color": ORANGE, "shape": "hv"}
    figure.update_traces(name="Best so far", line=line, selector={"name": "Best Value"})
    figure.update_traces(
        name="Breaks a constraint",
        showlegend=not all(map(feasible, trials)),
        selector={"name": "Infeasible Trial"},
    )
    yield figure.update_layout(height=380)
    yield from _capped(min(len(trials), _POINTS), len(trials), "trials, evenly spread.")
    if objective.omitted:
        count = len(trials) + objective.omitted
        verb = "has" if objective.omitted == 1 else "have"
        yield note(f"{objective.omitted:,} of {count:,} trials {verb} no finite value to draw.")


def importance(objective: Objective) -> Iterator[Part]:
    """Draw how much each parameter contributes to good values."""
    shares, count = objective.shares, len(objective.study.get_trials())
    _require(len(objective.varied) > 1, "fewer than two parameters vary in the complete trials")
    _require(count >= _ENOUGH, f"it takes {_ENOUGH} complete trials with finite values")
    _require(
        len(set(shares.values())) > 1, "no parameter distinguishes the best tenth of the trials"
    )
    figure = draw.plot_param_importances(
        objective.study, params=objective.varied, target_name=objective.name
    )
    title = f"Share in reaching the best tenth of {objective.name}"
    figure.update_layout(xaxis_title=title, yaxis_title="")
    figure.update_xaxes(range=[0, 1.1 * max(shares.values())])
    shown, top = min(len(shares), _PARAMS), len(shares) - 0.5
    figure.update_yaxes(type="category", range=[top - shown, top])  # a name may be a number
    yield figure.update_layout(height=90 + 28 * shown)
    if count < _RELIABLE:
        yield note(f"A rough estimate: the best tenth of {count} trials is compared with all.")


def parallel_coordinates(objective: Objective) -> Iterator[Part]:
    """Draw a line for each trial across its parameters."""
    _require(objective.params, "no parameter varies in the trials shown")
    figure = draw.plot_parallel_coordinate(
        objective.compared, objective.params, target_name=objective.name
    )
    yield figure.update_annotations(bgcolor="rgba(255, 255, 255, 0.8)")  # they lie on the lines
    shown, total = len(objective.compared.get_trials()), len(objective.study.get_trials())
    yield from _capped(shown, total, "trials here and below, evenly spread from best to worst.")
    count = len(objective.varied)
    yield from _capped(
        len(objective.params), count, "parameters here and below, the most important ones."
    )


def contours(objective: Objective) -> Iterator[Part]:
    """Draw the value over each pair of parameters."""
    params: list[str] = []  # of which any two vary in the trials that have both
    for name in objective.params:
        pairs = [{name, other} for other in params]
        if all(pair <= {*varied(_having(pair, objective))} for pair in pairs):
            params.append(name)
    total, params = len(params), params[:_CONTOUR_PARAMS]
    _require(len(params) > 1, "no two parameters vary in the same trials")
    figure = draw.plot_contour(objective.compared, params, target_name=objective.name)
    for trace in figure.select_traces(lambda trace: trace.x is None):  # on the diagonal
        trace.update(x=[None], y=[None], showlegend=False)  # else plotly draws lines to nowhere
    for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
        axis.update(showgrid=False, tickfont={"size": 10})
        if axis.type == "log":
            _space_ticks(axis, axis.range[1] - axis.range[0])
    figure.update_traces(marker={"size": 4, "line": {"width": 0}}, selector={"mode": "markers"})
    bar = {"title": {"side": "right"}, "thickness": 14}
    figure.update_traces(colorbar=bar, line={"width": 0.5}, selector={"type": "contour"})
    yield figure.update_layout(height=460 if len(params) == 2 else 60 + 200 * len(params))
    yield from _capped(len(params), total, "parameters, the most important ones.")


def _having(params: Iterable[str], objective: Objective) -> Iterator[FrozenTrial]:
    return (t for t in objective.compared.get_trials() if t.params.keys() >= {*params})


def slices(objective: Objective) -> Iterator[Part]:
    """Draw the value over each parameter, four in a row."""
    _require(objective.params, "no parameter varies in the trials shown")
    params = sorted(objective.params)
    rows = math.ceil(len(params) / 4)
    for row in range(rows):
        chosen = params[row * len(params) // rows : (row + 1) * len(params) // rows]
        figure = draw.plot_slice(objective.compared, chosen, target_name=objective.name)
        # Optuna's own scale begins with white, on white.
        bar = {"xpad": 10, "thickness": 14}
        marker = {"size": 6, "colorscale": ["#c6dbef", "#08306b"], "colorbar": bar}
        figure.update_traces(marker=marker, selector={"name": "Feasible Trial"})
        for axis in figure.select_xaxes():
            if axis.type == "log":
                trials = _having([axis.title.text], objective)
                values = [math.log10(trial.params[axis.title.text]) for trial in trials]
                _space_ticks(axis, max(values) - min(values))
            elif axis.type == "category":  # its values are written as by `repr`
                words = [text.strip("'\"") for text in axis.categoryarray]
                axis.update(tickvals=axis.categoryarray, ticktext=words)
        yield figure.update_layout(width=None, height=320)


def intermediate_values(whole: Selection) -> Iterator[Part]:
    """Draw what the trials reported, step by step."""
    _require(len(whole.directions) == 1, "with several objectives trials report no values")
    reported = [
        trial
        for trial in whole.get_trials()
        if trial.state.name in ("COMPLETE", "PRUNED", "RUNNING")
        and any(map(is_finite, trial.intermediate_values.values()))
    ]
    _require(reported, "no trial reported intermediate values")
    shown = []
    for trial in evenly(reported, _CURVES):
        points = evenly(sorted(trial.intermediate_values.items()), _STEPS)
        curve = {step: value if is_finite(value) else math.nan for step, value in points}
        shown.append(changed(trial, intermediate_values=curve))
    figure = draw.plot_intermediate_values(whole.of(shown))
    states = {f"Trial{trial.number}": trial.state.name for trial in shown}
    for trace in figure.data:
        _, colour = STATES[states[trace.name]]
        trace.update(line={"color": colour, "width": 1.2}, opacity=0.7, showlegend=False)
        trace.marker = {"color": colour, "size": 4, "maxdisplayed": 10}
    for word, colour in (STATES[state] for state in sorted(set(states.values()))):
        figure.add_scatter(x=[None], y=[None], name=word, line={"color": colour})
    yield figure.update_layout(showlegend=True, yaxis_title=whole.metric_names[0])
    yield from _capped(len(shown), len(reported), "trials.")


def timeline(whole: Selection) -> Iterator[Part]:
    """Draw when each trial ran and how it ended."""
    started = [trial for trial in whole.get_trials() if trial.datetime_start is not None]
    _require(started, "no trial has started")
    shown = started[-_BARS:]
    for place, trial in enumerate(shown):
        begin, end = trial.datetime_start, trial.datetime_complete
        if begin and end and end < begin:  # the clock was set back
            shown[place] = changed(trial, datetime_complete=begin)
    figure = draw.plot_timeline(whole.of(shown))
    for trace in figure.data:
        trace.name, colour = STATES[trace.name]
        trace.marker = {"color": colour, "line": {"width": 0}}
        local = map(datetime.fromisoformat, trace.base)
        trace.base = [begin.astimezone(UTC).replace(tzinfo=None) for begin in local]
    yield figure.update_layout(xaxis_title="UTC", height=380)
    yield from _capped(len(shown), len(started), "trials, the latest ones.")


def note(text: str) -> str:
    """Return a remark as HTML; `text` must be escaped."""
    return f'<p class="note">{text}</p>'


def _capped(shown: int, total: int, what: str) -> list[Part]:
    return [note(f"{shown:,} of {total:,} {what}")] if shown < total else []


def _require(condition: object, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _space_ticks(axis: Any, decades: float) -> None:
    """Put the ticks of a logarithmic axis at powers of ten: plotly's others overlap."""
    axis.exponentformat = "power"
    if decades > 1:
        axis.dtick = math.ceil(decades / 4)


def _value(trial: FrozenTrial) -> float:
    return float(trial.values[0])
