"""Traces, layer tables and graphs of networks, and that tracing does not change a network."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import resnet18

from tracker.capture.layers import graph_svg, layer_table
from tracker.capture.trace import Call, Trace, trace
from tracker.errors import ArgumentError

SVG = "{http://www.w3.org/2000/svg}"


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 12, 5)
        self.fc1 = nn.Linear(192, 120)
        self.fc2 = nn.Linear(120, 60)
        self.out = nn.Linear(60, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, 2)
        x = F.relu(self.fc1(x.reshape(-1, 192)))
        return self.out(F.relu(self.fc2(x)))


class LSTMClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8, max_norm=0.1)  # modifies its weight in forward
        self.lstm = nn.LSTM(8, 16, num_layers=2, batch_first=True, dropout=0.5)
        self.head = nn.Linear(16, 3)

    def forward(self, words: Tensor) -> dict[str, Any]:
        states, (last, _) = self.lstm(self.embedding(words))
        return {"logits": self.head(last[-1]), "states": [states], "length": words.shape[1]}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(5, 16))
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x + self.position).mean(1))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 8)
        self.right = nn.Linear(6, 8)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([self.left(a), self.right(b)], dim=1), a


class Stubborn(nn.Module):
    """Does in forward everything that a network should not do in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.shared = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.shared.weight
        self.register_buffer("last", None)
        self.state: Tensor | None = None
        self.seen = {"batches": 0}
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        x += random.random() + np.random.rand() + torch.rand(())
        x = F.batch_norm(x, self.norm.running_mean, self.norm.running_var, training=True)
        self.norm.num_batches_tracked += 1
        self.frozen.weight.mul_(2)
        self.last = self.state = x if self.state is None else x + self.state
        self.seen["batches"] += 1
        self.train()
        with torch.enable_grad():
            self.shared(x).sum().backward()
        if self.fail:
            raise ArithmeticError("as asked")
        return F.dropout(self.tied(self.shared(x)), training=True)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "convolutional": (Convolutional, lambda: torch.randn(2, 1, 28, 28)),
    "lstm": (LSTMClassifier, lambda: torch.randint(50, (2, 7))),
    "transformer": (Encoder, lambda: torch.randn(2, 5, 16)),
    "two inputs": (TwoInputs, lambda: (torch.randn(2, 4), torch.randn(2, 6))),
    "stubborn": (Stubborn, lambda: torch.randn(2, 4)),
    "resnet": (resnet18, lambda: torch.randn(2, 3, 64, 64)),
    "one layer": (lambda: nn.Linear(4, 2), lambda: torch.randn(2, 4)),
    "nothing": (nn.Sequential, lambda: torch.randn(2, 4)),
}


@pytest.fixture(params=NETWORKS)
def network_and_example(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    build, example = NETWORKS[request.param]
    torch.manual_seed(0)
    return build(), example()


def kinds(traced: Trace) -> list[str]:
    return [call.name or call.kind for call in traced.calls]


def readers(traced: Trace) -> list[tuple[str, str]]:
    """The edges as pairs of names, (from, to)."""
    names = kinds(traced)
    return [
        (names[i], name)
        for name, call in zip(names, traced.calls, strict=True)
        for i in call.inputs
    ]


def dims(shape: str) -> str:
    """`shape` with multiplication signs, as displayed."""
    return shape.replace("x", "\N{MULTIPLICATION SIGN}")


def functional(forward: Callable[[nn.ModuleDict, Tensor], Any], **layers: nn.Module) -> nn.Module:
    """A network of `layers` with the given forward."""

    class Network(nn.ModuleDict):
        def forward(self, x: Tensor) -> Any:
            return forward(self, x)

    return Network(layers)


class TestTrace:
    def test_lists_layers_and_functions_in_the_order_of_their_calls(self) -> None:
        traced = trace(Convolutional(), torch.zeros(2, 1, 28, 28))
        assert [(c.name, c.kind, c.shape, c.parameters) for c in traced.calls] == [
            ("", "input", (2, 1, 28, 28), 0),
            ("conv1", "Conv2d", (2, 6, 24, 24), 156),
            ("", "relu", (2, 6, 24, 24), 0),
            ("", "max_pool2d", (2, 6, 12, 12), 0),
            ("conv2", "Conv2d", (2, 12, 8, 8), 1812),
            ("", "relu", (2, 12, 8, 8), 0),
            ("", "max_pool2d", (2, 12, 4, 4), 0),
            ("", "reshape", (2, 192), 0),
            ("fc1", "Linear", (2, 120), 23160),
            ("", "relu", (2, 120), 0),
            ("fc2", "Linear", (2, 60), 7260),
            ("", "relu", (2, 60), 0),
            ("out", "Linear", (2, 10), 610),
            ("", "output", (2, 10), 0),
        ]
        assert [call.inputs for call in traced.calls] == [(), *((i,) for i in range(13))]

    def test_counts_frozen_parameters_separately(self) -> None:
        layer = nn.Linear(4, 2)
        layer.bias.requires_grad_(False)
        _, call, _ = trace(layer, torch.zeros(1, 4)).calls
        assert (call.parameters, call.trainable) == (10, 8)

    def test_a_residual_connection_is_an_edge_to_the_addition(self) -> None:
        network = functional(lambda m, x: m["fc"](x) + x, fc=nn.Linear(4, 4))
        assert readers(trace(network, torch.zeros(1, 4))) == [
            ("input", "fc"),
            ("fc", "add"),
            ("input", "add"),
            ("add", "output"),
        ]

    def test_readers_of_an_identity_s_input_do_not_seem_to_read_its_output(self) -> None:
        def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
            shortcut = F.dropout(m["skip"](x), training=False)
            return m["fc"](x) + shortcut

        network = functional(forward, skip=nn.Identity(), fc=nn.Linear(4, 4))
        assert ("input", "fc") in readers(trace(network, torch.zeros(1, 4)))
        assert ("skip", "dropout") in readers(trace(network, torch.zeros(1, 4)))

    def test_the_last_in_place_modification_produces_a_tensor(self) -> None:
        def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
            y = m["fc"](x)
            m["act"](y)
            y += 1
            y[0] = 0
            return y

        network = functional(forward, fc=nn.Linear(4, 4), act=nn.ReLU(inplace=True))
        assert readers(trace(network, torch.zeros(1, 4))) == [
            ("input", "fc"),
            ("fc", "act"),
            ("act", "add"),
            ("add", "setitem"),
            ("setitem", "output"),
        ]

    def test_a_constant_is_not_mistaken_for_a_deleted_tensor(self) -> None:
        def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
            x.exp()  # Python may reuse the id of the deleted result
            return m["fc"](torch.from_numpy(np.zeros((1, 4), np.float32)))

        network = functional(forward, fc=nn.Linear(4, 4))
        assert ("exp", "fc") not in readers(trace(network, torch.zeros(1, 4)))

    def test_a_layer_called_twice_is_two_calls(self) -> None:
        network = functional(lambda m, x: m["fc"](m["fc"](x)), fc=nn.Linear(4, 4))
        assert kinds(trace(network, torch.zeros(1, 4))) == ["input", "fc", "fc", "output"]

    def test_operators_have_the_names_of_their_functions(self) -> None:
        network = functional(lambda m, x: 1 - 2 / (-x @ x.T) ** 2, unused=nn.ReLU())
        expected = ["input", "neg", "T", "matmul", "pow", "div", "sub", "output"]
        assert kinds(trace(network, torch.ones(2, 2))) == expected

    def test_reading_attributes_is_not_a_call(self) -> None:
        network = functional(lambda m, x: x if x.dim() + x.shape[0] else x.dtype, unused=nn.ReLU())
        assert kinds(trace(network, torch.zeros(1, 4))) == ["input", "output"]

    def test_calls_inside_a_layer_are_part_of_it(self) -> None:
        parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        network = nn.Sequential(nn.MultiheadAttention(16, 4), parametrised)
        network.forward = lambda x: network[1](network[0](x, x, x)[0])
        traced = trace(network, torch.zeros(5, 2, 16))
        assert [call.kind for call in traced.calls] == [
            "input",
            "MultiheadAttention",
            "Linear",
            "output",
        ]
        assert sum(call.parameters for call in traced.calls) == 4 * 16 * 17 + 16 * 16 + 2 * 16

    def test_every_argument_is_an_input_and_nested_results_are_the_output(self) -> None:
        assert readers(trace(TwoInputs(), (torch.zeros(2, 4), torch.zeros(2, 6)))) == [
            ("input", "left"),
            ("input", "right"),
            ("left", "cat"),
            ("right", "cat"),
            ("cat", "output"),
            ("input", "output"),
        ]
        edges = readers(trace(LSTMClassifier(), torch.zeros(2, 7, dtype=torch.long)))
        assert {("head", "output"), ("lstm", "output")} <= set(edges)

    def test_runs_in_evaluation_mode_without_gradients(self) -> None:
        def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
            x = m["fc"](x)
            return x.neg() if m.training or m["fc"].training or x.requires_grad else x.exp()

        network = functional(forward, fc=nn.Linear(4, 4)).train()
        assert kinds(trace(network, torch.zeros(1, 4))) == ["input", "fc", "exp", "output"]

    def test_tracing_does_not_compile_a_network(self) -> None:
        def never(*args: object) -> Any:
            raise AssertionError("compiled")

        inner = torch.compile(nn.Linear(4, 4), backend=never)
        network = torch.compile(nn.Sequential(inner, nn.ReLU()), backend=never)
        traced = trace(network, torch.zeros(1, 4))
        assert [call.kind for call in traced.calls] == ["input", "Linear", "ReLU", "output"]

    def test_the_example_is_not_changed(self) -> None:
        example = -torch.ones(1, 4, requires_grad=True)
        trace(nn.ReLU(inplace=True), example)
        assert torch.equal(example, -torch.ones(1, 4))

    @pytest.mark.cuda
    def test_the_example_is_moved_to_the_network_s_device(self) -> None:
        trace(LSTMClassifier().cuda(), torch.zeros(2, 7, dtype=torch.long))

    @pytest.mark.parametrize("layer", [nn.LazyLinear(3), nn.LazyBatchNorm1d()])
    def test_refuses_lazy_parameters(self, layer: nn.Module) -> None:
        with pytest.raises(ArgumentError, match=r"0\.weight.*run a batch"):
            trace(nn.Sequential(layer), torch.zeros(2, 4))
        assert all(map(nn.parameter.is_lazy, layer.parameters()))


class TestNetworkIsUnchanged:
    """Training after a trace equals training without one, bit for bit."""

    @staticmethod
    def everything(network: nn.Module) -> tuple[Any, ...]:
        """Attributes (including hooks and modes) by identity; tensors and generators by value."""
        attributes = [
            {key: dict(value) if isinstance(value, dict) else value for key, value in attrs.items()}
            for attrs in map(vars, network.modules())
        ]
        tensors = [*network.parameters(), *network.buffers()]
        values = [t.detach().numpy().tobytes() for t in tensors]
        gradients = [None if t.grad is None else t.grad.numpy().tobytes() for t in tensors]
        generators = (
            torch.get_rng_state().numpy().tobytes(),
            np.random.get_state()[1].tobytes(),
            np.random.get_state()[2:],
            random.getstate(),
        )
        return attributes, values, gradients, generators, torch.is_grad_enabled()

    def test_after_a_trace(self, network_and_example: tuple[nn.Module, Any]) -> None:
        network, example = network_and_example
        for i, module in enumerate(network.modules()):  # mixed modes, and gradients for some
            module.training = i % 2 == 0
        for parameter in list(network.parameters())[::2]:
            parameter.grad = torch.ones_like(parameter)
        before = self.everything(network)
        trace(network, example)
        assert self.everything(network) == before

    def test_after_forward_raised(self) -> None:
        network = Stubborn()
        network.fail = True
        before = self.everything(network)
        with pytest.raises(ArithmeticError, match="as asked"):
            trace(network, torch.eye(4))
        assert self.everything(network) == before

    def test_after_the_network_caught_a_layer_s_error(self) -> None:
        def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
            try:
                return m["wrong"](x)
            except RuntimeError:
                return F.relu(m["right"](x))

        network = functional(forward, wrong=nn.Linear(5, 5), right=nn.Linear(4, 4))
        before = self.everything(network)
        assert kinds(trace(network, torch.zeros(1, 4)))[-3:] == ["right", "relu", "output"]
        assert self.everything(network) == before


class TestLayerTable:
    def test_has_a_row_per_layer_and_a_total(self) -> None:
        network = Convolutional()
        table = layer_table(network, trace(network, torch.zeros(3, 1, 28, 28)))
        assert table.values.tolist() == [
            ["conv1", "Conv2d", dims("Nx1x28x28"), dims("Nx6x24x24"), 156, 156],
            ["conv2", "Conv2d", dims("Nx6x12x12"), dims("Nx12x8x8"), 1812, 1812],
            ["fc1", "Linear", dims("Nx192"), dims("Nx120"), 23160, 23160],
            ["fc2", "Linear", dims("Nx120"), dims("Nx60"), 7260, 7260],
            ["out", "Linear", dims("Nx60"), dims("Nx10"), 610, 610],
            ["total", "", "", "", 32998, 32998],
        ]
        assert table.columns.tolist() == [
            "layer", "type", "input shape", "output shape", "parameters", "trainable",
        ]  # fmt: skip

    @pytest.mark.parametrize("traced", [True, False])
    def test_its_total_counts_every_parameter_once(
        self, network_and_example: tuple[nn.Module, Any], traced: bool
    ) -> None:
        network, example = network_and_example
        table = layer_table(network, trace(network, example) if traced else None)
        total = table.iloc[-1]
        assert total["layer"] == "total"
        assert total["parameters"] == sum(p.numel() for p in network.parameters())
        assert total["trainable"] == sum(p.numel() for p in network.parameters() if p.requires_grad)

    def test_without_a_trace_it_has_every_layer_and_no_shapes(self) -> None:
        network = Convolutional()
        whole = layer_table(network, trace(network, torch.zeros(3, 1, 28, 28)))
        whole[["input shape", "output shape"]] = ""
        assert layer_table(network, None).equals(whole)

    def test_a_layer_called_twice_has_two_rows_and_counts_once(self) -> None:
        network = functional(lambda m, x: m["fc"](m["fc"](x)), fc=nn.Linear(4, 4))
        table = layer_table(network, trace(network, torch.zeros(1, 4)))
        assert table["layer"].tolist() == ["fc", "fc", "total"]
        assert table["parameters"].tolist() == [20, 20, 20]

    def test_a_module_with_children_and_parameters_has_a_row_before_them(self) -> None:
        network = nn.Sequential(nn.ReLU(), Encoder())
        table = layer_table(network, trace(network, torch.zeros(2, 5, 16)))
        rows = table[["layer", "type", "parameters"]].values.tolist()
        assert rows[:3] == [
            ["0", "ReLU", 0],
            ["1", "Encoder", 80],
            ["1.layer.self_attn", "MultiheadAttention", 1088],
        ]

    def test_layers_that_were_not_called_come_last_and_have_no_shapes(self) -> None:
        network = functional(lambda m, x: m["used"](x), unused=nn.Linear(4, 1), used=nn.ReLU())
        table = layer_table(network, trace(network, torch.zeros(1, 4)))
        assert table["layer"].tolist() == ["used", "unused", "total"]
        assert table["output shape"].tolist() == [dims("Nx4"), "", ""]

    def test_lazy_parameters_count_as_zero(self) -> None:
        table = layer_table(nn.Sequential(nn.LazyLinear(3)), None)
        assert table["parameters"].tolist() == [0, 0]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}text")]


def boxes(svg: str) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of each box."""
    rectangles = [group.find(f"{SVG}rect") for group in ET.fromstring(svg).iter(f"{SVG}g")]
    sides = [
        [float(r.attrib[k]) for k in ("x", "y", "width", "height")]
        for r in rectangles
        if r is not None
    ]
    return [(x, y, x + width, y + height) for x, y, width, height in sides]


def graph(inputs: list[tuple[int, ...]]) -> Trace:
    """A graph of layers with these inputs."""
    return Trace(
        tuple(
            Call(f"layer{i}", "Linear", edges, (2, 4), (2, 4), 20, 20)
            for i, edges in enumerate(inputs)
        )
    )


@st.composite
def graphs(draw: st.DrawFn) -> Trace:
    size = draw(st.integers(0, 40))
    return graph(
        [tuple(draw(st.sets(st.integers(0, i - 1), max_size=3))) if i else () for i in range(size)]
    )


class TestGraph:
    def test_names_every_layer(self, network_and_example: tuple[nn.Module, Any]) -> None:
        traced = trace(*network_and_example)
        shown = texts(graph_svg(traced, "A network"))
        assert {call.name for call in traced.calls if call.name} <= set(shown)
        assert shown[0] == "A network"

    def test_a_box_has_the_type_the_parameters_and_the_shape(self) -> None:
        network = Convolutional()
        network.fc2.requires_grad_(False)
        shown = texts(graph_svg(trace(network, torch.zeros(2, 1, 28, 28)), ""))
        assert {"Conv2d · 156 params", dims("Nx6x24x24"), "Linear · 7,260 params · frozen"} <= set(
            shown
        )

    def test_is_self_contained(self) -> None:
        svg = graph_svg(trace(resnet18(), torch.zeros(1, 3, 64, 64)), "ResNet-18")
        root = ET.fromstring(svg)
        assert {element.tag.removeprefix(SVG) for element in root.iter()} == {
            "svg", "title", "style", "rect", "path", "g", "text",
        }  # fmt: skip
        assert "href" not in svg
        assert "url(" not in svg
        x, y, width, height = map(float, root.attrib["viewBox"].split())
        assert (root.attrib["width"], root.attrib["height"]) == (f"{width:.0f}", f"{height:.0f}")
        background = root.find(f"{SVG}rect")
        assert background is not None
        assert background.attrib["fill"] == "#ffffff"
        for left, top, right, bottom in boxes(svg):
            assert x < left < right < x + width
            assert y < top < bottom < y + height

    def test_escapes_characters_that_xml_does_not_allow(self) -> None:
        call = Call("<a & b>", "x", (), None, None, 0, 0)
        shown = texts(graph_svg(Trace((call,)), 'a < b & "c"\0'))
        assert shown == ['a < b & "c"\\x00', "<a & b>", "x"]

    def test_omits_functions_whose_results_are_unused(self) -> None:
        def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
            assert (x.abs() < 9).all()
            return m["fc"](x)

        traced = trace(functional(forward, fc=nn.Linear(4, 4)), torch.zeros(1, 4))
        assert "abs" in kinds(traced)
        assert not {"abs", "lt", "all"} & set(texts(graph_svg(traced, "")))

    @settings(deadline=None, max_examples=60)
    @given(graphs())
    def test_boxes_do_not_overlap_and_are_below_their_inputs(self, traced: Trace) -> None:
        placed = boxes(graph_svg(traced, ""))
        assert len(placed) == len(traced.calls)
        for i, (left, top, right, bottom) in enumerate(placed):
            for other_left, other_top, other_right, other_bottom in placed[:i]:
                assert (
                    right < other_left
                    or other_right < left
                    or bottom < other_top
                    or other_bottom < top
                )
            assert all(placed[source][3] < top for source in traced.calls[i].inputs)

    def test_a_chain_with_shortcuts_is_drawn_straight(self) -> None:
        traced = graph([(), (0,), (1,), (0, 2), (3,), (1, 4)])
        assert len({left for left, *_ in boxes(graph_svg(traced, ""))}) == 1

    @pytest.mark.timeout(20)
    def test_thousands_of_calls_are_drawn_without_their_longest_edges(self) -> None:
        steps = range(1, 3001)
        traced = graph([(), *((i - 1,) for i in steps), tuple(steps)])  # a loop, and all its states
        svg = graph_svg(traced, "")
        assert len(boxes(svg)) == 3002
        assert re.search("[0-9,]+ of the longest edges are omitted", texts(svg)[0])
