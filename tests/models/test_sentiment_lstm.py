"""The recipe sentiment-lstm: its texts, its network, and a model that takes raw strings."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import ModelsError, find
from models.recipe import Source
from models.reviews import ReviewData, Reviews, load_reviews
from models.sentiment_lstm import SentimentLSTM
from models.sentiment_predictor import SentimentPredictor, encode, numbered, tokenise
from studies.search import main as search
from studies.train import main as train
from tests.helpers import Store
from tracker import Predictor, start_run
from tracker.capture.dataset import describe_dataset

RECIPE = find("sentiment-lstm")
FILLERS = ("the", "film", "story", "actor", "is", "a", "of", "with", "it", "scene")
WORDS = (("dull", "flat", "stale"), ("gorgeous", "witty", "fresh"))
SMALL = ["--embedding", "8", "--hidden", "8", "--length", "12", "--lr", "0.01", "--epochs", "2"]


def texts_of(label: int, count: int, seed: int = 0) -> list[str]:
    """Texts whose class is given away by a word or two; most are distinct."""
    draw = random.Random(seed * 2 + label)
    return [
        " ".join(draw.sample([*draw.choices(FILLERS, k=5), *draw.choices(WORDS[label], k=2)], k=7))
        for _ in range(count)
    ]


def write(folder: Path, negative: Sequence[str], positive: Sequence[str], **how: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, texts in ((".neg", negative), (".pos", positive)):
        folder.joinpath(f"reviews{suffix}").write_text("\n".join(texts) + "\n", **how)
    return folder


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def load(
    dataset: Path | str, seed: int = 0, data_dir: str = "nowhere", **params: Any
) -> ReviewData:
    return load_reviews(Source(str(dataset), data_dir, seed), RECIPE.defaults() | params)


def parts_of(data: ReviewData) -> tuple[Reviews, Reviews, Reviews]:
    return data.train, data.validation, data.test


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    return write(tmp_path / "reviews", texts_of(0, 150), texts_of(1, 150))


# --- Texts


def test_a_folder_a_stem_and_auto_are_the_same_texts(tmp_path: Path) -> None:
    folder = write(tmp_path / "text", texts_of(0, 80), texts_of(1, 80))
    for suffix in (".neg", ".pos"):
        (folder / f"reviews{suffix}").rename(folder / f"rt-polarity{suffix}")
    found = [
        load(folder),
        load(folder / "rt-polarity"),
        load("auto", data_dir=str(tmp_path)),
    ]
    assert [data.name for data in found] == ["text", "rt-polarity", "rt-polarity"]
    for data in found:
        assert data.facts == found[0].facts
        for part, same in zip(parts_of(data), parts_of(found[0]), strict=True):
            assert part.texts == same.texts
            assert torch.equal(part.words, same.words)


def test_the_parts_are_stratified_and_share_no_text(tmp_path: Path) -> None:
    # Few distinct texts, and one that both classes have: all copies stay together.
    both = ["the film is a film"] * 9
    data = load(write(tmp_path / "d", texts_of(0, 200) * 2 + both, texts_of(1, 400) + both))
    seen = [{tuple(tokenise(text)) for text in part.texts} for part in parts_of(data)]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    assert sum(len(part) for part in parts_of(data)) == 818
    for part in parts_of(data):
        assert 0.4 < part.labels.float().mean() < 0.6


def test_the_seed_moves_the_validation_part_and_never_the_test_part(reviews: Path) -> None:
    first, same, other = load(reviews), load(reviews), load(reviews, seed=1)
    assert first.validation.texts == same.validation.texts != other.validation.texts
    assert first.test.texts == other.test.texts


def test_the_vocabulary_is_of_the_training_part_alone(reviews: Path) -> None:
    data = load(reviews, min_count=3)
    counts: dict[str, int] = {}
    for text in data.train.texts:
        for token in tokenise(text):
            counts[token] = counts.get(token, 0) + 1
    vocabulary = data.facts["vocabulary"]
    assert set(vocabulary) == {word for word, count in counts.items() if count >= 3}
    assert [counts[word] for word in vocabulary] == sorted(
        (counts[word] for word in vocabulary), reverse=True
    )
    assert load(reviews, vocabulary=4).facts["vocabulary"] == vocabulary[:4]
    unseen = write(reviews.parent / "other", [*texts_of(0, 150), "abracadabra"], texts_of(1, 150))
    data = load(unseen, min_count=1)
    assert ("abracadabra" in data.facts["vocabulary"]) == ("abracadabra" in data.train.texts)


def test_latin_1_and_odd_line_ends_are_read(tmp_path: Path) -> None:
    odd = [f"caf\u00e9 na\u00efve{number} \x85 fin" for number in range(30)]
    plain = [f"plain{number}" for number in range(30)]
    for newline in ("\n", "\r\n"):
        data = load(
            write(tmp_path / repr(newline), odd, plain, encoding="latin-1", newline=newline)
        )
        texts = [text for part in parts_of(data) for text in part.texts]
        assert len(texts) == 60  # \x85 does not end a line
        assert any(text.startswith("caf\u00e9 na\u00efve7 ") for text in texts)


def test_a_csv_names_its_classes(tmp_path: Path) -> None:
    rows = [["id", "said", "stars"]]
    rows += [
        [str(i), text + ", \u201cquoted\u201d\nand long", "five"]
        for i, text in enumerate(texts_of(1, 40))
    ]
    rows += [[str(i), text, "one"] for i, text in enumerate(texts_of(0, 40))]
    rows += [["81", "", "one"], ["82", "?!", "five"]]
    data = load(write_csv(tmp_path / "a.csv", rows), text_column="said", label_column="stars")
    assert data.name == "a"
    assert data.facts["classes"] == ["five", "one"]
    assert sum(len(part) for part in parts_of(data)) == 82
    for part in parts_of(data):
        for text, label in zip(part.texts, part.labels.tolist(), strict=True):
            assert label == (not any(word in text for word in (*WORDS[1], "?!")))


def test_a_text_is_cut_padded_and_never_empty() -> None:
    numbers = numbered(["good", "bad"])
    texts = [tokenise(text) for text in ("Good! BAD strange good", "", "...", "bad")]
    assert encode(texts, numbers, 3).tolist() == [[2, 1, 3], [1, 0, 0], [1, 0, 0], [3, 0, 0]]
    assert encode([], numbers, 3).shape == (0, 3)
    assert tokenise("It's the DIRECTOR'S cut -- isn't it?!") == [
        *("it's", "the", "director's", "cut", "isn't", "it", "?", "!")
    ]


MANY = [[text, name] for label, name in enumerate("ab") for text in texts_of(label, 40)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "dataset='{}' does not exist; allowed: a folder with .pos and .neg files"),
        ({}, "dataset='{}' has no .neg file; allowed"),
        ({"x.neg": "bad"}, "dataset='{}' has no .pos file; allowed"),
        ({"x.neg": "", "x.pos": "good"}, "dataset='{}/x.neg' is empty"),
        ({"x.neg": "\0\1\2\3" * 99, "x.pos": "good"}, "dataset='{}/x.neg' is binary"),
        ({"x.neg": "bad\nworse", "x.pos": "good"}, "dataset='{}' has 3 distinct texts, too few"),
        (
            {"x.neg": "bad\n" * 99, "x.pos": "good\n" * 99},
            "has 2 distinct texts, too few to split",
        ),
        ({"x.neg": "bad\n", "x.pos": " \n"}, "dataset='{}' has no text in its .pos file."),
    ],
)
def test_unsuitable_text_files_are_refused_in_one_sentence(
    tmp_path: Path, content: dict[str, str] | None, message: str
) -> None:
    folder = tmp_path / "data"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    assert message.format(folder) in refusal(folder)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["text", "stars"]], "label_column='label' is not a column of {}; allowed: text, stars."),
        ([["words", "label"]], "text_column='text' is not a column of {}; allowed: words, label."),
        ([["text", "label"]], "label_column='label' of {} has 0 distinct labels; allowed: two."),
        ([["text", "label"], ["x", "a"]], "has 1 distinct labels (a); allowed: two."),
        ([["text", "label"], *MANY, ["x", "c"]], "has 3 distinct labels (a, b, c); allowed: two."),
        ([["text", "label"], *MANY, ["x", ""]], "has no label, or other columns than its header"),
        ([["text", "label"], *MANY, ["x", "a", "b"]], "in the row that ends in line 82"),
        ([["text", "label"], *MANY[:3], *MANY[-3:]], "has 6 distinct texts, too few to split"),
        (
            [["text", "label", "text"]],
            "text_column='text' is two columns of {}; allowed: text, lab",
        ),
        ([["text", "label"], ["x" * 200_000, "a"]], "is not a valid CSV at line 2 (field larger"),
        ([], "is empty"),
    ],
)
def test_an_unsuitable_csv_is_refused_in_one_sentence(
    tmp_path: Path, rows: list[list[str]], message: str
) -> None:
    path = write_csv(tmp_path / "data.csv", rows)
    assert message.format(path) in refusal(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.csv", "is not a file"),
        ("none.tsv", "does not exist; allowed"),
        ("x" * 5000, "does not exist; allowed"),
        ("a\0b", "does not exist; allowed"),
        ("data.tsv", "is another kind of file; allowed: a folder with .pos"),
    ],
)
def test_an_odd_path_is_refused_in_one_sentence(name: str, message: str, workdir: Path) -> None:
    (workdir / "data.tsv").write_text("text\tlabel\n")
    assert f"{name}' {message}" in refusal(name)


def test_the_digest_is_that_of_the_texts_independent_of_the_vocabulary(
    reviews: Path, tmp_path: Path
) -> None:
    letters = str.maketrans("aeiou", "uoiea")  # other words with the same numbers
    other = write(
        tmp_path / "other",
        *([text.translate(letters) for text in texts_of(label, 150)] for label in (0, 1)),
    )

    def digests(path: Path, **params: Any) -> list[str]:
        return [describe_dataset(part).digest for part in parts_of(load(path, **params))]

    found = digests(reviews)
    assert len(set(found)) == 3
    assert digests(reviews, length=9) == digests(reviews, min_count=2) == found
    assert not {*found} & {*digests(other)}


def test_auto_without_data_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelsError, match=r"^dataset='auto' is not in data_dir='\S+': it has no "):
        load("auto", data_dir=str(tmp_path))


def refusal(dataset: Path | str) -> str:
    """The sentence that says why the data cannot be loaded."""
    with pytest.raises(ModelsError) as caught:
        load(dataset)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def test_the_command_prints_it_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["--model", "sentiment-lstm", "--dataset", "none"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("studies.train: dataset='none' does not exist; allowed: ")
    assert shown.count("\n") == 1


# --- The network


def network(**sizes: Any) -> SentimentLSTM:
    chosen = {"embedding": 4, "hidden": 3, "layers": 2, "bidirectional": True}
    return SentimentLSTM(9, dropout=0.5, word_dropout=0.5, **{**chosen, **sizes}).eval()


@settings(deadline=None, max_examples=50)
@given(
    texts=st.lists(st.lists(st.integers(1, 10), min_size=1, max_size=7), min_size=1, max_size=5),
    more=st.integers(0, 6),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
)
def test_padding_has_no_influence(
    texts: list[list[int]], more: int, layers: int, bidirectional: bool
) -> None:
    torch.manual_seed(0)
    sentiment = network(layers=layers, bidirectional=bidirectional)
    length = max(map(len, texts)) + more
    with torch.no_grad():
        together = sentiment(torch.tensor([text + [0] * (length - len(text)) for text in texts]))
        alone = torch.cat([sentiment(torch.tensor([text])) for text in texts])
    torch.testing.assert_close(together, alone)


def test_the_order_of_the_words_matters() -> None:
    torch.manual_seed(0)
    sentiment = network()
    assert not torch.allclose(*sentiment(torch.tensor([[2, 3, 4, 0], [4, 3, 2, 0]])))


def test_padding_alone_gives_a_finite_logit() -> None:
    assert network()(torch.zeros(2, 5, dtype=torch.long)).isfinite().all()


def test_scores_and_loss_are_those_of_the_logit() -> None:
    logits, targets = torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([0, 1, 0])
    assert RECIPE.scores is not None
    scores = RECIPE.scores(logits)
    torch.testing.assert_close(scores.softmax(dim=1)[:, 1], logits.sigmoid())
    torch.testing.assert_close(
        RECIPE.loss(logits, targets), torch.nn.functional.cross_entropy(scores, targets)
    )
    assert RECIPE.loss(logits.half(), targets).dtype == torch.half


def test_it_learns_texts_that_one_word_gives_away(reviews: Path) -> None:
    torch.manual_seed(0)
    params = RECIPE.defaults() | {"embedding": 8, "hidden": 8, "length": 8, "lr": 0.02}
    data = load(reviews, length=8)
    sentiment = RECIPE.build(params, data.facts)
    optimizer = RECIPE.optimizer(sentiment, params)
    for _ in range(25):
        optimizer.zero_grad()
        RECIPE.loss(sentiment(data.train.words), data.train.labels).backward()
        optimizer.step()
    with torch.no_grad():
        found = sentiment.eval()(data.test.words) > 0
    assert (found == data.test.labels.bool()).float().mean() > 0.95


def test_the_predictor_takes_texts_in_any_container() -> None:
    def network(words: torch.Tensor) -> torch.Tensor:
        return (words == 2).sum(dim=1) - 0.5

    facts = {"classes": ["no", "yes"], "vocabulary": ["good"], "length": 4}
    predictor = SentimentPredictor(network, facts)
    texts = ["Good", "bad", ""] * 100
    expected = pd.DataFrame({"label": ["yes", "no", "no"] * 100, "probability": [0.622459] * 300})
    for wrapped in (texts, pd.DataFrame({"any": texts}), np.array(texts), pd.Series(texts)):
        pd.testing.assert_frame_equal(predictor.predict(wrapped), expected)
    assert predictor.predict([None])["label"].tolist() == ["no"]
    assert predictor.predict([]).empty
    table = pd.DataFrame({"id": ["Good", "Good"], "text": ["bad", "Good"]})
    assert predictor.predict(table)["label"].tolist() == ["no", "yes"]


@pytest.mark.parametrize(
    ("wrapped", "message"),
    [
        (pd.DataFrame({"id": ["a"], "review": ["b"]}), r"^the columns are \['id', 'review'\]"),
        (pd.DataFrame({"text": [["a", "b"]]}), r"^\['a', 'b'\] is of type list; it must be a str"),
        ([1], r"^1 is of type int; it must be a str"),
    ],
)
def test_the_predictor_refuses_other_inputs(wrapped: Any, message: str) -> None:
    predictor = SentimentPredictor(
        lambda words: words, {"classes": ["no", "yes"], "vocabulary": [], "length": 4}
    )
    with pytest.raises(ValueError, match=message):
        predictor.predict(wrapped)


# --- The logged model, in a process that cannot import this project

PREDICT_ELSEWHERE = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tracker", "models", "studies"):
            raise ModuleNotFoundError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
import mlflow, torch
uri, length, *texts = sys.argv[1:]
found = mlflow.pyfunc.load_model(uri).predict(texts)
logits = mlflow.pytorch.load_model(uri)(torch.ones(3, int(length), dtype=torch.long))
json.dump([found.to_dict("list"), logits.shape], open("found.json", "w"))
"""


def predict_elsewhere(
    store: Store, run_id: str, folder: Path, texts: Sequence[str], length: int = 12
) -> Any:
    """Predict in a process that cannot import this project.

    Returns the predictions, and the shape of the network's output for texts of `length` tokens.
    """
    folder.mkdir()
    # -S ignores the path to this project that an editable installation adds.
    packages = str(Path(mlflow.__file__).parents[1])
    program = f"import sys; sys.path.append({packages!r}){PREDICT_ELSEWHERE}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, f"runs:/{run_id}/model", str(length), *texts],
        cwd=folder,
        env={"MLFLOW_TRACKING_URI": store.uri, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


def test_the_logged_model_classifies_raw_strings_without_this_project(
    store: Store, tmp_path: Path, reviews: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(["--model", "sentiment-lstm", "--dataset", str(reviews), *SMALL]) == 0
    assert "without its predictor" not in capfd.readouterr().err
    run = store.run()
    assert run.info.status == "FINISHED"
    assert run.data.params["dataset"] == "reviews"
    assert {"test_accuracy", "test_loss", "val_accuracy"} <= run.data.metrics.keys()
    assert len(run.inputs.dataset_inputs) == 3
    confusion = store.text(run, "mistakes/confusion.csv", tmp_path)
    assert confusion.splitlines()[0] == "true,negative,positive"
    assert store.text(run, "mistakes/worst.csv", tmp_path).splitlines()[0].endswith(",loss,text")

    (output,) = run.outputs.model_outputs
    uri = f"models:/{output.model_id}"
    local = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "model")))
    assert not list(local.rglob("__pycache__"))
    assert not [path for path in local.rglob("*") if path.suffix in (".pkl", ".pth")]
    signature = mlflow.models.get_model_info(uri).signature
    assert [str(column.type) for column in signature.inputs] == ["DataType.string"]
    assert signature.outputs.input_names() == ["label", "probability"]

    texts = ["a gorgeous film", "dull and far too long", "", "unheard-of"]
    found, shape = predict_elsewhere(store, run.info.run_id, tmp_path / "elsewhere", texts)
    assert shape == [3]
    assert set(found["label"]) <= {"negative", "positive"}
    assert all(0.5 <= probability <= 1 for probability in found["probability"])

    before = list(sys.path)
    model = mlflow.pyfunc.load_model(str(local))
    sys.path[:] = before
    assert model.predict(pd.DataFrame({"review": texts})).to_dict("list") == found
    (code,) = (local / "code").iterdir()
    del sys.modules[code.stem]
    spec = json.loads((local / "extra_files" / "recipe.json").read_text())
    words = encode(map(tokenise, texts), numbered(spec["facts"]["vocabulary"]), 12)
    logits = mlflow.pytorch.load_model(str(local))(words)
    labels = ["positive" if logit > 0 else "negative" for logit in logits.tolist()]
    assert labels == found["label"]


TABLE = pd.DataFrame({"shouted": ["A", "B"]})
PREDICTOR = """
class Shouting:
    def predict(self, inputs):
        import pandas as pd
        return pd.DataFrame({"shouted": [text.upper() for text in inputs.iloc[:, 0]]})

def load(network, files):
    return Shouting()
"""


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (PREDICTOR, None),
        (PREDICTOR.replace("upper", "title") + "\n#", None),
        (PREDICTOR.replace("upper", "lower"), "its predictions differ from the expected ones"),
        ("def load(network, files):\n    return files['vocabulary']", "'vocabulary'"),
        ("not a Python module", "invalid syntax"),
        (None, "No such file or directory"),
    ],
    ids=["right", "as right", "wrong", "raises", "not python", "no file"],
)
def test_a_predictor_that_fails_its_check_is_left_out(
    store: Store, tmp_path: Path, source: str | None, why: str | None, caplog: Any
) -> None:
    file = tmp_path / "shouting.py"
    if source is not None:
        file.write_text(source)
    path, modules = list(sys.path), {name for name in sys.modules if "predictor_" in name}
    with start_run() as run:
        predictor = Predictor(file, ["a", "b"], TABLE)
        assert run.log_model(torch.nn.Linear(3, 1), torch.rand(2, 3), predictor=predictor)
    assert sys.path == path
    assert {name for name in sys.modules if "predictor_" in name} == modules
    uri = f"runs:/{run.run_id}/model"
    assert mlflow.pytorch.load_model(uri)(torch.rand(5, 3)).shape == (5, 1)
    model = mlflow.pyfunc.load_model(uri)
    sys.path[:] = path
    warned = [
        record.getMessage() for record in caplog.records if record.name == "tracker.capture.model"
    ]
    if why is None:
        assert warned == []
        assert model.predict(["a", "b"]).equals(TABLE)
    else:
        (message,) = warned
        assert why in message
        assert message.startswith("The model is logged without its predictor: ")
        assert "\n" not in message
        assert model.predict(np.ones((4, 3), dtype=np.float32)).shape == (4, 1)


@pytest.mark.slow
def test_a_study_searches_it_and_its_best_model_takes_strings(
    store: Store, tmp_path: Path, reviews: Path
) -> None:
    arguments = ["--model", "sentiment-lstm", "--dataset", str(reviews), "--trials", "2"]
    storage = ["--storage", f"sqlite:///{tmp_path / 'optuna.db'}"]
    assert search([*arguments, *storage, "--epochs", "1", "--length", "12"]) == 0
    outputs = [run for run in store.runs() if run.outputs and run.outputs.model_outputs]
    assert outputs
    found, _ = predict_elsewhere(store, outputs[-1].info.run_id, tmp_path / "elsewhere", ["fresh"])
    assert found["label"][0] in ("negative", "positive")


@pytest.mark.slow
def test_it_learns_the_real_reviews(store: Store, data_dir: Path | None) -> None:
    if data_dir is None or not (data_dir / "text" / "rt-polarity.pos").is_file():
        pytest.skip("TRACKER_DATA_DIR has no text/rt-polarity.pos")
    assert train(["--model", "sentiment-lstm", "--data-dir", str(data_dir), "--epochs", "3"]) == 0
    assert store.run().data.metrics["test_accuracy"] > 0.66  # 0.76 after all ten epochs
