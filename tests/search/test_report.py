"""The page of a study: one file that shows everything, for any kind of study."""

from __future__ import annotations

import copy
import datetime
import json
import logging
import math
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from tracker.search.plan import STARTED
from tracker.search.report.page import study_page

CHARTS = [
    *("History", "Importance of the parameters", "Parallel coordinates", "Contours", "Slices"),
    *("Intermediate values", "Timeline"),
]
Directions = Sequence[Literal["minimize", "maximize"]]
NOON = datetime.datetime(2026, 3, 1, 12)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Silence the studies of the tests, so that only messages of the page are logged."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(level)


class Page(HTMLParser):
    """The content of a page: each section's texts, notes and charts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.title = ""
        self.notes: dict[str, list[str]] = {}
        self.texts: dict[str, list[str]] = {}
        self.codes: list[str] = []
        self.scripts: list[str] = []
        self.resources: list[str] = []
        self.figures: list[Any] = []
        self._charts: dict[str, list[Any]] = {}
        self._path: list[tuple[str, str]] = []
        self._section = ""
        self.feed(page)

    def charts(self, section: str) -> list[Any]:
        return self._charts[section]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.resources += [values[name] for name in ("src", "href", "srcset") if name in values]
        if tag in ("meta", "link"):
            return
        self._path.append((tag, values.get("class", "")))
        if tag in ("script", "code"):
            (self.scripts if tag == "script" else self.codes).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._path.pop()[0] == tag
        if tag == "script" and self._section:
            self._charts[self._section].append(figure_of(self.scripts[-1]))
            self.figures.append(self._charts[self._section][-1])

    def handle_data(self, data: str) -> None:
        tag, style = self._path[-1] if self._path else ("", "")
        if tag == "h2":
            self._section = data
            self._charts[data], self.notes[data], self.texts[data] = [], [], []
        elif tag == "title":
            self.title = data
        elif tag == "script":
            self.scripts[-1] += data
        elif self._section and data.strip():
            self.texts[self._section].append(data.strip())
            if tag == "code":
                self.codes[-1] += data
            if style == "note":
                self.notes[self._section].append(data)


def figure_of(script: str) -> dict[str, Any]:
    """The figure in plotly's `Plotly.newPlot("chart-1", data, layout, config)`."""
    decoder = json.JSONDecoder()
    parts: list[Any] = []
    place = script.index("Plotly.newPlot(") + len("Plotly.newPlot(")
    for _ in ("id", "data", "layout"):
        place += len(script[place:]) - len(script[place:].lstrip(" \n,"))
        part, place = decoder.raw_decode(script, place)
        parts.append(part)
    return {"data": parts[1], "layout": parts[2]}


def made(
    objective: Callable[[Trial], Any], trials: int, directions: Directions = ("minimize",)
) -> optuna.Study:
    study = optuna.create_study(
        study_name="bright-fox",
        directions=directions,
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=optuna.pruners.ThresholdPruner(upper=1.5),
    )
    study.optimize(objective, n_trials=trials, catch=(OSError,))
    return study


def trained(trial: Trial) -> float:
    """Three params; trial 3 fails, and trials with a bad first epoch are pruned."""
    rate = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
    width = trial.suggest_int("width", 8, 64)
    optimizer = trial.suggest_categorical("optimizer", ["adam", "sgd"])
    if trial.number == 3:
        raise OSError
    loss = abs(math.log10(rate) + 3) + width / 100 + 0.2 * (optimizer == "sgd")
    for epoch in range(4):
        trial.report(loss / (epoch + 1), epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return loss


def pair(trial: Trial) -> tuple[float, float]:
    x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
    return x + y, x - y**2


def finished(
    number: int,
    values: Sequence[float] | None = None,
    params: Mapping[str, tuple[Any, Any]] = {},
    state: TrialState = TrialState.COMPLETE,
    **fields: Any,
) -> FrozenTrial:
    """A trial of a minute; `params` are a value and its distribution by name."""
    start = NOON + datetime.timedelta(minutes=number)
    return FrozenTrial(
        number=number,
        state=state,
        value=None,
        values=values,
        datetime_start=fields.get("start", start),
        datetime_complete=fields.get("end", start + datetime.timedelta(minutes=1)),
        params={name: value for name, (value, _) in params.items()},
        distributions={name: distribution for name, (_, distribution) in params.items()},
        user_attrs=fields.get("user_attrs", {}),
        system_attrs={},
        intermediate_values=fields.get("intermediate", {}),
        trial_id=number,
    )


def holding(trials: Sequence[FrozenTrial], directions: Directions = ("minimize",)) -> Page:
    study = optuna.create_study(study_name="bright-fox", directions=directions)
    study.add_trials(trials)
    return Page(study_page(study))


def unit(value: float) -> tuple[float, FloatDistribution]:
    return value, FloatDistribution(0, 1)


def grid(count: int = 12) -> list[dict[str, Any]]:
    """Params x and y that vary."""
    return [{"x": unit(n / count), "y": unit(n * 5 % count / count)} for n in range(count)]


def shown(values: Any) -> list[Any]:
    """The numbers of a trace: Plotly packs those of an array."""
    assert isinstance(values, list | tuple)
    return list(values)


# Content.


def test_the_summary_has_the_states_and_the_best_trial() -> None:
    study = made(trained, 20)
    page = Page(study_page(study, {"epochs not trained": "120 of 400"}))
    summary = page.texts["Summary"]
    states = [trial.state for trial in study.trials]
    complete, pruned = states.count(TrialState.COMPLETE), states.count(TrialState.PRUNED)
    assert page.title == "bright-fox"
    assert "minimize objective value" in summary
    assert f"20: {complete} complete, {pruned} pruned, 1 failed" in summary
    assert summary[summary.index("Best trial") + 1] == str(study.best_trial.number)
    assert f"{study.best_value:.6g}" in summary
    assert f"optimizer = {study.best_params['optimizer']}" in page.codes
    assert summary[summary.index("epochs not trained") + 1] == "120 of 400"


def test_a_command_is_code_that_is_copied_without_its_prompt() -> None:
    page = Page(study_page(made(trained, 1), {"replay": "$ python train.py --lr 0.1 && echo"}))
    assert "python train.py --lr 0.1 && echo" in page.codes


def test_every_chart_of_one_objective_is_drawn() -> None:
    page = Page(study_page(made(trained, 40)))
    assert [section for section in page.notes if section != "Summary"] == CHARTS
    assert all(len(page.charts(section)) == 1 for section in CHARTS)


def test_no_chart_is_wider_than_the_page() -> None:
    trials = [
        finished(n, [n], {**params, "z": unit(n / 13), "w": unit(n / 14)})
        for n, params in enumerate(grid())
    ]
    assert all("width" not in figure["layout"] for figure in holding(trials).figures)


def test_the_history_shows_each_complete_trial_and_the_best_so_far() -> None:
    values = [5, 7, 3, 4]
    trials = [finished(n, [value]) for n, value in enumerate(values)]
    trials.insert(2, finished(2, state=TrialState.FAIL))
    points, best, _ = holding(trials).charts("History")[0]["data"]
    assert (points["x"], points["y"]) == ([0, 1, 3, 4], values)
    assert (best["x"], best["y"]) == ([0, 1, 2, 3, 4], [5, 5, 5, 3, 3])


def test_objectives_are_shown_by_their_names() -> None:
    study = made(pair, 12, ["minimize", "maximize"])
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        study.set_metric_names(["loss", "accuracy"])
    page = Page(study_page(study))
    assert "minimize loss, maximize accuracy" in page.texts["Summary"]
    assert [each["layout"]["yaxis"]["title"]["text"] for each in page.charts("History")] == [
        "loss",
        "accuracy",
    ]


def test_several_objectives_have_a_pareto_front_and_a_chart_each() -> None:
    study = made(pair, 20, ["minimize", "maximize"])
    page = Page(study_page(study))
    assert len(page.charts("Pareto front")) == 1
    for section in CHARTS[:5]:
        assert len(page.charts(section)) == 2
    assert f"{len(study.best_trials)} trials" in page.texts["Summary"]
    cells = page.texts["Pareto front"]
    assert all(str(trial.number) in cells for trial in study.best_trials)
    assert all(f"{trial.values[1]:.6g}" in cells for trial in study.best_trials)
    assert page.notes["Intermediate values"][0].startswith("Not drawn: with several objectives")


@pytest.mark.parametrize(("objectives", "drawn"), [(3, 1), (4, 0)])
def test_a_front_of_two_or_three_objectives_is_drawn(objectives: int, drawn: int) -> None:
    trials = [finished(n, [n, -n, n, n][:objectives], params) for n, params in enumerate(grid())]
    page = holding(trials, ["minimize"] * objectives)
    assert len(page.charts("Pareto front")) == drawn
    assert bool(page.notes["Pareto front"]) == (not drawn)


@pytest.mark.parametrize("directions", [["minimize"], ["maximize"], ["maximize", "minimize"]])
def test_importance_is_measured_by_the_best_values(directions: Directions) -> None:
    """`low` alone decides how low a value can get, `high` how high; each fails the other way."""
    sides = {"low": -1, "high": 1}

    def objective(trial: Trial) -> list[float]:
        reached = {name: trial.suggest_float(name, 0, 1) for name in sides}
        value = sum(side * 100 * max(0, reached[name] - 0.8) for name, side in sides.items())
        return [value] * len(directions)

    page = Page(study_page(made(objective, 300, directions)))
    for figure, direction in zip(page.charts(CHARTS[1]), directions, strict=True):
        (bars,) = figure["data"]
        assert bars["y"][-1] == ("low" if direction == "minimize" else "high")
        assert bars["x"][-1] > 0.9


def test_trials_that_break_a_constraint_are_counted_and_marked() -> None:
    def objective(trial: Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        trial.set_constraint("size", 0.5 - x)
        return x

    study = made(objective, 20)
    broken = sum(trial.params["x"] < 0.5 for trial in study.trials)
    page = Page(study_page(study))
    assert f"broken by {broken} of 20 complete trials" in page.texts["Summary"]
    assert str(study.best_trial.number) in page.texts["Summary"]
    assert len(page.charts("History")[0]["data"][2]["x"]) == broken


# Unusual studies.


def test_an_empty_study_says_why_nothing_is_drawn() -> None:
    page = holding([])
    assert page.figures == []
    assert all(len(page.notes[section]) == 1 for section in CHARTS)
    assert "none yet: no trial is complete" in page.texts["Summary"]


def test_an_empty_study_of_two_objectives_has_an_empty_front() -> None:
    page = holding([], ["minimize", "maximize"])
    assert page.figures == []
    assert "0 trials" in page.texts["Summary"]


def test_a_single_trial_has_a_history_and_a_timeline() -> None:
    page = holding([finished(0, [1.0], {"x": unit(0.5)})])
    assert [section for section in CHARTS if page.charts(section)] == ["History", "Timeline"]
    assert all(len(page.notes[each]) == 1 for each in CHARTS if each not in ("History", "Timeline"))


def test_a_study_without_a_feasible_trial_has_no_best_one() -> None:
    def objective(trial: Trial) -> float:
        trial.set_constraint("never", 1)
        return trial.suggest_float("x", 0, 1)

    page = Page(study_page(made(objective, 12)))
    assert "none yet: no trial is complete and feasible" in page.texts["Summary"]


def test_trials_of_every_state_are_shown() -> None:
    trials = [
        finished(0, [1.0], intermediate={0: 2.0}),
        finished(1, state=TrialState.PRUNED, intermediate={0: 3.0}),
        finished(2, state=TrialState.FAIL, intermediate={0: 4.0}),
        finished(3, state=TrialState.RUNNING, intermediate={0: 5.0}, end=None),
        finished(4, state=TrialState.WAITING, start=None, end=None),
    ]
    page = holding(trials)
    assert "5: 1 complete, 1 pruned, 1 failed, 1 running, 1 waiting" in page.texts["Summary"]
    curves = [
        trace for trace in page.charts("Intermediate values")[0]["data"] if "xaxis" not in trace
    ]
    names = {trace["name"] for trace in curves}
    assert names == {"Trial0", "Trial1", "Trial3", "complete", "pruned", "running"}
    bars = page.charts("Timeline")[0]["data"]
    assert {trace["name"] for trace in bars} == {"complete", "pruned", "failed", "running"}


def test_a_clock_that_was_set_back_gives_a_duration_of_zero() -> None:
    page = holding([finished(0, [1.0], end=NOON - datetime.timedelta(hours=1))])
    assert page.charts("Timeline")[0]["data"][0]["x"] == [0]


@pytest.mark.parametrize("zone", ["UTC", "Etc/GMT-5"])
def test_the_timeline_is_in_utc_wherever_a_trial_ran(
    zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = int(NOON.replace(tzinfo=datetime.UTC).timestamp() * 1000)
    there = NOON + datetime.timedelta(hours=3)  # Optuna stores no zone
    end = there + datetime.timedelta(minutes=1)
    trial = finished(0, [1.0], user_attrs={STARTED: started}, start=there, end=end)
    try:
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        (bar,) = holding([trial]).charts("Timeline")[0]["data"]
    finally:
        monkeypatch.undo()
        time.tzset()
    assert bar["base"] == ["2026-03-01T12:00:00"]
    assert bar["x"] == [60_000]


@pytest.mark.parametrize("extreme", [math.inf, -math.inf, 1e308, -1e308])
def test_values_that_an_axis_cannot_hold_are_omitted_and_counted(extreme: float) -> None:
    trials = [finished(n, [float(n)], params) for n, params in enumerate(grid())]
    trials.append(finished(12, [extreme], grid()[0]))
    page = holding(trials)
    assert any("1 of 13 trials has no finite value" in note for note in page.notes["History"])
    assert shown(page.charts("History")[0]["data"][0]["y"]) == list(range(12))


def test_infinite_values_of_one_objective_do_not_affect_the_other() -> None:
    trials = [finished(n, [n, math.inf], params) for n, params in enumerate(grid())]
    page = holding(trials, ["minimize", "minimize"])
    assert len(page.charts("History")) == 1
    assert page.notes["Pareto front"] == ["Not drawn: no complete trial has finite values only."]


def test_intermediate_values_that_are_not_numbers_leave_a_gap() -> None:
    page = holding([finished(0, [1.0], intermediate={0: 2.0, 1: math.nan, 2: math.inf, 3: 1.0})])
    assert page.charts("Intermediate values")[0]["data"][0]["y"] == [2.0, None, None, 1.0]


def test_intermediate_values_that_are_all_nan_are_not_drawn() -> None:
    page = holding([finished(0, [1.0], intermediate={0: math.nan})])
    assert page.notes["Intermediate values"] == [
        "Not drawn: no trial reported intermediate values."
    ]


def test_equal_values_have_no_importances() -> None:
    page = holding([finished(n, [1.0], params) for n, params in enumerate(grid())])
    assert page.notes[CHARTS[1]] == [
        "Not drawn: no parameter distinguishes the best tenth of the trials."
    ]


def test_params_with_a_single_value_are_not_drawn() -> None:
    trials = [
        finished(n, [n], {**params, "fixed": unit(0.5), "single": (1, IntDistribution(1, 1))})
        for n, params in enumerate(grid())
    ]
    page = holding(trials)
    assert set(page.charts(CHARTS[1])[0]["data"][0]["y"]) == {"x", "y"}
    assert '"fixed"' not in json.dumps([page.charts(section) for section in CHARTS[1:6]])


def test_a_single_param_has_no_contour() -> None:
    page = holding([finished(n, [n], {"x": unit(n / 12)}) for n in range(12)])
    assert page.notes["Contours"] == ["Not drawn: no two parameters vary in the same trials."]
    assert page.charts("Slices")
    assert page.charts("Parallel coordinates")


def test_conditional_params_that_never_meet_have_no_contour() -> None:
    def objective(trial: Trial) -> float:
        return trial.suggest_float("even" if trial.number % 2 else "odd", 0, 1)

    page = Page(study_page(made(objective, 20)))
    assert page.notes["Contours"] == ["Not drawn: no two parameters vary in the same trials."]
    assert page.charts("Parallel coordinates")


@pytest.mark.parametrize(
    ("values", "distribution"),
    [
        ([True, False], CategoricalDistribution([True, False])),
        ([None, 1, "1"], CategoricalDistribution([None, 1, "1"])),
        ([0.1, math.inf, math.nan], CategoricalDistribution([0.1, math.inf, math.nan])),
        ([1, 10, 10**6], IntDistribution(1, 10**6, log=True)),
        ([0, 2**62], IntDistribution(0, 2**62)),
        ([1e-300, 1e-5, 1.0], FloatDistribution(1e-300, 1, log=True)),
        ([-1e149, 1e149], FloatDistribution(-1e149, 1e149)),
        (["x" * 500, "x" * 501], CategoricalDistribution(["x" * 500, "x" * 501])),
    ],
)
def test_params_of_every_kind_are_drawn(values: list[Any], distribution: Any) -> None:
    trials = [
        finished(n, [n], {**params, "it": (values[n % len(values)], distribution)})
        for n, params in enumerate(grid())
    ]
    page = holding(trials)
    for section in CHARTS[1:5]:
        assert page.charts(section)
        assert '"it"' in json.dumps(page.charts(section))


def test_params_too_large_for_an_axis_are_left_out() -> None:
    huge = FloatDistribution(-1e308, 1e308)
    trials = [
        finished(n, [n], {**params, "huge": (n * 1e306, huge)}) for n, params in enumerate(grid())
    ]
    page = holding(trials)
    assert "huge" not in json.dumps(page.figures)
    assert any(code.startswith("huge = ") for code in page.codes)  # it is still a trial's


def test_a_param_with_incompatible_distributions_is_categorical() -> None:
    kinds = [(1, IntDistribution(0, 9)), ("a", CategoricalDistribution(["a", "b"]))]
    trials = [finished(n, [n], {**params, "it": kinds[n % 2]}) for n, params in enumerate(grid())]
    assert holding(trials).charts("Slices")


# Large studies.


def test_a_large_study_is_thinned_out_and_the_page_says_so() -> None:
    names = "abcde"
    trials = []
    for number in range(1000):
        params = {
            name: unit(number * step % 1000 / 1000)
            for name, step in zip(names, (7, 11, 13, 17, 19), strict=True)
        }
        value = abs(params["a"][0] - 0.3) + params["b"][0] / 10
        trials.append(finished(number, [value], params, intermediate={0: 2.0, 1: value}))
    study = optuna.create_study(study_name="large")
    study.add_trials(trials)
    text = study_page(study)
    page = Page(text)
    assert len(text.encode()) < 8e6
    assert len(page.charts("History")[0]["data"][0]["x"]) == 1000
    best = f"{study.best_value:.3g}"
    assert best in json.dumps(page.charts("Parallel coordinates"))
    for section, words in {
        "Parallel coordinates": "100 of 1,000 trials here and below, evenly spread from best to "
        "worst.",
        "Intermediate values": "100 of 1,000 trials.",
        "Timeline": "500 of 1,000 trials, the latest ones.",
    }.items():
        assert words in page.notes[section]
    assert "4 of 5 parameters, the most important ones." in page.notes["Contours"]


def test_a_param_that_varies_only_in_omitted_trials_is_not_drawn() -> None:
    trials = [finished(n, [n], {"x": unit(0.5 if n == 1 else 0.0)}) for n in range(2500)]
    page = holding(trials)
    assert page.notes["Slices"] == page.notes["Parallel coordinates"]
    assert page.notes["Slices"] == ["Not drawn: no parameter varies in the trials shown."]


def test_a_history_keeps_every_improvement() -> None:
    values = [1000.0] * 7000
    values[3001:3004] = [3.0, 2.0, 1.0]
    page = holding([finished(number, [value]) for number, value in enumerate(values)])
    points, best, _ = page.charts("History")[0]["data"]
    assert best["y"][3000:3004] == [1000.0, 3.0, 2.0, 1.0]
    assert len(points["x"]) == 2000
    assert "2,000 of 7,000 trials, evenly spread." in page.notes["History"]


def test_only_the_most_important_of_many_params_are_drawn_in_rows() -> None:
    study = made(
        lambda trial: sum(i * trial.suggest_float(f"p{i:02}", 0, 1) for i in range(14)), 30
    )
    page = Page(study_page(study))
    axes = [
        sum(name.startswith("xaxis") for name in figure["layout"])
        for figure in page.charts("Slices")
    ]
    assert sum(axes) == 10
    assert max(axes) <= 4
    assert any("10 of 14 parameters" in note for note in page.notes["Parallel coordinates"])


# Isolation: untrusted text, network, global state.


NASTY = "</script><script>alert(1)</script><!--<b>"


def test_text_is_escaped_wherever_it_comes_from() -> None:
    distribution = CategoricalDistribution([NASTY, f"{NASTY}2"])
    trials = [
        finished(
            n,
            [n, -n],
            {**params, NASTY: (distribution.choices[n % 2], distribution)},
            user_attrs={NASTY: NASTY},
        )
        for n, params in enumerate(grid())
    ]
    study = optuna.create_study(study_name=NASTY, directions=["minimize", "minimize"])
    study.add_trials(trials)
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        study.set_metric_names([NASTY, NASTY])
    text = study_page(study, {NASTY: NASTY, "command": f"$ {NASTY}"})
    assert NASTY not in text
    page = Page(text)
    assert text.lower().count("</script>") == 1 + len(page.figures)
    assert page.title == NASTY
    # Plotly renders text as HTML.
    assert "<script" not in json.dumps(page.figures)


def test_template_marks_in_a_name_stay_text() -> None:
    study = optuna.create_study(study_name="{{plotly}}")
    assert Page(study_page(study)).title == "{{plotly}}"


def test_internal_attributes_are_not_shown() -> None:
    trials = [finished(0, [1.0], user_attrs={"tracker:run": "abc123", "note": "kept"})]
    study = optuna.create_study()
    study.add_trials(trials)
    text = study_page(study)
    assert "tracker:run" not in text
    assert "abc123" not in text
    assert "kept" in json.dumps(Page(text).figures)


def test_a_page_loads_nothing_from_elsewhere() -> None:
    text = study_page(made(trained, 20))
    page = Page(text)
    ours = text.replace(get_plotlyjs(), "")
    assert page.resources == ["data:,"]
    assert "http" not in ours.replace("http-equiv", "")
    for way in ("@import", "url(", "fetch(", "import(", "XMLHttpRequest", "localStorage"):
        assert way not in ours
    assert "default-src 'none'" in ours


def test_plotly_is_included_once() -> None:
    assert study_page(made(trained, 20)).count(get_plotlyjs()) == 1


def test_drawing_a_page_changes_no_global_state(caplog: pytest.LogCaptureFixture) -> None:
    study = made(trained, 20)
    before = copy.deepcopy(study.trials)
    loggers = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict}
    filters = list(warnings.filters)
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    optuna.logging.enable_propagation()
    caplog.set_level(logging.DEBUG)
    study_page(study)
    optuna.logging.disable_propagation()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    assert not [record for record in caplog.records if record.name.startswith("optuna")]
    assert filters == warnings.filters
    assert all(logging.getLogger(name).level == level for name, level in loggers.items())
    assert study.trials == before


def test_importing_tracker_imports_neither_optuna_nor_plotly() -> None:
    code = "import sys, tracker; sys.exit(bool({'optuna', 'plotly'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("objectives", [1, 2])
def test_a_browser_draws_every_chart_without_an_error(objectives: int, tmp_path: Path) -> None:
    study = made(trained, 40) if objectives == 1 else made(pair, 20, ["minimize", "maximize"])
    text = study_page(study)
    path = tmp_path / "study.html"
    path.write_text(text)
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--enable-logging=stderr", f"--user-data-dir={tmp_path}/profile"),
        *("--virtual-time-budget=25000", "--window-size=1000,800"),
    ]
    done = subprocess.run(
        ["chromium", *flags, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.count('class="plot-container') == len(Page(text).figures) > 5
    assert "CONSOLE" not in done.stderr
