"""The HTML page of a run's histograms."""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracker.errors import ArgumentError
from tracker.texts import visible
from tracker.views.histogram_page import histogram_page

Record = dict[str, Any]

# The CNN of deeplizard's tutorial.
SHAPES = {
    "conv1.weight": (6, 1, 5, 5),
    "conv1.bias": (6,),
    "conv2.weight": (12, 6, 5, 5),
    "conv2.bias": (12,),
    "fc1.weight": (120, 192),
    "fc1.bias": (120,),
    "fc2.weight": (60, 120),
    "fc2.bias": (60,),
    "out.weight": (10, 60),
    "out.bias": (10,),
}


def binned(values: np.ndarray[Any, Any]) -> Record:
    """Return the histogram of `values`, computed from the bits of float32 as the format defines."""
    bits = values.astype(np.float32).ravel().view(np.uint32).astype(np.int64)
    magnitude, negative = bits & 0x7FFFFFFF, bits >> 31 == 1
    finite, infinite = magnitude < 0x7F800000, magnitude == 0x7F800000
    number = np.maximum((magnitude >> 20) - 7, 0)
    bins, counts = np.unique(np.where(negative, -number, number)[finite], return_counts=True)
    return {
        "bins": bins.tolist(),
        "counts": counts.tolist(),
        "nan": int(np.sum(~finite & ~infinite)),
        "posinf": int(np.sum(infinite & ~negative)),
        "neginf": int(np.sum(infinite & negative)),
    }


def tutorial_run(epochs: int) -> list[Record]:
    """Return records of weights that spread and of gradients, a third of them zero, that vanish."""
    draw = np.random.default_rng(0)
    records = []
    for step in range(epochs):
        histograms = []
        for name, shape in SHAPES.items():
            weight = draw.normal(0, 0.05 + step / 200, shape)
            gradient = draw.laplace(0, 10.0 ** -(1 + step / 5), shape)
            gradient *= draw.random(shape) > 1 / 3
            histograms += [
                {"tensor": name, "kind": "weight", **binned(weight)},
                {"tensor": name, "kind": "gradient", **binned(gradient)},
            ]
        records.append({"step": step, "histograms": histograms})
    return records


def record(step: int, *histograms: Record) -> Record:
    return {"step": step, "histograms": list(histograms)}


def histogram(tensor: str = "w", kind: str = "weight", **fields: Any) -> Record:
    empty = {"bins": [], "counts": [], "nan": 0, "posinf": 0, "neginf": 0}
    return {"tensor": tensor, "kind": kind, **empty, **fields}


class Elements(HTMLParser):
    """Text of a page's elements, by element name."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self._open = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self._open = tag
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open][-1] += data


def embedded(page: str) -> Mapping[str, Any]:
    data: Mapping[str, Any] = json.loads(Elements(page).texts["script"][0])
    return data


def decoded(page: str) -> list[Record]:
    """Return the records that a page shows."""
    data = embedded(page)
    records = []
    for step, *cells in data["records"]:
        histograms = []
        for (tensor, kind, _), cell in zip(data["series"], cells, strict=False):
            if cell == 0:
                continue
            nan, posinf, neginf, *runs = cell
            bins, counts, bin_ = [], [], runs[0] if runs else 0
            for run in runs[1:]:
                if run < 0:
                    bin_ -= run
                    continue
                bins.append(bin_)
                counts.append(run)
                bin_ += 1
            fields = {"nan": nan, "posinf": posinf, "neginf": neginf}
            histograms.append(histogram(tensor, kind, bins=bins, counts=counts, **fields))
        records.append(record(step, *histograms))
    return records


def by_key(records: Sequence[Record]) -> list[tuple[int, dict[tuple[str, str], Record]]]:
    return [
        (
            each["step"],
            {
                (visible(one["tensor"]), one["kind"]): one | {"tensor": visible(one["tensor"])}
                for one in each["histograms"]
            },
        )
        for each in records
    ]


def test_a_run_of_20_epochs_is_one_small_file_without_links() -> None:
    records = tutorial_run(20)
    page = histogram_page(records, "bright-fox-12")
    assert len(page.encode()) < 300_000
    assert by_key(decoded(page)) == by_key(records)
    assert "http://" not in page
    assert "https://" not in page
    assert "20 epochs" in Elements(page).texts["p"]


counts = st.integers(1, 2**40)
histograms = st.builds(
    lambda name, kind, cells, odd: histogram(
        name,
        kind,
        bins=sorted(cells),
        counts=[cells[bin_] for bin_ in sorted(cells)],
        **dict(zip(["nan", "posinf", "neginf"], odd, strict=True)),
    ),
    st.text(max_size=4),
    st.sampled_from(["weight", "gradient", "activation", "value"]),
    st.dictionaries(st.integers(-2032, 2032) | st.integers(-3, 3), counts, max_size=8),
    st.tuples(*[st.integers(0, 3)] * 3),
)
unique_histograms = st.lists(histograms, max_size=4, unique_by=lambda h: (h["tensor"], h["kind"]))


@given(st.dictionaries(st.integers(0, 10**6), unique_histograms, max_size=4))
def test_the_page_contains_exactly_the_records(run: dict[int, list[Record]]) -> None:
    records = [record(step, *run[step]) for step in run]
    in_order = sorted(records, key=lambda each: int(each["step"]))
    assert by_key(decoded(histogram_page(records, "run"))) == by_key(in_order)


@pytest.mark.parametrize(
    "name", ["</script><script>alert(1)</script>", "<!-- <script>", "{{title}}", '"&amp;\\']
)
def test_html_in_names_is_shown_as_text(name: str) -> None:
    records = [record(0, histogram(name, bins=[1], counts=[1]))]
    page = histogram_page(records, name)
    plain = histogram_page(records, "run")
    assert decoded(page) == records
    texts = Elements(page).texts
    assert texts["title"] == texts["h1"] == [name]
    assert len(texts["script"]) == len(Elements(plain).texts["script"]) == 2


def steps_shown(page: str) -> list[int]:
    return [each[0] for each in embedded(page)["records"]]


def test_a_long_run_is_shown_by_an_even_selection_of_epochs_and_says_so() -> None:
    records = (record(step, histogram(bins=[step], counts=[1])) for step in range(500))
    page = histogram_page(records, "run")
    shown = steps_shown(page)
    assert (len(shown), shown[0], shown[-1]) == (60, 0, 499)
    assert set(np.diff(shown)) == {8, 9}
    assert "60 of 500 epochs, evenly spaced" in Elements(page).texts["p"]


def test_a_large_network_is_shown_with_fewer_epochs() -> None:
    bins = list(range(-400, 400))
    large = histogram("", bins=bins, counts=[123_456] * len(bins))
    tensors = [{**large, "tensor": f"layer{i}.weight"} for i in range(20)]
    page = histogram_page([record(step, *tensors) for step in range(60)], "run")
    shown = steps_shown(page)
    assert 30 <= len(shown) < 60
    assert (shown[0], shown[-1]) == (0, 59)
    assert len(page) < 4_200_000
    assert f"{len(shown)} of 60 epochs, evenly spaced" in Elements(page).texts["p"]


def test_the_first_nan_is_named_even_if_its_epoch_is_not_shown() -> None:
    sound = histogram(bins=[0], counts=[1])
    bad = [{"nan": 1}, {"posinf": 1}, {"neginf": 1}]
    for fields in bad:
        records = [
            record(step, {**sound, **(fields if step in (4, 7) else {})}) for step in range(10)
        ]
        data = embedded(histogram_page(records, "run", max_steps=2))
        assert data["series"] == [["w", "weight", 4]]
        assert [each[0] for each in data["records"]] == [0, 9]


@pytest.mark.parametrize(("epochs", "words"), [(0, "0 epochs"), (1, "1 epoch"), (2, "2 epochs")])
def test_the_page_says_how_many_epochs_it_shows(epochs: int, words: str) -> None:
    page = histogram_page([record(step, histogram()) for step in range(epochs)], "run")
    assert steps_shown(page) == list(range(epochs))
    assert words in Elements(page).texts["p"]


def test_the_page_says_which_rows_are_epochs_and_which_are_steps() -> None:
    values = histogram("z", "value", bins=[1], counts=[2], nan=1)
    page = histogram_page(
        [
            {**record(100, values), "unit": "step"},
            record(2, histogram()),
            {**record(100, histogram("y", "value")), "unit": "step"},
            record(1, histogram()),
        ],
        "run",
    )
    assert steps_shown(page) == [1, 2, "step 100"]
    assert "2 epochs; 1 step" in Elements(page).texts["p"]
    assert ["z", "value", "step 100"] in embedded(page)["series"]
    assert [one["tensor"] for one in decoded(page)[2]["histograms"]] == ["z", "y"]


def test_fewer_than_two_epochs_are_refused() -> None:
    with pytest.raises(ArgumentError, match="max_steps=1"):
        histogram_page([], "run", max_steps=1)


class Served:
    """A page on a local server in a sandbox like MLflow's, and the paths requested from it.

    With the header the page's origin is opaque like that of an iframe with
    sandbox="allow-scripts", but being the top document it can be dumped.
    """

    def __init__(self, page: str) -> None:
        paths: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                paths.append(self.path)
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Security-Policy", "sandbox allow-scripts")
                self.end_headers()
                self.wfile.write(page.encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.paths = paths
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        self._thread = threading.Thread(target=self.server.serve_forever)

    def __enter__(self) -> Served:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@pytest.fixture
def served() -> Iterator[Served]:
    records = tutorial_run(10)
    records[6]["histograms"][8]["nan"] = 5  # of fc1.weight
    for step in (100, 200, 300):
        outputs = histogram("fc1", "activation", bins=[1], counts=[7])
        values = histogram("conv1.weight", "value", bins=[2], counts=[step])
        weight = histogram("out.weight", bins=[3], counts=[step])
        records.append({**record(step, outputs, values, weight), "unit": "step"})
    with Served(histogram_page(records, "bright-fox-12")) as page:
        yield page


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize(
    ("link", "tensor", "at", "rows", "panels", "count"),
    [
        (
            *("#tensor=fc1.weight&epoch=7&axis=symlog", "fc1.weight", "epoch 7", 10),
            *({"Weights", "Gradients"}, "23,040"),
        ),
        ("#tensor=fc1", "fc1", "step 300", 3, {"Activations"}, "7"),
        (
            *("#tensor=conv1.weight (values)&epoch=step+200", "conv1.weight (values)"),
            *("step 200", 3, {"Values"}, "200"),
        ),
        ("#tensor=out.weight&epoch=step+100", "out.weight", "step 100", 13, {"Weights"}, "100"),
    ],
    ids=["epochs", "activations", "values", "both"],
)
def test_the_page_works_in_a_sandbox_without_any_request(
    link: str,
    tensor: str,
    at: str,
    rows: int,
    panels: set[str],
    count: str,
    served: Served,
    tmp_path: Path,
) -> None:
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update"),
        *("--enable-logging=stderr", f"--user-data-dir={tmp_path}", "--virtual-time-budget=3000"),
    ]
    done = subprocess.run(
        ["chromium", *flags, "--dump-dom", served.url + link],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    texts = Elements(done.stdout).texts
    assert texts["h2"] == [tensor]
    assert texts["output"] == [at]
    assert set(texts["span"]) >= panels
    assert "weight: NaN or infinite from epoch 6" in texts["span"]
    assert ("NaN or infinite from epoch 6" in texts["span"]) == (tensor == "fc1.weight")
    assert texts["dd"].count(count) == len(panels)
    assert f'max="{rows - 1}"' in done.stdout  # of the slider
    assert "CONSOLE" not in done.stderr  # neither an error nor a request that the policy refused
    assert served.paths == ["/"]
