"""MLflow's verbs on a run: the same names and arguments, and files that MLflow reads back."""

from __future__ import annotations

import inspect
import json
import math
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import mlflow
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.figure import Figure
from PIL import Image, ImageSequence
from torch import nn

from tests.helpers import Store
from tracker import ArgumentError, Run, RunManager, start_run
from tracker.capture.media import dict_text, write_video, write_wav

mpl.use("agg")

VERBS = [
    *("log_metric", "log_metrics", "log_param", "log_params", "set_tag", "set_tags", "log_text"),
    *("log_dict", "log_figure", "log_table", "log_image", "log_artifact", "log_artifacts"),
]
NOT_OURS = {"synchronous", "run_id", "model_id", "dataset"}  # a run is itself, and never waits


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_mlflows_arguments_in_mlflows_order(verb: str) -> None:
    """Those that MLflow has after one that is not ours are keywords."""
    theirs, ours = (inspect.signature(getattr(owner, verb)).parameters for owner in (mlflow, Run))
    wanted = [name for name in theirs if name not in NOT_OURS]
    assert [name for name in ours if name != "self" and name in wanted] == wanted
    for place, name in enumerate(theirs):
        if name in NOT_OURS:
            break
        assert list(ours)[place + 1] == name
        assert ours[name].kind == theirs[name].kind


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "plots"
    (folder / "below").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "below" / "b.txt").write_text("b")
    return folder


def test_what_the_verbs_log_arrives_in_mlflow(store: Store, folder: Path, tmp_path: Path) -> None:
    with start_run() as run:
        run.log_metric("loss", 0.5, 3)
        run.log_metric(key="late", value=torch.tensor(2.0), step=1, timestamp=1234)
        run.log_metrics({"early": 1}, timestamp=99)
        run.log_param("lr", 0.1)
        run.set_tag("kind", "gan")
        run.log_artifact(local_path=folder / "a.txt", artifact_path="one")
        run.log_artifacts(str(folder), "all")
        run.log_artifacts(folder)
        run.log_text("old", "note.txt")
        run.log_text("text", artifact_file="note.txt", step=3)
        run.log_html("<p>page</p>", "pages/first.html", step=-2)
        run.log_dict({"rate": torch.tensor([0.5, 1]), 3: np.float32(2), "at": Path("x")}, "a.json")
        run.log_dict([{"größe": 1, "none": None, "set": {3}}], "b.yaml", step=1)
        run.log_audio(np.zeros(80), "quiet.wav", sample_rate=8000)
        run.log_image(np.zeros((4, 4)), artifact_file="grid.png")
        run.log_image(image=np.zeros((4, 4)), key="face", timestamp=7)
        run.log_image(mlflow.Image(np.zeros((4, 4, 3), np.uint8)), key="face", step=4)

    found = store.run()
    run_id = found.info.run_id
    assert found.data.params == {"lr": "0.1"}
    assert found.data.tags["kind"] == "gan"
    assert store.history(found, "loss") == [(3, 0.5)]
    points = [store.client.get_metric_history(run_id, name)[0] for name in ("late", "early")]
    assert [(one.value, one.step, one.timestamp) for one in points] == [(2, 1, 1234), (1, 0, 99)]
    files = store.artifacts(found)
    images = {file for file in files if file.startswith("images/")}
    assert files - images == {
        *("one/a.txt", "all/a.txt", "all/below/b.txt", "a.txt", "below/b.txt", "note.txt"),
        *("note/000003.txt", "pages/first/-00002.html", "a.json", "b/000001.yaml"),
        *("quiet.wav", "grid.png"),
    }
    steps = sorted(file.split("+")[:5:2] for file in images)
    assert [one[0] for one in steps] == ["images/face"] * 4
    assert sum("step+0+timestamp+7+" in file for file in images) == 2
    assert sum("step+4+" in file for file in images) == 2
    assert store.text(found, "note/000003.txt", tmp_path) == "text"
    loaded = json.loads(store.text(found, "a.json", tmp_path))
    assert loaded == {"rate": [0.5, 1.0], "3": 2.0, "at": "x"}
    text = store.text(found, "b/000001.yaml", tmp_path)
    assert text == "- größe: 1\n  none: null\n  set:\n  - 3\n"


# -- dictionaries --------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_a_dictionary_reads_back_as_it_was(value: Any) -> None:
    assert json.loads(dict_text(value, as_yaml=False)) == value


def test_a_dictionary_that_contains_itself_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["self"] = endless
    with pytest.raises(ArgumentError, match="dictionary contains itself"):
        dict_text(endless, as_yaml=False)


# -- tables --------------------------------------------------------------------------------------


def load_table(store: Store, path: str) -> pd.DataFrame:
    mlflow.set_tracking_uri(store.uri)
    try:
        return mlflow.load_table(path, run_ids=[store.run().info.run_id])
    finally:
        mlflow.set_tracking_uri(None)


@pytest.fixture(autouse=True)
def default_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")


@pytest.mark.parametrize("path", ["preds.json", "tables/preds.parquet"])
def test_mlflow_loads_a_table_with_the_rows_of_all_calls(store: Store, path: str) -> None:
    data = pd.DataFrame({"text": ["c"], "score": [0.75]}, index=[9])
    with start_run() as run:
        run.log_table({"text": ["a", "b"], "score": torch.tensor([0.25, 0.5])}, path)
        run.log_table(data, path)
        run.log_table({"text": "d", "score": np.float32(1)}, artifact_file=path)
        run.log_table({"other": [1, 2]}, "other.json")
    expected = pd.DataFrame({"text": [*"abcd"], "score": [0.25, 0.5, 0.75, 1.0]})
    pd.testing.assert_frame_equal(load_table(store, path), expected, check_dtype=False)
    assert len(load_table(store, "other.json")) == 2
    assert list(data.index) == [9]


def test_mlflow_appends_to_our_table_and_a_table_may_get_new_columns(store: Store) -> None:
    with start_run() as run:
        run.log_table({"a": [1]}, "t.json")
        run.log_table({"a": [2], "b": [[1, 2]]}, "t.json")
    store.client.log_table(store.run().info.run_id, {"a": [3], "b": [[3]]}, "t.json")
    table = load_table(store, "t.json")
    assert table["a"].tolist() == [1, 2, 3]
    assert table["b"].tolist() == [None, [1, 2], [3]]


def test_pictures_in_a_table_are_files_that_the_cells_name(store: Store) -> None:
    with start_run() as run:
        run.log_table({"image": [Image.new("L", (9, 3))] * 2, "label": [1, 2]}, "some/t.json")
        with pytest.raises(ArgumentError, match="pictures and other values in the column 'image'"):
            run.log_table({"image": [Image.new("L", (9, 3)), 4]}, "some/t.json")
    cells = load_table(store, "some/t.json")["image"].tolist()
    files = store.artifacts(store.run())
    for cell in cells:
        assert cell["type"] == "image"
        assert {cell["filepath"], cell["compressed_filepath"]} <= files
        assert cell["filepath"].startswith("table_images/some/t/")


def test_a_resumed_run_adds_to_its_table(store: Store) -> None:
    for number in range(2):
        ids = [run.info.run_id for run in store.runs()]
        manager = RunManager.resume(ids[0], model=False) if ids else RunManager(model=False)
        with manager:
            run = manager.begin_run({}, nn.Linear(1, 1), [])
            if number:
                run.log_table({"n": [0]}, "new.json")
            run.log_table({"n": [number]}, "t.json")
            manager.end_run()
    assert load_table(store, "t.json")["n"].tolist() == [0, 1]
    assert load_table(store, "new.json")["n"].tolist() == [0]


@pytest.mark.parametrize(
    ("data", "path", "message"),
    [
        ([1], "t.json", "data is a list; it must be a mapping of columns or a DataFrame"),
        ({"a": [1], "b": [1, 2]}, "t.json", r"several lengths, \{'a': 1, 'b': 2\}"),
        ({"a": [1]}, "t.csv", "must end in .json or .parquet"),
        ({"a": [1]}, "a:b.json", "must end in .json or .parquet, and not contain"),
    ],
)
def test_what_is_not_a_table_is_refused(store: Store, data: Any, path: str, message: str) -> None:
    with start_run() as run, pytest.raises(ArgumentError, match=message):
        run.log_table(data, path)
    assert store.artifacts(store.run()) == set()


# -- figures -------------------------------------------------------------------------------------


def test_a_figure_is_logged_and_not_changed(store: Store, tmp_path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(3, 2), dpi=70)
    axes.plot([1, 2])
    curve = go.Figure(go.Scatter(y=[1, 2]))
    before = curve.to_dict()
    with start_run() as run:
        run.log_figure(figure, "loss.png", step=2)
        run.log_figure(figure, artifact_file="loss.svg", save_kwargs={"transparent": True})
        run.log_figure(plt, "pyplot.pdf")
        run.log_figure(curve, "curve.html", save_kwargs={"include_plotlyjs": "cdn"})
        run.log_figure(curve, "whole.html")
    assert plt.fignum_exists(figure.number)
    assert (figure.dpi, figure.get_size_inches().tolist()) == (70, [3, 2])
    assert curve.to_dict() == before
    plt.close(figure)
    found = store.run()
    assert store.artifacts(found) == {
        *("loss/000002.png", "loss.svg", "pyplot.pdf", "curve.html", "whole.html"),
    }
    picture = store.client.download_artifacts(found.info.run_id, "loss/000002.png", str(tmp_path))
    with Image.open(picture) as image:
        assert image.size == (210, 140)
    assert "https://cdn.plot.ly" in store.text(found, "curve.html", tmp_path)
    assert len(store.text(found, "whole.html", tmp_path)) > 1_000_000


@pytest.mark.parametrize(
    ("figure", "path", "message"),
    [
        ("loss", "a.png", "figure is a str; allowed are figures of matplotlib and plotly"),
        (Figure(), "a.abc", "artifact_file='a.abc' cannot be written: Format 'abc' is not support"),
        (go.Figure(), "a.abc", "artifact_file='a.abc' cannot be written: "),
    ],
    ids=["str", "matplotlib", "plotly"],
)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(
    store: Store, figure: Any, path: str, message: str, workdir: Path
) -> None:
    with start_run() as run:
        with pytest.raises(ArgumentError, match=message) as raised:
            run.log_figure(figure, path)
        assert "\n" not in str(raised.value)
        assert list(workdir.glob(".tracker/*/files/*")) == []
    assert store.run().info.status == "FINISHED"


# -- sound ---------------------------------------------------------------------------------------


def sound_in(path: Path) -> tuple[np.ndarray[Any, Any], int]:
    with wave.open(str(path)) as file:
        kind = {1: np.uint8, 2: np.int16, 4: np.int32}[file.getsampwidth()]
        samples = np.frombuffer(file.readframes(file.getnframes()), kind)
        return samples.reshape(-1, file.getnchannels()), file.getframerate()


@settings(deadline=None, max_examples=30)
@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.int16, np.int32]),
        st.tuples(st.integers(4, 9), st.integers(1, 3)),
    ),
    st.sampled_from([np.asarray, np.transpose, lambda a: torch.from_numpy(a.T.copy())]),
    st.integers(1, 96_000),
)
def test_whole_numbers_are_stored_as_they_are(
    tmp_path_factory: Any, samples: Any, container: Callable[[Any], Any], rate: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "a.wav"
    write_wav(container(samples), path, rate)
    stored, stored_rate = sound_in(path)
    assert stored_rate == rate
    assert np.array_equal(stored, samples)


@pytest.mark.parametrize(
    "samples",
    [
        [0.0, 0.5, -1.0, 3.0, math.nan],
        torch.tensor([0.0, 0.5, -1.0, 3.0, math.nan], dtype=torch.bfloat16, requires_grad=True),
        np.array([0.0, 0.5, -1.0, math.inf, math.nan], np.float16),
    ],
    ids=["list", "tensor", "array"],
)
def test_floats_are_stored_with_16_bits_and_clipped(samples: Any, tmp_path: Path) -> None:
    write_wav(samples, tmp_path / "a.wav", 8000)
    stored, _ = sound_in(tmp_path / "a.wav")
    assert stored.dtype == np.int16
    assert stored.ravel().tolist() == [0, 16384, -32767, 32767, 0]


# -- moving pictures -----------------------------------------------------------------------------


def gray(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None, None].expand(-1, 4, 6)


FRAMES: dict[str, Callable[[], Any]] = {
    "(T, H, W)": lambda: gray(0, 0.5, 1),
    "(T, C, H, W)": lambda: gray(0, 0.5, 1)[:, None].expand(-1, 3, -1, -1),
    "(T, H, W, C)": lambda: gray(0, 0.5, 1)[..., None].expand(-1, -1, -1, 3).numpy(),
    "bytes": lambda: (gray(0, 0.5, 1) * 255).round().byte(),
    "pictures": lambda: [Image.new("RGB", (6, 4), (v, v, v)) for v in (0, 128, 255)],
    "an iterator": lambda: iter(gray(0, 0.5, 1)),
    "gray and colours": lambda: [gray(0)[0], torch.full((3, 4, 6), 0.5), np.ones((4, 6))],
}


@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES)
@pytest.mark.parametrize("suffix", [".gif", ".png"])
def test_a_video_shows_every_picture_for_its_time(
    frames: Callable[[], Any], suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a{suffix}"
    write_video(frames(), path, 25)
    with Image.open(path) as video:
        assert video.n_frames == 3
        assert video.size == (6, 4)
        shown = [
            (frame.convert("L").getpixel((0, 0)), round(frame.info["duration"]))
            for frame in ImageSequence.Iterator(video)
        ]
    assert shown == [(0, 40), (128, 40), (255, 40)]


def some(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


REFUSED: dict[str, tuple[Callable[[Run], object], str]] = {
    "html": (lambda r: r.log_html(b"", "a.html"), "html is a bytes; it must be text"),  # type: ignore[arg-type]
    "html path": (lambda r: r.log_html("", "a.txt"), "must end in .html"),
    "text step": (lambda r: r.log_text("", "a.txt", step=1.5), "step=1.5 is not allowed"),  # type: ignore[arg-type]
    "sound path": (lambda r: r.log_audio(some(4), "a.mp3", sample_rate=8), "must end in .wav"),
    "sound rate": (lambda r: r.log_audio(some(4), "a.wav", sample_rate=0), "sample_rate=0 is not"),
    "sound shape": (
        lambda r: r.log_audio(some(1, 2, 3), "a.wav", sample_rate=8),
        r"samples has the shape \(1, 2, 3\); allowed are",
    ),
    "no sound": (
        lambda r: r.log_audio([], "a.wav", sample_rate=8),
        r"samples has the shape \(0,\)",
    ),
    "sound dtype": (
        lambda r: r.log_audio(["a"], "a.wav", sample_rate=8),
        "samples has the dtype <U1; allowed are floats",
    ),
    "video path": (lambda r: r.log_video(some(2, 4, 4), "a.mp4"), "must end in .gif or .png"),
    "video fps": (
        lambda r: r.log_video(some(2, 4, 4), "a.gif", fps=60),
        "fps=60 is not .* up to 50",
    ),
    "no video": (lambda r: r.log_video([], "a.gif"), "frames is empty"),
    "video shape": (lambda r: r.log_video(some(4, 4), "a.gif"), r"frames has the shape \(4, 4\)"),
    "video type": (lambda r: r.log_video("a", "a.gif"), "frames is a str"),
    "video sizes": (
        lambda r: r.log_video([some(4, 4), some(5, 4)], "a.gif"),
        r"sizes \(4, 4\) and \(4, 5\); all must have the same",
    ),
    "folder": (lambda r: r.log_artifacts("nowhere"), "local_dir='nowhere' does not exist"),
    "file": (lambda r: r.log_artifacts("a.txt"), "local_dir='a.txt' is not a folder"),
    "two names": (
        lambda r: r.log_image(some(4, 4), "a.png", key="a"),
        "artifact_file='a.png' is not allowed beside key='a'",
    ),
    "time": (lambda r: r.log_metric("a", 1, timestamp=0.5), "timestamp=0.5 is not"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_allowed_is_refused_in_one_sentence(
    store: Store, call: Callable[[Run], object], message: str, workdir: Path
) -> None:
    (workdir / "a.txt").write_text("a")
    with start_run() as run, pytest.raises(ArgumentError, match=message) as raised:
        call(run)
    assert "\n" not in str(raised.value)
