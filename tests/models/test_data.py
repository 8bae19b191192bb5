"""Image networks and data sets."""

import gzip
import hashlib
import itertools
import logging
import os
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import FashionMNIST

import models
from models import DATASETS, RECIPES, FashionCNN, Images, ModelsError, find, load
from models.data import load_images
from models.download import Archives, DownloadError, download, download_file
from models.idx import FILES
from models.recipe import Source
from tests.test_imports import imports

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = FILES
REAL = os.environ.get("TRACKER_DATA_DIR")


# --- Data to test with: always generated, also real if TRACKER_DATA_DIR is set.


def idx_bytes(values: Tensor) -> bytes:
    header = struct.pack(f">I{values.ndim}I", 8 * 256 + values.ndim, *values.shape)
    return header + values.to(torch.uint8).numpy().tobytes()


def write_raw(
    root: Path, dataset: str = "FashionMNIST", *, train: int = 50, test: int = 20
) -> Path:
    """Write a data set of noise with equal classes, as the four files that torchvision unpacks."""
    raw = root / dataset / "raw"
    raw.mkdir(parents=True)
    noise = torch.Generator().manual_seed(1)
    for images, labels, count in (
        (TRAIN_IMAGES, TRAIN_LABELS, train),
        (TEST_IMAGES, TEST_LABELS, test),
    ):
        pixels = torch.randint(0, 256, (count, 28, 28), generator=noise)
        (raw / images).write_bytes(idx_bytes(pixels))
        (raw / labels).write_bytes(idx_bytes(torch.arange(count) % 10))
    return raw


def pictures_in(path: Path) -> Counter[bytes]:
    body = path.read_bytes()[16:]
    return Counter(body[start : start + 784] for start in range(0, len(body), 784))


def pictures_of(*parts: Images) -> Counter[bytes]:
    images = torch.cat([part.images for part in parts])
    return Counter(image.numpy().tobytes() for image in (images * 255).round().to(torch.uint8))


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(params=["generated", "real"] if REAL else ["generated"])
def data_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "real":
        assert REAL
        return Path(REAL)
    write_raw(tmp_path, "FashionMNIST")
    write_raw(tmp_path, "MNIST")
    return tmp_path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """The folder of an intact Fashion-MNIST, for a test to damage."""
    return write_raw(tmp_path)


# --- Mirrors to test with, on the loopback interface.


class Mirror(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def no_proxy_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def archives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archives]:
    """A mirror that has a generated Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("mirror")
    raw = write_raw(tmp_path_factory.mktemp("published"))
    for name in FILES:
        (folder / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
    with serve(folder, Mirror) as archives:
        yield archives


@pytest.fixture
def stalled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archives]:
    """A mirror that announces every file and sends one byte of it."""
    folder = tmp_path_factory.mktemp("stalled")
    for name in FILES:
        (folder / f"{name}.gz").touch()
    released = threading.Event()

    class Stalled(Mirror):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"\x1f")
            released.wait()

    with serve(folder, Stalled) as archives:
        yield archives
        released.set()


@contextmanager
def serve(folder: Path, handler: type[Mirror]) -> Iterator[Archives]:
    digests = [hashlib.md5((folder / f"{name}.gz").read_bytes()).hexdigest() for name in FILES]
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Archives(
            mirrors=(f"http://127.0.0.1:{server.server_port}/",),
            files=tuple((f"{name}.gz", md5) for name, md5 in zip(FILES, digests, strict=True)),
        )
        server.shutdown()
        thread.join()


@pytest.fixture
def offline() -> Iterator[Archives]:
    """A mirror that refuses connections: its port is bound but not listening."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield mirror_at(taken)


@pytest.fixture
def silent() -> Iterator[Archives]:
    """A mirror that accepts connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield mirror_at(listening)


def mirror_at(bound: socket.socket) -> Archives:
    return Archives(
        mirrors=(f"http://127.0.0.1:{bound.getsockname()[1]}/",),
        files=tuple((f"{name}.gz", "") for name in FILES),
    )


# --- Networks.


def test_fashion_cnn_has_the_layers_of_the_tutorial() -> None:
    weights = {name: layer.weight.shape for name, layer in FashionCNN().named_children()}

    assert weights == {
        "conv1": (6, 1, 5, 5),
        "conv2": (12, 6, 5, 5),
        "fc1": (120, 192),
        "fc2": (60, 120),
        "out": (10, 60),
    }


def test_fashion_cnn_applies_its_layers_in_order() -> None:
    network, images = FashionCNN(), torch.rand(3, 1, 28, 28)
    same = nn.Sequential(
        *(network.conv1, nn.ReLU(), nn.MaxPool2d(2, 2)),
        *(network.conv2, nn.ReLU(), nn.MaxPool2d(2, 2), nn.Flatten()),
        *(network.fc1, nn.ReLU(), network.fc2, nn.ReLU(), network.out),
    )

    logits = network(images)

    assert logits.shape == (3, 10)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, same(images))


@pytest.mark.parametrize("training", [True, False])
def test_a_wide_fashion_cnn_normalises_after_its_convolutions(training: bool) -> None:
    network = FashionCNN(width=2, batch_norm=True).train(training)
    images = torch.rand(3, 1, 28, 28)
    norms = [nn.BatchNorm2d(channels).train(training) for channels in (12, 24)]
    same = nn.Sequential(
        *(network.conv1, norms[0], nn.ReLU(), nn.MaxPool2d(2, 2)),
        *(network.conv2, norms[1], nn.ReLU(), nn.MaxPool2d(2, 2), nn.Flatten()),
        *(network.fc1, nn.ReLU(), network.fc2, nn.ReLU(), network.out),
    )

    torch.testing.assert_close(network(images), same(images))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_every_parameter_of_fashion_cnn_has_a_gradient(batch_norm: bool) -> None:
    network = FashionCNN(batch_norm=batch_norm)
    network(torch.rand(8, 1, 28, 28)).logsumexp(1).sum().backward()

    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize("name", ["fashion-cnn", "fashion-mlp"])
def test_dropout_drops_hidden_units_in_training_only(name: str) -> None:
    recipe = RECIPES[name]
    network = recipe.build({**recipe.defaults(), "dropout": 0.25}, {})
    plain = recipe.build(recipe.defaults(), {})
    for parameter in network.parameters():
        parameter.data.abs_()  # so that only dropped units are zero
    plain.load_state_dict(network.state_dict())
    images, hidden = torch.rand(50, 1, 28, 28), []
    network.get_submodule("out").register_forward_hook(lambda _, inputs, __: hidden.append(*inputs))

    network(images)
    network.train(False).get_submodule("fc2").train()  # like an unfrozen layer
    network(images)
    torch.testing.assert_close(network.eval()(images), plain(images), rtol=0, atol=0)

    trained, thawed, evaluated = ((units == 0).double().mean().item() for units in hidden)
    assert trained == pytest.approx(0.25, abs=0.05)
    assert (thawed > 0) == (name == "fashion-cnn")  # whose fc2 is the last hidden layer
    assert evaluated == 0


@pytest.mark.parametrize("name", ["fashion-cnn", "fashion-mlp"])
def test_build_draws_fresh_weights_from_the_global_generator(name: str) -> None:
    recipe = RECIPES[name]
    torch.manual_seed(5)
    first, second = (recipe.build(recipe.defaults(), {}) for _ in range(2))
    torch.manual_seed(5)
    again = recipe.build(recipe.defaults(), {})

    assert first is not second
    assert_same_weights = partial(torch.testing.assert_close, rtol=0, atol=0)
    assert_same_weights(dict(again.state_dict()), dict(first.state_dict()))
    with pytest.raises(AssertionError):
        assert_same_weights(dict(second.state_dict()), dict(first.state_dict()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "model='resnet' is unknown; allowed: fashion-cnn, fashion-mlp, "),
        ("nowhere:RECIPE", "model='nowhere:RECIPE' cannot be imported: No module named 'nowhere'."),
        ("models.recipe:NONE", "model='models.recipe:NONE' cannot be imported: "),
        ("models:find", "model='models:find' is a function, not a Recipe."),
    ],
)
def test_an_unknown_recipe_is_refused_in_a_sentence(name: str, message: str) -> None:
    with pytest.raises(ModelsError) as error:
        find(name)
    assert str(error.value).startswith(message)


def test_a_recipe_is_found_by_its_module() -> None:
    assert find("models.fashion_mlp:RECIPE") is RECIPES["fashion-mlp"]


def test_importing_models_does_not_need_scikit_learn() -> None:
    """A saved network is loaded without it; test_imports.py says the same of the tracker."""
    for path in Path(models.__file__).parent.glob("*.py"):
        names = imports(path, lazy=False)
        assert "sklearn" not in {name.split(".")[0] for name in names}, path


# --- Data sets.


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist", "digits"])
def test_images_have_the_shape_and_range_that_the_networks_take(name: str, data_dir: Path) -> None:
    data = load(name, data_dir)

    assert data.name == name
    for part in (data.train, data.validation, data.test):
        assert part.name == name
        assert len(part.classes) == 10
        assert part.images.shape == (len(part), 1, 28, 28)
        assert part.images.dtype == torch.float32
        assert part.images.min() >= 0
        assert part.images.max() <= 1
        assert part.images.max() > 0.9
        assert part.labels.shape == (len(part),)
        assert part.labels.dtype == torch.int64
        assert set(part.labels.tolist()) <= set(range(10))
        image, label = part[0]
        assert torch.equal(image, part.images[0])
        assert label == part.labels[0]


@pytest.mark.parametrize(
    ("name", "folder"), [("fashion-mnist", "FashionMNIST"), ("mnist", "MNIST")]
)
def test_files_are_read_exactly(name: str, folder: str, data_dir: Path) -> None:
    raw = data_dir / folder / "raw"

    data = load(name, data_dir)

    assert data.source == str(raw)
    assert pictures_of(data.test) == pictures_in(raw / TEST_IMAGES)
    assert bytes(data.test.labels.tolist()) == (raw / TEST_LABELS).read_bytes()[8:]


def test_the_published_classes_are_kept(data_dir: Path) -> None:
    assert load("fashion-mnist", data_dir).test.classes[:2] == ("T-shirt/top", "Trouser")
    assert load("mnist", data_dir).test.classes[:2] == ("0 - zero", "1 - one")


def test_validation_is_a_share_of_the_training_part_alone(data_dir: Path) -> None:
    data = load("fashion-mnist", data_dir, validation=0.2)

    published = pictures_in(data_dir / "FashionMNIST" / "raw" / TRAIN_IMAGES)
    assert pictures_of(data.train, data.validation) == published
    assert len(data.validation) == round(0.2 * published.total())


def test_every_image_keeps_its_label(raw: Path) -> None:
    data = load("fashion-mnist", raw.parents[1])

    pixels = (raw / TRAIN_IMAGES).read_bytes()[16:]
    for images, labels in (data.train.tensors, data.validation.tensors):
        for image, label in zip(images, labels, strict=True):
            position = pixels.index((image * 255).round().to(torch.uint8).numpy().tobytes()) // 784
            assert label == position % 10


@pytest.mark.parametrize("name", ["fashion-mnist", "digits"])
def test_validation_has_the_same_share_of_every_class(name: str, data_dir: Path) -> None:
    data = load(name, data_dir, validation=0.2)

    published = torch.cat([data.train.labels, data.validation.labels]).bincount(minlength=10)
    given = data.validation.labels.bincount(minlength=10)
    assert ((given - 0.2 * published).abs() <= 1).all()


@pytest.mark.parametrize("name", ["fashion-mnist", "digits"])
def test_only_the_seed_decides_which_images_are_set_aside(name: str, data_dir: Path) -> None:
    first = load(name, data_dir, seed=3)
    torch.manual_seed(99)
    again, other = load(name, data_dir, seed=3), load(name, data_dir, seed=4)

    assert all(map(torch.equal, again.train.tensors, first.train.tensors))
    assert all(map(torch.equal, again.validation.tensors, first.validation.tensors))
    assert not torch.equal(other.validation.images, first.validation.images)
    assert torch.equal(other.test.images, first.test.images)


@pytest.mark.parametrize("name", ["fashion-mnist", "digits"])
def test_loading_leaves_the_global_generators_alone(name: str, data_dir: Path) -> None:
    def states() -> tuple[object, ...]:
        kind, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), random.getstate(), (kind, bytes(keys), *rest)

    before = states()
    load(name, data_dir)

    assert states() == before


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("mirror", [False, True])
def test_training_images_are_mirrored_and_shifted(mirror: bool, shift: int, data_dir: Path) -> None:
    source = Source("fashion-mnist", str(data_dir), seed=0)
    plain, varied = (
        load_images(source, params) for params in ({}, {"mirror": mirror, "shift": shift})
    )
    image, label = plain.train[0]
    framed, flips, offsets = F.pad(image, [shift] * 4), {False, mirror}, range(2 * shift + 1)
    variants = {
        (flip, y, x): (framed.flip(2) if flip else framed)[:, y : y + 28, x : x + 28]
        for flip, y, x in itertools.product(flips, offsets, offsets)
    }
    torch.manual_seed(0)
    # Each image of a batch is drawn independently; a subset's indices may be a tensor.
    batches = DataLoader(Subset(varied.train, torch.zeros(60, dtype=torch.long)), 20)
    drawn = [varied.train[0], *(pair for batch in batches for pair in zip(*batch, strict=True))]
    assert [part.shape for part in varied.train[:5]] == [(5, 1, 28, 28), (5,)]
    seen = {next(v for v, like in variants.items() if torch.equal(like, im)) for im, _ in drawn}
    assert {int(same) for _, same in drawn} == {int(label)}

    for values, possible in zip(zip(*seen, strict=True), (flips, offsets, offsets), strict=True):
        assert set(values) == set(possible)
    for part, same_part in ((plain.validation, varied.validation), (plain.test, varied.test)):
        assert all(torch.equal(a[0], b[0]) for a, b in zip(part, same_part, strict=True))


def test_the_digits_are_complete(tmp_path: Path) -> None:
    data = load("digits", tmp_path)

    assert [len(part) for part in (data.train, data.validation, data.test)] == [1294, 144, 359]
    assert ((data.test.labels.bincount() - 35.9).abs() < 2).all()
    assert "load_digits" in data.source
    assert everything_in(tmp_path) == []


# --- `auto`.


def test_auto_is_fashion_mnist_if_it_is_on_disk(
    data_dir: Path, offline: Archives, caplog: pytest.LogCaptureFixture
) -> None:
    data = load("auto", data_dir, archives=offline)

    assert data.name == data.test.name == "fashion-mnist"
    assert one_warning(caplog) == (
        f"dataset='auto' is fashion-mnist, because it is in {data_dir}/FashionMNIST/raw."
    )


def test_auto_downloads_fashion_mnist(tmp_path: Path, archives: Archives) -> None:
    assert load("auto", tmp_path / "data", archives=archives).name == "fashion-mnist"


def test_auto_falls_back_to_the_digits_and_says_why(
    tmp_path: Path, offline: Archives, caplog: pytest.LogCaptureFixture
) -> None:
    data = load("auto", tmp_path / "data", archives=offline)

    assert data.name == data.test.name == "digits"
    warning = one_warning(caplog)
    assert f"digits, because Fashion-MNIST is not in {tmp_path}/data" in warning
    assert "refused" in warning
    assert everything_in(tmp_path) == []


def test_auto_does_not_fall_back_if_files_are_damaged(raw: Path, offline: Archives) -> None:
    (raw / TEST_LABELS).write_bytes(b"")
    with pytest.raises(ModelsError, match=TEST_LABELS):
        load("auto", raw.parents[1], archives=offline)

    (raw / TEST_LABELS).unlink()
    with pytest.raises(ModelsError, match=f"lacks {TEST_LABELS}"):
        load("auto", raw.parents[1], archives=offline)


def one_warning(caplog: pytest.LogCaptureFixture) -> str:
    ((name, level, message),) = caplog.record_tuples
    assert (name, level) == ("models.data", logging.WARNING)
    return message


# --- Downloads.


def test_an_absent_data_set_is_downloaded_once(tmp_path: Path, archives: Archives) -> None:
    root = tmp_path / "new" / "data"

    first = load("fashion-mnist", root, archives=archives)
    nowhere = Archives(mirrors=(), files=archives.files)
    again = load("fashion-mnist", root, archives=nowhere)

    assert len(first.train) + len(first.validation) == 50
    assert torch.equal(again.train.images, first.train.images)
    assert torch.equal(FashionMNIST(root, train=False).targets, first.test.labels)
    assert everything_in(root) == sorted(
        ["FashionMNIST", "FashionMNIST/raw", *(f"FashionMNIST/raw/{name}" for name in FILES)]
    )


def test_the_next_mirror_is_tried_after_a_failure(
    tmp_path: Path, archives: Archives, offline: Archives
) -> None:
    both = Archives(mirrors=offline.mirrors + archives.mirrors, files=archives.files)

    assert load("fashion-mnist", tmp_path, archives=both).name == "fashion-mnist"


def test_a_download_keeps_other_files_in_the_folder(tmp_path: Path, archives: Archives) -> None:
    note = tmp_path / "FashionMNIST" / "raw" / "note.txt"
    note.parent.mkdir(parents=True)
    note.write_text("mine")

    load("fashion-mnist", tmp_path, archives=archives)

    assert note.read_text() == "mine"
    assert {path.name for path in note.parent.iterdir()} == {"note.txt", *FILES}


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist"])
def test_without_a_network_the_message_says_what_to_do(
    name: str, tmp_path: Path, offline: Archives
) -> None:
    root = tmp_path / "new" / "data"

    with pytest.raises(ModelsError) as caught:
        load(name, root, archives=offline)

    message = str(caught.value)
    assert message.startswith(f"dataset='{name}' is not in data_dir='{root}' and cannot be dow")
    assert "refused" in message
    assert "use dataset='digits', or put train-images-idx3-ubyte, " in message
    assert isinstance(caught.value.__cause__, DownloadError)
    assert everything_in(tmp_path) == []


def test_a_mirror_that_never_answers_is_abandoned(
    tmp_path: Path, silent: Archives, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.download.PROBE_S", 0.2)
    with pytest.raises(ModelsError, match=r"did not answer within 0.2 s|timed out"):
        load("fashion-mnist", tmp_path, archives=silent)


def test_a_stalled_transfer_is_abandoned_at_the_limit(tmp_path: Path, stalled: Archives) -> None:
    with pytest.raises(DownloadError):
        download(stalled, tmp_path / "data" / "FashionMNIST" / "raw", limit_s=0.5)
    assert everything_in(tmp_path) == []


def test_a_single_file_is_downloaded_completely_or_not_at_all(
    tmp_path: Path, archives: Archives, stalled: Archives
) -> None:
    url = f"{archives.mirrors[0]}{archives.files[0][0]}"
    path = tmp_path / "deep" / "weights.pth"
    with pytest.raises(DownloadError, match="arrived damaged: its SHA-256 is not 0123"):
        download_file(url, path, sha256="0123", limit_s=30)
    with pytest.raises(DownloadError, match="timed out"):
        download_file(f"{stalled.mirrors[0]}{stalled.files[0][0]}", path, sha256="", limit_s=0.5)
    assert everything_in(path.parent) == []
    download_file(url, path, sha256="", limit_s=30)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    path.unlink()
    download_file(url, path, sha256=sha256[:8], limit_s=30)
    assert everything_in(path.parent) == ["weights.pth"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([(f"{TEST_LABELS}.gz", "0" * 32)], "arrived damaged"),
        ([(f"{TRAIN_IMAGES}.gz", ""), ("absent.gz", "")], "arrived damaged"),
        ([("absent.gz", "")], "answered 404"),
    ],
)
def test_a_failed_download_leaves_nothing(
    files: list[tuple[str, str]], reason: str, tmp_path: Path, archives: Archives
) -> None:
    wrong = Archives(mirrors=archives.mirrors, files=(*archives.files[:2], *files))

    with pytest.raises(ModelsError, match=reason):
        load("fashion-mnist", tmp_path / "new" / "data", archives=wrong)
    assert everything_in(tmp_path) == []

    (tmp_path / "mine").mkdir()
    with pytest.raises(ModelsError, match=reason):
        load("fashion-mnist", tmp_path / "mine", archives=wrong)
    assert everything_in(tmp_path) == ["mine"]


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path, archives: Archives) -> None:
    (tmp_path / "FashionMNIST").write_text("in the way")

    with pytest.raises(ModelsError, match=r"cannot be written: .*; use dataset='digits'"):
        load("fashion-mnist", tmp_path, archives=archives)


# --- Bad arguments and bad files.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cifar"}, f"dataset='cifar' is unknown; allowed: {', '.join(DATASETS)}."),
        ({"validation": 0.0}, "validation=0.0 is not allowed; it must be between 0 and 1."),
        ({"validation": 1.0}, "validation=1.0 is not allowed"),
        ({"validation": float("nan")}, "validation=nan is not allowed"),
        ({"validation": 1e-9}, "validation=1e-09 of 1438 training images leaves one part empty"),
        ({"validation": 1 - 1e-9}, "of 1438 training images leaves one part empty"),
        ({"seed": -1}, "seed=-1 is out of range; allowed: 0 to 2**63 - 1."),
        ({"data_dir": __file__}, f"data_dir='{__file__}' is not a folder"),
    ],
)
def test_an_invalid_argument_is_named(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelsError) as caught:
        load(**{"name": "digits", "data_dir": tmp_path, **arguments})

    assert message in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda body: b"", id="empty"),
        pytest.param(lambda body: body[:2], id="2 bytes"),
        pytest.param(lambda body: body[:6], id="header cut short"),
        pytest.param(lambda body: body[: len(body) // 2], id="cut in half"),
        pytest.param(lambda body: body[:-1], id="one byte short"),
        pytest.param(lambda body: body + b"\0", id="one byte long"),
        pytest.param(lambda body: b"<html>404 not found</html>" * 9, id="a page of the mirror"),
        pytest.param(gzip.compress, id="still packed"),
        pytest.param(lambda body: bytes(len(body)), id="zeros"),
        pytest.param(lambda body: b"\0\0\x0a" + body[3:], id="an unknown type"),
        pytest.param(lambda body: b"\0\0\x09" + body[3:], id="signed bytes"),
        pytest.param(lambda body: body[:3] + b"\x02" + body[4:], id="another rank"),
    ],
)
def test_a_damaged_file_is_named(name: str, damage: Callable[[bytes], bytes], raw: Path) -> None:
    (raw / name).write_bytes(damage((raw / name).read_bytes()))

    with pytest.raises(ModelsError) as caught:
        load("fashion-mnist", raw.parents[1])

    assert f"{raw / name} (" in str(caught.value)
    assert "is empty, truncated or not an idx file" in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_and_not_downloaded(
    name: str, raw: Path, archives: Archives
) -> None:
    (raw / name).unlink()

    with pytest.raises(ModelsError, match=f"lacks {name}; add it"):
        load("fashion-mnist", raw.parents[1], archives=archives)
    assert not (raw / name).exists()


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (TRAIN_LABELS, torch.arange(49) % 10, "holds 49 labels for the 50 images of train-im"),
        (TEST_IMAGES, torch.zeros(19, 28, 28), "holds 20 labels for the 19 images of t10k-im"),
        (TRAIN_LABELS, torch.arange(50) % 11, "holds the label 10; allowed: 0 to 9."),
        (TEST_IMAGES, torch.zeros(20, 32, 32), "holds images of 32x32 pixels; allowed: 28x28."),
    ],
)
def test_files_that_do_not_match_are_named(
    name: str, values: Tensor, message: str, raw: Path
) -> None:
    (raw / name).write_bytes(idx_bytes(values))

    with pytest.raises(ModelsError) as caught:
        load("fashion-mnist", raw.parents[1])

    assert message in str(caught.value)
    assert str(raw) in str(caught.value)
