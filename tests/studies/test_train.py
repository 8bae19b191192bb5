"""`python -m studies.train`: one tracked training, and a sentence for each mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from studies.train import main, parse, ui_command
from tests.helpers import Store


def test_a_training_is_one_finished_run_with_its_params(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--dataset digits --epochs 2 --lr 0.005 --shuffle false --seed 3"
    assert main([*arguments.split(), "--tracking-uri", store.uri]) == 0
    run = store.run()
    assert run.info.status == "FINISHED"
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
    assert len(run.inputs.dataset_inputs) == 3
    assert len(run.outputs.model_outputs) == 1
    shown = capsys.readouterr().out
    assert run.info.run_id in shown
    assert store.uri in shown
    assert "mlflow ui --backend-store-uri" in shown


def test_the_same_seed_gives_the_same_training(store: Store) -> None:
    for seed in ("0", "0", "1"):
        assert main(["--dataset", "digits", "--epochs", "1", "--seed", seed]) == 0
    first, same, other = (run.data.metrics["loss"] for run in store.runs())
    assert first == same != other


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
        ("--model resnet", "model='resnet' is not known; allowed: fashion-cnn, "),
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
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
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


def test_a_typo_at_the_command_line_has_no_traceback(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "studies.train", "--epoch-count", "3"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert process.stderr == "studies.train: unrecognized arguments: --epoch-count 3\n"


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
