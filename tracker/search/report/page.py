"""An Optuna study as one HTML file that needs nothing else: no network, no storage."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from tracker.search.report.charts import (
    STATES,
    Chart,
    Part,
    contours,
    for_each,
    history,
    intermediate_values,
    objective_of,
    parallel_coordinates,
    params_html,
    pareto_chart,
    pareto_table,
    slices,
    timeline,
)
from tracker.search.report.drawable import Snapshot, as_labels, drawable, is_feasible
from tracker.search.report.style import AXIS, BODY, PAGE


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
    whole = Snapshot(drawable(trials), study.directions, as_labels(names, 40))
    objectives = [
        objective_of(whole, index, direction, name)
        for index, (direction, name) in enumerate(zip(whole.directions, whole.names, strict=True))
    ]
    page = _Page()
    page.section("Summary", [_summary(study, names, trials, facts)])
    if len(objectives) > 1:
        page.section("Pareto front", [*pareto_chart(whole), pareto_table(study, names, trials)])
    page.section("History", for_each(objectives, history))
    page.section("Importance of the parameters", for_each(objectives, lambda each: each.importance))
    page.section("Parallel coordinates", for_each(objectives, parallel_coordinates))
    page.section("Contours", for_each(objectives, contours))
    page.section("Slices", for_each(objectives, slices))
    page.section("Intermediate values", intermediate_values(whole))
    page.section("Timeline", timeline(whole))
    return page.html(study.study_name)


class _Page:
    def __init__(self) -> None:
        self._sections: list[str] = []
        self._figures: list[str] = []

    def section(self, title: str, parts: Iterable[Part]) -> None:
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

    def _chart(self, chart: Chart) -> str:
        figure = chart.figure
        # Optuna's titles repeat the section's; its template is Plotly's, 7 kB in each figure.
        figure.update_layout(template=None, title=None, **BODY)
        figure.update_xaxes(**AXIS)
        figure.update_yaxes(**AXIS)
        self._figures.append(figure.to_json())
        number = len(self._figures) - 1
        return f'<div class="chart" id="chart-{number}" style="height: {chart.height}px"></div>'


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
    states = [f"{counts[state]:,} {word}" for state, word in STATES.items() if counts[state]]
    rows = {
        "Study": study.study_name,
        "Objective" if len(goals) == 1 else "Objectives": ", ".join(goals),
        "Trials": ": ".join([f"{len(trials):,}", *filter(None, [", ".join(states)])]),
    }
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    broken = sum(not is_feasible(trial) for trial in complete)
    if broken:
        rows["Constraints"] = f"broken by {broken:,} of {len(complete):,} complete trials"
    best = Snapshot(list(trials), study.directions, list(names)).best_trials
    if len(goals) > 1:
        rows["Pareto front"] = "1 trial" if len(best) == 1 else f"{len(best):,} trials"
    elif best:
        rows["Best trial"] = f"{best[0].number}"
        rows[f"Best {names[0]}"] = f"{best[0].values[0]:.6g}"
    else:
        rows["Best trial"] = "none yet: no trial is complete" + " and feasible" * bool(broken)
    cells = [(html.escape(label), html.escape(text)) for label, text in rows.items()]
    if len(goals) == 1 and best:
        cells.append(("Its parameters", params_html(best[0])))
    cells += [(html.escape(label), _fact(text)) for label, text in facts.items()]
    body = "\n".join(f"<dt>{label}</dt><dd>{text}</dd>" for label, text in cells)
    return f"<dl>\n{body}\n</dl>"


def _fact(text: str) -> str:
    if text.startswith("$ "):
        return f'<code class="command">{html.escape(text[2:])}</code>'
    return html.escape(text)


def _default_names(count: int) -> list[str]:
    return ["objective value"] if count == 1 else [f"objective {index}" for index in range(count)]
