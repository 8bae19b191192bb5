"""Pictures are converted exactly, from any container."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torch import Tensor

from tests.helpers import Store
from tracker import ArgumentError
from tracker.capture.images import image_grid, mlflow_image_files, to_pil

patient = settings(deadline=None, max_examples=50)

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
SIDES = st.integers(5, 12)  # longer than the number of channels, so that the axes are unambiguous


@st.composite
def pictures(draw: st.DrawFn) -> npt.NDArray[np.uint8]:
    """Bytes of shape (H, W, C)."""
    shape = (draw(SIDES), draw(SIDES), draw(st.sampled_from([1, 3, 4])))
    return draw(hnp.arrays(np.uint8, shape))


def pixels(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """Bytes of shape (H, W, C), read back."""
    array = np.asarray(picture)
    return array[:, :, None] if array.ndim == 2 else array


def grey(values: Any) -> list[int]:
    """The bytes made of a row of numbers."""
    return pixels(to_pil(values)).ravel().tolist()


# -- one picture ---------------------------------------------------------------------------------

CONTAINERS: dict[str, Callable[[npt.NDArray[np.uint8]], Any]] = {
    "array (H, W, C)": lambda bytes_: bytes_,
    "array (C, H, W)": lambda bytes_: bytes_.transpose(2, 0, 1),
    "array of floats": lambda bytes_: bytes_ / 255,
    "array of float16": lambda bytes_: (bytes_ / 255).astype(np.float16),
    "tensor (H, W, C)": torch.from_numpy,
    "tensor (C, H, W)": lambda bytes_: torch.from_numpy(bytes_).permute(2, 0, 1),
    "tensor of floats": lambda bytes_: torch.from_numpy(bytes_).permute(2, 0, 1) / 255,
    "tensor in a graph": lambda bytes_: (torch.from_numpy(bytes_) / 255).requires_grad_() * 1,
    "tensor of float64": lambda bytes_: torch.from_numpy(bytes_).double() / 255,
    "tensor of float16": lambda bytes_: (torch.from_numpy(bytes_) / 255).half(),
}


@pytest.mark.parametrize("convert", CONTAINERS.values(), ids=CONTAINERS)
@given(picture=pictures())
@patient
def test_every_pixel_is_converted_exactly(
    convert: Callable[[npt.NDArray[np.uint8]], Any], picture: npt.NDArray[np.uint8]
) -> None:
    result = to_pil(convert(picture))

    assert result.mode == MODES[picture.shape[2]]
    np.testing.assert_array_equal(pixels(result), picture)


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6)))
@patient
def test_a_two_dimensional_picture_is_grey(picture: npt.NDArray[np.uint8]) -> None:
    for held in (picture, torch.from_numpy(picture), picture / 255):
        result = to_pil(held)

        assert (result.mode, result.size) == ("L", picture.shape[::-1])
        np.testing.assert_array_equal(np.asarray(result), picture)


def test_a_pil_image_is_returned_unchanged() -> None:
    picture = Image.new("P", (3, 2))

    assert to_pil(picture) is picture


@pytest.mark.parametrize("holder", [np.array, torch.tensor], ids=["array", "tensor"])
def test_floats_outside_0_and_1_are_clipped(holder: Callable[[Any], Any]) -> None:
    row = [[-math.inf, -1.0, 0.0, 0.5, 1.0, 7.0, math.inf, math.nan]]

    assert grey(holder(row)) == [0, 0, 0, 128, 255, 255, 255, 0]


@pytest.mark.parametrize("holder", [np.array, torch.tensor], ids=["array", "tensor"])
def test_a_mask_is_black_and_white(holder: Callable[[Any], Any]) -> None:
    assert grey(holder([[True, False]])) == [255, 0]
    assert grey(holder([[1, 0]])) == [255, 0]


def test_dark_bytes_are_not_taken_for_a_mask() -> None:
    assert grey(torch.tensor([[0, 1, 2]], dtype=torch.uint8)) == [0, 1, 2]
    assert grey(np.array([[0, 1, 2]], dtype=np.uint8)) == [0, 1, 2]


@pytest.mark.parametrize("shape", [(1, 3, 3), (3, 4, 4), (3, 8, 1), (4, 1, 3), (1, 5, 4)], ids=str)
def test_a_tensor_s_channels_come_first_if_the_shape_is_ambiguous(
    shape: tuple[int, int, int],
) -> None:
    """Such as a kernel of 3 by 3."""
    tensor = torch.randint(256, shape, dtype=torch.uint8)

    result = to_pil(tensor)

    assert result.size == (shape[2], shape[1])
    np.testing.assert_array_equal(pixels(result), tensor.permute(1, 2, 0).numpy())


def test_conversion_does_not_change_the_tensor() -> None:
    tensor = torch.tensor([[-1.0, math.nan, 0.25, 9.0]])
    before = tensor.numpy().tobytes()

    to_pil(tensor)

    assert tensor.numpy().tobytes() == before


SHAPES = [(), (5,), (2, 5, 5), (5, 5, 2), (5, 6, 7), (1, 1, 5, 5), (0, 5), (3, 0, 5), (5, 0, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("holder", [np.zeros, torch.zeros], ids=["array", "tensor"])
def test_any_other_shape_is_refused(holder: Callable[[Any], Any], shape: tuple[int, ...]) -> None:
    sentence = rf"^image has the shape {re.escape(str(shape))}; allowed are \(H, W\), .*channels\.$"

    with pytest.raises(ArgumentError, match=sentence):
        to_pil(holder(shape))


# -- a batch -------------------------------------------------------------------------------------


def cells(grid: Image.Image, rows: int, columns: int, side: int) -> list[npt.NDArray[np.uint8]]:
    """The pictures of a grid before they were enlarged, row by row."""
    wide, high = columns * (side + 2) + 2, rows * (side + 2) + 2
    factor = grid.width // wide
    assert grid.size == (wide * factor, high * factor)
    small = np.asarray(grid)[::factor, ::factor]
    np.testing.assert_array_equal(small.repeat(factor, 0).repeat(factor, 1), np.asarray(grid))
    return [
        small[top : top + side, left : left + side]
        for top in range(2, high - 2, side + 2)
        for left in range(2, wide - 2, side + 2)
    ]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("number", "rows", "columns"), [(2, 1, 2), (4, 2, 2), (7, 3, 3)])
def test_a_grid_shows_every_picture_row_by_row_on_white(
    number: int, rows: int, columns: int, channels: int
) -> None:
    batch = torch.randint(256, (number, channels, 8, 8), dtype=torch.uint8)
    batch[0, :, 0, 0], batch[-1, :, -1, -1] = 0, 255  # the range of the batch

    grid = image_grid(batch)

    assert grid is not None
    assert grid.getpixel((0, 0)) == (255, 255, 255)
    result = cells(grid, rows, columns, side=8)
    for picture, cell in zip(batch, result[:number], strict=True):
        expected = picture.permute(1, 2, 0).expand(8, 8, 3).numpy()
        np.testing.assert_allclose(cell.astype(int), expected, atol=1)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (4.0, -2.0), (1e-3, 5.0), (1e4, 0.0)])
def test_a_grid_is_scaled_to_its_own_range(scale: float, shift: float) -> None:
    """Data sets are normalised to various ranges."""
    ramp = torch.linspace(0, 1, 64, dtype=torch.float64).reshape(1, 1, 8, 8).expand(4, 1, 8, 8)

    grid = image_grid(ramp * scale + shift)

    assert grid is not None
    (first, *_) = cells(grid, 2, 2, side=8)
    np.testing.assert_allclose(first[:, :, 0], np.linspace(0, 255, 64).reshape(8, 8), atol=1)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 28, 700])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_picture_fills_the_grid(side: int, channels: int) -> None:
    batch = torch.randint(256, (1, channels, side, side), dtype=torch.uint8)
    batch[0, 0, 0, 0], batch[0, -1, -1, -1] = 0, 255

    grid = image_grid(batch)

    assert grid is not None
    factor = grid.width // side
    assert grid.size == (side * factor, side * factor)
    if side > 1:  # a single pixel may have no contrast
        small = np.asarray(grid.convert("RGB"))[::factor, ::factor]
        expected = batch[0].permute(1, 2, 0).expand(side, side, 3)
        np.testing.assert_allclose(small.astype(int), expected, atol=1)


def test_a_batch_without_contrast_has_a_grid() -> None:
    for value in (0.0, 3.0, math.nan):
        grid = image_grid(torch.full((4, 1, 8, 8), value))

        assert grid is not None
        assert grid.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "shape", [(4, 2, 8, 8), (4, 4, 8, 8), (8, 8), (4, 8, 8), (0, 1, 8, 8), (4, 1, 0, 8), (4, 10)]
)
def test_a_batch_of_another_shape_has_no_grid(shape: tuple[int, ...]) -> None:
    assert image_grid(torch.zeros(shape)) is None


def test_a_grid_does_not_change_the_batch() -> None:
    batch: Tensor = torch.randn(4, 1, 8, 8)
    before = batch.clone()

    image_grid(batch)

    assert torch.equal(batch, before)


# -- files for MLflow ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["faces", "faces/fake", "a.b-c_d e"])
def test_files_are_named_as_by_mlflow_s_client(store: Store, tmp_path: Path, name: str) -> None:
    picture = Image.new("RGB", (300, 200), (10, 20, 30))
    run = store.client.create_run("0")
    store.client.log_image(
        run.info.run_id, picture, key=name, step=7, timestamp=1234, synchronous=True
    )

    def anonymous(paths: Any) -> set[str]:
        return {re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "UUID", path) for path in paths}

    ours = dict(mlflow_image_files(name, picture, 7, 1234))
    assert anonymous(ours) == anonymous(store.artifacts(run))
    assert all("UUID" in path for path in anonymous(ours))


def test_the_files_are_the_picture_and_a_smaller_preview() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 600, 3), np.uint8))

    (png, full), (webp, preview) = mlflow_image_files("noise", picture, 0, 1)

    assert png.endswith(".png")
    assert full is picture
    assert webp == png.removesuffix(".png") + "+compressed.webp"
    assert preview.size == (256, 128)
    assert picture.size == (600, 300)
    for path, image in ((png, full), (webp, preview)):
        file = io.BytesIO()
        image.save(file, format=path.rpartition(".")[2])
        assert Image.open(file).size == image.size


def test_a_small_picture_is_its_own_preview() -> None:
    picture = Image.new("L", (28, 28), 77)

    _, (_, preview) = mlflow_image_files("digit", picture, 0, 1)

    assert preview.size == (28, 28)
    assert preview.getpixel((3, 3)) == 77


def test_pictures_of_the_same_step_have_different_files() -> None:
    picture = Image.new("L", (2, 2))

    paths = [path for _ in range(2) for path, _ in mlflow_image_files("x", picture, 1, 1)]

    assert len(set(paths)) == 4
