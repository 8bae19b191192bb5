"""Every recipe, by the same commands: a study over each, and a recipe from outside the package."""

from __future__ import annotations

import io
import json
import math
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim import Optimizer

from models import RECIPES, ModelsError, parse_spec, rebuild
from models.recipe import Parameter, Params, Range, Recipe, Source
from studies import export, search, train
from studies.arguments import default_space
from studies.training import Task, begin
from tests.helpers import Store, Training, run_train
from tracker import ArgumentError, Keep, RunManager, load_trained, set_seed
from tracker.deploy import FORMATS

DIGITS = Source("digits", "data", 0)
OWN = """
import torch
from torch import nn
from models.data import load_images
from models.recipe import Parameter, Recipe

RECIPE = Recipe(
    name="linear",
    summary="one layer",
    load=load_images,
    build=lambda params, facts: nn.Sequential(
        nn.Flatten(), nn.Dropout(params["dropout"]), nn.Linear(784, len(facts["classes"]))
    ),
    parameters={
        "lr": Parameter(default=0.01, help="rate", search=(0.01, 0.001), grid=(0.01, 0.001)),
        "batch_size": Parameter(default=200, help="images per batch"),
        "dropout": Parameter(default=0.0, least=0, most=0.9, help="share of pixels"),
    },
    datasets="digits",
    dataset="digits",
    epochs=1,
)
"""
ENDLESS = """
from dataclasses import replace
from torch.utils.data import IterableDataset
from models import RECIPES
from models.data import load_images


class Endless(IterableDataset):
    def __init__(self, part):
        self.part = part

    def __iter__(self):
        return iter([self.part[0]] * 8)


def load(source, params):
    data = load_images(source, params)
    return replace(data, train=Endless(data.train))


RECIPE = replace(RECIPES["fashion-mlp"], load=load, dataset="digits", datasets="digits")
"""
UNTRAINABLE = """
from torch import nn
from models.recipe import Data, Parameter, Recipe
ONE = Parameter(default=1.0, help="")
RECIPE = Recipe(name="wrong", summary="", datasets="", dataset="none",
    load=lambda source, params: Data(name="none", train=[], source=""),
    build=lambda params, facts: nn.Linear(1, 1), parameters=PARAMETERS)
"""


@pytest.fixture
def own_recipe(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a module `own` with a recipe, and return the arguments that name it."""
    monkeypatch.syspath_prepend(workdir)

    def write(source: str) -> list[str]:
        sys.modules.pop("own", None)
        (workdir / "own.py").write_text(source)
        return ["--model", "own:RECIPE"]

    yield write
    sys.modules.pop("own", None)


@pytest.fixture
def quick(tmp_path: Path) -> dict[str, list[str]]:
    """Arguments that make a training short, for each recipe."""
    words = "the cat sat on a mat and saw that it was good, or was it not? "
    (tmp_path / "text.txt").write_text("".join(words[i % 7 :] for i in range(400)))
    for ending, word in (("pos", "gorgeous"), ("neg", "dull")):
        lines = [f"a {word} film of number {number}" for number in range(60)]
        (tmp_path / f"films.{ending}").write_text("\n".join(lines))
    for name in ("content", "style"):
        Image.effect_noise((48, 40), 90).save(tmp_path / f"{name}.png")
    pair = f"{tmp_path / 'content.png'},{tmp_path / 'style.png'}"
    digits = ["--dataset", "digits"]
    return {
        "fashion-cnn": digits,
        "fashion-mlp": digits,
        "transfer": [*digits, "--weights", "none", "--image-size", "16"],
        "style-transfer": ["--dataset", pair, "--weights", "none", "--steps", "2", "--size", "32"],
        "char-lstm": ["--dataset", str(tmp_path / "text.txt"), "--batch-size", "8",
                      "--hidden", "16", "--length", "20"],
        "sentiment-lstm": ["--dataset", str(tmp_path / "films"), "--hidden", "8"],
    }  # fmt: skip


def train_without_model(task: Task, *, epochs: int = 1, seed: int = 0) -> dict[str, float]:
    """Train, and log neither the model nor its mistakes; returns the last epoch's metrics."""
    set_seed(seed)
    settings = {"epochs": epochs, "device": torch.device("cpu"), "params": {}, "final": False}
    with RunManager(model=False) as manager:
        *_, last = begin(manager, task, **settings)[1]
    return dict(last.metrics)


def refusal(capsys: pytest.CaptureFixture[str], command: Any, *arguments: str) -> str:
    """The message of a command for invalid arguments: one line, and an exit code of 2."""
    capsys.readouterr()
    try:
        code = command.main(list(arguments))
    except SystemExit as exited:
        code = int(str(exited.code))
    message = capsys.readouterr().err
    assert code == 2, message
    assert message.count("\n") == 1, message
    return message


# -- each recipe -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_study_of_two_trials_over_each_recipe(
    name: str, quick: dict[str, list[str]], store: Store, workdir: Path
) -> None:
    command = ["--model", name, *quick[name], "--epochs", "1"]
    assert search.main([*command, "--sampler", "random", "--trials", "2"]) == 0
    runs = store.runs()
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    objective = next(iter(RECIPES[name].metrics))
    table = pd.read_csv(io.StringIO(store.text(parent, "trials.csv", workdir)))
    assert len(table) == 2
    searched = search.parse(command).space
    assert searched
    assert set(searched) <= set(table.columns)
    for run in runs:
        if run is not parent:
            assert run.data.params["model"] == name
            assert objective in run.data.metrics


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion-mlp", "transfer", "sentiment-lstm"])
def test_each_classifier_is_exported_to_each_format(
    name: str, quick: dict[str, list[str]], store: Store, workdir: Path
) -> None:
    run_id = run_train(store, "--model", name, *quick[name], "--epochs", "1").run_id
    for kind in FORMATS:  # each file is compared with the model before it is written
        target = workdir / f"model.{kind}"
        assert export.main([run_id, "--to", kind, "--output", str(target)]) == 0
        assert target.stat().st_size > 1000


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_the_help_lists_each_hyperparameter_and_its_values_are_allowed(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (train, search):
        with pytest.raises(SystemExit):
            command.parse(["--model", recipe.name, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        for name in recipe.parameters:
            assert f"--{name.replace('_', '-')} " in shown
    for grid in (False, True):
        assert default_space(recipe, grid=grid)
    for parameter in recipe.parameters.values():
        for value in (*(parameter.grid or ()), parameter.default):
            assert type(value) is type(parameter.default)
            assert parameter.parse(str(value)) == value
        if isinstance(parameter.search, Range):
            assert parameter.search.low < parameter.search.high
            assert parameter.parse(str(parameter.search.low)) == parameter.search.low


def test_a_study_s_help_shows_the_default_search_space(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        search.parse(["--model", "fashion-cnn", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "several (A,B) or a range (LOW:HIGH[:log])" in shown
    assert "the peak of a schedule; default: 0.0001:0.1:log, in a grid 0.01,0.001" in shown
    assert "standard deviation; default: false" in shown


# -- hyperparameters -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameter", "text", "domain"),
    [
        (Parameter(default=1, help=""), "1.5", "a whole number from 1"),
        (Parameter(default=1, help="", least=0), "-1", "a whole number from 0"),
        (Parameter(default=1, help="", most=8), "9", "a whole number from 1 to 8"),
        (Parameter(default=0.1, help=""), "0", "a number above 0"),
        (Parameter(default=0.1, help=""), "inf", "a number above 0"),
        (Parameter(default=0.1, help="", least=0, most=1), "nan", "a number from 0 to 1"),
        (Parameter(default=True, help=""), "yes", "true or false"),
        (Parameter(default="a", help="", allowed=("a", "b")), "c", "one of a, b"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_in_a_sentence(
    parameter: Parameter, text: str, domain: str
) -> None:
    with pytest.raises(ValueError, match=rf"^'{text}' is not allowed; it must be {domain}$"):
        parameter.parse(text)


def test_a_default_must_be_an_allowed_value() -> None:
    with pytest.raises(ModelsError, match=r"^default=-1 is not allowed; it must be a whole number"):
        Parameter(default=-1, help="")


def test_an_ignored_hyperparameter_is_not_searched(quick: dict[str, list[str]]) -> None:
    options = ["--model", "transfer", *quick["transfer"]]
    assert list(search.parse(options).space) == ["batch_size", "shuffle", "lr"]
    assert "thaw" in search.parse(["--model", "transfer"]).space


# -- training --------------------------------------------------------------------------------------


def test_a_recipe_from_outside_the_package_trains_and_is_rebuilt(
    own_recipe: Any, store: Store
) -> None:
    arguments = [*own_recipe(OWN), "--dropout", "0.5", "--batch_size", "100"]
    trained = run_train(store, *arguments)
    assert trained.run.data.params["model"] == "own:RECIPE"
    assert trained.run.data.params["batch_size"] == "100"
    model = load_trained(trained.model)
    network = rebuild(json.loads(model.files["recipe.json"]))
    network.load_state_dict(model.program.state_dict)


def test_the_seed_decides_the_training(store: Store) -> None:
    recipe = RECIPES["fashion-mlp"]
    params = recipe.defaults() | {"batch_size": 500}
    task = Task.of("fashion-mlp", params, DIGITS, None)
    first, same, other = (train_without_model(task, seed=seed)["loss"] for seed in (0, 0, 1))
    assert first == same != other


@pytest.mark.parametrize("model", ["fashion-cnn", pytest.param("transfer", marks=pytest.mark.slow)])
def test_a_resumed_training_equals_an_uninterrupted_one(
    model: str,
    quick: dict[str, list[str]],
    store: Store,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With everything random: dropout, augmentation and shuffling, under a schedule."""
    options = ["--schedule", "one-cycle", "--shift", "2", "--mirror", "true", "--batch-size", "200"]
    if model == "fashion-cnn":
        options += ["--dropout", "0.2", "--width", "2", "--batch-norm", "true"]
        options += ["--normalize", "true"]
    command = ["--model", model, *quick[model], *options, "--epochs"]
    straight = run_train(store, *command, "2")

    set_seed(0)
    given = train.parse([*command, "2"])
    task = Task.of(model, given.params, DIGITS, None)
    rest = {"epochs": 2, "device": torch.device("cpu"), "params": {"seed": 0}}
    with suppress(KeyboardInterrupt), RunManager(checkpoints=Keep()) as manager:
        next(begin(manager, task, final=True, **rest)[1])
        raise KeyboardInterrupt
    (cut,) = [run for run in store.runs() if run.info.run_id != straight.run_id]
    assert cut.info.status == "KILLED"
    resume = ["--resume", cut.info.run_id]
    message = refusal(capsys, train, *command, "3", *resume)
    assert "epochs=3 differs from the run to resume, whose learning rate schedule" in message
    assert store.client.get_run(cut.info.run_id).info.status == "KILLED"
    resumed = run_train(store, *command, "2", *resume)
    assert resumed.run_id == cut.info.run_id

    weights, again = (load_trained(run.model).program.state_dict for run in (straight, resumed))
    for name, tensor in weights.items():
        assert torch.equal(again[name], tensor), name
    for name in ("loss", "val_loss"):
        assert store.history(resumed.run, name) == store.history(straight.run, name)
    inputs = [{i.dataset.digest for i in r.inputs.dataset_inputs} for r in store.runs()]
    assert inputs[0] == inputs[1]
    if model == "fashion-cnn":  # its normalisation is part of the model
        images = task.data.train.images
        assert weights["0.mean"].item() == pytest.approx(images.mean().item(), abs=1e-4)
        assert weights["0.std"].item() == pytest.approx(images.std().item(), abs=1e-4)


def test_one_cycle_raises_the_rate_to_lr_and_lowers_it_to_zero_over_all_steps(
    store: Store,
) -> None:
    rates: list[float] = []

    def optimizer(network: nn.Module, params: Params) -> Optimizer:
        made = recipe.optimizer(network, params)
        made.register_step_post_hook(lambda *_: rates.append(made.param_groups[0]["lr"]))
        return made

    recipe = RECIPES["fashion-mlp"]
    params = {**recipe.defaults(), "lr": 0.002, "batch_size": 300, "schedule": "one-cycle"}
    data = recipe.load(DIGITS, params)
    task = Task("fashion-mlp", replace(recipe, optimizer=optimizer), params, data)
    train_without_model(task, epochs=4)

    assert len(rates) == 4 * math.ceil(len(data.train) / 300)
    assert 0.0018 < max(rates) <= 0.002
    assert rates[0] == pytest.approx(0.002 / 25)
    assert rates[-1] < 1e-6
    peak = rates.index(max(rates))
    assert rates == [*sorted(rates[:peak]), *sorted(rates[peak:], reverse=True)]


# -- mistakes --------------------------------------------------------------------------------------


def test_a_schedule_needs_a_length_and_two_steps(
    own_recipe: Any, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--schedule", "one-cycle", "--epochs", "1"]
    message = refusal(capsys, train, *own_recipe(ENDLESS), "--shuffle", "false", *options)
    assert "schedule='one-cycle' needs a data set with a length" in message
    message = refusal(capsys, train, "--dataset", "digits", "--batch-size", "2000", *options)
    assert "schedule='one-cycle' needs at least 2 training steps, not 1" in message
    assert store.runs() == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--model", "fashion-mlp"], "model='fashion-mlp' differs from the run to resume"),
        (
            ["--lr", "0.01"],
            "lr=0.01 differs from the run to resume, which has '0.005'; repeat the options of that "
            "run.",
        ),
        (["--seed", "1"], "seed=1 differs from the run to resume, which has '3'"),
    ],
)
def test_a_run_is_resumed_with_the_options_it_began_with(
    changed: list[str],
    message: str,
    on_digits: Training,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--dataset", "digits", "--lr", "5e-3", "--shuffle", "false", "--seed", "3"]
    again = [*options, "--epochs", "3", "--tracking-uri", on_digits.store.uri]
    assert message in refusal(capsys, train, *again, "--resume", on_digits.run_id, *changed)
    assert on_digits.store.client.get_run(on_digits.run_id).info.status == "FINISHED"


def test_a_run_older_than_a_hyperparameter_is_resumed_with_its_default() -> None:
    recipe = RECIPES["fashion-cnn"]
    logged = {"model": "fashion-cnn", "dataset": "digits", "seed": "0", "optimizer": "Adam"}
    logged |= {"lr": "1e-2"}  # as `mlflow run -P lr=1e-2` logs it
    train._check_same(Task.of("fashion-cnn", recipe.defaults(), DIGITS, None), 0, logged)
    changed = Task.of("fashion-cnn", {**recipe.defaults(), "dropout": 0.5}, DIGITS, None)
    with pytest.raises(ArgumentError, match=r"dropout=0.5 differs .* which has '0.0'"):
        train._check_same(changed, 0, logged)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("{}", "lacks the parameter 'batch_size', which training needs."),
        ("{'seed': ONE, 'lr': ONE, 'batch_size': ONE}", "which is an option of the command"),
        (
            "{'lr': ONE, 'batch_size': ONE}",
            "is a classifier whose data lacks facts['classes']; add them, or pass scores=None.",
        ),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused_before_training(
    parameters: str,
    message: str,
    own_recipe: Any,
    store: Store,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = own_recipe(UNTRAINABLE.replace("PARAMETERS", parameters))
    assert message in refusal(capsys, train, *arguments)
    assert store.runs() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "transfer", "--backbone", "nosuch"], "backbone='nosuch' is unknown"),
        (
            ["--model", "style-transfer", "--style-layers", "a,b"],
            "layer 'a' is not a convolution of the network",
        ),
        (["--model", "style-transfer", "--register", "x"], "style-transfer does not make a model."),
        (
            ["--model", "transfer", "--thaw", "0,1"],
            "argument --thaw: it has no effect together with",
        ),
        (
            ["--model", "sentiment-lstm", "--dropout", "0:0.5:log"],
            "'0:0.5:log' is not allowed; LOW must be above 0 for log",
        ),
    ],
)
def test_a_mistake_in_a_study_is_reported_before_its_first_trial(
    arguments: list[str],
    message: str,
    quick: dict[str, list[str]],
    store: Store,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [*quick[arguments[1]], "--epochs", "1", "--trials", "2"]
    if arguments[1] == "style-transfer":
        options += ["--backbone", "resnet18"]
    assert message in refusal(capsys, search, *arguments, *options)
    assert store.runs() == []


# -- the description that is logged with a model ---------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "weights='w' is a model with a damaged recipe.json."),
        ("[1]", "weights='w' is a model with a damaged recipe.json."),
        ('{"model": "fashion-cnn"}', "weights='w' is a model with a damaged recipe.json."),
        (
            '{"model": "antigravity:x", "params": {}, "facts": {}}',
            "weights='w' is a model of 'antigravity:x'; allowed: char-lstm, fashion-cnn, ",
        ),
    ],
)
def test_a_model_s_description_is_not_trusted(text: str, message: str) -> None:
    with pytest.raises(ModelsError) as error:
        parse_spec(text, RECIPES, "weights='w'")
    assert str(error.value).startswith(message)
    assert "antigravity" not in sys.modules


def test_a_model_older_than_a_hyperparameter_gets_its_default() -> None:
    text = '{"model": "fashion-cnn", "params": {"lr": 0.5}, "facts": {}}'
    assert parse_spec(text, RECIPES, "model='m'")["params"] == {
        **RECIPES["fashion-cnn"].defaults(),
        "lr": 0.5,
    }
