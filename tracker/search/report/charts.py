"""The charts of a study's page, a section each: Optuna's, thinned out and in our colours."""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna import visualization as draw
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tracker.search.report.drawable import (
    Snapshot,
    as_label,
    as_text,
    copied,
    evenly,
    is_feasible,
    is_finite,
    out_of,
    value_of,
    varied_params,
)
from tracker.search.report.style import COLOURS, STATE_COLOURS

# Most trials in a chart: what a browser draws at once, and a reader can tell apart. A contour is
# a square matrix of its trials, for each pair of params.
_HISTORY = 3000
_PARALLEL = 200
_CONTOUR = 80
_SLICE = 1000
_CURVES = 100
_BARS = 500
_FRONT = 1000
# Most steps in a curve, params in a chart, rows in a table.
_STEPS = 200
_PARAMS = 10
_CONTOUR_PARAMS = 4
_ROWS = 50

_ENOUGH = 10
"""Complete trials that importance needs: their best tenth is compared with all of them."""
_RELIABLE = 50
"""Complete trials of which that tenth is large enough for more than a rough estimate."""

STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


# What a section consists of: texts (HTML) and charts.


@dataclass(frozen=True)
class Chart:
    """A figure of plotly's, and its height in pixels."""

    figure: Any
    height: int = 420


Part = str | Chart


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>'


@dataclass(frozen=True)
class Objective:
    """One objective's own study: its complete trials with a value that can be drawn."""

    study: Snapshot
    left_out: int
    count: int
    """Objectives that share the page."""
    params: list[str]
    """Those with more than one value, the most important first."""
    importance: list[Part]

    @property
    def name(self) -> str:
        """What it is called."""
        return self.study.names[0]

    @property
    def trials(self) -> list[FrozenTrial]:
        """Those with a value that can be drawn."""
        return self.study.get_trials()

    def spread(self, most: int) -> list[FrozenTrial]:
        """At most so many trials, evenly from the best to the worst, by number."""
        most = max(30, most // self.count)
        kept = evenly(sorted(self.trials, key=value_of), most)
        return sorted(kept, key=lambda trial: trial.number)

    def thinned(self, shown: Sequence[object]) -> list[Part]:
        """What is to be said where not all are shown."""
        if len(shown) == len(self.trials):
            return []
        return [_note(f"{out_of(shown, self.trials)} trials, evenly from the best to the worst.")]

    def most_important(self, shown: list[FrozenTrial]) -> tuple[list[str], list[Part]]:
        """The params to draw for these trials, by name, and what is to be said of them."""
        varied = varied_params(shown)
        params = sorted([name for name in self.params if name in varied][:_PARAMS])
        if not params:
            return [], [_note(_too_few_params(params, 1))]
        if len(params) == len(self.params):
            return params, []
        return params, [_note(f"The {out_of(params, self.params)} parameters that matter most.")]


def objective_of(whole: Snapshot, index: int, direction: StudyDirection, name: str) -> Objective:
    """As a study of its own every chart knows the objective's direction.

    Given a target instead, optuna takes the lower value for the better one: of a study with
    several objectives, and in the importance of any.
    """
    complete = whole.get_trials(states=(TrialState.COMPLETE,))
    trials = [
        copied(trial, values=[trial.values[index]])
        for trial in complete
        if is_finite(trial.values[index])
    ]
    study = Snapshot(trials, [direction], [name])
    params, importance = _importance(study, trials, name)
    return Objective(study, len(complete) - len(trials), len(whole.directions), params, importance)


def for_each(
    objectives: Sequence[Objective], chart: Callable[[Objective], list[Part]]
) -> Iterator[Part]:
    """The chart, for each objective, under its name where there are several."""
    for objective in objectives:
        if len(objectives) > 1:
            yield f"<h3>{objective.name}</h3>"
        yield from chart(objective)


def params_html(trial: FrozenTrial) -> str:
    """A trial's params, as HTML."""
    if not trial.params:
        return "none"
    return " ".join(
        f"<code>{html.escape(name)} = {html.escape(as_text(value))}</code>"
        for name, value in trial.params.items()
    )


def pareto_chart(whole: Snapshot) -> Iterator[Part]:
    """The front, for two or three objectives."""
    if len(whole.directions) > 3:
        yield _note("Drawn for two or three objectives only; the table holds the front.")
        return
    trials = [
        trial
        for trial in whole.get_trials(states=(TrialState.COMPLETE,))
        if all(map(is_finite, trial.values))
    ]
    if not trials:
        yield _note("No trial is complete with values that can be drawn.")
        return
    front = {trial.number for trial in whole.of(trials).best_trials}
    others = [trial for trial in trials if trial.number not in front]
    shown = [trial for trial in trials if trial.number in front]
    shown += evenly(others, max(30, _FRONT - len(front)))
    figure = draw.plot_pareto_front(whole.of(shown))
    infeasible = any(trial.constraints for trial in shown)
    words = ["Breaks a constraint"] * infeasible + ["Dominated", "On the Pareto front"]
    colours = [COLOURS["faint"]] * infeasible + [COLOURS["first"], COLOURS["second"]]
    for trace, word, colour in zip(figure.data, words, colours, strict=True):
        # Optuna's two scales of trial numbers side by side would take a third of the width.
        trace.marker = {"color": colour, "size": 5 if len(whole.directions) == 3 else 8}
        trace.update(name=word, showlegend=len(trace.x) > 0)
    if len(whole.directions) == 3:  # from far enough to see the whole cube
        eye = {"x": 1.6, "y": 1.6, "z": 1.0}
        figure.update_layout(scene={"aspectmode": "cube", "camera": {"eye": eye}})
    yield Chart(figure, 460 if len(whole.directions) == 2 else 620)
    if len(shown) < len(trials):
        yield _note(f"{out_of(shown, trials)} trials.")


def pareto_table(study: optuna.Study, names: Sequence[str], trials: Sequence[FrozenTrial]) -> str:
    """The front's trials, as HTML."""
    front = Snapshot(list(trials), study.directions, list(names)).best_trials
    if not front:
        return _note("No trial is complete and feasible: the front is empty.")
    shown = evenly(sorted(front, key=lambda trial: trial.values), _ROWS)
    head = "".join(f"<th>{html.escape(text)}</th>" for text in ["Trial", *names, "Parameters"])
    rows = "\n".join(
        f"<tr><td>{trial.number}</td>"
        + "".join(f"<td>{value:.6g}</td>" for value in trial.values)
        + f"<td>{params_html(trial)}</td></tr>"
        for trial in shown
    )
    table = f'<div class="wide"><table><tr>{head}</tr>\n{rows}\n</table></div>'
    if len(shown) < len(front):
        table += _note(
            f"{out_of(shown, front)} trials of the front, ordered by {as_label(names[0])}."
        )
    return table


def history(objective: Objective) -> list[Part]:
    """The value of each trial, and the best so far."""
    if not objective.trials:
        return [_note(_too_few(objective.trials, 1))]
    numbers = _history_numbers(objective)
    shown = [trial for trial in objective.trials if trial.number in numbers]
    # Optuna takes a trial's number for its place in the list, which here has gaps.
    placed = [copied(trial, number=place) for place, trial in enumerate(shown)]
    figure = draw.plot_optimization_history(objective.study.of(placed), target_name=objective.name)
    for trace in figure.data:
        trace.x = [shown[place].number for place in trace.x]
    values, best, broken = figure.data
    values.marker = {"color": COLOURS["first"], "size": 6}
    best.update(name="Best so far", line={"color": COLOURS["second"], "shape": "hv"})
    broken.update(name="Breaks a constraint", showlegend=len(broken.x) > 0)
    parts: list[Part] = [Chart(figure, 380)]
    if len(shown) < len(objective.trials):
        parts.append(
            _note(f"{out_of(shown, objective.trials)} trials, evenly and each improvement.")
        )
    if objective.left_out:
        parts.append(
            _note(
                f"Not drawn here and below: {objective.left_out:,} trials whose value is "
                "infinite or beyond 1e150."
            )
        )
    return parts


def _history_numbers(objective: Objective) -> set[int]:
    """The trials that the history shows: all, or an even selection and every improvement."""
    numbers = {trial.number for trial in evenly(objective.trials, _HISTORY)}
    sign = 1 if objective.study.direction == StudyDirection.MINIMIZE else -1
    best = math.inf
    for trial in objective.trials:
        if is_feasible(trial) and sign * value_of(trial) < best:
            best = sign * value_of(trial)
            numbers.add(trial.number)
    return numbers


def _importance(
    study: Snapshot, trials: list[FrozenTrial], name: str
) -> tuple[list[str], list[Part]]:
    """The params that vary, the most important first where that can be said, and the section."""
    params = varied_params(trials)
    if len(params) < 2:
        return params, [_note(_too_few_params(params, 2))]
    if len(trials) < _ENOUGH:
        return params, [_note(_too_few(trials, _ENOUGH))]
    try:
        with _quiet():
            figure = draw.plot_param_importances(study, params=params, target_name=name)
    except (ValueError, RuntimeError) as error:  # optuna's, for data too degenerate to judge
        return params, [_note(f"Not drawn: optuna says {html.escape(str(error))}")]
    (bars,) = figure.data  # the most important last
    if len(set(bars.x)) == 1:
        return params, [
            _note("Not drawn: nothing tells the best tenth of the trials from the others.")
        ]
    bars.marker = {"color": COLOURS["first"]}
    figure.update_layout(xaxis_title=f"Share in reaching the best tenth of {name}", yaxis_title="")
    figure.update_yaxes(type="category")  # a param may be named 1 or 2024-01-01
    figure.update_xaxes(range=[0, max(bars.x) * 1.1])
    params = list(reversed(bars.y))
    parts: list[Part] = []
    if len(params) > _PARAMS:
        figure.update_yaxes(range=[len(params) - _PARAMS - 0.5, len(params) - 0.5])
        parts = [_note(f"The {_PARAMS:,} of {len(params):,} parameters that matter most.")]
    if len(trials) < _RELIABLE:
        parts.append(
            _note(
                f"A rough estimate: {len(trials)} complete trials, of which the best tenth is "
                "compared with all."
            )
        )
    return params, [Chart(figure, 90 + 28 * min(len(params), _PARAMS)), *parts]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without optuna's warnings that an importance is rough: the page says it."""
    with warnings.catch_warnings():
        for message in ("Target and region quantiles", "Some regimes for parameter"):
            warnings.filterwarnings("ignore", message, UserWarning)
        yield


def parallel_coordinates(objective: Objective) -> list[Part]:
    """A line for each trial, across its params."""
    shown = objective.spread(_PARALLEL)
    params, notes = objective.most_important(shown)
    if not params:
        return notes
    figure = draw.plot_parallel_coordinate(
        objective.study.of(shown), params, target_name=objective.name
    )
    figure.update_annotations(bgcolor="rgba(255, 255, 255, 0.8)")  # over the lines they lie on
    return [Chart(figure), *objective.thinned(shown), *notes]


def contours(objective: Objective) -> list[Part]:
    """The value over each pair of params."""
    if len(objective.params) < 2:
        return [_note(_too_few_params(objective.params, 2))]
    # A matrix takes the square of it: so that a page stays as large with many objectives.
    shown = objective.spread(round(_CONTOUR * objective.count**0.5))
    params = _together(shown, objective.params)
    if len(params) < 2:
        return [_note("Not drawn: no two parameters vary in the same trials.")]
    figure = draw.plot_contour(objective.study.of(shown), params, target_name=objective.name)
    for trace in figure.data:
        if trace.x is None:  # on the diagonal: without points Plotly draws lines to nowhere
            trace.update(x=[None], y=[None], showlegend=False)
    for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
        axis.update(showgrid=False, tickfont={"size": 10})
        if axis.type == "log":
            _log_ticks(axis, axis.range[1] - axis.range[0])
    figure.update_traces(marker={"size": 4, "line": {"width": 0}}, selector={"mode": "markers"})
    figure.update_traces(
        colorbar={"title": {"side": "right"}, "thickness": 14},
        line={"width": 0.5},
        selector={"type": "contour"},
    )
    parts: list[Part] = [Chart(figure, 460 if len(params) == 2 else 60 + 200 * len(params))]
    if len(params) < len(objective.params):
        parts.append(
            _note(
                f"The {out_of(params, objective.params)} parameters that matter most, and "
                "vary together."
            )
        )
    return [*parts, *objective.thinned(shown)]


def _together(trials: Sequence[FrozenTrial], params: Sequence[str]) -> list[str]:
    """The first few of `params` of which any two vary in the trials that have both."""
    chosen: list[str] = []
    for name in params:
        pairs = [
            varied_params(trial for trial in trials if {name, other} <= trial.params.keys())
            for other in chosen
        ]
        fits = all({name, other} <= set(pair) for other, pair in zip(chosen, pairs, strict=True))
        if fits and len(chosen) < _CONTOUR_PARAMS:
            chosen.append(name)
    return chosen


def slices(objective: Objective) -> list[Part]:
    """The value over each param."""
    shown = objective.spread(_SLICE)
    params, notes = objective.most_important(shown)
    if not params:
        return notes
    rows = math.ceil(len(params) / 4)  # in one row, as optuna does it, they get wider than a page
    width = math.ceil(len(params) / rows)
    parts: list[Part] = []
    for start in range(0, len(params), width):
        chosen = params[start : start + width]
        figure = draw.plot_slice(objective.study.of(shown), chosen, target_name=objective.name)
        figure.update_traces(
            marker={
                "size": 6,
                # Not optuna's: the first trials would be white on white.
                "colorscale": [COLOURS["pale"], COLOURS["deep"]],
                "colorbar": {"xpad": 10, "thickness": 14},
            },
            selector={"name": "Feasible Trial"},
        )
        figure.update_layout(width=None)
        for axis, name in zip(figure.select_xaxes(), chosen, strict=True):
            if axis.type == "log":
                values = [math.log10(trial.params[name]) for trial in shown if name in trial.params]
                _log_ticks(axis, max(values) - min(values))
            elif axis.type == "category":  # whose values are their repr
                words = [text.strip("'\"") for text in axis.categoryarray]
                axis.update(tickvals=axis.categoryarray, ticktext=words)
        parts.append(Chart(figure, 320))
    return [*parts, *objective.thinned(shown), *notes]


def intermediate_values(whole: Snapshot) -> Iterator[Part]:
    """What the trials reported, step by step."""
    if len(whole.directions) > 1:
        yield _note("Not drawn: with several objectives optuna takes no intermediate values.")
        return
    reported = [
        trial
        for trial in whole.get_trials(
            states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        )
        if any(map(is_finite, trial.intermediate_values.values()))
    ]
    if not reported:
        yield _note("Not drawn: no trial reported intermediate values.")
        return
    shown = evenly(reported, _CURVES)
    curves = [
        {
            step: value if is_finite(value) else math.nan  # a gap in the curve
            for step, value in evenly(sorted(trial.intermediate_values.items()), _STEPS)
        }
        for trial in shown
    ]
    figure = draw.plot_intermediate_values(
        whole.of(
            [
                copied(trial, intermediate_values=curve)
                for trial, curve in zip(shown, curves, strict=True)
            ]
        )
    )
    for trace, trial in zip(figure.data, shown, strict=True):
        colour = STATE_COLOURS[STATES[trial.state]]
        trace.update(line={"color": colour, "width": 1.2}, opacity=0.7)
        trace.marker = {"color": colour, "size": 4, "maxdisplayed": 10}
        trace.showlegend = False
    for word in sorted({STATES[trial.state] for trial in shown}):
        figure.add_scatter(x=[None], y=[None], name=word, line={"color": STATE_COLOURS[word]})
    figure.update_layout(showlegend=True, yaxis_title=whole.names[0])
    yield Chart(figure)
    if len(shown) < len(reported):
        yield _note(f"{out_of(shown, reported)} trials.")


def timeline(whole: Snapshot) -> Iterator[Part]:
    """When each trial ran, and how it ended."""
    started = [
        # A clock that was set back leaves trials that end before they start.
        copied(trial, datetime_complete=max(trial.datetime_start, trial.datetime_complete))
        if trial.datetime_start and trial.datetime_complete
        else trial
        for trial in whole.get_trials()
        if trial.datetime_start is not None
    ]
    if not started:
        yield _note("Not drawn: no trial has started.")
        return
    shown = started[-_BARS:]
    figure = draw.plot_timeline(whole.of(shown))
    for trace in figure.data:
        word = "broken" if trace.name == "INFEASIBLE" else STATES[TrialState[trace.name]]
        trace.marker = {"color": STATE_COLOURS[word], "line": {"width": 0}}
        trace.name = "breaks a constraint" if word == "broken" else word
    figure.update_layout(xaxis_title="")
    yield Chart(figure, 380)
    if len(shown) < len(started):
        yield _note(f"The last {out_of(shown, started)} trials.")


def _log_ticks(axis: Any, decades: float) -> None:
    """Ticks at powers of ten: those that Plotly puts between them would lie on each other."""
    axis.exponentformat = "power"
    if decades > 1:
        axis.dtick = math.ceil(decades / 4)


def _too_few(trials: Sequence[object], least: int) -> str:
    return (
        f"Not drawn: it takes {least} complete {'trial' if least == 1 else 'trials'} whose value "
        f"can be drawn, and there {'is' if len(trials) == 1 else 'are'} {len(trials)}."
    )


def _too_few_params(params: Sequence[object], least: int) -> str:
    count = len(params) or "none"
    return (
        f"Not drawn: it takes {least} {'parameter' if least == 1 else 'parameters'} with more "
        f"than one value in the complete trials, and there is {count}."
    )
