"""Names from anywhere, in every page, picture and table that is written."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import optuna
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import create_trial
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
from torch import nn

from tests.helpers import Store
from tracker import RunManager, Study
from tracker.capture.files import mistake_files, network_files
from tracker.search.report.page import study_page
from tracker.texts import csv_cell, visible
from tracker.views.files import csv_text
from tracker.views.histogram_page import histogram_page

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "</title></style></code></svg><h1 id=evil>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)' x='",
    "]]><!-- <script>",
    "&lt;b&gt;&#60;i&#62;",
    "{{title}} {{data}} ${sections} $title $",
    "$x_{ and $\\frac",
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1)",
    "\tindented",
    "two\nlines",
    "a\x00b\x1b[31m",
    "\u202eevil\u2066 \u200f",
    "\ufeff\u2028\uffff",
    "x" * 300,
    "größe 日本",
]
PLAIN = [f"n{number}" for number in range(len(HOSTILE))]
INVISIBLE = "\x00\x1b\u202e\u2066\u200f\ufeff\u2028\uffff"


class Elements(HTMLParser):
    """The elements of a page, each with the names of its attributes; and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[tuple[str, ...]] = set()
        self.text = ""
        self.data = ""
        """What is in scripts."""
        self._tag = ""
        self.feed(page.replace(get_plotlyjs(), ""))  # or it takes seconds
        self.close()

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.found.add((tag, *(name for name, _ in attrs)))
        self._tag = tag

    def handle_data(self, data: str) -> None:
        if self._tag == "script":
            self.data += data
        else:
            self.text += data


def check(page: str, plain: str) -> None:
    """Check that a page has the elements of one with plain names, and shows every character."""
    elements = Elements(page)
    assert elements.found == Elements(plain).found
    for sign in INVISIBLE:
        assert sign not in page
        assert not re.search(rf"(?<!\\)\\u{ord(sign):04x}", elements.data)  # in JSON


def histograms(names: Sequence[str]) -> str:
    one = {"kind": "weight", "bins": [1], "counts": [1], "nan": 1, "posinf": 0, "neginf": 0}
    return histogram_page([{"step": 0, "histograms": [{"tensor": n, **one} for n in names]}], "run")


def test_the_histogram_page_shows_names_as_text() -> None:
    check(histograms(HOSTILE), histograms(PLAIN))
    for name in HOSTILE:
        page = histogram_page([], name)
        check(page, histogram_page([], "run"))
        assert visible(name).strip() in Elements(page).text


def network(names: Sequence[str]) -> nn.Module:
    kind = type(names[0], (nn.Sequential,), {})
    made = kind()
    for name in names:
        made.add_module(name.replace(".", ""), nn.Linear(3, 3))
    return made


@pytest.mark.parametrize("first", HOSTILE[:4])
def test_the_graph_and_the_table_of_layers_show_names_as_text(first: str) -> None:
    names = [first, *(name for name in HOSTILE if name != first)]
    files = network_files(network(names), torch.rand(2, 3))
    plain = network_files(network(PLAIN), torch.rand(2, 3))
    svg = files["network/graph.svg"]
    check(svg, plain["network/graph.svg"])
    ElementTree.fromstring(svg)
    layers = pd.read_csv(io.StringIO(files["network/layers.csv"], newline=""))["layer"]
    assert list(layers[:-1]) == [csv_cell(name.replace(".", "")) for name in names]


def study(names: Sequence[str], directions: int) -> str:
    made = optuna.create_study(study_name=names[0], directions=["minimize"] * directions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.set_metric_names([f"{names[0]}{number}" for number in range(directions)])
    choices = CategoricalDistribution(list(names))
    for number in range(2 * len(names)):
        made.add_trial(
            create_trial(
                params={
                    **{name: (number * place) % 7 / 7 for place, name in enumerate(names, 2)},
                    f"{names[1]}+": names[number % len(names)],
                },
                distributions={
                    **dict.fromkeys(names, FloatDistribution(0, 1)),
                    f"{names[1]}+": choices,
                },
                values=[float(number), *[-float(number)] * (directions - 1)],
                user_attrs=dict(zip(names, names, strict=True)),
                intermediate_values={0: 1.0},
            )
        )
    return study_page(made, {names[2]: names[3], names[4]: f"$ {names[5]}"})


@pytest.mark.parametrize("directions", [1, 2])
def test_the_page_of_a_study_shows_names_as_text(directions: int) -> None:
    plain = study(PLAIN, directions)
    for first in range(0, len(HOSTILE), 7):  # each is the study's name, a label or a command
        check(study(HOSTILE[first:] + HOSTILE[:first], directions), plain)


def test_a_classifiers_mistakes_show_names_as_text() -> None:
    inputs = torch.rand(40, 1, 4, 4)
    labels = torch.arange(40) % len(HOSTILE)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(16, len(HOSTILE)))
    texts = (HOSTILE * 2)[: len(inputs)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a font that lacks 日本
        warnings.filterwarnings("ignore", "constrained_layout")
        files = mistake_files(classifier, [(inputs, labels)], classes=HOSTILE, shown=texts)
    assert files["mistakes/confusion.png"][1:4] == files["mistakes/worst.png"][1:4] == b"PNG"
    for path in ("mistakes/confusion.csv", "mistakes/worst.csv"):
        table = pd.read_csv(io.StringIO(files[path].decode(), newline=""))
        assert_no_formula(table)
    assert [*table["text"]] == [csv_cell(texts[number]) for number in table["sample"]]


def assert_no_formula(table: pd.DataFrame) -> None:
    for cell in [*table.columns, *table.to_numpy().ravel()]:
        if isinstance(cell, str):
            assert csv_cell(cell) == cell


NUMBERS = [-0.5, 1e-300, "-0.5", "+3", "-1e5", -7, "-inf", 0.25, True, None]


def test_formulas_become_text_in_csv_and_numbers_stay_numbers() -> None:
    rows = [
        {"number": number, "text": text} for number, text in zip(NUMBERS, HOSTILE, strict=False)
    ]
    rows += [{name: name for name in HOSTILE}]
    table = pd.read_csv(io.StringIO(csv_text(rows), newline=""))
    assert_no_formula(table)
    assert "'=1+1" in table.columns
    assert list(table["text"][:10]) == [csv_cell(text) for text in HOSTILE[:10]]
    numbers = pd.read_csv(io.StringIO(csv_text([{"x": number} for number in NUMBERS[:8]])))["x"]
    assert list(numbers) == [float(str(number)) for number in NUMBERS[:8]]


@given(st.floats(), st.text())
def test_a_cell_is_changed_only_if_it_begins_like_a_formula(number: float, text: str) -> None:
    assert csv_cell(number) is number
    assert csv_cell(repr(number)) == repr(number)
    assert csv_cell(text) in (text, f"'{text}")
    assert csv_cell(csv_cell(text)) == csv_cell(text)


def test_hostile_names_arrive_in_mlflow_as_text(store: Store, tmp_path: Path) -> None:
    with RunManager(model=False, tags={"mlflow.runName": HOSTILE[1]}) as manager:
        manager.begin_run({"a": HOSTILE[9]}, network(HOSTILE), [torch.rand(2, 3)])
        manager.begin_epoch()
        assert manager.network is not None
        manager.network(torch.rand(2, 3)).sum().backward()
        manager.track_loss(torch.tensor(1.0), 2)
        manager.end_epoch()
        manager.end_run()
        manager.save("results")
    run = store.run()
    page = store.text(run, "histograms.html", tmp_path)
    check(page, histograms(PLAIN))
    assert f"<title>{HOSTILE[1]}" not in page
    check(
        store.text(run, "network/graph.svg", tmp_path),
        network_files(network(PLAIN), torch.rand(2, 3))["network/graph.svg"],
    )
    assert_no_formula(pd.read_csv("results.csv"))


def test_a_study_with_hostile_values_arrives_in_mlflow_as_text(
    store: Store, tmp_path: Path
) -> None:
    values: list[Any] = [HOSTILE[0], HOSTILE[9], HOSTILE[10], -0.5]
    name = HOSTILE[1]
    Study(name, lambda _: 1.0, space={"kind": values}, sampler="grid", models="none").run()
    parent = next(run for run in store.runs() if run.info.run_name == name)
    found = Elements(store.text(parent, "study.html", tmp_path)).found
    assert not {element for element in found if element[0] in ("img", "svg")}
    table = pd.read_csv(io.StringIO(store.text(parent, "trials.csv", tmp_path)))
    assert_no_formula(table)
    assert list(table["kind"]) == ["<script>alert(1)</script>", "'=1+1", f"'{HOSTILE[10]}", "-0.5"]
