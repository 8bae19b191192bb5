"""Histograms count every element once, in bins that never depend on the data."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.helpers import Store
from tracker import ArgumentError, StoreError, load_histograms, load_nonfinite, start_run
from tracker.capture.histograms import Histogram, bin_edges, histograms
from tracker.capture.network_histograms import HistogramState, network_histograms

# The format, spelt out: the lower edges of the bins of positive numbers, 1, 2, …
LOWER = np.array([math.ldexp(1 + m / 8, e) for e in range(-126, 1024) for m in range(8)])
LAST = len(LOWER)  # the bin of the largest float64
LAST_FLOAT32 = (127 + 126) * 8 + 8

patient = settings(deadline=None)


def values_of(tensor: Tensor) -> npt.NDArray[np.float64]:
    """The real numbers in a tensor, as float64."""
    tensor = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg().double().numpy().ravel()


def counted_by_hand(values: npt.NDArray[np.float64]) -> Histogram:
    """The histogram computed by searching for each number among the edges."""
    finite = values[np.isfinite(values)]
    size = np.searchsorted(LOWER, np.abs(finite), side="right")
    bins, counts = np.unique(np.where(finite < 0, -size, size), return_counts=True)
    return Histogram(
        bins,
        counts,
        int(np.isnan(values).sum()),
        int(np.isposinf(values).sum()),
        int(np.isneginf(values).sum()),
    )


def plain(histogram: Histogram) -> tuple[Any, ...]:
    """A histogram as a tuple, which `==` can compare."""
    return (histogram.bins.tolist(), histogram.counts.tolist(), *histogram[2:])


def count(tensor: Tensor) -> tuple[Any, ...]:
    (histogram,) = histograms([tensor])
    return plain(histogram)


FLOATS = {np.float16: 16, np.float32: 32, np.float64: 64}
COMPLEX = {np.complex64: 64, np.complex128: 128}
INTEGERS = {
    np.uint8: (0, 255),
    np.int8: (-128, 127),
    np.int16: (-(2**15), 2**15 - 1),
    np.int32: (-(2**31), 2**31 - 1),
    np.int64: (-(2**53), 2**53),  # a float64 cannot distinguish larger ones
}
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
FLOAT32 = st.floats(width=32)
FLOAT64 = st.floats()

# Ways to lay out the same elements in memory, or to make them part of a graph.
LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    lambda tensor: tensor,
    lambda tensor: tensor.mT if tensor.dim() > 1 else tensor,
    lambda tensor: tensor.reshape(-1)[::2],
    lambda tensor: tensor.expand(3, *tensor.shape),
    lambda tensor: tensor.flatten()[1:],
    lambda tensor: tensor.conj() if tensor.is_complex() else tensor,
    lambda tensor: tensor.clone().requires_grad_() * 1 if tensor.is_floating_point() else tensor,
]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Tensors of any dtype, shape and layout."""
    dtype: Any = draw(st.sampled_from([*FLOATS, *COMPLEX, *INTEGERS, bool, torch.bfloat16]))
    if dtype in FLOATS:
        elements: Any = st.floats(width=FLOATS[dtype])
    elif dtype in COMPLEX:
        elements = st.complex_numbers(width=COMPLEX[dtype])
    elif dtype in INTEGERS:
        elements = st.integers(*INTEGERS[dtype])
    else:
        elements = st.booleans() if dtype is bool else FLOAT32
    kind = np.float32 if dtype is torch.bfloat16 else dtype
    tensor = torch.from_numpy(np.array(draw(hnp.arrays(kind, SHAPES, elements=elements))))
    if dtype is torch.bfloat16:
        tensor = tensor.bfloat16()
    return draw(st.sampled_from(LAYOUTS))(tensor)


# -- counts --------------------------------------------------------------------------------------


@given(tensors())
@patient
def test_every_element_is_counted_in_its_bin(tensor: Tensor) -> None:
    (histogram,) = histograms([tensor])

    values = values_of(tensor)
    assert plain(histogram) == plain(counted_by_hand(values))
    assert (
        histogram.counts.sum() + histogram.nan + histogram.posinf + histogram.neginf == values.size
    )


@given(tensors())
@patient
def test_each_bin_holds_the_numbers_between_its_edges(tensor: Tensor) -> None:
    (histogram,) = histograms([tensor])

    values = values_of(tensor)
    bins = histogram.bins[np.abs(histogram.bins) < LAST]
    for number, left, right in zip(bins, *bin_edges(bins), strict=True):
        within = (values > left) & (values < right)
        if number:
            within |= values == (left if number > 0 else right)  # the edge nearer to zero
        assert histogram.counts[histogram.bins == number].item() == within.sum()


@given(st.lists(tensors(), max_size=6))
@patient
def test_tensors_of_different_types_are_counted_separately(several: list[Tensor]) -> None:
    assert list(map(plain, histograms(several))) == [
        plain(counted_by_hand(values_of(tensor))) for tensor in several
    ]


@given(tensors())
@patient
def test_counting_does_not_change_the_tensor(tensor: Tensor) -> None:
    before = values_of(tensor).tobytes()
    needed = tensor.requires_grad

    histograms([tensor])

    assert values_of(tensor).tobytes() == before
    assert tensor.requires_grad == needed


@given(st.lists(FLOAT32), st.lists(FLOAT32))
@patient
def test_counts_of_parts_can_be_added(one: list[float], other: list[float]) -> None:
    """Epochs and ranks can be added because the bins do not depend on the data."""
    parts = histograms([torch.tensor(one), torch.tensor(other)])
    (whole,) = histograms([torch.tensor(one + other)])

    added: dict[int, int] = {}
    for part in parts:
        for number, size in zip(part.bins.tolist(), part.counts.tolist(), strict=True):
            added[number] = added.get(number, 0) + size
    assert dict(sorted(added.items())) == dict(zip(*plain(whole)[:2], strict=True))
    assert (whole.nan, whole.posinf, whole.neginf) == tuple(
        sum(part[field] for part in parts) for field in (2, 3, 4)
    )


@given(st.lists(st.floats(width=16)))
@patient
def test_a_number_has_the_same_bin_in_every_precision(numbers: list[float]) -> None:
    half = torch.tensor(numbers, dtype=torch.float16)

    assert count(half) == count(half.float()) == count(half.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zeros_of_either_sign_and_subnormals_are_in_bin_zero(dtype: torch.dtype) -> None:
    below = math.nextafter(2.0**-126, 0) if dtype == torch.float64 else 2.0**-126 - 2.0**-149
    numbers = [0.0, -0.0, 2.0**-149, -(2.0**-149), below, -below]

    assert count(torch.tensor(numbers, dtype=dtype)) == ([0], [6], 0, 0, 0)


@given(st.integers(1, LAST))
@example(1)
@example(LAST_FLOAT32)
@example(LAST)
@patient
def test_an_edge_belongs_to_the_bin_farther_from_zero(number: int) -> None:
    edge = LOWER[number - 1]
    before = np.nextafter(edge, 0)

    histogram = count(torch.tensor([edge, before, -edge, -before], dtype=torch.float64))

    if number == 1:
        assert histogram == ([-1, 0, 1], [1, 2, 1], 0, 0, 0)
    else:
        assert histogram == ([-number, 1 - number, number - 1, number], [1] * 4, 0, 0, 0)


@given(st.integers(-126, 127))
@patient
def test_each_octave_has_eight_bins(exponent: int) -> None:
    octave = torch.tensor([2.0**exponent * (1 + eighth / 8) for eighth in range(8)])
    first = (exponent + 126) * 8 + 1

    assert count(octave) == (list(range(first, first + 8)), [1] * 8, 0, 0, 0)
    assert count(-octave) == (list(range(-first - 7, -first + 1)), [1] * 8, 0, 0, 0)


@pytest.mark.parametrize(
    ("dtype", "last"), [(torch.float32, LAST_FLOAT32), (torch.float64, LAST)], ids=str
)
def test_the_largest_number_is_finite_and_infinity_is_not(dtype: torch.dtype, last: int) -> None:
    largest = torch.finfo(dtype).max
    numbers = [largest, -largest, math.inf, math.inf, -math.inf, math.nan, -math.nan]

    assert count(torch.tensor(numbers, dtype=dtype)) == ([-last, last], [1, 1], 2, 2, 1)


NARROW = [
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_value_of_a_narrow_type_is_counted_in_its_bin(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 8 * dtype.itemsize, dtype=torch.int32)
    every = every.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype)
    numbers = every[~every.float().isnan()]

    assert count(numbers) == plain(counted_by_hand(values_of(numbers)))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_nan_is_counted_in_every_narrow_type(dtype: torch.dtype) -> None:
    nan = torch.tensor([math.nan]).to(dtype)
    assert nan.float().isnan().all()

    assert count(nan) == ([], [], 1, 0, 0)


def test_sparse_tensors_are_counted_like_dense_ones() -> None:
    embedding = nn.Embedding(50, 3, sparse=True)
    embedding(torch.tensor([7, 7, 30])).square().sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None
    assert sum(count(gradient)[1]) == 150
    duplicates = torch.sparse_coo_tensor(
        torch.tensor([[1, 1]]), torch.tensor([0.5, 1.5]), (3,), check_invariants=True
    )
    dense = torch.zeros(4, 5)
    dense[1, 2], dense[3, 0] = 0.5, -3.0
    others = [dense.to(dtype).to_sparse() for dtype in (torch.half, torch.double, torch.cfloat)]

    for sparse in (gradient, duplicates, *others):
        assert sparse.is_sparse
        assert count(sparse) == count(sparse.to_dense())


def test_a_lazily_negated_view_is_counted_by_its_values() -> None:
    lazy = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert lazy.is_neg()

    assert count(lazy) == count(torch.tensor([-2.0, 4.0]))


def test_a_tensor_of_millions_of_elements_is_counted_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(5_000_011, generator=generator)
    tensor[::1_000_000] = math.nan

    (histogram,) = histograms([tensor])

    assert plain(histogram) == plain(counted_by_hand(values_of(tensor)))
    assert histogram.nan == 6


def test_tensors_of_very_different_sizes_are_counted_separately() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [2_200_000, 7, 0, 2_200_000, 4_200_000, 1]
    several = [torch.randn(size, generator=generator) * 2.0**n for n, size in enumerate(sizes)]

    assert list(map(plain, histograms(several))) == [
        plain(counted_by_hand(values_of(tensor))) for tensor in several
    ]


def test_without_elements_there_is_nothing_to_count() -> None:
    assert histograms([]) == []
    for shape in ((0,), (3, 0, 2)):
        for dtype in (torch.float32, torch.float64, torch.complex64):
            assert count(torch.empty(shape, dtype=dtype)) == ([], [], 0, 0, 0)


# -- bins ----------------------------------------------------------------------------------------


def test_edges_are_eighths_of_octaves_without_gap_or_overlap() -> None:
    left, right = bin_edges(range(1, LAST))
    np.testing.assert_array_equal(left, LOWER[:-1])
    np.testing.assert_array_equal(right, LOWER[1:])

    mirrored_left, mirrored_right = bin_edges(range(-1, -LAST, -1))
    np.testing.assert_array_equal(mirrored_left, -right)
    np.testing.assert_array_equal(mirrored_right, -left)

    left, right = bin_edges(range(1 - LAST, LAST))
    np.testing.assert_array_equal(left[1:], right[:-1])
    assert (left < right).all()
    assert (left[LAST - 1], right[LAST - 1]) == (-(2.0**-126), 2.0**-126)  # bin 0


@pytest.mark.parametrize(
    ("bins", "left", "right"),
    [([1017, -1017, 1017], [2.0, -2.25, 2.0], [2.25, -2.0, 2.25]), ([], [], [])],
)
def test_edges_are_returned_in_the_given_order(
    bins: list[int], left: list[float], right: list[float]
) -> None:
    assert [edges.tolist() for edges in bin_edges(iter(bins))] == [left, right]


def test_the_outermost_bins_hold_the_largest_float64() -> None:
    (low, high), (low_end, high_end) = bin_edges([-LAST, LAST])
    largest = np.finfo(np.float64).max

    assert high == -low_end == LOWER[-1]
    assert low <= -largest
    assert high_end >= largest


# -- networks ------------------------------------------------------------------------------------


def of_network(network: nn.Module, step: int = 1) -> dict[tuple[str, str], tuple[Any, ...]]:
    """The histograms of a network by tensor and kind; each pair exists once."""
    items = network_histograms(network, step)["histograms"]
    keys = [(item["tensor"], item["kind"]) for item in items]
    assert len(keys) == len(set(keys))
    fields = ("bins", "counts", "nan", "posinf", "neginf")
    return {key: tuple(item[f] for f in fields) for key, item in zip(keys, items, strict=True)}


class Mixed(nn.Module):
    """Parameters of several precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.single = nn.Linear(3, 4)
        self.double = nn.Linear(4, 5).double()
        self.half = nn.Linear(5, 2).bfloat16()
        self.phase = nn.Parameter(torch.tensor([1 + 2j, -0.5j]))
        self.table = nn.Parameter(torch.arange(6), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(2.0))


def test_a_mixed_precision_network_has_histograms_of_all_weights_and_gradients() -> None:
    torch.manual_seed(0)
    network = Mixed()
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)

    counts = of_network(network)

    for name, parameter in network.named_parameters():
        assert counts[name, "weight"] == count(parameter)
        assert sum(counts[name, "weight"][1]) == parameter.numel() * (1 + parameter.is_complex())
        if parameter.grad is not None:
            assert counts[name, "gradient"] == count(parameter.grad)
    assert ("table", "gradient") not in counts
    assert len(counts) == 2 * len(list(network.parameters())) - 1


def test_a_parameter_without_a_gradient_has_only_a_weight_histogram() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    network[0].requires_grad_(False)
    network(torch.ones(1, 2)).sum().backward()

    assert set(of_network(network)) == {
        ("0.weight", "weight"),
        ("0.bias", "weight"),
        ("1.weight", "weight"),
        ("1.weight", "gradient"),
        ("1.bias", "weight"),
        ("1.bias", "gradient"),
    }


def test_an_uninitialized_layer_has_no_histogram_yet() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(1))
    assert set(of_network(network)) == {("0.weight", "weight"), ("0.bias", "weight")}

    network(torch.ones(1, 2))

    assert ("1.weight", "weight") in of_network(network)


def test_tied_weights_are_counted_once() -> None:
    network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    network[1].weight = network[0].weight
    network(torch.ones(1, 4)).sum().backward()

    counts = of_network(network)

    assert set(counts) == {("0.weight", "weight"), ("0.weight", "gradient")}
    assert sum(counts["0.weight", "weight"][1]) == 16


def parameter(tensor: Tensor) -> nn.Parameter:
    """A frozen parameter, as those of quantised networks are."""
    return nn.Parameter(tensor, requires_grad=False)


ELEMENTS = torch.tensor([[0.5, 2.0], [-4.0, 0.0]])
COUNTED: dict[str, Callable[[], Tensor]] = {
    "float8_e4m3": lambda: ELEMENTS.to(torch.float8_e4m3fn),
    "float8_e5m2": lambda: ELEMENTS.to(torch.float8_e5m2),
    "float16": lambda: ELEMENTS.half(),
    "bfloat16": lambda: ELEMENTS.bfloat16(),
    "int8": lambda: ELEMENTS.mul(2).to(torch.int8).double() / 2,
    "quantized": lambda: torch.quantize_per_tensor(ELEMENTS, 0.5, 64, torch.quint8),
    "sparse": ELEMENTS.to_sparse,
    "sparse_csr": ELEMENTS.to_sparse_csr,
    "mkldnn": ELEMENTS.to_mkldnn,
    "expanded": lambda: ELEMENTS.expand(1, 2, 2),
    "complex": lambda: torch.view_as_complex(ELEMENTS),
    "complex_half": lambda: ELEMENTS.to(torch.float16).view(torch.complex32),
    "nested": lambda: torch.nested.nested_tensor([ELEMENTS[0], ELEMENTS[1]]),
    "jagged": lambda: torch.nested.nested_tensor(list(ELEMENTS), layout=torch.jagged),
}
LEFT_OUT: dict[str, Callable[[], Tensor]] = {
    "meta": lambda: torch.empty(3, device="meta"),
    "float4": lambda: torch.zeros(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # prototypes of torch
@pytest.mark.parametrize("kind", COUNTED)
def test_every_kind_of_parameter_is_counted(kind: str) -> None:
    network = nn.Module()
    network.extra = parameter(COUNTED[kind]())
    state = HistogramState()

    first, again = (network_histograms(network, step, state)["histograms"] for step in (1, 2))

    (item,) = first
    assert (item["bins"], item["counts"]) == count(ELEMENTS)[:2]
    assert again in ([], first)  # [] if its change can be told


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_a_parameter_without_numbers_is_left_out_with_one_sentence(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    network = nn.Linear(2, 2)
    network.extra = parameter(LEFT_OUT[kind]())
    network(torch.ones(1, 2)).sum().backward()
    state = HistogramState()

    for step in (1, 2):
        items = network_histograms(network, step, state)["histograms"]
        assert {item["tensor"] for item in items} == {"weight", "bias"}

    (record,) = caplog.records
    assert record.getMessage().startswith("The histograms of extra (weight) are left out: ")


def test_a_shard_is_left_out_and_a_replica_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        network = nn.Module()
        network.replica = nn.Parameter(DTensor.from_local(ELEMENTS, mesh, [Replicate()]))
        network.shard = nn.Parameter(DTensor.from_local(ELEMENTS, mesh, [Shard(0)]))
        items = network_histograms(network, 1)["histograms"]
    finally:
        dist.destroy_process_group()

    (item,) = items
    assert (item["tensor"], item["counts"]) == ("replica", count(ELEMENTS)[1])
    assert "shard (weight) are left out: each rank has a part of it." in caplog.text


def test_a_half_precision_network_is_not_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Module()
    size = 1 << 20
    network.large = nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
    converted: list[int] = []
    convert = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda one: converted.append(one.numel()) or convert(one))

    counts = of_network(network)

    assert counts["large", "weight"][1] == [size]
    assert max(converted) <= size // 8


def test_wrappers_do_not_rename_tensors() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    names = set(of_network(network))

    assert set(of_network(nn.DataParallel(network))) == names
    assert set(of_network(torch.compile(network))) == names  # type: ignore[arg-type]
    network[0] = torch.compile(network[0])
    assert set(of_network(network)) == names


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_cleared_before_the_end_of_the_epoch_are_said_once(
    to_none: bool, caplog: pytest.LogCaptureFixture
) -> None:
    network = nn.Linear(2, 1)
    state = HistogramState()
    network(torch.ones(1, 2)).sum().backward()
    network_histograms(network, 1, state)
    assert caplog.records == []

    network.zero_grad(set_to_none=to_none)
    network_histograms(network, 2, state)
    assert caplog.records == []  # it may not be trained at all
    for step in (3, 4):
        network.weight.data.mul_(3)
        network_histograms(network, step, state)

    (record,) = caplog.records
    assert record.getMessage() == (
        "All gradients of the network are missing or zero when the epoch ends; to have their "
        "histograms, call zero_grad() before backward(), not after the step."
    )


def test_a_sum_that_float16_cannot_hold_shows_a_change() -> None:
    network = nn.Module()
    network.table = parameter(torch.full((4096,), 1000.0, dtype=torch.float16))
    state = HistogramState()
    assert network_histograms(network, 1, state)["histograms"]
    assert not network_histograms(network, 2, state)["histograms"]

    network.table.add_(1000)

    assert network_histograms(network, 3, state)["histograms"]


def test_a_network_without_parameters_has_no_histograms() -> None:
    assert network_histograms(nn.Sequential(nn.ReLU()), 3) == {"step": 3, "histograms": []}


def test_the_record_of_a_network_is_json() -> None:
    network = Mixed()
    network.scale.data.fill_(math.nan)
    record = network_histograms(network, 7)

    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["step"] == 7


def test_counting_does_not_change_the_network() -> None:
    network = Mixed()
    network.scale.grad = torch.tensor(1.5)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    gradients = [parameter.grad for parameter in network.parameters()]

    network_histograms(network, 1)

    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    assert all(p.grad is g for p, g in zip(network.parameters(), gradients, strict=True))


# -- read back from a run ------------------------------------------------------------------------

COLUMNS = ["tensor", "kind", "step", "left", "right", "count", "unit"]


def logged(network: nn.Module, steps: int = 1, *, uri: str | None = None) -> str:
    """The id of a run with histograms of `network`, whose weights double at each step."""
    with start_run(tracking_uri=uri) as run:
        for step in range(1, steps + 1):
            run.log_histograms(network, step)
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter *= 2
    assert run.run_id
    return run.run_id


def test_histograms_are_read_back_from_a_run(tracking_uri: str) -> None:
    network = nn.Linear(5, 4)
    network(torch.ones(2, 5)).sum().backward()
    tensors = {
        (name, kind): (tensor.detach().clone(), 2.0 if kind == "weight" else 1.0)
        for name, parameter in network.named_parameters()
        for kind, tensor in (("weight", parameter), ("gradient", parameter.grad))
        if tensor is not None
    }

    frame = load_histograms(logged(network, steps=12, uri=tracking_uri), tracking_uri)

    assert list(frame.columns) == COLUMNS
    assert pd.api.types.is_string_dtype(frame["tensor"])
    assert pd.api.types.is_string_dtype(frame["kind"])
    assert frame.dtypes[2:6].astype(str).tolist() == ["int64", "float64", "float64", "int64"]
    assert frame["step"].is_monotonic_increasing
    assert frame["step"].unique().tolist() == list(range(1, 13))
    for (name, kind, step), rows in frame.groupby(["tensor", "kind", "step"]):
        values, growth = tensors[name, kind]
        expected = counted_by_hand(values_of(values * growth ** (step - 1)))
        left, right = bin_edges(expected.bins)
        assert rows["left"].tolist() == left.tolist()
        assert rows["right"].tolist() == right.tolist()
        assert rows["count"].tolist() == expected.counts.tolist()
    assert len(frame.groupby(["tensor", "kind", "step"])) == 2 * 2 * 12


def test_bins_are_the_same_in_every_epoch(tracking_uri: str) -> None:
    """Doubled weights are eight bins higher; no bin has moved."""
    network = nn.Linear(50, 2, bias=False)
    nn.init.uniform_(network.weight, 0.5, 1.0)

    frame = load_histograms(logged(network, steps=2), tracking_uri)

    first, second = (frame[frame["step"] == step] for step in (1, 2))
    assert (2 * first["left"]).tolist() == second["left"].tolist()
    assert (2 * first["right"]).tolist() == second["right"].tolist()
    assert first["count"].tolist() == second["count"].tolist()


def test_histograms_can_be_read_during_the_run(tracking_uri: str) -> None:
    with start_run() as run:
        run.log_histograms(nn.Linear(2, 2), 1)
        run.flush()
        assert run.run_id
        assert load_histograms(run.run_id)["count"].sum() == 6
        assert load_nonfinite(run.run_id).empty


class Broken(nn.Module):
    """One finite parameter, one with some numbers that are not, and one of NaNs only."""

    def __init__(self) -> None:
        super().__init__()
        self.sound = nn.Parameter(torch.ones(3))
        self.cracked = nn.Parameter(torch.tensor([1.0, math.nan, math.inf, math.inf, -math.inf]))
        self.lost = nn.Parameter(torch.full((2, 2), math.nan))


def test_counts_of_nonfinite_values_are_read_back_separately(tracking_uri: str) -> None:
    run_id = logged(Broken(), steps=2)

    frame = load_nonfinite(run_id, tracking_uri)
    assert list(frame.columns) == ["tensor", "kind", "step", "nan", "posinf", "neginf"]
    assert [str(dtype) for dtype in frame.dtypes[2:]] == ["int64"] * 4
    assert frame.values.tolist() == [
        ["cracked", "weight", 1, 1, 2, 1],
        ["lost", "weight", 1, 4, 0, 0],
        ["cracked", "weight", 2, 1, 2, 1],
        ["lost", "weight", 2, 4, 0, 0],
    ]
    frame = load_histograms(run_id, tracking_uri)
    assert frame["tensor"].tolist() == ["sound", "cracked"] * 2
    assert frame["count"].tolist() == [3, 1] * 2
    assert [str(frame[name].dtype) for name in ("step", "count")] == ["int64", "int64"]


def test_a_run_without_rows_has_the_columns(tracking_uri: str) -> None:
    network = nn.Linear(2, 2)
    finite = load_nonfinite(logged(network), tracking_uri)
    for parameter in network.parameters():
        nn.init.constant_(parameter, math.nan)
    nonfinite = load_histograms(logged(network), tracking_uri)

    assert finite.empty
    assert list(finite.columns) == ["tensor", "kind", "step", "nan", "posinf", "neginf"]
    assert nonfinite.empty
    assert list(nonfinite.columns) == COLUMNS


def test_the_largest_float64_is_read_back(tracking_uri: str) -> None:
    network = nn.Linear(1, 1, bias=False).double()
    largest = torch.finfo(torch.float64).max
    nn.init.constant_(network.weight, largest)

    (row,) = load_histograms(logged(network), tracking_uri).to_dict("records")

    assert row["left"] == LOWER[-1]
    assert row["right"] >= largest
    assert row["count"] == 1


def test_a_missing_run_and_a_run_without_histograms_are_errors(tracking_uri: str) -> None:
    with start_run() as run:
        pass
    for load in (load_histograms, load_nonfinite):
        with pytest.raises(StoreError, match=rf"^run_id='{run.run_id}' .*'histograms'\.$"):
            load(run.run_id or "", tracking_uri)
        with pytest.raises(StoreError, match="0123456789abcdef"):
            load("0123456789abcdef", tracking_uri)


# -- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_a_gpu_and_the_cpu_count_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    wild = torch.randint(-(2**31), 2**31, (100_000,), generator=generator, dtype=torch.int32)
    several = [
        wild.view(torch.float32).nan_to_num(nan=math.nan),  # any number, with torch's NaN
        torch.randn(5_000_011, generator=generator),
        torch.randn(1_000, generator=generator).bfloat16(),
        torch.randn(30, 40, generator=generator, dtype=torch.float64).mT,
        torch.randn(10, generator=generator, dtype=torch.complex64),
        torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 2.0**-149]),
        torch.tensor(3.0),
        torch.empty(0),
        torch.eye(30).to_sparse(),
    ]

    on_gpu = histograms([tensor.cuda() for tensor in several])

    assert list(map(plain, on_gpu)) == list(map(plain, histograms(several)))


@pytest.mark.cuda
def test_histograms_of_a_network_on_a_gpu_wait_once() -> None:
    network = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 10).double()).cuda()
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    network_histograms(network, 1)  # loads the kernels

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            network_histograms(network, 2)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    waits = [str(each.message) for each in caught if "synchronizing" in str(each.message)]
    assert len(waits) == 1  # the transfer of the counts


# -- frozen parts ----------------------------------------------------------------------------------


def test_frozen_weights_are_logged_again_only_when_they_change(tracking_uri: str) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    network[0].requires_grad_(False)
    with start_run() as run:
        for step in (1, 2, 3, 4, 5):
            if step == 3:
                network[0].weight.data.mul_(2)  # as for an average of weights
            if step == 4:
                network[0].requires_grad_(True)  # thawed
            run.log_histograms(network, step)
        run.flush()
        frame = load_histograms(run.run_id)
    steps = frame[frame["kind"] == "weight"].groupby("tensor")["step"].unique().map(list).to_dict()
    assert steps["1.weight"] == [1, 2, 3, 4, 5]
    assert steps["0.weight"] == [1, 3, 4, 5]
    assert steps["0.bias"] == [1, 4, 5]


def test_histograms_of_the_users_tensors_are_kept_beside_those_of_networks(store: Store) -> None:
    values = {
        "array": np.array([1.0, 2.0, np.nan]),
        "list": [[1, 2], [3, 4]],
        "number": 3,
        "tensor": torch.ones(5, requires_grad=True),
    }
    with start_run() as run:
        for network in (nn.Linear(2, 1), nn.Bilinear(1, 1, 1)):  # of a GAN, say
            run.log_histograms(network, 3)
        for name, value in values.items():
            run.log_histogram(name, value, 3)
        run.log_histogram("tensor", values["tensor"], step=4)
        with pytest.raises(ArgumentError, match="tensor is a str that cannot be counted"):
            run.log_histogram("text", "a")
        with pytest.raises(ArgumentError, match="name='' is not allowed"):
            run.log_histogram("", 1.0)
    run_id = store.run().info.run_id
    table = load_histograms(run_id, store.uri)
    sizes = table.groupby(["unit", "step", "tensor", "kind"])["count"].sum().to_dict()
    assert sizes == {
        ("epoch", 3, "weight", "weight"): 3,  # of both networks
        ("epoch", 3, "bias", "weight"): 2,
        ("step", 3, "array", "value"): 2,
        ("step", 3, "list", "value"): 4,
        ("step", 3, "number", "value"): 1,
        ("step", 3, "tensor", "value"): 5,
        ("step", 4, "tensor", "value"): 5,
    }
    assert load_nonfinite(run_id, store.uri)["nan"].tolist() == [1]
    assert {file for file in store.artifacts(store.run()) if "/" in file} == {
        *("histograms/000003.json", "histograms/000003-1.json", "histograms/step-000003.json"),
        *(f"histograms/step-000003-{part}.json" for part in (1, 2, 3)),
        "histograms/step-000004.json",
    }
