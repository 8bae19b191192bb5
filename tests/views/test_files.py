"""Tables can be read back unchanged, and a reader never sees half a file."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import stat
import threading
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tracker.texts import csv_cell
from tracker.views.files import csv_text, json_text, write_atomically

patient = settings(deadline=None)

Rows = list[dict[str, Any]]

WORDS = st.text(min_size=1)
NAMES = st.sampled_from(["run", "epoch", "loss", "accuracy", "val_loss", "lr", "größe", 'a "b", c'])
NUMBERS = st.integers(-(2**53), 2**53) | st.floats(width=32)
TABLES = st.lists(st.dictionaries(NAMES, NUMBERS, min_size=1), min_size=1, max_size=6)
TEXTS = st.lists(st.fixed_dictionaries({"name": WORDS, "note": WORDS}), min_size=1, max_size=4)


def read_csv(rows: Rows, **options: Any) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(csv_text(rows), newline=""), **options)


def read_json(rows: Rows, **options: Any) -> pd.DataFrame:
    return pd.read_json(io.StringIO(json_text(rows)), **options)


def numbers_of(frame: pd.DataFrame) -> Rows:
    """Return the rows of a table without NaN values."""
    return [
        {name: value for name, value in row.items() if not math.isnan(value)}
        for row in frame.to_dict("records")
    ]


# -- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [read_csv, read_json])
@given(rows=TABLES)
@example([{"loss": math.nan}, {"loss": math.inf}, {"loss": -math.inf}, {"loss": -0.0}])
@example([{"loss": math.nan}])
@patient
def test_numbers_can_be_read_back(read: Callable[[Rows], pd.DataFrame], rows: Rows) -> None:
    frame = read(rows)

    assert list(frame.columns) == list(dict.fromkeys(key for row in rows for key in row))
    assert numbers_of(frame) == [
        {
            name: pytest.approx(row[name], rel=1e-14)
            for name in frame.columns
            if name in row and not math.isnan(row[name])
        }
        for row in rows
    ]


@given(TEXTS)
@example([{"name": "one\rtwo", "note": "x"}, {"name": "three", "note": "y"}])
@example([{"name": 'a "quoted", b', "note": "line\nbreak"}])
@patient
def test_text_can_be_read_back_from_csv(rows: Rows) -> None:
    frame = read_csv(rows, dtype=str, keep_default_na=False)

    assert frame.to_dict("records") == [
        {name: csv_cell(text) for name, text in row.items()} for row in rows
    ]


@given(TEXTS)
@patient
def test_text_can_be_read_back_from_json(rows: Rows) -> None:
    frame = read_json(rows, dtype=False)

    assert frame.to_dict("records") == rows


def test_rows_with_different_columns_share_one_table() -> None:
    rows = [{"run": 1, "lr": 0.1}, {"run": 2, "momentum": 0.9}, {"run": 3, "lr": 0.2, "seed": 4}]

    assert list(csv.reader(csv_text(rows).splitlines())) == [
        ["run", "lr", "momentum", "seed"],
        ["1", "0.1", "", ""],
        ["2", "", "0.9", ""],
        ["3", "0.2", "", "4"],
    ]


def test_nan_and_infinity_can_be_read_back() -> None:
    rows = [
        {"epoch": 1, "loss": 0.5, "val_loss": 0.25},
        {"epoch": 2, "loss": math.inf, "val_loss": -math.inf},
        {"epoch": 3, "loss": math.nan, "val_loss": math.nan},
    ]

    for frame in (read_csv(rows), read_json(rows)):
        assert [str(dtype) for dtype in frame.dtypes] == ["int64", "float64", "float64"]
        assert frame["loss"].tolist()[:2] == [0.5, math.inf]
        assert frame["val_loss"].tolist()[:2] == [0.25, -math.inf]
        assert frame.iloc[2, 1:].isna().all()


def test_a_table_without_rows_can_be_read_back() -> None:
    assert json.loads(json_text([])) == []
    assert csv_text([]).strip() == ""


# -- json ----------------------------------------------------------------------------------------


def strict(text: str) -> Any:
    """Read standard JSON, without the NaN that Python accepts."""

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


@given(VALUES)
@patient
def test_values_can_be_read_back_from_json(value: Any) -> None:
    assert strict(json_text(value)) == value


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        {"loss": math.inf},
        [{"loss": -math.inf}],
        {"best": {"loss": math.nan}},
        {"losses": [1.0, math.nan]},
        [{"betas": (0.9, math.inf)}],
    ],
    ids=repr,
)
def test_nan_and_infinity_are_words_in_json_at_any_depth(value: Any) -> None:
    text = json_text(value)

    strict(text)
    assert any(f'"{word}"' in text for word in ("NaN", "Infinity", "-Infinity"))


def test_json_has_one_line_per_item_of_a_list() -> None:
    assert json_text([{"epoch": 1}, {"epoch": 2}]) == '[\n{"epoch": 1},\n{"epoch": 2}\n]\n'


def test_json_does_not_escape_letters() -> None:
    assert json_text({"größe": "ü"}) == '{"größe": "ü"}'


def test_values_that_json_cannot_express_become_text() -> None:
    assert strict(json_text({"path": Path("a/b"), "day": date(2026, 1, 2)})) == {
        "path": "a/b",
        "day": "2026-01-02",
    }


# -- writing -------------------------------------------------------------------------------------


@given(st.text())
@patient
def test_the_file_contains_the_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("folder") / "table.csv"

    write_atomically(path, text)

    assert path.read_bytes().decode("utf-8") == text


def test_no_temporary_file_is_left_in_the_folder(tmp_path: Path) -> None:
    write_atomically(tmp_path / "table.csv", "a")

    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old and rather longer")

    write_atomically(path, "new")

    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_open_reader_of_the_old_file_can_finish_it(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")

    with path.open() as reader:
        write_atomically(path, "new")
        assert reader.read() == "old"


@pytest.mark.parametrize("name", ["table.csv", "x" * 200 + ".csv", ".hidden", "größe"])
def test_unusual_file_names_work(tmp_path: Path, name: str) -> None:
    write_atomically(Path(name), "relative")
    write_atomically(tmp_path / "absolute", "absolute")

    assert (tmp_path / name).read_text() == "relative"


UNWRITABLE = "half of it\ud800"  # UTF-8 cannot encode half a surrogate pair


def test_after_a_failure_the_old_file_is_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")

    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "x" * 100_000 + UNWRITABLE)

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_after_a_failure_there_is_no_new_file(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "table.csv", UNWRITABLE)

    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_the_name_of_the_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "table.csv").mkdir()

    with pytest.raises(OSError, match=r"table\.csv"):
        write_atomically(tmp_path / "table.csv", "text")

    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert (tmp_path / "table.csv").is_dir()


def test_a_missing_folder_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "nowhere" / "table.csv", "text")

    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_the_file_has_the_permissions_of_any_new_file(tmp_path: Path, umask: int) -> None:
    write_atomically(tmp_path / "ours", "text")
    (tmp_path / "plain").write_text("text")

    ours, plain = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain"))
    assert ours == plain == 0o666 & ~umask


def test_a_concurrent_reader_sees_one_of_the_whole_texts(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    texts = [letter * 300_000 for letter in "abc"]
    write_atomically(path, texts[0])

    def write() -> None:
        for number in range(60):
            write_atomically(path, texts[number % 3])

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while writer.is_alive():
        seen.add(path.read_text())
    writer.join()

    assert seen <= set(texts)
