"""`transfer` and `style-transfer`: backbones that were trained before, by us or by torchvision."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from models import RECIPES, ModelsError, find, rebuild, spec
from models.pictures import read_picture
from models.recipe import Source
from models.style_transfer import gram
from models.transfer import Transfer, thaw
from studies.train import main
from studies.training import Task
from tests.helpers import Store
from tracker import load_histograms

IMAGENET = torchvision.models.get_model_weights("resnet18").DEFAULT.url
FACTS = {"classes": [str(digit) for digit in range(10)], "mean": 0.3, "std": 0.35}
TRANSFER, STYLE = RECIPES["transfer"], RECIPES["style-transfer"]


def params(recipe: str, **changed: object) -> dict[str, object]:
    return {**RECIPES[recipe].defaults(), "weights": "none", **changed}


@pytest.fixture
def trained(store: Store) -> str:
    """The model of a tracked training, `runs:/ID/model`."""
    assert main(["--dataset", "digits", "--epochs", "1"]) == 0
    return f"runs:/{store.run().info.run_id}/model"


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """Two picture files: waves, and stripes in colour."""
    x, y = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    waves = (torch.sin(x / 7) * torch.cos(y / 9) + 1) / 2
    stripes = torch.stack([(x + y) % 16 < 8, (x - y) % 12 < 6, x % 10 < 5]).float()
    for name, tensor in (("content", waves.expand(3, -1, -1)), ("style", stripes)):
        array = (tensor * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    return f"{tmp_path / 'content.png'},{tmp_path / 'style.png'}"


# -- transfer --------------------------------------------------------------------------------------


def test_the_features_of_a_tracked_model_are_kept_and_its_head_is_new(
    store: Store, trained: str
) -> None:
    command = ["--model", "transfer", "--weights", trained, "--dataset", "digits", "--epochs", "2"]
    assert main([*command, "--seed", "1"]) == 0
    before, after = store.runs()
    first = Task.of("fashion-cnn", {}, Source("digits", "data", 0), None).recipe
    assert first.name == before.data.params["model"]
    kept = {}
    for run in (before, after):
        found = load_histograms(run.info.run_id)
        last = found[(found["kind"] == "weight") & (found["step"] == 1)]
        kept[run.info.run_id] = {
            name.removeprefix("backbone."): table[["left", "count"]].to_numpy().tolist()
            for name, table in last.groupby("tensor")
        }
    own, new = kept[before.info.run_id], kept[after.info.run_id]
    assert {name for name in own if own[name] != new[name]} == {"out.weight", "out.bias"}
    steps = found[found["kind"] == "weight"].groupby("tensor")["step"].unique().map(list).to_dict()
    assert steps["backbone.out.weight"] == [1, 2]
    assert steps["backbone.conv1.weight"] == [1]  # frozen: not logged again
    assert after.info.status == "FINISHED"
    assert "test_accuracy" in after.data.metrics


def test_a_model_that_was_transferred_can_be_transferred_again(store: Store, trained: str) -> None:
    command = ["--model", "transfer", "--dataset", "digits", "--epochs", "1"]
    assert main([*command, "--weights", trained]) == 0
    again = f"runs:/{store.runs()[-1].info.run_id}/model"
    assert main([*command, "--weights", again]) == 0
    assert [run.info.status for run in store.runs()] == ["FINISHED"] * 3


def test_layers_thaw_from_the_head_down() -> None:
    chosen = params("transfer", thaw=2)
    network = rebuild(spec("transfer", chosen, FACTS))
    assert isinstance(network, Transfer)

    def warm(epoch: int) -> set[str]:
        thaw(network, chosen | {"weights": "imagenet"}, epoch)
        names = {n.split(".")[1] for n, p in network.named_parameters() if p.requires_grad}
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(m.training == m.weight.requires_grad for m in norms)
        return names

    assert warm(1) == warm(2) == {"fc"}
    assert warm(3) == warm(4) == {"fc", "layer4"}
    assert warm(5) == {"fc", "layer4", "layer3"}
    assert warm(99) == {"fc", "layer4", "layer3", "layer2", "layer1", "bn1", "conv1"}


def test_what_is_frozen_stays_as_it_is(store: Store) -> None:
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


def test_imagenet_s_weights_come_from_torch_s_own_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    published = torchvision.models.resnet18().state_dict()
    file = tmp_path / "checkpoints" / Path(IMAGENET).name
    file.parent.mkdir()
    torch.save(published, file)
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
        ({"backbone": "resnet0"}, "backbone='resnet0' is not known; allowed: alexnet, "),
        ({"backbone": "squeezenet1_0"}, "has no linear layer to replace by a head."),
        ({"weights": "coco"}, "weights='coco' is not known; allowed: imagenet, none, runs:/RUN_ID"),
        ({"backbone": "alexnet", "image_size": 16}, "does not take pictures of 28x28 at image_"),
    ],
)
def test_a_backbone_that_does_not_fit_is_a_sentence(
    changed: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelsError, match=re.escape(message)) as error:
        rebuild(spec("transfer", params("transfer", **changed), FACTS))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{}, {"conv1.weight": torch.zeros(64, 3, 7, 7)}, [1], "cut"])
def test_a_damaged_file_of_weights_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / Path(IMAGENET).name
    file.parent.mkdir()
    if content == "cut":
        file.write_bytes(b"PK")
    else:
        torch.save(content, file)
    chosen = params("transfer", weights="imagenet")
    assert TRANSFER.weights is not None
    with pytest.raises(ModelsError, match=re.escape(f"{file} is damaged; remove it")):
        TRANSFER.weights(rebuild(spec("transfer", chosen, FACTS)), chosen, None)


def test_weights_of_another_shape_are_a_sentence() -> None:
    chosen = params("transfer", weights="runs:/1/model")
    backbone = spec("fashion-cnn", find("fashion-cnn").defaults(), {})
    network = rebuild(spec("transfer", chosen, {**FACTS, "backbone": backbone}))
    assert TRANSFER.weights is not None
    for state in ({"conv1.weight": torch.zeros(6, 3, 5, 5)}, {"conv9.weight": torch.zeros(1)}):
        with pytest.raises(
            ModelsError, match=r"^weights='runs:/1/model' do not fit: conv\d.weight"
        ):
            TRANSFER.weights(network, chosen, state)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("runs:/" + "0" * 32 + "/model", "MLflow could not find the model"),
        ("models:/nothing/1", "MLflow could not find the model 'models:/nothing/1'"),
    ],
)
def test_a_model_that_is_not_there_is_a_sentence(
    store: Store, capsys: pytest.CaptureFixture[str], weights: str, message: str
) -> None:
    command = ["--model", "transfer", "--dataset", "digits", "--weights", weights]
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert store.runs() == []


# -- style-transfer --------------------------------------------------------------------------------


def test_the_style_loss_falls_and_the_picture_is_logged_by_step(
    store: Store, trained: str, pictures: str
) -> None:
    command = ["--model", "style-transfer", "--dataset", pictures, "--weights", trained]
    assert main([*command, "--epochs", "3", "--steps", "20", "--size", "64"]) == 0
    run = store.runs()[-1]
    assert run.info.status == "FINISHED"
    losses = [value for _, value in store.history(run, "style_loss")]
    assert len(losses) == 3
    assert run.data.metrics["style_fall"] > 10
    assert run.data.metrics["content_loss"] > 0
    logged = {name for name in store.artifacts(run) if name.startswith("images/picture")}
    assert {name.split("+")[2] for name in logged} == {"1", "2", "3"}
    assert run.outputs.model_outputs == []


def test_a_network_for_colours_that_we_trained_judges_pictures_at_their_own_size(
    store: Store, pictures: str
) -> None:
    small = ["--weights", "none", "--image-size", "16", "--dataset", "digits", "--epochs", "1"]
    assert main(["--model", "transfer", *small]) == 0
    own = f"runs:/{store.run().info.run_id}/model"
    command = ["--model", "style-transfer", "--dataset", pictures, "--weights", own]
    assert main([*command, "--epochs", "1", "--steps", "10", "--size", "64"]) == 0
    run = store.runs()[-1]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["style_fall"] > 1


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
        (["--dataset", "a.jpg"], "dataset='a.jpg' is not two picture files"),
        (["--dataset", "a.jpg,b.jpg"], "dataset='a.jpg,b.jpg' is not two picture files"),
        (["--dataset", "{text},{text}"], "is not a picture that can be decoded."),
        (["--dataset", "{cut},{cut}"], "cannot be read: "),
        (
            ["--dataset", "{huge},{huge}"],
            "studies.train: {huge} is too large; allowed are 100,000,000 pixels in all.",
        ),
        (["--dataset", "{bomb},{bomb}"], "{bomb} is too large; allowed are 100,000,000 pixels in"),
        (
            ["--dataset", "{deep},{deep}"],
            "{deep} has pixels of the kind I;16; allowed: 8 bits",
        ),
        (["--backbone", "vit_b_32", "--size", "64"], "the network does not take pictures of 48x"),
        (["--dataset", "{good}", "--style-layers", "features.1"], "'features.1' is no convolution"),
        (["--size", "8"], "argument --size: '8' is not allowed; it must be a whole number from 16"),
    ],
)
def test_a_mistake_is_one_sentence(
    store: Store,
    tmp_path: Path,
    pictures: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes((tmp_path / "style.png").read_bytes()[:60])
    huge = tmp_path / "huge.png"
    Image.new("1", (12_000, 10_000)).save(huge)
    bomb = tmp_path / "bomb.png"  # PIL itself refuses to open it
    Image.new("1", (20_000, 10_000)).save(bomb)
    deep = tmp_path / "deep.png"
    Image.new("I;16", (50, 50)).save(deep)
    files = {"text": text, "cut": cut, "huge": huge, "bomb": bomb, "deep": deep, "good": pictures}
    given = [word.format(**files) for word in arguments]
    if "--dataset" not in given:
        given += ["--dataset", pictures]
    capsys.readouterr()
    try:
        code = main(["--model", "style-transfer", "--weights", "none", "--epochs", "1", *given])
    except SystemExit as error:
        code = int(error.code or 0)
    said = capsys.readouterr().err
    assert code == 2
    assert message.format(**files) in said
    assert said.count("\n") == 1
    assert store.runs() == []


def test_a_picture_is_scaled_by_its_longer_side_or_cropped(pictures: str) -> None:
    content, style = pictures.split(",")
    assert read_picture(content, 40).shape == (3, 30, 40)
    assert read_picture(content, 400).shape == (3, 60, 80)  # never enlarged
    cropped: Tensor = read_picture(style, (50, 50))
    assert cropped.shape == (3, 50, 50)
    assert 0 <= cropped.min() < cropped.max() <= 1
