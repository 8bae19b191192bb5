"""A baseline for `sentiment-lstm`: logistic regression on bags of words.

python -m bench.sentiment_baseline --data-dir data

The splits are the recipe's. The penalty is chosen on the validation part for each kind of features,
and the model is fitted to the training part only, like the network.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from bench.measuring import table
from models import ModelsError, find
from models.recipe import Source
from models.reviews import DATASETS, Reviews, load_reviews
from models.sentiment_predictor import tokenise
from studies.arguments import RAW
from studies.arguments import seed as seed_type

PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
KINDS = {
    "words, present or not": lambda: CountVectorizer(
        binary=True, tokenizer=tokenise, token_pattern=None, lowercase=False
    ),
    "words, tf-idf": lambda: TfidfVectorizer(
        tokenizer=tokenise, token_pattern=None, lowercase=False, sublinear_tf=True
    ),
    "words and pairs, tf-idf": lambda: TfidfVectorizer(
        tokenizer=tokenise,
        token_pattern=None,
        lowercase=False,
        sublinear_tf=True,
        ngram_range=(1, 2),
    ),
}


def fitted(kind: str, penalty: float, train: Reviews) -> Pipeline:
    """Fit a regression.

    Args:
        kind: A key of `KINDS`.
        penalty: scikit-learn's C.
        train: The training part.
    """
    model = make_pipeline(KINDS[kind](), LogisticRegression(C=penalty, max_iter=1000))
    return model.fit(train.texts, train.labels.numpy())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="bench.sentiment_baseline", description=__doc__, formatter_class=RAW
    )
    parser.add_argument("--dataset", default="auto", help=f"{DATASETS}; default: auto")
    parser.add_argument(
        "--data-dir", default="data", metavar="FOLDER", help="where data sets are; default: data"
    )
    parser.add_argument(
        "--seed", type=seed_type, default=0, help="seed of the validation split; default: 0"
    )
    given = parser.parse_args(arguments)
    defaults = find("sentiment-lstm").defaults()
    try:
        data = load_reviews(Source(given.dataset, given.data_dir, given.seed), defaults)
    except ModelsError as error:
        parser.error(str(error))
    train, validation, test = data.train, data.validation, data.test

    def accuracy(model: Pipeline, part: Reviews) -> float:
        return float(model.score(part.texts, part.labels.numpy()))

    rows = []
    for kind in KINDS:
        models = {penalty: fitted(kind, penalty, train) for penalty in PENALTIES}
        scores = {penalty: accuracy(model, validation) for penalty, model in models.items()}
        best = max(scores, key=lambda penalty: scores[penalty])
        tested = accuracy(models[best], test)
        rows.append([kind, f"{best:g}", f"{scores[best]:.4f}", f"{tested:.4f}"])
    noise = math.sqrt(0.25 / len(test))
    table(
        f"{data.name}, seed {given.seed}: {len(train)} training, {len(validation)} validation and "
        f"{len(test)} test texts (standard error of the test accuracy: at most {noise:.4f})",
        ["features", "C", "validation accuracy", "test accuracy"],
        rows,
    )


if __name__ == "__main__":
    main()
