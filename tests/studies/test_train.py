"""`python -m studies.train`: one tracked training, and one sentence for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from studies.train import main, parse, ui_command
from tests.helpers import Store, Training


def test_a_training_is_one_finished_run_with_its_params(on_digits: Training) -> None:
    store, run, output = on_digits
    assert run.data.params == {
        "model": "fashion-cnn",
        "dataset": "digits",
        "lr": "0.005",
        "batch_size": "100",
        "epochs": "2",
        "shuffle": "False",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "seed": "3",
        "optimizer": "Adam",
        "normalize": "False",
        "schedule": "constant",
        "dropout": "0.0",
        "width": "1",
        "batch_norm": "False",
        "mirror": "False",
        "shift": "0",
    }
    for name in ("loss", "accuracy", "val_loss", "val_accuracy", "epoch_duration"):
        assert [step for step, _ in store.history(run, name)] == [1, 2], name
    assert "test_accuracy" in run.data.metrics
    assert len(run.outputs.model_outputs) == 1
    assert run.info.run_id in output
    assert store.uri in output
    assert "mlflow ui --backend-store-uri" in output


def test_the_parts_of_the_data_set_are_inputs_of_the_run_with_their_digests(
    on_digits: Training,
) -> None:
    inputs = on_digits.run.inputs.dataset_inputs
    assert {each.tags[0].value for each in inputs} == {"training", "validation", "test"}
    assert len({each.dataset.digest for each in inputs}) == 3


def test_the_defaults_are_those_of_the_project_file() -> None:
    from mlflow.projects._project_spec import load_project

    parameters = load_project(str(Path(__file__).parents[2])).get_entry_point("main").parameters
    defaults = vars(parse([]))
    assert {name: defaults[name] for name in parameters} == {
        name: parameter.default for name, parameter in parameters.items()
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model resnet", "model='resnet' is unknown; allowed: fashion-cnn, "),
        ("--dataset imagenet", "dataset='imagenet'"),
        ("--device cuda", "device='cuda' cannot be used on this machine; allowed here: auto, cpu"),
        ("--device meta", "device='meta' cannot be used on this machine"),
        ("--tracking-uri http://[bad", "tracking_uri='http://[bad' cannot be opened"),
        ("--device toaster", "device='toaster' cannot be used on this machine"),
        ("--lr 0", "argument --lr: '0' is not allowed; it must be a number above 0"),
        ("--lr nan", "argument --lr: 'nan' is not allowed"),
        ("--lr fast", "argument --lr: 'fast' is not allowed"),
        ("--batch-size 0", "argument --batch-size: '0' is not allowed; it must be a whole number"),
        ("--epochs 1.5", "argument --epochs: '1.5' is not allowed"),
        ("--epochs -1", "--epochs"),
        ("--seed -1", "--seed"),
        ("--shuffle maybe", "argument --shuffle: 'maybe' is not allowed; it must be true or false"),
        ("--dataset mnist --data-dir /proc/none", "/proc/none"),
        ("--tracking-uri sqlite:////proc/x/m.db", "tracking_uri='sqlite:////proc/x/m.db' cannot"),
        ("--tracking-uri http://127.0.0.1:9", "tracking_uri='http://127.0.0.1:9' cannot be opened"),
        ("--epoch-count 3", "studies.train: unrecognized arguments: --epoch-count 3\n"),
        ("--mod char-lstm", "unrecognized arguments: --mod"),  # no abbreviations
    ],
)
def test_a_mistake_is_reported_in_one_sentence_with_exit_code_2(
    store: Store,
    tmp_path: Path,
    arguments: str,
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if arguments == "--device cuda" and torch.cuda.is_available():
        return
    try:
        code = main(["--dataset", "digits", "--epochs", "1", *arguments.split()])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    shown = capfd.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert store.runs() == []
    assert [path for path in tmp_path.rglob("*") if path.name != ".tracker"] == []


@pytest.mark.parametrize(
    ("uri", "command"),
    [
        ("sqlite:////a/b.db", "mlflow ui --backend-store-uri sqlite:////a/b.db"),
        ("file:///a", "MLFLOW_ALLOW_FILE_STORE=true "),
        ("http://localhost:5000", "http://localhost:5000"),
    ],
)
def test_the_command_that_opens_the_ui(uri: str, command: str) -> None:
    assert command in ui_command(uri)
