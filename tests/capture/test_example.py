"""The whole first call of a network, of any structure, is the example of its inputs."""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from mlflow.entities import Run as MlflowRun
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils import _pytree as pytree

from tests.helpers import Store
from tracker import ArgumentError, RunManager, start_run
from tracker.capture.example import Example, FirstInputs, as_example
from tracker.capture.model import save_model
from tracker.capture.trace import trace


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor
    cache: Any = None


class MappingOutput(collections.OrderedDict[str, Any]):
    """Like the outputs of transformers: attributes and keys."""


class Classifier(nn.Module):
    """Called by keywords, with labels in training, like the models of transformers."""

    def __init__(self, wrap: Callable[..., Any] = Output) -> None:
        super().__init__()
        self.embedding, self.head, self.wrap = nn.Embedding(20, 8), nn.Linear(8, 3), wrap

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Any = None
    ) -> Any:
        hidden = self.embedding(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        logits = self.head(hidden.mean(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return self.wrap(loss=loss, logits=logits)


class WordModel(nn.Module):
    """Takes words (T, N) and the state of the words before: dimension 0 is not the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.rnn = nn.Embedding(30, 6), nn.LSTM(6, 6, 2)
        self.decoder = nn.Linear(6, 30)
        self.decoder.weight = self.encoder.weight

    def forward(self, words: Tensor, hidden: tuple[Tensor, Tensor]) -> Any:
        output, hidden = self.rnn(self.encoder(words), hidden)
        return self.decoder(output).view(-1, 30), hidden


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(12, 4), nn.Linear(2, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x.flatten(1)).chunk(2, 1)
        return self.decoder(mean), mean, log_variance


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twin, self.head = nn.Conv2d(1, 3, 3), nn.Linear(6, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        pair = [self.twin(x).mean((2, 3)) for x in (left, right)]
        return self.head(torch.cat(pair, 1))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        logits = self.head(self.embedding(idx))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class OneMapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"scores": self.linear(batch["image"])}


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Conv2d(3, 2, 3)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [{"boxes": self.linear(image[None]).mean((2, 3))} for image in images]


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        sums = torch.zeros(x.shape[0], 3)
        return sums.index_add(0, edges[0], self.linear(x)[edges[1]])


def models(run: MlflowRun) -> list[Any]:
    return list(run.outputs.model_outputs) if run.outputs else []


def ids(*shape: int) -> Tensor:
    return torch.randint(9, shape)


def text_batch(samples: int) -> dict[str, Tensor]:
    labels = torch.randint(3, (samples,))
    return {"input_ids": ids(samples, 7), "attention_mask": ids(samples, 7), "labels": labels}


def states(batch: int) -> tuple[Tensor, Tensor]:
    return torch.rand(2, batch, 6), torch.rand(2, batch, 6)


CALLS: dict[str, tuple[nn.Module, Any, Any, list[str]]] = {
    "keywords": (
        Classifier(),
        text_batch(6),
        text_batch(5),
        ["input_ids", "attention_mask", "labels"],
    ),
    "a mapping returned": (
        Classifier(lambda **kept: MappingOutput(kept)),
        text_batch(6),
        text_batch(3),
        ["input_ids", "attention_mask", "labels"],
    ),
    "words and a state": (
        WordModel(),
        (ids(7, 5), states(5)),
        (ids(7, 3), states(3)),  # torch.export unrolls an LSTM: the length is fixed
        ["words", "hidden.0", "hidden.1"],
    ),
    "a tuple returned": (VAE(), torch.rand(8, 3, 2, 2), torch.rand(3, 3, 2, 2), [""]),
    "two inputs": (
        Siamese(),
        (torch.rand(8, 1, 8, 8), torch.rand(8, 1, 8, 8)),
        (torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8)),
        ["left", "right"],
    ),
    "targets": (GPT(), (ids(4, 8), ids(4, 8)), (ids(3, 8), ids(3, 8)), ["idx", "targets"]),
    "no targets": (GPT(), ids(4, 8), ids(3, 8), [""]),
    "one mapping": (
        OneMapping(),
        {"image": torch.rand(4, 4), "flag": torch.ones(4, dtype=torch.bool)},
        {"image": torch.rand(7, 4), "flag": torch.ones(7, dtype=torch.bool)},
        ["batch.image", "batch.flag"],
    ),
    "pictures in a list": (
        Detector(),
        [torch.rand(3, 8, 8), torch.rand(3, 9, 9)],
        [torch.rand(3, 7, 8), torch.rand(3, 8, 7)],
        ["images.0", "images.1"],
    ),
    "a graph": (
        Graph(),
        (torch.rand(9, 5), torch.randint(9, (2, 12))),
        (torch.rand(6, 5), torch.randint(6, (2, 8))),
        ["x", "edges"],
    ),
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_model_of_any_structure_is_saved_with_its_names_and_any_batch(
    kind: str, tmp_path: Path
) -> None:
    network, example, other, names = CALLS[kind]
    assert save_model(network, example, tmp_path / "m") is None
    loaded = mlflow.pytorch.load_model(str(tmp_path / "m"))
    call = as_example(network, other)
    live = pytree.tree_leaves(vars_of(network.eval()(*call.args, **call.kwargs)))
    saved = pytree.tree_leaves(loaded(*call.args, **call.kwargs))
    for one, two in zip(live, saved, strict=True):
        torch.testing.assert_close(one, two)

    signature = mlflow.models.get_model_info(str(tmp_path / "m")).signature
    assert [spec.name or "" for spec in signature.inputs] == names
    assert all(-1 in spec.shape for spec in signature.inputs)
    served = mlflow.pyfunc.load_model(str(tmp_path / "m"), suppress_warnings=True)
    arrays = {n: t.numpy() for n, t in zip(names, call.tensors, strict=True)}
    results = served.predict(arrays.get("", arrays))
    results = list(results.values()) if isinstance(results, dict) else [results]
    assert len(results) == len(live)
    np.testing.assert_allclose(results[-1], live[-1].detach().numpy(), atol=1e-5) if isinstance(
        live[-1], Tensor
    ) else None


def vars_of(output: Any) -> Any:
    return (
        vars(output)
        if isinstance(output, Output)
        else dict(output)
        if isinstance(output, MappingOutput)
        else output
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_is_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    network = nn.Linear(4, 3).to(dtype)
    assert save_model(network, torch.rand(5, 4, dtype=dtype), tmp_path / "m") is None
    loaded = mlflow.pytorch.load_model(str(tmp_path / "m"))
    assert loaded(torch.rand(3, 4, dtype=dtype)).dtype == dtype
    described = mlflow.models.get_model_info(str(tmp_path / "m"))
    assert (described.signature is None) == (dtype == torch.bfloat16)  # MLflow does not know it
    served = mlflow.pyfunc.load_model(str(tmp_path / "m"), suppress_warnings=True)
    if dtype == torch.float16:
        assert served.predict(np.ones((3, 4), np.float16)).shape == (3, 3)


@pytest.mark.parametrize("kind", CALLS)
def test_the_hook_keeps_the_whole_call_and_the_graph_has_its_inputs(kind: str) -> None:
    network, example, _, _ = CALLS[kind]
    first = FirstInputs(network)
    call = as_example(network, example)
    network(*call.args, **call.kwargs)
    assert first.inputs is not None
    assert pytree.tree_structure(first.inputs.args) == pytree.tree_structure(call.args)
    assert list(first.inputs.kwargs) == list(call.kwargs)
    inputs = [each for each in trace(network, first.inputs).calls if each.kind == "input"]
    assert len(inputs) == len(call.tensors)


@given(st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=4), st.integers(1, 5))
def test_few_samples_are_kept_only_of_tensors_that_agree(
    shapes: list[list[int]], samples: int
) -> None:
    example = Example(tuple(torch.rand(shape) for shape in shapes), {})
    kept = example.first(samples)
    for shape, tensor, original in zip(shapes, kept.tensors, example.tensors, strict=True):
        cut = shape and example.is_certain
        assert list(tensor.shape) == ([min(samples, shape[0]), *shape[1:]] if cut else shape)
        assert torch.equal(tensor, original[:samples] if cut else original)
    assert kept.is_certain == example.is_certain
    with_batch = [shape for shape in shapes if shape]
    if example.is_certain:
        assert len({shape[0] for shape in with_batch}) == 1
        assert {t.shape[0] for t in kept.resized(3).tensors if t.dim()} == {3}


@pytest.mark.parametrize(
    ("example", "problem"),
    [
        ((), "holds no tensor"),
        ({"a": 1}, "holds no tensor"),
        (object(), "holds an object of the class object"),
        (torch.rand(0, 3), "holds a tensor that cannot be copied (strided, cpu, empty)"),
        ((torch.eye(2).to_sparse(), 1), "holds a tensor that cannot be copied (sparse_coo, cpu)"),
    ],
    ids=["nothing", "no tensor", "an object", "empty", "sparse"],
)
def test_an_example_that_no_network_takes_is_refused_before_the_run(
    example: Any, problem: str, tmp_path: Path
) -> None:
    manager = RunManager(offline=True, directory=tmp_path / "journal")
    with pytest.raises(ArgumentError) as caught:
        manager.begin_run({}, nn.Linear(4, 3), [], example=example)
    assert problem in str(caught.value)
    assert manager.run_id is None
    assert not (tmp_path / "journal").exists()


def test_inputs_that_cannot_be_kept_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(nn.Linear):
        def forward(self, holder: Any) -> Tensor:
            return super().forward(holder.x)

    network, holder = Own(4, 3), type("Holder", (), {"x": torch.rand(2, 4)})()
    manager = RunManager(offline=True, model=False, directory=tmp_path)
    manager.begin_run({}, network, [])
    manager.begin_epoch()
    for _ in range(2):
        manager.track_loss(network(holder).sum(), 2)
    manager.end_epoch()
    manager.end_run()
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert sum("holds an object of the class Holder" in text for text in messages) == 1


def test_a_packed_sequence_is_in_the_graph() -> None:
    class Packed(nn.LSTM):
        def forward(self, words: Any) -> Any:  # type: ignore[override]
            return super().forward(words)[1][0]

    network = Packed(4, 3)
    first = FirstInputs(network)
    network(pack_sequence([torch.rand(3, 4), torch.rand(2, 4)]))
    assert first.inputs is not None
    assert [each.kind for each in trace(network, first.inputs).calls] == [
        "input",
        "Packed",
        "output",
    ]


def test_a_loop_of_keywords_with_a_mask_has_its_model_graph_and_no_data(
    store: Store, tmp_path: Path
) -> None:
    network = Classifier()
    with RunManager(samples=False) as manager:
        manager.begin_run({}, network, [])
        manager.begin_epoch()
        manager.track_loss(network(**text_batch(6)).loss, 6)
        manager.end_epoch()
        manager.end_run()
    run = store.run()
    assert "network/graph.svg" in store.artifacts(run)
    (output,) = models(run)
    model = mlflow.pyfunc.load_model(f"models:/{output.model_id}", suppress_warnings=True)
    assert not any(np.any(array) for array in model.input_example.values())


def test_the_loop_s_inputs_are_those_that_it_casts_from_labels_first(store: Store) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    labels, pictures = torch.arange(5) % 3, torch.randint(255, (5, 3, 2, 2), dtype=torch.uint8)
    with RunManager() as manager:
        manager.begin_run({}, network, [(labels, pictures)])
        manager.begin_epoch()
        loss = F.cross_entropy(network(pictures.float() / 255), labels)
        manager.track_loss(loss, (labels, pictures))
        manager.end_epoch()
        manager.end_run()
    run = store.run()
    assert "samples.png" in store.artifacts(run)
    (output,) = models(run)
    (spec,) = mlflow.models.get_model_info(f"models:/{output.model_id}").signature.inputs
    assert (spec.type, spec.shape) == (np.dtype("float32"), (-1, 3, 2, 2))


def test_begin_run_and_log_network_take_an_example(store: Store) -> None:
    network = Siamese()
    pair = (torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8))
    with RunManager() as manager:
        manager.begin_run({}, network, [], example={"left": pair[0], "right": pair[1]})
        manager.end_run()
    assert len(models(store.run())) == 1
    assert {"network/graph.svg", "samples.png"} <= store.artifacts(store.run())
    with start_run() as run:
        run.log_network(network, pair)
    assert "network/graph.svg" in store.artifacts(store.runs()[-1])
