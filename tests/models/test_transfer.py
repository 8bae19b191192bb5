"""`transfer` and `style-transfer`: backbones pretrained by torchvision or tracked before."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from models import RECIPES, ModelsError, find, rebuild, spec
from models.image_file import read_image
from models.recipe import Source
from models.style_transfer import gram
from models.transfer import Transfer, thaw
from studies.train import main
from studies.training import Task
from tests.helpers import Store, Training, run_train
from tracker import load_histograms, load_trained

DIGITS = Source("digits", "data", 0)
IMAGENET = torchvision.models.get_model_weights("resnet18").DEFAULT.url
FACTS = {"classes": [str(digit) for digit in range(10)], "mean": 0.3, "std": 0.35}
TRANSFER, STYLE = RECIPES["transfer"], RECIPES["style-transfer"]


def params(recipe: str, **changed: object) -> dict[str, object]:
    return {**RECIPES[recipe].defaults(), "weights": "none", **changed}


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """Two image files: waves, and stripes in colour."""
    x, y = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    waves = (torch.sin(x / 7) * torch.cos(y / 9) + 1) / 2
    stripes = torch.stack([(x + y) % 16 < 8, (x - y) % 12 < 6, x % 10 < 5]).float()
    for name, tensor in (("content", waves.expand(3, -1, -1)), ("style", stripes)):
        array = (tensor * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    return f"{tmp_path / 'content.png'},{tmp_path / 'style.png'}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in torch's cache that holds the ImageNet weights of resnet18, not yet written."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / Path(IMAGENET).name
    file.parent.mkdir()
    return file


# -- transfer --------------------------------------------------------------------------------------


def test_a_tracked_model_s_features_are_kept_with_a_new_head(on_digits: Training) -> None:
    store = on_digits.store
    command = ["--model", "transfer", "--weights", on_digits.model, "--dataset", "digits"]
    trained = run_train(store, *command, "--epochs", "2", "--seed", "1")
    assert "test_accuracy" in trained.run.data.metrics
    assert not {"backbone", "image_size"} & set(trained.run.data.params)  # the model brings both
    own = load_trained(on_digits.model, store.uri).program.state_dict
    new = load_trained(trained.model, store.uri).program.state_dict
    changed = {name for name in own if not torch.equal(own[name], new[f"backbone.{name}"])}
    assert changed == {"out.weight", "out.bias"}
    histograms = load_histograms(trained.run_id, store.uri).query("kind == 'weight'")
    steps = histograms.groupby("tensor")["step"].unique().map(list).to_dict()
    assert steps["backbone.out.weight"] == [1, 2]
    assert steps["backbone.conv1.weight"] == [1]  # frozen, so not logged again

    again = params("transfer", weights=trained.model)  # a transferred model, transferred again
    network = Task.of("transfer", again, DIGITS, store.uri).network()
    assert torch.equal(network.get_parameter("backbone.backbone.conv1.weight"), own["conv1.weight"])
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_layers_thaw_from_the_head_down() -> None:
    chosen = params("transfer", thaw=2)
    network = rebuild(spec("transfer", chosen, FACTS))
    assert isinstance(network, Transfer)

    def trained(epoch: int) -> set[str]:
        thaw(network, chosen | {"weights": "imagenet"}, epoch)
        names = {n.split(".")[1] for n, p in network.named_parameters() if p.requires_grad}
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(m.training == m.weight.requires_grad for m in norms)
        return names

    assert trained(1) == trained(2) == {"fc"}
    assert trained(3) == trained(4) == {"fc", "layer4"}
    assert trained(5) == {"fc", "layer4", "layer3"}
    assert trained(99) == {"fc", "layer4", "layer3", "layer2", "layer1", "bn1", "conv1"}


def test_frozen_layers_keep_their_weights_and_statistics() -> None:
    network = rebuild(spec("transfer", params("transfer", image_size=16), FACTS))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    thaw(network, {"thaw": 0, "weights": "imagenet"}, 1)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad])
    network(torch.rand(4, 1, 28, 28)).logsumexp(1).sum().backward()
    optimizer.step()
    changed = {n for n, t in network.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"backbone.fc.weight", "backbone.fc.bias"}


def test_without_weights_everything_is_trained() -> None:
    network = rebuild(spec("transfer", params("transfer"), FACTS))
    thaw(network, params("transfer"), 1)
    assert all(p.requires_grad for p in network.parameters())


def test_imagenet_weights_come_from_torch_s_cache(hub: Path) -> None:
    published = torchvision.models.resnet18().state_dict()
    torch.save(published, hub)
    chosen = params("transfer", weights="imagenet")
    network = rebuild(spec("transfer", chosen, FACTS))
    assert TRANSFER.weights is not None
    TRANSFER.weights(network, chosen, None)
    assert isinstance(network, Transfer)
    assert torch.equal(network.backbone.get_parameter("conv1.weight"), published["conv1.weight"])
    assert network.backbone.get_parameter("fc.weight").shape == (10, 512)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"backbone": "resnet0"}, "backbone='resnet0' is unknown; allowed: alexnet, "),
        ({"backbone": "squeezenet1_0"}, "has no linear layer to replace with a head."),
        ({"weights": "coco"}, "weights='coco' is unknown; allowed: imagenet, none, runs:/RUN_ID"),
        ({"backbone": "alexnet", "image_size": 16}, "does not take images of 28x28 at image_size"),
    ],
)
def test_an_unsuitable_backbone_is_refused_in_a_sentence(
    changed: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelsError, match=re.escape(message)) as error:
        rebuild(spec("transfer", params("transfer", **changed), FACTS))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{}, {"conv1.weight": torch.zeros(64, 3, 7, 7)}, [1], "cut"])
def test_a_damaged_file_of_weights_is_named(hub: Path, content: object) -> None:
    if content == "cut":
        hub.write_bytes(b"PK")
    else:
        torch.save(content, hub)
    chosen = params("transfer", weights="imagenet")
    assert TRANSFER.weights is not None
    with pytest.raises(ModelsError, match=re.escape(f"{hub} is damaged; remove it")):
        TRANSFER.weights(rebuild(spec("transfer", chosen, FACTS)), chosen, None)


def test_weights_of_another_shape_are_refused_in_a_sentence() -> None:
    chosen = params("transfer", weights="runs:/1/model")
    backbone = spec("fashion-cnn", find("fashion-cnn").defaults(), {})
    network = rebuild(spec("transfer", chosen, {**FACTS, "backbone": backbone}))
    assert TRANSFER.weights is not None
    for state in ({"conv1.weight": torch.zeros(6, 3, 5, 5)}, {"conv9.weight": torch.zeros(1)}):
        with pytest.raises(
            ModelsError, match=r"^weights='runs:/1/model' do not fit: conv\d.weight"
        ):
            TRANSFER.weights(network, chosen, state)


@pytest.mark.parametrize("weights", ["runs:/" + "0" * 32 + "/model", "models:/nothing/1"])
def test_a_model_that_does_not_exist_is_reported_in_a_sentence(
    store: Store, capsys: pytest.CaptureFixture[str], weights: str
) -> None:
    capsys.readouterr()
    assert main(["--model", "transfer", "--dataset", "digits", "--weights", weights]) == 2
    message = capsys.readouterr().err
    assert f"could not find the model '{weights}'" in message
    assert message.count("\n") == 1
    assert store.runs() == []


# -- style-transfer --------------------------------------------------------------------------------


def test_the_style_loss_falls_and_the_image_is_logged_after_each_epoch(
    on_digits: Training, pictures: str
) -> None:
    store = on_digits.store
    command = ["--model", "style-transfer", "--dataset", pictures, "--weights", on_digits.model]
    run = run_train(store, *command, "--epochs", "2", "--steps", "20", "--size", "64").run
    assert len(store.history(run, "style_loss")) == 2
    assert run.data.metrics["style_fall"] > 10
    assert run.data.metrics["content_loss"] > 0
    logged = {name for name in store.artifacts(run) if name.startswith("images/picture")}
    assert {name.split("+")[2] for name in logged} == {"1", "2"}
    assert run.outputs.model_outputs == []


def test_a_tracked_colour_network_judges_images_at_full_size(pictures: str) -> None:
    """`transfer` shrinks its images to 16 pixels; style transfer skips that."""
    transferred = spec("transfer", params("transfer", image_size=16), FACTS)
    chosen = params("style-transfer", size=64, steps=10, weights="runs:/1/model")
    data = STYLE.load(Source(pictures, "data", 0), chosen)
    network = STYLE.build(chosen, {**data.facts, "backbone": transferred})
    assert STYLE.loop is not None
    loop = STYLE.loop(network, data, chosen)
    assert len(list(loop.train(1))) == 10
    assert loop.validate()["style_fall"] > 1


def test_vgg_19_judges_by_the_paper_s_layers(pictures: str) -> None:
    chosen = params("style-transfer", size=32)
    task = Task.of("style-transfer", chosen, Source(pictures, "data", 0), None)
    network = task.network()
    assert STYLE.loop is not None
    loop = STYLE.loop(network, task.data, {**chosen, "steps": 2})
    before = loop.validate()["style_loss"]
    assert before > 0
    assert [step.samples for step in loop.train(1)] == [1, 1]
    assert loop.validate()["style_loss"] < before
    assert [name for name, _ in network.named_parameters()] == ["picture"]


def test_a_gram_matrix_is_that_of_the_paper() -> None:
    features = torch.randn(1, 3, 4, 5)
    flat = features[0].reshape(3, 20)
    expected = torch.stack([torch.stack([(a * b).sum() for b in flat]) for a in flat]) / 60
    torch.testing.assert_close(gram(features)[0], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "a.jpg"], "dataset='a.jpg' is not two image files"),
        (["--dataset", "a.jpg,b.jpg"], "dataset='a.jpg,b.jpg' is not two image files"),
        (["--backbone", "vit_b_32", "--size", "64"], "the network does not take images of 48x64"),
        (["--style-layers", "features.1"], "'features.1' is not a convolution of the network"),
        (["--size", "8"], "argument --size: '8' is not allowed; it must be a whole number from 16"),
    ],
)
def test_a_mistake_is_reported_in_one_sentence(
    store: Store,
    pictures: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["--model", "style-transfer", "--weights", "none", "--dataset", pictures]
    capsys.readouterr()
    try:
        code = main([*command, "--epochs", "1", *arguments])
    except SystemExit as error:
        code = int(error.code or 0)
    shown = capsys.readouterr().err
    assert code == 2
    assert message in shown
    assert shown.count("\n") == 1
    assert store.runs() == []


# -- image files -----------------------------------------------------------------------------------


def test_an_image_is_scaled_by_its_longer_side_or_cropped(pictures: str) -> None:
    content, style = pictures.split(",")
    assert read_image(content, 40).shape == (3, 30, 40)
    assert read_image(content, 400).shape == (3, 60, 80)  # never enlarged
    cropped = read_image(style, (50, 50))
    assert cropped.shape == (3, 50, 50)
    assert 0 <= cropped.min() < cropped.max() <= 1


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "is not an image that can be decoded."),
        ("cut", "cannot be read: "),
        ("huge", "is too large; allowed are 100,000,000 pixels in all."),
        ("bomb", "is too large; allowed are 100,000,000 pixels in all."),  # refused by Pillow
        ("deep", "has pixels of mode I;16; allowed: 8 bits per channel."),
    ],
)
def test_an_unusable_image_is_refused_in_a_sentence(
    kind: str, message: str, tmp_path: Path, pictures: str
) -> None:
    path = tmp_path / f"{kind}.png"
    sizes = {"huge": (12_000, 10_000), "bomb": (20_000, 10_000), "deep": (50, 50)}
    if kind in sizes:
        Image.new("I;16" if kind == "deep" else "1", sizes[kind]).save(path)
    else:
        content = Path(pictures.split(",")[1]).read_bytes()[:60]
        path.write_bytes(content if kind == "cut" else b"not an image")
    with pytest.raises(ModelsError) as error:
        read_image(path, 64)
    assert str(error.value).startswith(f"{path} {message}")
    assert "\n" not in str(error.value)
