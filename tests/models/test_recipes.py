"""Every recipe, by the same commands: a study over each, and a recipe of one's own."""

from __future__ import annotations

import io
import json
import math
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim import Optimizer

from models import RECIPES, ModelsError, parse_spec, rebuild
from models.recipe import Parameter, Params, Range, Source
from studies import export, search, train
from studies.arguments import default_space
from studies.training import Task, begin
from tests.helpers import Store
from tracker import ArgumentError, Keep, RunManager, load_trained, set_seed
from tracker.deploy import FORMATS

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
        "lr": Parameter(default=0.01, help="Adam's", search=(0.01, 0.001), grid=(0.01, 0.001)),
        "batch_size": Parameter(default=200, help="pictures"),
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


@pytest.fixture
def quick(tmp_path: Path) -> dict[str, list[str]]:
    """For each recipe, the options that make a training short."""
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


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_study_of_four_trials_over_each_recipe(
    name: str, quick: dict[str, list[str]], store: Store, workdir: Path
) -> None:
    command = ["--model", name, *quick[name], "--epochs", "1"]
    assert search.main([*command, "--sampler", "random", "--trials", "4"]) == 0
    runs = store.runs()
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in runs] == ["FINISHED"] * 5
    objective = next(iter(RECIPES[name].metrics))
    table = pd.read_csv(io.StringIO(store.text(parent, "trials.csv", workdir)))
    assert len(table) == 4
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
    assert train.main(["--model", name, *quick[name], "--epochs", "1"]) == 0
    run_id = store.run().info.run_id
    for kind in FORMATS:  # each file is compared with the model before it is there
        target = workdir / f"model.{kind}"
        assert export.main([run_id, "--to", kind, "--output", str(target)]) == 0
        assert target.stat().st_size > 1000


def test_a_recipe_of_one_s_own_trains_and_is_rebuilt(
    store: Store, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workdir / "mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(workdir)
    assert train.main(["--model", "mine:RECIPE", "--dropout", "0.5", "--batch_size", "100"]) == 0
    run = store.run()
    assert run.data.params["model"] == "mine:RECIPE"
    assert run.data.params["batch_size"] == "100"
    trained = load_trained(f"runs:/{run.info.run_id}/model")
    network = rebuild(json.loads(trained.files["recipe.json"]))
    network.load_state_dict(trained.program.state_dict)
    sys.modules.pop("mine")


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_says_what_it_searches_and_what_it_is(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = RECIPES[name]
    for command in (train, search):
        with pytest.raises(SystemExit):
            command.parse(["--model", name, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        for parameter in recipe.parameters:
            assert f"--{parameter.replace('_', '-')} " in shown
    for grid in (False, True):
        assert default_space(recipe, grid=grid)
    for parameter in recipe.parameters.values():
        for value in (*(parameter.grid or ()), parameter.default):
            assert type(value) is type(parameter.default)
            assert parameter.parse(str(value)) == value
        if isinstance(parameter.search, Range):
            assert parameter.search.low < parameter.search.high
            assert parameter.parse(str(parameter.search.low)) == parameter.search.low


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
def test_a_value_that_is_not_allowed_is_a_sentence(
    parameter: Parameter, text: str, domain: str
) -> None:
    with pytest.raises(ValueError, match=rf"^'{text}' is not allowed; it must be {domain}$"):
        parameter.parse(text)


def test_the_parts_of_a_data_set_are_inputs_of_the_run_with_their_digests(store: Store) -> None:
    assert train.main(["--dataset", "digits", "--epochs", "1"]) == 0
    inputs = store.run().inputs.dataset_inputs
    contexts = {each.tags[0].value: each.dataset for each in inputs}
    assert set(contexts) == {"training", "validation", "test"}
    assert len({dataset.digest for dataset in contexts.values()}) == 3
    parts = Task.of("fashion-cnn", {}, Source("digits", "data", 0), None).data
    assert len(parts.train) + len(parts.validation) + len(parts.test) == 1797


def test_normalisation_is_of_the_training_part_and_travels_with_the_model(store: Store) -> None:
    command = ["--dataset", "digits", "--epochs", "1", "--normalize", "true"]
    assert train.main(command) == 0
    state = load_trained(f"runs:/{store.run().info.run_id}/model").program.state_dict
    part = Task.of("fashion-cnn", {}, Source("digits", "data", 0), None).data.train
    assert state["0.mean"].item() == pytest.approx(part.images.mean().item(), abs=1e-4)
    assert state["0.std"].item() == pytest.approx(part.images.std().item(), abs=1e-4)


@pytest.mark.parametrize(
    "model", ["fashion-cnn", "fashion-mlp", pytest.param("transfer", marks=pytest.mark.slow)]
)
def test_a_training_with_all_that_varies_goes_on_as_if_never_cut_off(
    model: str, quick: dict[str, list[str]], store: Store
) -> None:
    options = ["--schedule", "one-cycle", "--shift", "2", "--mirror", "true", "--epochs", "3"]
    if model != "transfer":
        options += ["--dropout", "0.2"]
    if model == "fashion-cnn":
        options += ["--width", "2", "--batch-norm", "true"]
    command = ["--model", model, *quick[model], *options]
    assert train.main(command) == 0
    straight = store.run()

    given = train.parse(command)
    set_seed(0)
    task = Task.of(model, given.params, Source("digits", "data", 0), None)
    rest = {"epochs": 3, "device": torch.device("cpu"), "params": {"seed": 0}}
    with suppress(KeyboardInterrupt), RunManager(checkpoints=Keep()) as manager:
        next(begin(manager, task, final=True, **rest)[1])
        raise KeyboardInterrupt
    (cut,) = [run for run in store.runs() if run.info.run_id != straight.info.run_id]
    assert cut.info.status == "KILLED"
    assert train.main([*command, "--resume", cut.info.run_id]) == 0

    whole, resumed = (load_trained(f"runs:/{run.info.run_id}/model") for run in (straight, cut))
    for name, weights in whole.program.state_dict.items():
        assert torch.equal(resumed.program.state_dict[name], weights), name
    for name in ("loss", "val_loss"):
        assert store.history(cut, name) == store.history(straight, name)
    inputs = [{i.dataset.digest for i in r.inputs.dataset_inputs} for r in store.runs()]
    assert inputs[0] == inputs[1]


def test_one_cycle_takes_the_rate_up_to_lr_and_down_to_nothing_over_all_steps(
    store: Store,
) -> None:
    rates: list[float] = []

    def optimizer(network: nn.Module, params: Params) -> Optimizer:
        made = recipe.optimizer(network, params)
        made.register_step_post_hook(lambda *_: rates.append(made.param_groups[0]["lr"]))
        return made

    recipe = RECIPES["fashion-mlp"]
    params = {**recipe.defaults(), "lr": 0.002, "batch_size": 300, "schedule": "one-cycle"}
    data = recipe.load(Source("digits", "data", 0), params)
    task = Task("fashion-mlp", replace(recipe, optimizer=optimizer), params, data)
    with RunManager(model=False) as manager:
        settings = {"epochs": 4, "device": torch.device("cpu"), "params": {}}
        for _ in begin(manager, task, final=False, **settings)[1]:
            pass

    assert len(rates) == 4 * math.ceil(len(data.train) / 300)
    assert 0.0018 < max(rates) <= 0.002
    assert rates[0] == pytest.approx(0.002 / 25)
    assert rates[-1] < 1e-6
    peak = rates.index(max(rates))
    assert rates == [*sorted(rates[:peak]), *sorted(rates[peak:], reverse=True)]


def test_a_schedule_that_cannot_be_is_a_sentence(
    store: Store,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (workdir / "endless.py").write_text(ENDLESS)
    monkeypatch.syspath_prepend(workdir)
    given = ["--model", "endless:RECIPE", "--shuffle", "false", "--schedule", "one-cycle"]
    assert "one-cycle' is not allowed of a data set without a length" in refused(
        capsys, train, *given
    )
    sys.modules.pop("endless")
    one_step = ["--dataset", "digits", "--epochs", "1", "--batch-size", "2000"]
    assert "one-cycle' is not allowed with 1 step of training" in refused(
        capsys, train, *one_step, "--schedule", "one-cycle"
    )
    assert store.runs() == []


def test_what_a_run_began_without_did_as_its_default_does() -> None:
    recipe = RECIPES["fashion-cnn"]
    begun = {"model": "fashion-cnn", "dataset": "digits", "seed": "0", "optimizer": "Adam"}
    source = Source("digits", "data", 0)
    train._check_same(Task.of("fashion-cnn", recipe.defaults(), source, None), 0, begun)
    changed = Task.of("fashion-cnn", {**recipe.defaults(), "dropout": 0.5}, source, None)
    with pytest.raises(ArgumentError, match=r"dropout=0.5 is not what the run began with, '0.0'"):
        train._check_same(changed, 0, begun)


def test_one_cycle_ends_where_the_training_began_to_aim(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--dataset", "digits", "--schedule", "one-cycle", "--epochs"]
    assert train.main([*command, "1"]) == 0
    again = [*command, "2", "--resume", store.run().info.run_id]
    assert "epochs=2 is not what the run began with, '1'; its schedule ends there." in refused(
        capsys, train, *again
    )
    assert store.run().info.status == "FINISHED"


# -- mistakes --------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], command: object, *arguments: str) -> str:
    """What a command says of a mistake: one sentence, with an exit code of 2."""
    capsys.readouterr()
    try:
        code = command.main(list(arguments))  # type: ignore[attr-defined]
    except SystemExit as exited:
        code = int(str(exited.code))
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.count("\n") == 1, said
    return said


def test_a_run_goes_on_as_what_it_began(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    begun = ["--dataset", "digits", "--epochs", "1", "--lr", "0.002"]
    assert train.main(begun) == 0
    again = ["--resume", store.run().info.run_id, "--dataset", "digits", "--epochs", "2"]
    for changed, said in (
        (["--model", "fashion-mlp"], "model='fashion-mlp' is not what the run began with"),
        ([], "lr=0.01 is not what the run began with, '0.002'; it goes on with the same options."),
        (["--lr", "0.002", "--seed", "1"], "seed=1 is not what the run began with, '0'"),
    ):
        assert said in refused(capsys, train, *again, *changed)
        assert store.run().info.status == "FINISHED"
    assert train.main([*again, "--lr", "2e-3"]) == 0
    assert len(store.history(store.run(), "loss")) == 2


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("parameters={}", "has no parameter 'batch_size', which its training needs."),
        ("parameters={'seed': ONE, 'lr': ONE, 'batch_size': ONE}", "which is an option of the"),
        (
            "parameters={'lr': ONE, 'batch_size': ONE}",
            "is a classifier whose data has no facts['classes']; with scores=None it is none.",
        ),
    ],
)
def test_a_recipe_that_cannot_be_trained_says_so_before_it_is(
    recipe: str,
    said: str,
    store: Store,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (workdir / "wrong.py").write_text(
        "from torch import nn\nfrom models.recipe import Data, Parameter, Recipe\n"
        "ONE = Parameter(default=1.0, help='')\n"
        "RECIPE = Recipe(name='wrong', summary='', datasets='', dataset='none',\n"
        "    load=lambda source, params: Data(name='none', train=[], source=''),\n"
        f"    build=lambda params, facts: nn.Linear(1, 1), {recipe})\n"
    )
    monkeypatch.syspath_prepend(workdir)
    assert said in refused(capsys, train, "--model", "wrong:RECIPE")
    sys.modules.pop("wrong", None)
    assert store.runs() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "transfer", "--backbone", "nosuch"], "backbone='nosuch' is not known"),
        (["--model", "style-transfer", "--style-layers", "a,b"], "layer 'a' is no convolution"),
        (["--model", "style-transfer", "--register", "x"], "style-transfer makes no model."),
        (["--model", "transfer", "--thaw", "0,1"], "argument --thaw: it has no effect beside"),
        (
            ["--model", "sentiment-lstm", "--dropout", "0:0.5:log"],
            "'0:0.5:log' is not allowed; LOW must be above 0 for log",
        ),
    ],
)
def test_what_is_wrong_with_a_study_shows_before_its_first_trial(
    arguments: list[str],
    said: str,
    quick: dict[str, list[str]],
    store: Store,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [*quick[arguments[1]], "--epochs", "1", "--trials", "2"]
    if arguments[1] == "style-transfer":
        options += ["--backbone", "resnet18"]
    assert said in refused(capsys, search, *arguments, *options)
    assert store.runs() == []


def test_what_has_no_effect_is_neither_searched_nor_logged(
    store: Store, quick: dict[str, list[str]]
) -> None:
    options = ["--model", "transfer", *quick["transfer"], "--epochs", "1"]
    assert list(search.parse(options).space) == ["batch_size", "shuffle", "lr"]
    assert "thaw" in search.parse(["--model", "transfer"]).space
    assert train.main(options) == 0
    assert "thaw" not in store.run().data.params


def test_a_study_s_help_says_what_it_searches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        search.parse(["--model", "fashion-cnn", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "several (A,B) or a range (LOW:HIGH[:log])" in said
    assert "learning rate, of a schedule the highest; by default 0.0001:0.1:log, in a grid" in said
    assert "divide by its deviation; by default False" in said


def test_a_parameter_has_a_default_that_could_be_given() -> None:
    with pytest.raises(ModelsError, match=r"^default=-1 is not allowed; it must be a whole number"):
        Parameter(default=-1, help="")


def test_an_option_is_spelt_out(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unrecognized arguments: --mod" in refused(capsys, train, "--mod", "char-lstm")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "weights='w' is a model whose recipe.json is damaged."),
        ("[1]", "weights='w' is a model whose recipe.json is damaged."),
        (
            '{"model": "antigravity:x", "params": {}, "facts": {}}',
            "weights='w' is a model of 'antigravity:x'; allowed: char-lstm, fashion-cnn, ",
        ),
        ('{"model": "fashion-cnn"}', "weights='w' is a model whose recipe.json is damaged."),
    ],
)
def test_what_travels_with_a_model_is_not_trusted(text: str, said: str) -> None:
    with pytest.raises(ModelsError) as error:
        parse_spec(text, RECIPES, "weights='w'")
    assert str(error.value).startswith(said)
    assert "antigravity" not in sys.modules


def test_a_parameter_that_is_newer_than_a_model_has_its_default() -> None:
    text = '{"model": "fashion-cnn", "params": {"lr": 0.5}, "facts": {}}'
    assert parse_spec(text, RECIPES, "model='m'")["params"] == {
        **RECIPES["fashion-cnn"].defaults(),
        "lr": 0.5,
    }
