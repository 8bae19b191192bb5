"""What `sentiment-lstm` is compared with: `python -m bench.sentiment_baseline --data-dir DIR`.

Bags of words and logistic regression, on the recipe's own split. The penalty is chosen on the
validation part, for each kind of features; fitted is the training part alone, as for the network.
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
from models.reviews import Reviews
from models.sentiment_predictor import tokenise

PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
KINDS = {
    "words, there or not": lambda: CountVectorizer(
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
    """Features of that kind and a regression on them; `penalty` is scikit-learn's C."""
    model = make_pipeline(KINDS[kind](), LogisticRegression(C=penalty, max_iter=1000))
    return model.fit(train.texts, train.labels.numpy())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="bench.sentiment_baseline", description=__doc__)
    parser.add_argument("--dataset", default="auto")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    recipe = find("sentiment-lstm")
    try:
        data = recipe.load(Source(given.dataset, given.data_dir, given.seed), recipe.defaults())
    except ModelsError as error:
        parser.error(str(error))
    train, validation, test = data.train, data.validation, data.test
    assert validation is not None
    assert test is not None

    def accuracy(model: Pipeline, part: Reviews) -> float:
        return float(model.score(part.texts, part.labels.numpy()))

    rows = []
    for kind in KINDS:
        models = {penalty: fitted(kind, penalty, train) for penalty in PENALTIES}
        found = {penalty: accuracy(model, validation) for penalty, model in models.items()}
        best = max(found, key=lambda penalty: found[penalty])
        tested = accuracy(models[best], test)
        rows.append([kind, f"{best:g}", f"{found[best]:.4f}", f"{tested:.4f}"])
    noise = math.sqrt(0.25 / len(test))
    table(
        f"{data.name}, seed {given.seed}: {len(train)} texts to train, {len(validation)} to "
        f"validate, {len(test)} to test (one standard error of the last: at most {noise:.4f})",
        ["features", "C", "validation accuracy", "test accuracy"],
        rows,
    )


if __name__ == "__main__":
    main()
