"""An Optuna study as one HTML file that needs nothing else: no network, no storage."""

from __future__ import annotations

import html
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna import visualization as draw
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from tracker.search.page_style import AXIS, BODY, COLOURS, PAGE, STATE_COLOURS

_HUGE = 1e150
"""Numbers beyond it overflow in the charts' arithmetic, and are left out as infinite ones are."""

# Most trials in a chart: what a browser draws at once, and a reader can tell apart. A contour is
# a square matrix of its trials, for each pair of params.
_HISTORY = 3000
_PARALLEL = 200
_CONTOUR = 80
_SLICE = 1000
_CURVES = 100
_BARS = 500
_FRONT = 1000
# Most steps in a curve, attributes in a trial's hover text, params in a chart, rows in a table.
_STEPS = 200
_ATTRS = 8
_PARAMS = 10
_CONTOUR_PARAMS = 4
_ROWS = 50

_ENOUGH = 10
"""Complete trials that importance needs: their best tenth is compared with all of them."""
_RELIABLE = 50
"""Complete trials of which that tenth is large enough for more than a rough estimate."""

_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def study_page(study: optuna.Study, facts: Mapping[str, str] = {}) -> str:
    """The page that shows a study: what was tried, what was found, and what mattered.

    `facts` are further rows of the summary. A text that begins with `$ ` is a command, and is
    shown as code that can be copied.

    What a large study has too much of is thinned out, and the page says so; under 8 MB for 1,000
    trials. A chart that the study has too little for is left out, and the page says why. User
    attributes whose name begins with `tracker:` are not shown.
    """
    trials = study.get_trials(deepcopy=False)
    names = study.metric_names or _default_names(len(study.directions))
    whole = _Snapshot(_drawable(trials), study.directions, _labels(names, 40))
    objectives = [
        _objective(whole, index, direction, name)
        for index, (direction, name) in enumerate(zip(whole.directions, whole.names, strict=True))
    ]
    page = _Page()
    page.section("Summary", [_summary(study, names, trials, facts)])
    if len(objectives) > 1:
        page.section("Pareto front", [*_pareto(whole), _pareto_table(study, names, trials)])
    page.section("History", _each(objectives, _history))
    page.section("Importance of the parameters", _each(objectives, lambda each: each.importance))
    page.section("Parallel coordinates", _each(objectives, _parallel))
    page.section("Contours", _each(objectives, _contour))
    page.section("Slices", _each(objectives, _slice))
    page.section("Intermediate values", _intermediate(whole))
    page.section("Timeline", _timeline(whole))
    return page.html(study.study_name)


# What a section consists of: texts (HTML) and charts.


@dataclass(frozen=True)
class _Chart:
    figure: Any
    height: int = 420


_Part = str | _Chart


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>'


class _Page:
    def __init__(self) -> None:
        self._sections: list[str] = []
        self._figures: list[str] = []

    def section(self, title: str, parts: Iterable[_Part]) -> None:
        body = "\n".join(part if isinstance(part, str) else self._chart(part) for part in parts)
        self._sections.append(f"<section>\n<h2>{title}</h2>\n{body}\n</section>")

    def html(self, title: str) -> str:
        values = {
            "title": html.escape(title),
            "sections": "\n".join(self._sections),
            "plotly": get_plotlyjs(),
            # `<` occurs in JSON within strings only; escaped, it can neither end the script
            # element nor open a comment in it.
            "figures": f"[{','.join(self._figures)}]".replace("<", "\\u003c"),
        }
        return re.sub(r"\{\{(\w+)\}\}", lambda mark: values[mark[1]], PAGE)

    def _chart(self, chart: _Chart) -> str:
        figure = chart.figure
        # Optuna's titles repeat the section's; its template is Plotly's, 7 kB in each figure.
        figure.update_layout(template=None, title=None, **BODY)
        figure.update_xaxes(**AXIS)
        figure.update_yaxes(**AXIS)
        self._figures.append(figure.to_json())
        number = len(self._figures) - 1
        return f'<div class="chart" id="chart-{number}" style="height: {chart.height}px"></div>'


# What is drawn of a study.


class _Snapshot(optuna.Study):
    """Trials as optuna's functions read them from a study: a selection, read once.

    It has no storage: one in memory would number the trials anew, and log that it was made.
    """

    def __init__(
        self, trials: list[FrozenTrial], directions: list[StudyDirection], names: list[str]
    ) -> None:
        self._trials = trials
        self._directions = directions
        self.names = names

    @property
    def directions(self) -> list[StudyDirection]:
        return self._directions

    @property
    def metric_names(self) -> list[str] | None:
        return self.names

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return [trial for trial in self._trials if states is None or trial.state in states]

    def of(self, trials: list[FrozenTrial]) -> _Snapshot:
        return _Snapshot(trials, self._directions, self.names)


@dataclass(frozen=True)
class _Objective:
    """One objective's own study: its complete trials with a value that can be drawn."""

    study: _Snapshot
    left_out: int
    count: int
    """Objectives that share the page."""
    params: list[str]
    """Those with more than one value, the most important first."""
    importance: list[_Part]

    @property
    def name(self) -> str:
        return self.study.names[0]

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials()

    def spread(self, most: int) -> list[FrozenTrial]:
        """At most so many trials, evenly from the best to the worst, by number."""
        most = max(30, most // self.count)
        kept = _even(sorted(self.trials, key=_value), most)
        return sorted(kept, key=lambda trial: trial.number)

    def thinned(self, shown: Sequence[object]) -> list[_Part]:
        if len(shown) == len(self.trials):
            return []
        return [_note(f"{_of(shown, self.trials)} trials, evenly from the best to the worst.")]

    def most_important(self, shown: list[FrozenTrial]) -> tuple[list[str], list[_Part]]:
        """The params to draw for these trials, by name, and what is to be said of them."""
        varied = _varied(shown)
        params = sorted([name for name in self.params if name in varied][:_PARAMS])
        if not params:
            return [], [_note(_too_few_params(params, 1))]
        if len(params) == len(self.params):
            return params, []
        return params, [_note(f"The {_of(params, self.params)} parameters that matter most.")]


def _objective(whole: _Snapshot, index: int, direction: StudyDirection, name: str) -> _Objective:
    """As a study of its own every chart knows the objective's direction.

    Given a target instead, optuna takes the lower value for the better one: of a study with
    several objectives, and in the importance of any.
    """
    complete = whole.get_trials(states=(TrialState.COMPLETE,))
    trials = [
        _copy(trial, values=[trial.values[index]])
        for trial in complete
        if _finite(trial.values[index])
    ]
    study = _Snapshot(trials, [direction], [name])
    params, importance = _importance(study, trials, name)
    return _Objective(study, len(complete) - len(trials), len(whole.directions), params, importance)


def _each(
    objectives: Sequence[_Objective], chart: Callable[[_Objective], list[_Part]]
) -> Iterator[_Part]:
    """The chart, for each objective, under its name where there are several."""
    for objective in objectives:
        if len(objectives) > 1:
            yield f"<h3>{objective.name}</h3>"
        yield from chart(objective)


def _drawable(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials with names and values that any chart can take, and none of the internal ones.

    Plotly reads text as HTML: what is not ours is escaped.
    """
    seen: dict[str, list[tuple[BaseDistribution, Any]]] = {}
    for trial in trials:
        for name, distribution in trial.distributions.items():
            seen.setdefault(name, []).append((distribution, trial.params[name]))
    labels = dict(zip(seen, _labels(list(seen), 30), strict=True))
    # Of params that cannot be drawn there is no entry; of numbers it is None.
    texts = {name: _texts(pairs) for name, pairs in seen.items() if _has_scale(pairs)}
    choices = {
        name: CategoricalDistribution(list(dict.fromkeys(known.values())))
        for name, known in texts.items()
        if known is not None
    }
    drawable = []
    for trial in trials:
        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}
        for name, value in trial.params.items():
            if name not in texts:
                continue
            known = texts[name]
            params[labels[name]] = value if known is None else known[repr(value)]
            distributions[labels[name]] = choices.get(name, trial.distributions[name])
        drawable.append(
            _copy(
                trial,
                params=params,
                distributions=distributions,
                user_attrs={
                    _label(key, 30): _label(str(trial.user_attrs[key]), 60)
                    for key in [key for key in trial.user_attrs if not key.startswith("tracker:")][
                        :_ATTRS
                    ]
                },
            )
        )
    return drawable


def _has_scale(pairs: Iterable[tuple[BaseDistribution, Any]]) -> bool:
    return all(
        isinstance(distribution, CategoricalDistribution)
        or (
            isinstance(distribution, FloatDistribution | IntDistribution)
            and _finite(distribution.low)
            and _finite(distribution.high)
        )
        for distribution, _ in pairs
    )


def _texts(pairs: Sequence[tuple[BaseDistribution, Any]]) -> dict[str, Any] | None:
    """What stands for each value, by its repr, on an axis of categories; None on one of numbers."""
    kinds = {(type(each), getattr(each, "log", False)) for each, _ in pairs}
    if len(kinds) == 1 and not isinstance(pairs[0][0], CategoricalDistribution):
        return None
    values = {repr(value): value for _, value in pairs}
    for distribution, _ in pairs:
        if isinstance(distribution, CategoricalDistribution):
            values = {repr(choice): choice for choice in distribution.choices} | values
    kinds_of_value = {type(value) for value in values.values()}
    if kinds_of_value == {bool} or (
        kinds_of_value <= {int, float} and all(map(_finite, values.values()))
    ):
        return values
    texts = _labels([str(value) for value in values.values()], 30)
    return dict(zip(values, texts, strict=True))


def _copy(trial: FrozenTrial, **changes: Any) -> FrozenTrial:
    fields: dict[str, Any] = {
        "number": trial.number,
        "state": trial.state,
        "values": trial.values,
        "datetime_start": trial.datetime_start,
        "datetime_complete": trial.datetime_complete,
        "params": trial.params,
        "distributions": trial.distributions,
        "user_attrs": trial.user_attrs,
        "system_attrs": trial.system_attrs,  # the constraints among them
        "intermediate_values": trial.intermediate_values,
    }
    return FrozenTrial(**{**fields, **changes}, value=None, trial_id=trial.number)


def _varied(trials: Iterable[FrozenTrial]) -> list[str]:
    """The params that have more than one value, by name."""
    values: dict[str, set[Any]] = {}
    for trial in trials:
        for name, value in trial.params.items():
            values.setdefault(name, set()).add(value)
    return sorted(name for name, of_name in values.items() if len(of_name) > 1)


# The sections.


def _summary(
    study: optuna.Study,
    names: Sequence[str],
    trials: Sequence[FrozenTrial],
    facts: Mapping[str, str],
) -> str:
    goals = [
        f"{direction.name.lower()} {name}"
        for direction, name in zip(study.directions, names, strict=True)
    ]
    counts = Counter(trial.state for trial in trials)
    states = [f"{counts[state]:,} {word}" for state, word in _STATES.items() if counts[state]]
    rows = {
        "Study": study.study_name,
        "Objective" if len(goals) == 1 else "Objectives": ", ".join(goals),
        "Trials": ": ".join([f"{len(trials):,}", *filter(None, [", ".join(states)])]),
    }
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    broken = sum(not _feasible(trial) for trial in complete)
    if broken:
        rows["Constraints"] = f"broken by {broken:,} of {len(complete):,} complete trials"
    best = _Snapshot(list(trials), study.directions, list(names)).best_trials
    if len(goals) > 1:
        rows["Pareto front"] = "1 trial" if len(best) == 1 else f"{len(best):,} trials"
    elif best:
        rows["Best trial"] = f"{best[0].number}"
        rows[f"Best {names[0]}"] = f"{best[0].values[0]:.6g}"
    else:
        rows["Best trial"] = "none yet: no trial is complete" + " and feasible" * bool(broken)
    cells = [(html.escape(label), html.escape(text)) for label, text in rows.items()]
    if len(goals) == 1 and best:
        cells.append(("Its parameters", _params(best[0])))
    cells += [(html.escape(label), _fact(text)) for label, text in facts.items()]
    body = "\n".join(f"<dt>{label}</dt><dd>{text}</dd>" for label, text in cells)
    return f"<dl>\n{body}\n</dl>"


def _fact(text: str) -> str:
    if text.startswith("$ "):
        return f'<code class="command">{html.escape(text[2:])}</code>'
    return html.escape(text)


def _params(trial: FrozenTrial) -> str:
    if not trial.params:
        return "none"
    return " ".join(
        f"<code>{html.escape(name)} = {html.escape(_text(value))}</code>"
        for name, value in trial.params.items()
    )


def _pareto(whole: _Snapshot) -> Iterator[_Part]:
    if len(whole.directions) > 3:
        yield _note("Drawn for two or three objectives only; the table holds the front.")
        return
    trials = [
        trial
        for trial in whole.get_trials(states=(TrialState.COMPLETE,))
        if all(map(_finite, trial.values))
    ]
    if not trials:
        yield _note("No trial is complete with values that can be drawn.")
        return
    front = {trial.number for trial in whole.of(trials).best_trials}
    others = [trial for trial in trials if trial.number not in front]
    shown = [trial for trial in trials if trial.number in front]
    shown += _even(others, max(30, _FRONT - len(front)))
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
    yield _Chart(figure, 460 if len(whole.directions) == 2 else 620)
    if len(shown) < len(trials):
        yield _note(f"{_of(shown, trials)} trials.")


def _pareto_table(study: optuna.Study, names: Sequence[str], trials: Sequence[FrozenTrial]) -> str:
    front = _Snapshot(list(trials), study.directions, list(names)).best_trials
    if not front:
        return _note("No trial is complete and feasible: the front is empty.")
    shown = _even(sorted(front, key=lambda trial: trial.values), _ROWS)
    head = "".join(f"<th>{html.escape(text)}</th>" for text in ["Trial", *names, "Parameters"])
    rows = "\n".join(
        f"<tr><td>{trial.number}</td>"
        + "".join(f"<td>{value:.6g}</td>" for value in trial.values)
        + f"<td>{_params(trial)}</td></tr>"
        for trial in shown
    )
    table = f'<div class="wide"><table><tr>{head}</tr>\n{rows}\n</table></div>'
    if len(shown) < len(front):
        table += _note(f"{_of(shown, front)} trials of the front, ordered by {_label(names[0])}.")
    return table


def _history(objective: _Objective) -> list[_Part]:
    if not objective.trials:
        return [_note(_too_few(objective.trials, 1))]
    numbers = _history_numbers(objective)
    shown = [trial for trial in objective.trials if trial.number in numbers]
    # Optuna takes a trial's number for its place in the list, which here has gaps.
    placed = [_copy(trial, number=place) for place, trial in enumerate(shown)]
    figure = draw.plot_optimization_history(objective.study.of(placed), target_name=objective.name)
    for trace in figure.data:
        trace.x = [shown[place].number for place in trace.x]
    values, best, broken = figure.data
    values.marker = {"color": COLOURS["first"], "size": 6}
    best.update(name="Best so far", line={"color": COLOURS["second"], "shape": "hv"})
    broken.update(name="Breaks a constraint", showlegend=len(broken.x) > 0)
    parts: list[_Part] = [_Chart(figure, 380)]
    if len(shown) < len(objective.trials):
        parts.append(_note(f"{_of(shown, objective.trials)} trials, evenly and each improvement."))
    if objective.left_out:
        parts.append(
            _note(
                f"Not drawn here and below: {objective.left_out:,} trials whose value is "
                "infinite or beyond 1e150."
            )
        )
    return parts


def _history_numbers(objective: _Objective) -> set[int]:
    """The trials that the history shows: all, or an even selection and every improvement."""
    numbers = {trial.number for trial in _even(objective.trials, _HISTORY)}
    sign = 1 if objective.study.direction == StudyDirection.MINIMIZE else -1
    best = math.inf
    for trial in objective.trials:
        if _feasible(trial) and sign * _value(trial) < best:
            best = sign * _value(trial)
            numbers.add(trial.number)
    return numbers


def _importance(
    study: _Snapshot, trials: list[FrozenTrial], name: str
) -> tuple[list[str], list[_Part]]:
    """The params that vary, the most important first where that can be said, and the section."""
    params = _varied(trials)
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
    parts: list[_Part] = []
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
    return params, [_Chart(figure, 90 + 28 * min(len(params), _PARAMS)), *parts]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without optuna's warnings that an importance is rough: the page says it."""
    with warnings.catch_warnings():
        for message in ("Target and region quantiles", "Some regimes for parameter"):
            warnings.filterwarnings("ignore", message, UserWarning)
        yield


def _parallel(objective: _Objective) -> list[_Part]:
    shown = objective.spread(_PARALLEL)
    params, notes = objective.most_important(shown)
    if not params:
        return notes
    figure = draw.plot_parallel_coordinate(
        objective.study.of(shown), params, target_name=objective.name
    )
    figure.update_annotations(bgcolor="rgba(255, 255, 255, 0.8)")  # over the lines they lie on
    return [_Chart(figure), *objective.thinned(shown), *notes]


def _contour(objective: _Objective) -> list[_Part]:
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
    parts: list[_Part] = [_Chart(figure, 460 if len(params) == 2 else 60 + 200 * len(params))]
    if len(params) < len(objective.params):
        parts.append(
            _note(
                f"The {_of(params, objective.params)} parameters that matter most, and "
                "vary together."
            )
        )
    return [*parts, *objective.thinned(shown)]


def _together(trials: Sequence[FrozenTrial], params: Sequence[str]) -> list[str]:
    """The first few of `params` of which any two vary in the trials that have both."""
    chosen: list[str] = []
    for name in params:
        pairs = [
            _varied(trial for trial in trials if {name, other} <= trial.params.keys())
            for other in chosen
        ]
        fits = all({name, other} <= set(pair) for other, pair in zip(chosen, pairs, strict=True))
        if fits and len(chosen) < _CONTOUR_PARAMS:
            chosen.append(name)
    return chosen


def _slice(objective: _Objective) -> list[_Part]:
    shown = objective.spread(_SLICE)
    params, notes = objective.most_important(shown)
    if not params:
        return notes
    rows = math.ceil(len(params) / 4)  # in one row, as optuna does it, they get wider than a page
    width = math.ceil(len(params) / rows)
    parts: list[_Part] = []
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
        parts.append(_Chart(figure, 320))
    return [*parts, *objective.thinned(shown), *notes]


def _intermediate(whole: _Snapshot) -> Iterator[_Part]:
    if len(whole.directions) > 1:
        yield _note("Not drawn: with several objectives optuna takes no intermediate values.")
        return
    reported = [
        trial
        for trial in whole.get_trials(
            states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        )
        if any(map(_finite, trial.intermediate_values.values()))
    ]
    if not reported:
        yield _note("Not drawn: no trial reported intermediate values.")
        return
    shown = _even(reported, _CURVES)
    curves = [
        {
            step: value if _finite(value) else math.nan  # a gap in the curve
            for step, value in _even(sorted(trial.intermediate_values.items()), _STEPS)
        }
        for trial in shown
    ]
    figure = draw.plot_intermediate_values(
        whole.of(
            [
                _copy(trial, intermediate_values=curve)
                for trial, curve in zip(shown, curves, strict=True)
            ]
        )
    )
    for trace, trial in zip(figure.data, shown, strict=True):
        colour = STATE_COLOURS[_STATES[trial.state]]
        trace.update(line={"color": colour, "width": 1.2}, opacity=0.7)
        trace.marker = {"color": colour, "size": 4, "maxdisplayed": 10}
        trace.showlegend = False
    for word in sorted({_STATES[trial.state] for trial in shown}):
        figure.add_scatter(x=[None], y=[None], name=word, line={"color": STATE_COLOURS[word]})
    figure.update_layout(showlegend=True, yaxis_title=whole.names[0])
    yield _Chart(figure)
    if len(shown) < len(reported):
        yield _note(f"{_of(shown, reported)} trials.")


def _timeline(whole: _Snapshot) -> Iterator[_Part]:
    started = [
        # A clock that was set back leaves trials that end before they start.
        _copy(trial, datetime_complete=max(trial.datetime_start, trial.datetime_complete))
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
        word = "broken" if trace.name == "INFEASIBLE" else _STATES[TrialState[trace.name]]
        trace.marker = {"color": STATE_COLOURS[word], "line": {"width": 0}}
        trace.name = "breaks a constraint" if word == "broken" else word
    figure.update_layout(xaxis_title="")
    yield _Chart(figure, 380)
    if len(shown) < len(started):
        yield _note(f"The last {_of(shown, started)} trials.")


# Words and numbers.


def _log_ticks(axis: Any, decades: float) -> None:
    """Ticks at powers of ten: those that Plotly puts between them would lie on each other."""
    axis.exponentformat = "power"
    if decades > 1:
        axis.dtick = math.ceil(decades / 4)


def _default_names(count: int) -> list[str]:
    return ["objective value"] if count == 1 else [f"objective {index}" for index in range(count)]


def _label(text: str, most: int = 40) -> str:
    """Text as a chart takes it: short, and without HTML."""
    return html.escape(text if len(text) <= most else f"{text[: most - 1]}…", quote=False)


def _labels(texts: Sequence[str], most: int) -> list[str]:
    """A label for each text, no two the same."""
    labels: list[str] = []
    for text in texts:
        label, count = _label(text, most), 1
        while label in labels:
            count += 1
            label = f"{_label(text, most)} ({count})"
        labels.append(label)
    return labels


def _text(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else f"{text[:199]}…"


def _of(shown: Sequence[object], total: Sequence[object]) -> str:
    return f"{len(shown):,} of {len(total):,}"


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


def _even(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spread, the first and the last included."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def _feasible(trial: FrozenTrial) -> bool:
    return all(value <= 0 for value in trial.constraints.values())


def _finite(value: float) -> bool:
    return abs(value) <= _HUGE  # and not NaN
