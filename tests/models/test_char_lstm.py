"""The recipe char-lstm: its data, its training, and the text it generates."""

from __future__ import annotations

import copy
import json
import logging
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.text_baselines import character_trigram
from models import ModelsError, rebuild, spec
from models.char_lstm import RECIPE, CharLSTM, TruncatedLoop, draw, evaluate, sample
from models.recipe import Picture, Source, Step, Text
from models.text import TextData, Vocabulary, Windows, load_text, read_text
from studies import sample as sampling
from studies import search
from studies.train import main as train
from studies.training import Task, begin
from tests.helpers import Store, Training, run_train
from tracker import RunManager, load_trained
from tracker.capture.dataset import describe_dataset

WORDS = ("anna", "vronsky", "levin", "kitty", "went", "to", "the", "ball", "and", "said", "was")
SMALL = {"hidden": 16, "batch_size": 4, "length": 20, "sample_length": 30}
FLAGS = ["--hidden", "16", "--batch-size", "4", "--length", "20", "--sample-length", "30"]
COMMAND = ["--model", "char-lstm", *FLAGS, "--dropout", "0.3", "--seed", "5", "--prime", "ä was"]
EXAMPLES = settings(deadline=None, max_examples=50)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def words(count: int) -> str:
    chosen = random.Random(0).choices(WORDS, k=count)
    return "\n".join(" ".join(chosen[i : i + 8]) for i in range(0, count, 8))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(words(800))
    return path


def loaded(path: Path, streams: int = 4, length: int = 20) -> TextData:
    return load_text(Source(str(path), "nowhere", 0), streams, length)


def trained(text_file: Path, **params: Any) -> tuple[TruncatedLoop, CharLSTM, TextData]:
    """A loop with a new network, whose weights are the same each time."""
    chosen = RECIPE.defaults() | SMALL | params
    data = RECIPE.load(Source(str(text_file), "nowhere", 0), chosen)
    torch.manual_seed(0)
    network = RECIPE.build(chosen, data.facts)
    assert RECIPE.loop is not None
    loop = RECIPE.loop(network, data, chosen)
    assert isinstance(loop, TruncatedLoop)
    assert isinstance(network, CharLSTM)
    assert isinstance(data, TextData)
    return loop, network, data


# --- Text files


@given(
    text=st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    mark=st.booleans(),
)
@EXAMPLES
def test_a_utf8_file_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, text: str, end: str, mark: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    text = text.lstrip("\ufeff")
    path.write_bytes(f"{text}{end}{text}{end}".encode("utf-8-sig" if mark else "utf-8"))
    assert read_text(path) == (f"{text}\n{text}\n", "utf-8")


@given(
    text=st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), min_size=1),
)
@EXAMPLES
def test_a_latin1_file_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(
        f"{text}é\r\n".encode("latin-1")
    )  # not UTF-8: é is not followed by two more bytes
    assert read_text(path) == (f"{text}é\n", "cp1252")


def test_the_source_names_the_encoding(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    for content, encoding in (
        (words(400).encode(), "utf-8"),
        (words(400).replace("anna", "änna").encode("latin-1"), "cp1252"),
        (words(400).encode() + b"\x81\xe9", "latin-1"),
    ):
        path.write_bytes(content)
        assert loaded(path).source == f"{path} ({encoding})"


def test_the_digest_is_that_of_the_text_independent_of_the_windows(
    tmp_path: Path, text_file: Path
) -> None:
    other = tmp_path / "other.txt"  # other letters with the same numbers
    letters = text_file.read_text().translate(str.maketrans("abc", "xyz"))
    other.write_text(letters)

    def digests(path: Path, length: int) -> list[str]:
        data = loaded(path, length=length)
        return [describe_dataset(part).digest for part in (data.train, data.validation, data.test)]

    assert len({*digests(text_file, 20), *digests(text_file, 30)}) == 3
    assert not {*digests(text_file, 20)} & {*digests(other, 20)}


@given(text=st.text(min_size=1), more=st.text())
@EXAMPLES
def test_a_vocabulary_encodes_only_its_own_characters(text: str, more: str) -> None:
    vocabulary = Vocabulary.of(text)
    symbols = [*vocabulary.characters, None]
    assert sorted(set(text)) == symbols[:-1]
    assert [symbols[number] for number in vocabulary.encode(text)] == list(text)
    expected = [character if character in text else None for character in more]
    assert [symbols[number] for number in vocabulary.encode(more)] == expected
    assert vocabulary.missing(more) == [c for c in dict.fromkeys(more) if c not in text]


@given(st.data())
@EXAMPLES
def test_windows_cover_each_stream_once_in_order(data: st.DataObject) -> None:
    streams, length = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    count = data.draw(st.integers(streams * length + 1, 200))
    windows = Windows("text", "", torch.arange(count, dtype=torch.int32), streams, length)
    loader = torch.utils.data.DataLoader(windows, batch_size=streams)
    batches = list(loader)
    assert len(batches) == windows.windows
    for inputs, targets in batches:
        assert inputs.shape == targets.shape == (streams, length)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs + 1, targets)  # each character here is its own position
    rows = torch.cat([inputs for inputs, _ in batches], dim=1)
    whole = rows.flatten()  # streams are end to end, without overlap
    assert whole.tolist() == list(range(len(whole)))
    assert count - 1 - len(whole) < streams * length
    for own, loaded_ in zip(windows.batches(), batches, strict=True):
        assert all(map(torch.equal, own, loaded_))


def test_the_vocabulary_comes_from_the_training_part(
    tmp_path: Path,
) -> None:
    path = tmp_path / "parts.txt"
    path.write_text("ab" * 4500 + "ac" * 250 + "ad" * 250)
    data = loaded(path)
    assert data.facts == {"characters": "ab"}
    for part in (data.train, data.validation, data.test):
        assert part.name == data.name == "parts.txt"
    assert not (data.train.targets == 2).any()
    assert torch.equal(data.validation.targets.unique(), torch.tensor([0, 2]))
    assert len(data.validation.data.flatten()) > 400
    json.dumps(data.facts)


def test_validation_does_not_depend_on_batch_size_and_length(text_file: Path) -> None:
    one, other = loaded(text_file, 4, 20), loaded(text_file, 9, 7)
    assert torch.equal(one.validation.data, other.validation.data)


def test_auto_is_anna_if_it_exists_else_python_s_help_texts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    data = load_text(Source("auto", str(tmp_path), 0), 4, 20)
    assert data.name == "pydoc-topics"
    assert data.source.startswith("pydoc_data.topics of Python")
    assert len(data.train) > 1000
    path = tmp_path / "text" / "anna.txt"
    path.parent.mkdir()
    path.write_text(words(800))
    assert load_text(Source("auto", str(tmp_path), 0), 4, 20).source == f"{path} (utf-8)"
    assert [
        f"'auto' is {name}" in line
        for name, line in zip(("Python's help texts", path), caplog.messages, strict=True)
    ] == [True, True]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a file; allowed: a text file, or auto."),
        (b"", "is empty; allowed: a text file, or auto."),
        (b"\xef\xbb\xbf", "is empty; allowed: a text file, or auto."),
        (b"a\0b" * 5000, "is binary; allowed: text in UTF-8 or Latin-1."),
        (words(800).encode("utf-16"), "is binary; allowed: text in UTF-8 or Latin-1."),
        (bytes(range(1, 256)) * 50, "is binary; allowed: text in UTF-8 or Latin-1."),
        (b"short", "has 5 characters; batch_size=64 and length=100 need at least 7,"),
        (b"a" * 7112, "has 7,112 characters; batch_size=64 and length=100 need"),
    ],
)
def test_an_unsuitable_file_is_refused_in_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    refused(f"dataset='{path}' {message}", capfd, dataset=str(path))
    assert [file.name for file in tmp_path.iterdir()] == ([] if content is None else ["bad.txt"])


def refused(message: str, capfd: pytest.CaptureFixture[str], dataset: str, *more: str) -> None:
    assert train(["--model", "char-lstm", "--dataset", dataset, *more]) == 2
    shown = capfd.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_odd_paths_and_an_unknown_prime_are_refused_in_one_sentence(
    tmp_path: Path, text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    refused(f"dataset='{tmp_path}' is a folder", capfd, str(tmp_path))
    refused("dataset='/dev/zero' is not a file", capfd, "/dev/zero")
    refused("is not a file", capfd, "x" * 5000)
    message = "prime='Änna' contains 'Ä'; allowed: the characters of the text"
    refused(message, capfd, str(text_file), *FLAGS, "--prime", "Änna")


def test_the_message_names_the_shortest_text_that_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    for streams, length in ((1, 1), (4, 20), (64, 100), (7, 13), (3, 400)):
        path.write_text("ab")
        with pytest.raises(ModelsError, match="at least") as error:
            loaded(path, streams, length)
        match = re.search(r"at least ([\d,]+)", str(error.value))
        assert match is not None
        needed = int(match[1].replace(",", ""))
        path.write_text("a" * needed)
        data = loaded(path, streams, length)
        assert all(len(part) for part in (data.train, data.validation, data.test))
        path.write_text("a" * (needed - 1))
        with pytest.raises(ModelsError, match="at least"):
            loaded(path, streams, length)


# --- Training


@pytest.mark.parametrize("params", [{}, {"embedding": 8}, {"layers": 2, "dropout": 0.2}])
def test_the_state_carries_over_between_calls(text_file: Path, params: dict[str, Any]) -> None:
    _, network, data = trained(text_file, **params)
    network.eval()
    tokens = data.train.data[:, :60].long()
    whole = network(tokens)
    assert whole.shape == (4, 60, len(data.facts["characters"]) + 1)
    parts, state = [], None
    for part in tokens.split(20, dim=1):
        logits, state = network.advance(part, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_the_loss_of_an_epoch_is_that_of_whole_streams(text_file: Path) -> None:
    """At a tiny learning rate, windows add up to one pass over the streams."""
    loop, network, data = trained(text_file, lr=1e-30)
    whole = F.cross_entropy(
        network(data.train.data.long()).flatten(0, 1), data.train.targets.long().flatten()
    ).item()
    for epoch in (1, 2):  # the second starts from a zero state too
        steps = [(step.loss.item(), step.samples) for step in loop.train(epoch)]
        assert {samples for _, samples in steps} == {80}
        assert sum(loss for loss, _ in steps) / len(steps) == pytest.approx(whole, rel=1e-5)


def test_an_epoch_starts_without_a_state_and_windows_share_no_gradient(text_file: Path) -> None:
    loop, network, _ = trained(text_file)
    states: list[Any] = []
    advance = network.advance

    def spied(tokens: Tensor, state: Any = None) -> Any:
        states.append(state)
        return advance(tokens, state)

    network.advance = spied  # type: ignore[method-assign]
    for epoch in (1, 2):
        states.clear()
        steps = sum(1 for _ in loop.train(epoch))
        assert len(states) == steps
        are_zero = [not any(part.any() for part in state) for state in states]
        assert are_zero == [True] + [False] * (steps - 1)
        assert not any(tensor.requires_grad for state in states[1:] for tensor in state)


def test_gradients_are_clipped(text_file: Path) -> None:
    loop, network, _ = trained(text_file, clip=1e-3)
    for _ in loop.train(1):
        norms = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None])
        assert norms.norm() <= 1e-3 * (1 + 1e-4)


def test_validation_and_samples_are_repeatable_and_leave_training_unchanged(
    text_file: Path,
) -> None:
    loop, network, _ = trained(text_file, dropout=0.5)
    network.eval()
    before = copy.deepcopy(network.state_dict())
    generator = torch.get_rng_state()
    metrics = loop.validate()
    (shown,) = loop.show(3)
    assert loop.validate() == metrics
    assert list(loop.show(3)) == [shown]
    assert list(loop.show(4)) != [shown]
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert metrics["val_perplexity"] == pytest.approx(math.exp(metrics["val_loss"]))
    assert isinstance(shown, Text)
    assert shown.path == "samples/epoch-0003.txt"
    assert len(shown.content) == 30


def test_a_loop_is_validated_and_shown_in_evaluation_mode(store: Store, text_file: Path) -> None:
    modes: list[tuple[str, bool]] = []

    class Watched(TruncatedLoop):
        def validate(self) -> Mapping[str, float]:
            modes.append(("validate", self._network.training))
            return super().validate()

        def test(self) -> Mapping[str, float]:
            modes.append(("test", self._network.training))
            return super().test()

        def show(self, epoch: int) -> Iterable[Picture | Text]:
            modes.append(("show", self._network.training))
            return super().show(epoch)

        def train(self, epoch: int) -> Iterator[Step]:
            modes.append(("train", self._network.training))
            return super().train(epoch)

    source, chosen = Source(str(text_file), "nowhere", 0), RECIPE.defaults() | SMALL
    task = Task.of("char-lstm", chosen, source, None)
    task = replace(task, recipe=replace(task.recipe, loop=Watched))
    device = torch.device("cpu")
    with RunManager(model=False) as manager:
        for _ in begin(manager, task, epochs=2, device=device, params={}, final=True)[1]:
            pass
    epoch = [("train", True), ("validate", False), ("show", False)]
    assert modes == [*epoch, *epoch, ("test", False)]


def test_a_training_that_diverged_has_no_sample_and_an_infinite_perplexity(
    text_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop, network, _ = trained(text_file)
    with torch.no_grad():
        network.out.bias.copy_(torch.randn(len(network.out.bias)) * 1e6)
    assert loop.validate()["val_perplexity"] == math.inf
    with torch.no_grad():
        network.out.bias.fill_(torch.nan)
    assert math.isnan(loop.validate()["val_perplexity"])
    assert list(loop.show(1)) == []
    assert "No sample after epoch 1: the network's outputs are not finite" in caplog.text


def test_it_learns_a_predictable_text(tmp_path: Path) -> None:
    path = tmp_path / "abc.txt"
    path.write_text("abcdefgh" * 500)
    loop, network, data = trained(path, lr=0.02)
    for epoch in (1, 2, 3):
        for _ in loop.train(epoch):
            pass
    assert loop.validate()["val_perplexity"] < 1.2
    vocabulary = Vocabulary(data.facts["characters"])
    text = sample(
        network,
        vocabulary,
        prime="cdefghab",
        length=16,
        temperature=0.1,
        top_k=1,
        generator=torch.Generator().manual_seed(0),
    )
    assert text == "cdefghab" * 2


@pytest.mark.cuda
def test_it_trains_on_cuda(text_file: Path) -> None:
    _, network, data = trained(text_file)
    network.to("cuda")
    loop = TruncatedLoop(network, data, RECIPE.defaults() | SMALL)
    assert all(step.loss.is_cuda for step in loop.train(1))
    assert loop.validate()["val_loss"] > 0
    assert len(list(loop.show(1))) == 1


# --- Samples


@given(
    logits=st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=8),
    temperature=st.floats(min_value=0, exclude_min=True, max_value=1e300),
    top_k=st.integers(0, 10),
    number=st.integers(0, 100),
)
@EXAMPLES
def test_only_the_most_likely_are_drawn_and_never_the_unknown(
    logits: list[float], temperature: float, top_k: int, number: int
) -> None:
    """At any temperature; the last symbol is the unknown character."""
    logits[-1] = 2e30
    generator = torch.Generator().manual_seed(number)
    tensor = torch.tensor(logits, dtype=torch.float64)
    (drawn,) = draw(tensor, temperature=temperature, top_k=top_k, generator=generator).tolist()
    assert drawn < len(logits) - 1
    if top_k:
        assert sorted(logits[:-1], reverse=True).index(logits[drawn]) < top_k


def test_a_low_temperature_sharpens_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 9.0])  # the last is the unknown character
    shares = []
    for temperature in (0.01, 0.5, 1.0, 1e6):
        generator = torch.Generator().manual_seed(0)
        drawn = [
            draw(logits, temperature=temperature, top_k=0, generator=generator).item()
            for _ in range(500)
        ]
        shares.append(sum(drawn) / len(drawn))
    assert shares[0] == 1
    expected = [1 / (1 + math.exp(-1 / t)) for t in (0.5, 1.0, 1e6)]
    assert shares[1:] == pytest.approx(expected, abs=0.07)


def test_each_character_costs_one_step(text_file: Path) -> None:
    _, network, data = trained(text_file)
    lengths: list[int] = []
    advance = network.advance

    def spied(tokens: Tensor, state: Any = None) -> Any:
        lengths.append(tokens.shape[1])
        return advance(tokens, state)

    network.advance = spied  # type: ignore[method-assign]
    vocabulary = Vocabulary(data.facts["characters"])
    for prime, first in (("anna", 4), ("", 1)):
        lengths.clear()
        generator = torch.Generator().manual_seed(0)
        drawn = sample(
            network,
            vocabulary,
            prime=prime,
            length=20,
            generator=generator,
            temperature=1.0,
            top_k=0,
        )
        assert len(drawn) == 20
        assert lengths == [first] + [1] * 19


def test_sampling_with_a_state_equals_reading_the_whole_text_each_time(text_file: Path) -> None:
    _, network, data = trained(text_file, layers=2)
    network.eval()
    vocabulary = Vocabulary(data.facts["characters"])
    drawn = sample(
        network,
        vocabulary,
        prime="the ",
        length=30,
        generator=torch.Generator(),
        temperature=1.0,
        top_k=1,
    )
    for place in range(30):
        logits = network(vocabulary.encode("the " + drawn[:place]).long()[None])[0, -1, :-1]
        assert vocabulary.characters[int(logits.argmax())] == drawn[place]


# --- The commands


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shared_store: Store) -> Training:
    """Two epochs on a Latin-1 file with CRLF line ends, with dropout and samples."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "words.txt"
    path.write_bytes(words(800).replace("\n", "\r\n").replace("anna", "ä").encode("latin-1"))
    arguments = [*COMMAND, "--dataset", str(path), "--epochs", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKER_INLINE", "1")
        patch.chdir(folder)
        return run_train(shared_store, *arguments)._replace(output=str(path))


def test_a_training_logs_its_metrics_samples_and_a_model_that_can_be_rebuilt(
    finished: Training, tmp_path: Path
) -> None:
    store, run, path = finished
    assert run.data.params["model"] == "char-lstm"
    assert run.data.params["dataset"] == "words.txt"
    assert run.data.params["hidden"] == "16"
    for name in RECIPE.metrics:
        assert [step for step, _ in store.history(run, name)] == [1, 2], name
    first, last = (value for _, value in store.history(run, "val_perplexity"))
    assert last < first
    assert "test_perplexity" in run.data.metrics
    assert len(run.inputs.dataset_inputs) == 3
    samples = sorted(path for path in store.artifacts(run) if path.startswith("samples/"))
    assert samples == ["samples/epoch-0001.txt", "samples/epoch-0002.txt"]
    sample = store.text(run, samples[-1], tmp_path)
    assert sample.startswith("ä was")
    assert len(sample) == 35

    model = load_trained(finished.model, store.uri)
    described = json.loads(model.files["recipe.json"])
    assert "\r" not in described["facts"]["characters"]
    network = rebuild(described)
    network.load_state_dict(model.program.state_dict)
    tokens = torch.randint(5, (3, 20))
    torch.testing.assert_close(model.program.module()(tokens), network.eval()(tokens))
    assert isinstance(network, CharLSTM)
    validation = loaded(Path(path)).validation
    assert evaluate(network, validation) == pytest.approx(run.data.metrics["val_loss"])


def test_the_sample_command_repeats_the_run_s_sample_and_takes_other_options(
    finished: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = finished.store

    def output(*arguments: str) -> str:
        capsys.readouterr()
        command = [finished.run_id, "--tracking-uri", store.uri, *arguments]
        assert sampling.main(command) == 0
        return capsys.readouterr().out

    # The run's prime, temperature and top_k are the defaults; an epoch's seed is seed + epoch.
    logged = store.text(finished.run, "samples/epoch-0002.txt", tmp_path)
    assert output("--length", "30", "--seed", str(5 + 2)) == f"{logged}\n"
    options = ["--prime", "was", "--length", "50", "--temperature", "0.5", "--top-k", "3"]
    first, same, other = (output(*options, "--seed", seed) for seed in ("0", "0", "1"))
    assert first == same != other
    assert first.startswith("was")
    assert len(first) == 3 + 50 + 1

    assert sampling.main([finished.run_id, "--tracking-uri", store.uri, "--prime", "Ω was Ω"]) == 2
    message = "prime='Ω was Ω' contains 'Ω'; allowed: the characters of the text that the network"
    assert one_sentence(capsys).startswith(f"studies.sample: {message}")


def test_one_epoch_and_a_resumed_one_equal_two_without_a_break(finished: Training) -> None:
    """Dropout and samples draw random numbers."""
    store = finished.store
    arguments = [*COMMAND, "--dataset", finished.output]
    cut = run_train(store, *arguments, "--epochs", "1")
    resumed = run_train(store, *arguments, "--epochs", "2", "--resume", cut.run_id)
    one, other = (
        load_trained(training.model, store.uri).program.state_dict
        for training in (finished, resumed)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("loss", "val_loss"):
        assert store.history(finished.run, name) == store.history(resumed.run, name)


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err


def test_a_run_without_a_char_lstm_cannot_be_sampled(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sampling.main(["0" * 32]) == 2
    assert "0" * 32 in one_sentence(capsys)
    assert sampling.main(["no/run"]) == 2
    assert "no/run" in one_sentence(capsys)

    network = torch.nn.Linear(4, 2)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(8, 4)), 4)
    other = json.dumps(spec("os:system", {}, {}))
    expected = (
        (False, None, "could not find the model 'runs:/RUN/model'"),
        (
            True,
            None,
            "model='runs:/RUN/model' was not logged by studies.train; allowed: a char-lstm",
        ),
        (
            True,
            {"recipe.json": other},
            "model='runs:/RUN/model' is a model of 'os:system'; allowed: char-lstm.",
        ),
    )
    for has_model, files, message in expected:
        with RunManager(model=has_model) as manager:
            manager.begin_run({}, network, loader)
            network(torch.rand(8, 4))
            manager.end_run(model_files=files)
        run_id = store.runs()[-1].info.run_id
        assert sampling.main([run_id]) == 2
        assert message.replace("RUN", run_id) in one_sentence(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: RUN_ID"),
        ("r --length 0", "argument --length: '0' is not allowed; it must be a whole number from 1"),
        ("r --temperature 0", "argument --temperature: '0' is not allowed; it must be a number"),
        ("r --temperature nan", "argument --temperature: 'nan' is not allowed"),
        ("r --top-k -1", "--top-k"),
        ("r --seed x", "argument --seed: 'x' is not allowed"),
        ("r --tracking-uri http://[bad", "tracking_uri='http://[bad' cannot be opened"),
    ],
)
def test_a_mistake_is_reported_in_one_sentence(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = sampling.main(arguments.split())
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    assert message in one_sentence(capsys)


@pytest.mark.parametrize("size", ["4", "2,4"])
def test_a_study_is_checked_with_values_that_its_trials_may_take(
    store: Store, text_file: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text is too short for the default batch_size, but long enough for the given ones."""
    arguments = ["--model", "char-lstm", "--dataset", str(text_file), "--length", "20"]
    arguments += ["--tracking-uri", store.uri, "--batch-size"]
    search.make(search.parse([*arguments, size]), arguments)  # is not refused
    assert search.main([*arguments, "400"]) == 2
    assert "batch_size=400 and length=20 need at least" in one_sentence(capsys)


def test_the_trigram_baseline_learns_what_is_predictable(tmp_path: Path) -> None:
    path = tmp_path / "letters.txt"
    path.write_text("abcdefgh" * 2500)
    assert character_trigram(loaded(path)).perplexity < 1.01
    path.write_text("".join(random.Random(0).choices("abcdefgh", k=200_000)))
    assert character_trigram(loaded(path)).perplexity == pytest.approx(8, rel=0.01)
    path.write_text("ab" * 10_000 + "xyz" * 700)  # the training part has none of these
    assert 2 < character_trigram(loaded(path)).perplexity < math.inf


@pytest.mark.slow
def test_it_beats_trigrams_on_anna(store: Store, data_dir: Path | None) -> None:
    if data_dir is None or not (data_dir / "text" / "anna.txt").is_file():
        pytest.skip("TRACKER_DATA_DIR has no text/anna.txt")
    arguments = ["--model", "char-lstm", "--data-dir", str(data_dir), "--hidden", "128"]
    assert train([*arguments, "--epochs", "2"]) == 0
    data = load_text(Source("auto", str(data_dir), 0), 64, 100)
    baseline = character_trigram(data)
    assert store.run().data.metrics["val_perplexity"] < baseline.perplexity
