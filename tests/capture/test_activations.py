"""Histograms of activations count the outputs of leaf modules without changing the network."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

from tracker import Every
from tracker.capture.activations import Activations
from tracker.capture.histograms import histograms
from tracker.training.networks import as_networks


class Output(NamedTuple):
    indices: Tensor
    values: Tensor


class Several(nn.Module):
    """Returns several tensors in one of the ways in which modules do."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, inputs: Tensor) -> Any:
        return self.wrap(inputs.argmax(1), inputs)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(self.layer(inputs))


INPUTS = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
LINEAR = nn.Linear(3, 2)


def in_place() -> Any:
    network = nn.Sequential(nn.Linear(3, 2), nn.ReLU(inplace=True))
    before = network[0](INPUTS)
    return network, INPUTS, {"0": [before.clone()], "1": [before.relu()]}


def twice() -> Any:
    network = Twice()
    first = network.layer(INPUTS)
    return network, INPUTS, {"layer": [first, network.layer(first)]}


def lstm() -> Any:
    network = nn.Sequential(nn.LSTM(3, 2))
    return network, INPUTS, {"0": [network[0](INPUTS)[0]]}


def packed() -> Any:
    network, sequence = nn.GRU(3, 2), pack_sequence([INPUTS, INPUTS[:2]])
    return network, sequence, {"GRU": [network(sequence)[0].data]}


def attention() -> Any:
    network = nn.TransformerEncoderLayer(4, 1, 5, dropout=0.0)
    inputs = torch.rand(2, 3, 4)
    attended = network.self_attn(inputs, inputs, inputs)[0]
    return network, inputs, {"self_attn": [attended], "dropout1": [attended]}


def parametrized() -> Any:
    network = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)))
    return network, INPUTS, {"0": [network(INPUTS)]}


def several_networks() -> Any:
    parts = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 1))
    network = as_networks({"g": parts[0], "d": parts[1]})
    network.forward = lambda inputs: parts[1](parts[0](inputs))
    return network, INPUTS, {"g": [parts[0](INPUTS)], "d.0": [network.forward(INPUTS)]}


def frozen() -> Any:
    network = nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Linear(3, 2))
    return network, INPUTS, {"0": [network[0](INPUTS)], "1": [network(INPUTS)]}


def half() -> Any:
    network = nn.Sequential(nn.Linear(3, 2, dtype=torch.bfloat16))
    return network, INPUTS.bfloat16(), {"0": [network(INPUTS.bfloat16())]}


def of_two_types() -> Any:
    network = nn.Sequential(nn.Identity(), Several(lambda _, x: x.double()), nn.Identity())
    network.append(network[0])
    twice = INPUTS.double()
    return network, INPUTS, {"0": [INPUTS, twice], "1": [twice], "2": [twice]}


def structured(wrap: Callable[[Tensor, Tensor], Any]) -> Any:
    return nn.Sequential(Several(wrap)), INPUTS, {"0": [INPUTS]}


NETWORKS: dict[str, Callable[[], Any]] = {
    "a layer in place": in_place,
    "a layer that is called twice": twice,
    "a recurrent layer": lstm,
    "a packed sequence": packed,
    "attention": attention,
    "a parametrisation": parametrized,
    "several networks": several_networks,
    "a frozen layer in evaluation mode": frozen,
    "bfloat16": half,
    "float32 and float64": of_two_types,
    "complex": lambda: (*structured(lambda _, x: x + 0j)[:2], {"0": [INPUTS + 0j]}),
    "a tuple": lambda: structured(Output),
    "a mapping": lambda: structured(lambda i, x: {"logits": x, "more": [x]}),
    "integers": lambda: (*structured(lambda i, x: i)[:2], {}),
    "None": lambda: (*structured(lambda i, x: None)[:2], {}),
    "DataParallel": lambda: (nn.DataParallel(LINEAR), INPUTS, {"Linear": [LINEAR(INPUTS)]}),
}


def counted(activations: Activations) -> dict[str, dict[str, Any]]:
    return {one.pop("tensor"): one for one in activations.take()}


def of_all(said: set[str] | None = None) -> Activations:
    return Activations(Every(activations=True), set() if said is None else said)


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_outputs_of_each_leaf_are_counted(kind: str) -> None:
    torch.manual_seed(0)
    network, inputs, expected = NETWORKS[kind]()
    activations = of_all()
    activations.start(network)
    (network.forward if kind == "several networks" else network)(inputs)
    activations.stop()
    assert hooks(network) == 0
    network(inputs)  # is not counted
    found = counted(activations)
    assert not found.keys() - expected.keys() or kind == "attention"
    for name, outputs in expected.items():
        flat = [torch.view_as_real(one) if one.is_complex() else one for one in outputs]
        (sum_,) = histograms([torch.cat([one.detach().double().flatten() for one in flat])])
        assert found[name]["kind"] == "activation"
        assert (found[name]["bins"], found[name]["counts"]) == (
            sum_.bins.tolist(),
            sum_.counts.tolist(),
        )


def test_only_the_modules_that_are_wanted_are_watched() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.ReLU()))
    activations = Activations(Every(only="1.*", activations=True), set())
    activations.start(network)
    assert [hooks(module) for module in network] == [0, 1]
    network(INPUTS)
    assert set(counted(activations)) == {"1.0"}


def test_a_pattern_of_no_module_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    activations = Activations(Every(only="0.weight", activations=True), set())
    for _ in range(2):
        activations.start(nn.Sequential(nn.Linear(3, 2)))
        assert activations.take() == []
    assert caplog.messages == [
        "There are no histograms of activations: only='0.weight' is the name of no leaf module."
    ]


def evaluation(network: nn.Module) -> None:
    network.eval()(INPUTS)
    network.train()


def without_gradients(network: nn.Module) -> None:
    with torch.no_grad():
        network(INPUTS)


def traced(network: nn.Module) -> None:
    torch.jit.trace(network, INPUTS)


def exported(network: nn.Module) -> None:
    torch.export.export(network, (INPUTS,))


def of_fake_tensors(network: nn.Module) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        network(mode.from_tensor(INPUTS))


def transformed(network: nn.Module) -> None:
    torch.func.vmap(network)(INPUTS)


def of_a_copy(network: nn.Module) -> None:
    copy.deepcopy(network)(INPUTS)


def of_a_pickle(network: nn.Module) -> None:
    data = pickle.dumps(network)
    assert b"tracker" not in data
    pickle.loads(data)(INPUTS)
    torch.save(network, file := io.BytesIO())
    file.seek(0)
    torch.load(file, weights_only=False)(INPUTS)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "call",
    [
        *(evaluation, without_gradients, traced, exported, of_fake_tensors, transformed),
        *(of_a_copy, of_a_pickle),
    ],
)
def test_what_is_no_step_of_the_training_is_not_counted(call: Any) -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    activations = of_all()
    activations.start(network)
    call(network)
    network(INPUTS)
    call(network)
    found = counted(activations)
    assert {name: sum(one["counts"]) for name, one in found.items()} == {"0": 8, "1": 8}


def test_what_a_backward_pass_computes_again_is_not_counted() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    activations = of_all()
    activations.start(network)
    result: Any = checkpoint(network, INPUTS.clone().requires_grad_(), use_reentrant=False)
    result.sum().backward()
    assert {name: sum(one["counts"]) for name, one in counted(activations).items()} == {
        "0": 8,
        "1": 8,
    }


def test_outputs_that_cannot_be_counted_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    said: set[str] = set()
    for _ in range(2):
        activations = of_all(said)
        activations.start(network)
        torch.func.vmap(network)(INPUTS)
        assert activations.take() == []
    assert caplog.messages == [
        "The histograms of 0 (activation) and 1 more are left out: they are inside a transform of "
        "torch.func."
    ]


def test_a_step_without_a_call_is_said(caplog: pytest.LogCaptureFixture) -> None:
    activations = of_all()
    activations.start(nn.Linear(3, 2))
    assert activations.take() == []
    assert "without a forward pass in training mode" in caplog.text


# -- torch.compile ------------------------------------------------------------------------------


class Compiled(NamedTuple):
    network: nn.Module
    call: Callable[[Tensor], Any]
    left_out: str
    """What the sentence names."""


def parts() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 2), nn.Tanh()))


def whole() -> Compiled:
    network: Any = torch.compile(parts(), backend="eager")
    return Compiled(network, network, "Sequential has")


def inside_another() -> Compiled:
    network = nn.DataParallel(torch.compile(parts(), backend="eager"))  # type: ignore[arg-type]
    return Compiled(network, network, "Sequential has")


def itself() -> Compiled:
    network = parts()
    network.compile(backend="eager")
    return Compiled(network, network, "Sequential has")


def a_part() -> Compiled:
    network: Any = parts()
    network[1] = torch.compile(network[1], backend="eager")
    return Compiled(network, network, "1 has")


def its_forward() -> Compiled:
    network: Any = parts()
    network[1].forward = torch.compile(network[1].forward, backend="eager")
    return Compiled(network, network, "1 has")


def scripted() -> Compiled:
    network: Any = parts()
    network[1] = torch.jit.script(network[1])
    return Compiled(network, network, "1 has")


def a_function() -> Compiled:
    network = parts()
    return Compiled(network, torch.compile(lambda x: network(x), backend="eager"), "")


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:The .grad attribute")
@pytest.mark.parametrize(
    "make", [whole, inside_another, itself, a_part, its_forward, scripted, a_function]
)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_compiled_network_is_not_compiled_again(
    make: Callable[[], Compiled], is_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    counters.clear()
    network, call, left_out = make()
    said: set[str] = set()
    found = []
    for step in range(4):
        activations = of_all(said)
        if step % 2 == (0 if is_first else 1):
            activations.start(network)
        call(INPUTS).sum().backward()
        found.append(set(counted(activations)))
    assert counters["frames"]["total"] == (0 if make is scripted else 1)
    is_whole = not left_out.startswith("1")
    due = set() if is_whole else {"0"}
    late = is_first and make in (a_part, its_forward)  # the first step compiles
    assert found[::2] == ([set() if late else due, due] if is_first else [set(), set()])
    assert found[1::2] == ([set(), set()] if is_first else [due, due])
    said = {one.message for one in caplog.records if one.name.startswith("tracker")}
    assert any(left_out in one for one in said)
    torch._dynamo.reset()


# -- GPUs ---------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_counting_on_a_gpu_does_not_wait_and_gives_the_same() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.ReLU(inplace=True)).cuda()
    inputs, activations = INPUTS.cuda(), of_all()
    network(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        activations.start(network)
        outputs = network(inputs)
        network(inputs)
        activations.stop()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    (expected,) = histograms([torch.cat([outputs, outputs])])
    assert counted(activations)["1"]["counts"] == expected.counts.tolist()


@pytest.mark.cuda
def test_a_graph_that_is_captured_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    network = nn.Sequential(nn.Linear(3, 2)).cuda()
    inputs, activations, graph = INPUTS.cuda(), of_all(), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        network(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    activations.start(network)
    with torch.cuda.graph(graph):
        network(inputs)
    graph.replay()
    assert activations.take() == []
    assert "they are captured in a graph" in caplog.text
