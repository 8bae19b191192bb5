"""`python -m studies.export` writes a logged model for programs without this project."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import chdir
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from torch import Tensor, nn
from torch.export import ExportedProgram

from studies import train
from studies.export import main
from tracker import load_trained, start_run
from tracker.deploy import FORMATS, DeployError, Pt2, deploy

torchscript_is_deprecated = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")

ROOT = Path(__file__).parents[1]
NORMALISED = "fashion-cnn --batch-norm true --width 2"
ELSEWHERE = """
import sys
from pathlib import Path
to, path, *blocked = sys.argv[1:]
class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in blocked:
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
import numpy as np
if to == "onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession(path)
    run = lambda batch: session.run(None, {session.get_inputs()[0].name: batch})[0]
else:
    import torch
    load = {
        "torchscript": torch.jit.load,
        "pt2": lambda path: torch.export.load(path).module(),
        "aoti": torch._inductor.aoti_load_package,
    }[to]
    program = load(path)
    def run(batch):
        with torch.no_grad():
            return program(torch.from_numpy(batch)).numpy()
for batch in Path().glob("batch-*.npy"):
    np.save(f"logits-{batch.stem}.npy", run(np.load(batch)))
assert not any(name in sys.modules for name in blocked)
"""


class Trained:
    """Networks trained for one epoch on the digits, each at most once, in one store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.run_id: Callable[[str], str] = cache(self._train)

    def _train(self, model: str) -> str:
        arguments = f"--model {model} --dataset digits --epochs 1 --tracking-uri {self.uri}"
        with chdir(self.folder):
            run_id, _ = train.train(train.parse(arguments.split()))
        assert run_id is not None
        return run_id

    def live(self, model: str) -> Callable[[Tensor], Tensor]:
        program = load_trained(f"runs:/{self.run_id(model)}/model", self.uri).program
        return program.module()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


def export(trained: Trained, model: str, to: str, *arguments: str) -> int:
    return main([trained.run_id(model), "--to", to, "--tracking-uri", trained.uri, *arguments])


def pictures(size: int) -> Tensor:
    return torch.rand(size, 1, 28, 28, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize(
    ("model", "to"),
    [
        ("fashion-cnn", "torchscript"),
        ("fashion-cnn", "pt2"),
        pytest.param("fashion-cnn", "onnx", marks=pytest.mark.slow),
        pytest.param(NORMALISED, "torchscript", marks=pytest.mark.slow),
        pytest.param(NORMALISED, "aoti", marks=pytest.mark.slow),
    ],  # the C++ example reads more
)
def test_the_file_runs_in_a_process_that_cannot_import_this_project(
    trained: Trained, model: str, to: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained.run_id(model)
    capfd.readouterr()
    assert export(trained, model, to) == 0
    (path,) = tmp_path.iterdir()
    assert path.name == trained.run_id(model) + FORMATS[to].suffix
    shown = capfd.readouterr()
    assert shown.err == ""
    assert f"file        {path.name}\nsize        {path.stat().st_size:,} bytes\n" in shown.out
    assert " from the logged model, on batches of 1, 2, 3, 7" in shown.out
    blocked = ["models", "tracker", "studies", "mlflow", *(["torch"] if to == "onnx" else [])]
    live = trained.live(model)
    for size in (1, 5):
        np.save(tmp_path / f"batch-{size}.npy", pictures(size).numpy())
    subprocess.run([sys.executable, "-c", ELSEWHERE, to, path, *blocked], check=True)
    for size in (1, 5):
        with torch.no_grad():
            expected = live(pictures(size)).numpy()
        logits = np.load(f"logits-batch-{size}.npy")
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_registered_model_is_exported_under_its_name_and_alias(
    trained: Trained, tmp_path: Path
) -> None:
    run_id = trained.run_id("fashion-cnn")
    client = MlflowClient(trained.uri, trained.uri)
    (output,) = client.get_run(run_id).outputs.model_outputs
    client.create_registered_model("fashion")
    source = client.get_logged_model(output.model_id).artifact_location
    client.create_model_version("fashion", source)
    client.set_registered_model_alias("fashion", "champion", "1")
    arguments = ["models:/fashion@champion", "--to", "pt2", "--tracking-uri", trained.uri]
    assert main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["fashion-champion.pt2"]


class Tokens(nn.Module):
    """Reads the size of its batch from its input for the LSTM's state and as an index."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.lstm = nn.LSTM(8, 16, num_layers=2, batch_first=True)
        self.out = nn.Linear(16, 1)

    def forward(self, tokens: Tensor) -> Any:
        states, _ = self.lstm(self.embedding(tokens))
        lengths = (tokens != 0).sum(1).clamp(min=1)
        last = states[torch.arange(tokens.shape[0]), lengths - 1]
        return self.out(last).squeeze(1)


def program_of(network: nn.Module, example: Tensor) -> ExportedProgram:
    free = ({0: torch.export.Dim.AUTO},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own LSTM
        return torch.export.export(network.eval(), (example,), dynamic_shapes=free)


@torchscript_is_deprecated
@pytest.mark.parametrize(
    "to",
    [
        "torchscript",
        "pt2",
        pytest.param("onnx", marks=pytest.mark.slow),
        pytest.param("aoti", marks=pytest.mark.slow),
    ],
)
def test_an_exported_lstm_over_tokens_accepts_any_batch_size(to: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Tokens()
    program = program_of(network, torch.randint(0, 50, (2, 12)))
    path = tmp_path / f"model{FORMATS[to].suffix}"
    assert deploy(program, path, to) <= 1e-5
    loaded = FORMATS[to].load(path)
    for size in (1, 2, 40):
        tokens = torch.randint(0, 50, (size, 12))
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens), network(tokens), rtol=1e-5, atol=1e-5)


class Drifting(Pt2):
    """Loads another model than it wrote."""

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        loaded = super().load(path)
        return lambda batch: loaded(batch) + (1e-3 if len(batch) == 7 else 0)


class NotANumber(Pt2):
    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        loaded = super().load(path)
        return lambda batch: loaded(batch) * float("nan")


class FixedBatch(Pt2):
    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        loaded = super().load(path)
        return lambda batch: loaded(batch[:2])


class FullDisk(Pt2):
    def write(self, program: ExportedProgram, path: Path) -> None:
        path.write_text("half of it")
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Drifting(), "differs by 0.001 on a batch of 7; nothing was written."),
        (NotANumber(), "differs by nan on a batch of 1"),
        (FixedBatch(), "returns torch.float32 (2, 3) for a batch of 3; it must be torch.float32"),
        (FullDisk(), "cannot be written as pt2: [Errno 28] No space left on device."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_file_that_fails_its_check_does_not_replace_an_existing_one(
    target: Pt2, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "pt2", target)  # type: ignore[arg-type]
    path = tmp_path / "model.pt2"
    path.write_text("the old one")
    with pytest.raises(DeployError) as raised:
        deploy(program_of(nn.Linear(4, 3), torch.rand(2, 4)), path, "pt2")
    assert message in str(raised.value)
    assert path.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [path]


@torchscript_is_deprecated
def test_a_file_that_passes_its_check_replaces_an_existing_one(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_text("the old one")
    network = nn.Linear(4, 3)
    assert deploy(program_of(network, torch.rand(2, 4)), path, "torchscript") == 0
    assert torch.equal(
        FORMATS["torchscript"].load(path)(torch.ones(3, 4)), network(torch.ones(3, 4))
    )


def test_a_model_with_two_inputs_is_refused_in_one_sentence(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return one + other

    program = torch.export.export(Two(), (torch.rand(2), torch.rand(2)))
    with pytest.raises(DeployError, match="must have one tensor as its input"):
        deploy(program, tmp_path / "model.pt2", "pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("RUN --to mat", "argument --to: invalid choice: 'mat' (choose from"),
        ("RUN", "the following arguments are required: --to"),
        ("0123 --to pt2", "Run with id=0123 not found"),
        ("EMPTY --to pt2", "find the model 'runs:/EMPTY/model': the run has no such model."),
        ("models:/nothing@best --to pt2", "Registered Model with name=nothing not found"),
        ("models:/nothing/1 --to pt2", "Registered Model with name=nothing not found"),
        ("models:/m-nothing --to pt2", "Logged model with ID 'm-nothing' not found"),
        ("runs:/RUN/other --to pt2", "/other': the run has no such model; it has model."),
        ("dbfs:/model --to pt2", "model='dbfs:/model' is not allowed; it must be runs:/RUN_ID/"),
        ("RUN --to pt2 --output none/m.pt2", "output='none/m.pt2' cannot be written: No such file"),
        ("RUN --to pt2 --output /proc/m.pt2", "output='/proc/m.pt2' cannot be written: "),
        ("RUN --to pt2 --output .", "output='.' is a folder; it must be a file."),
        (
            "RUN --to pt2 --tracking-uri sqlite:///no.db",
            "no.db' does not exist, so it does not have",
        ),
        (
            "RUN --to pt2 --tracking-uri file:none",
            "none' does not exist, so it does not have",
        ),
        ("RUN --to onnx", 'needs onnxruntime; pip install "mlflow-runmanager[onnx]"'),
        ("RUN --to aoti", "format='aoti' needs the C++ compiler '/no/compiler'."),
    ],
)
def test_a_mistake_exits_with_code_2_and_one_sentence_and_writes_no_file(
    trained: Trained,
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # imports as if not installed
    monkeypatch.setenv("CXX", "/no/compiler")
    run_id = trained.run_id("fashion-cnn")
    if "EMPTY" in arguments:
        with chdir(trained.folder), start_run(tracking_uri=trained.uri) as run:
            empty = str(run.run_id)
        arguments, message = (text.replace("EMPTY", empty) for text in (arguments, message))
    capfd.readouterr()
    try:
        code = main(["--tracking-uri", trained.uri, *arguments.replace("RUN", run_id).split()])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    shown = capfd.readouterr()
    assert message in shown.err
    assert shown.err.startswith("studies.export: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_model_is_reported_in_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with start_run(tracking_uri=uri) as run:
        run.log_model(nn.Linear(4, 3), torch.rand(2, 4))
    (model,) = tmp_path.glob("mlruns/**/model.pt2")
    model.write_bytes(model.read_bytes()[:100])
    before = set(tmp_path.rglob("*"))
    capfd.readouterr()
    assert main([str(run.run_id), "--to", "pt2"]) == 2
    shown = capfd.readouterr().err
    assert f"model='runs:/{run.run_id}/model' cannot be read by torch" in shown
    assert shown.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which(os.environ.get("CXX", "c++"))),
    reason="this machine has no cmake or no C++ compiler",
)
def test_the_c_plus_plus_example_prints_the_same_logits(trained: Trained, tmp_path: Path) -> None:
    source, build = ROOT / "examples/cpp", tmp_path / "build"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    strict = "-DCMAKE_CXX_FLAGS=-Werror"
    subprocess.run(["cmake", prefix, strict, "-S", source, "-B", build], check=True)
    subprocess.run(["cmake", "--build", build], check=True)

    def predict(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [build / "predict", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    pixels = torch.randint(256, (28, 28), generator=torch.Generator().manual_seed(0))
    Path("a.pgm").write_bytes(b"P5\n# a picture\n28 28\n255\n" + bytes(pixels.flatten().tolist()))
    Path("short.pgm").write_bytes(b"P5 28 28 255\n1234")
    Path("text.pgm").write_text("P2 28 28 255\n" + "0 " * 784)
    for model in ("fashion-cnn", "fashion-mlp"):
        live = trained.live(model)  # may train, so it needs gradients
        with torch.no_grad():
            expected = live(pixels.float().div(255)[None, None])[0]
        for to, name in (("torchscript", "m.pt"), ("aoti", "m.pt2")):
            assert export(trained, model, to, "--output", name) == 0
            done = predict(name, "a.pgm")
            assert done.returncode == 0, done.stderr
            logits = torch.tensor([float(line) for line in done.stdout.splitlines()])
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    assert export(trained, "fashion-cnn", "pt2", "--output", "graph.pt2") == 0
    for arguments, message in (
        (("none.pt", "a.pgm"), "predict: the model none.pt cannot be opened"),
        (("m.pt", "none.pgm"), "predict: the image none.pgm cannot be opened"),
        (("m.pt", "short.pgm"), "predict: the image short.pgm is truncated"),
        (("m.pt", "text.pgm"), "predict: the image text.pgm must be a binary .pgm (P5) of 28"),
        (("a.pgm", "a.pgm"), "predict: "),
        (("graph.pt2", "a.pgm"), "predict: Failed to find a generated cpp file or so file"),
        ((), "usage: predict MODEL IMAGE"),
    ):
        done = predict(*arguments)
        assert done.returncode != 0
        assert done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
