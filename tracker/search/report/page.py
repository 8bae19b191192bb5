"""An Optuna study as one HTML file that needs neither a network nor the storage."""

from __future__ import annotations

import string
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import optuna
import plotly.graph_objects as go  # type: ignore[import-untyped]
import plotly.io  # type: ignore[import-untyped]
from optuna.trial import FrozenTrial, TrialState
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from tracker.search.best import best_trials, feasible
from tracker.search.report import charts
from tracker.search.report.charts import STATES, Objective, Part, note
from tracker.search.report.trials import Selection, escaped, evenly, labels, prepared

_ROWS = 50
_AXIS = {"automargin": True, "gridcolor": "#dfe2e7", "linecolor": "#dfe2e7", "zeroline": False}
_STYLE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#1b1f26"},
        "colorway": [charts.BLUE, charts.ORANGE],
        "margin": {"l": 50, "r": 20, "t": 30, "b": 45},
        "legend": {"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom"},
        "hoverlabel": {"align": "left", "font": {"size": 11}},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "plot_bgcolor": "#fff",
    }
)


def study_page(study: optuna.Study, facts: Mapping[str, str] = {}) -> str:
    """Return the page of a study: what was tried, what is best, and which parameters matter.

    Large studies are thinned out, and the page says so: it stays below 8 MB. A chart that cannot
    be drawn is left out with its reason. User attributes named `tracker:…` are not shown.

    Args:
        study: The study; it is only read.
        facts: More rows of the summary. A text that begins with `$ ` is shown as a command.
    """
    trials = study.get_trials(deepcopy=False)
    several = len(study.directions) > 1
    default = [f"objective {index}" for index in range(len(study.directions))]
    names = study.metric_names or (default if several else ["objective value"])
    whole = Selection(prepared(trials), study.directions, labels(names, 40))
    best = best_trials(trials, [direction.name.lower() for direction in study.directions])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's, of rough estimates
        objectives = [Objective(whole, index) for index in range(len(names))]
        page = _Page(study.study_name, objectives)
        page.add("Summary", lambda: [_summary(study, names, trials, best, facts)])
        if several:
            page.add("Pareto front", lambda: charts.pareto_front(whole), _table(names, best))
        page.add_each("History", charts.history)
        page.add_each("Importance of the parameters", charts.importance)
        page.add_each("Parallel coordinates", charts.parallel_coordinates)
        page.add_each("Contours", charts.contours)
        page.add_each("Slices", charts.slices)
        page.add("Intermediate values", lambda: charts.intermediate_values(whole))
        page.add("Timeline", lambda: charts.timeline(whole))
    return page.html()


class _Page:
    def __init__(self, title: str, objectives: Sequence[Objective]) -> None:
        self._title = escaped(title)
        self._objectives = objectives
        self._parts: list[str] = []
        self._charts = 0

    def add(self, title: str, parts: Callable[[], Iterable[Part]], more: str = "") -> None:
        self._parts += [f"<h2>{title}</h2>", *self._drawn(parts), more]

    def add_each(self, title: str, parts: Callable[[Objective], Iterable[Part]]) -> None:
        """Add a section with a chart for each objective, under its name if there are several."""
        self._parts.append(f"<h2>{title}</h2>")
        for each in self._objectives:
            if len(self._objectives) > 1:
                self._parts.append(f"<h3>{each.name}</h3>")
            self._parts += self._drawn(partial(parts, each))

    def _drawn(self, parts: Callable[[], Iterable[Part]]) -> list[str]:
        try:
            return [part if isinstance(part, str) else self._chart(part) for part in parts()]
        except Exception as error:  # noqa: BLE001 - the page is written whatever Optuna says
            return [note(f"Not drawn: {escaped(str(error))}.")]

    def _chart(self, figure: go.Figure) -> str:
        figure.update_layout(template=_STYLE, title=None)
        self._charts += 1
        return str(
            plotly.io.to_html(
                figure,
                config={"responsive": True, "displayModeBar": False},
                include_plotlyjs=False,
                full_html=False,
                div_id=f"chart-{self._charts}",
            )
        )

    def html(self) -> str:
        template = string.Template(Path(__file__).with_name("page.html").read_text("utf-8"))
        return template.substitute(
            title=self._title, plotly=get_plotlyjs(), sections="\n".join(self._parts)
        )


def _summary(
    study: optuna.Study,
    names: Sequence[str],
    trials: Sequence[FrozenTrial],
    best: Sequence[FrozenTrial],
    facts: Mapping[str, str],
) -> str:
    goals = [f"{d.name.lower()} {name}" for d, name in zip(study.directions, names, strict=True)]
    counts = Counter(trial.state.name for trial in trials)
    states = ", ".join(f"{counts[k]:,} {word}" for k, (word, _) in STATES.items() if counts[k])
    rows = {
        "Study": study.study_name,
        "Objective" if len(goals) == 1 else "Objectives": ", ".join(goals),
        "Trials": f"{len(trials):,}: {states}" if trials else "none",
    }
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if broken := sum(not feasible(trial) for trial in complete):
        rows["Constraints"] = f"broken by {broken:,} of {len(complete):,} complete trials"
    if len(goals) > 1:
        rows["Pareto front"] = f"{len(best):,} trial{'' if len(best) == 1 else 's'}"
    elif best:
        rows["Best trial"] = str(best[0].number)
        rows[f"Best {names[0]}"] = f"{best[0].values[0]:.6g}"
    else:
        rows["Best trial"] = "none yet: no trial is complete" + " and feasible" * bool(broken)
    cells = {label: escaped(text) for label, text in rows.items()}
    if len(goals) == 1 and best:
        cells["Its parameters"] = _params(best[0])
    for label, text in facts.items():
        command, is_command = escaped(text.removeprefix("$ ")), text.startswith("$ ")
        cells[label] = f'<code class="command">{command}</code>' if is_command else command
    body = "\n".join(f"<dt>{escaped(k)}</dt><dd>{v}</dd>" for k, v in cells.items())
    return f"<dl>\n{body}\n</dl>"


def _table(names: Sequence[str], front: Sequence[FrozenTrial]) -> str:
    if not front:
        return note("No trial is complete and feasible: the front is empty.")
    shown = evenly(sorted(front, key=lambda trial: trial.values), _ROWS)
    head = "".join(f"<th>{escaped(text)}</th>" for text in ["Trial", *names, "Parameters"])
    rows = "\n".join(
        f"<tr><td>{trial.number}</td>"
        + "".join(f"<td>{value:.6g}</td>" for value in trial.values)
        + f"<td>{_params(trial)}</td></tr>"
        for trial in shown
    )
    remark = note(f"{len(shown)} of {len(front):,} trials of the front.")
    table = f'<div class="wide"><table><tr>{head}</tr>\n{rows}\n</table></div>'
    return table + remark * (len(shown) < len(front))


def _params(trial: FrozenTrial) -> str:
    texts = [
        f"{name} = {value:.6g}" if isinstance(value, float) else f"{name} = {value}"
        for name, value in trial.params.items()
    ]
    codes = [f"<code>{escaped(text[:200])}</code>" for text in texts]
    return " ".join(codes) or "none"
