"""A baseline for `char-lstm`: a character trigram model.

python -m bench.text_baselines --data-dir data
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bench.measuring import table
from models import ModelsError
from models.char_lstm import RECIPE
from models.recipe import Source
from models.text import TextData, Windows, load_text
from studies.arguments import RAW

Tokens = npt.NDArray[np.int64]


class Baseline(NamedTuple):
    """The result of a baseline."""

    loss: float
    """Nats per character."""
    seconds: float

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss)


def character_trigram(data: TextData) -> Baseline:
    """Evaluate a character 3-gram model with interpolated Kneser-Ney smoothing.

    It is fitted to the training part and evaluated on the characters that char-lstm predicts, the
    targets of the validation part, except the first, which lacks two characters before it.

    Source: Chen & Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling",
    1999, section 2.7; one discount per order, n1 / (n1 + 2 n2), as in Ney, Essen & Kneser, 1994.
    """
    started = time.perf_counter()
    symbols = len(data.facts["characters"]) + 1  # the last is the unknown character
    train = _flat(data.train)
    counts = np.zeros((symbols,) * 3)
    np.add.at(counts, (train[:-2], train[1:-1], train[2:]), 1)
    # Lower orders count the contexts in which a character occurs, not its occurrences.
    pairs = (counts > 0).sum(axis=0).astype(float)
    singles = (pairs > 0).sum(axis=0).astype(float)
    uniform = np.full(symbols, 1 / symbols)
    probabilities = _interpolated(counts, _interpolated(pairs, _interpolated(singles, uniform)))

    text = _flat(data.validation)
    predicted = probabilities[text[:-2], text[1:-1], text[2:]]
    return Baseline(float(-np.log(predicted).mean()), time.perf_counter() - started)


def _interpolated(
    counts: npt.NDArray[np.float64], lower: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Probabilities (…, symbols) from discounted `counts`, the discount spread as in `lower`.

    A context without counts has the probabilities of `lower`, the order below.
    """
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    # Use the common value if the estimate is undefined: the text is very small or very large.
    discount = once / (once + 2 * twice) if once and twice else 0.75
    total = counts.sum(axis=-1, keepdims=True)
    kept = np.maximum(counts - discount, 0)
    spread = np.where(total > 0, total - kept.sum(axis=-1, keepdims=True), 1)
    mixed: npt.NDArray[np.float64] = (kept + spread * lower) / np.maximum(total, 1)
    return mixed


def _flat(part: Windows) -> Tokens:
    """The characters of a part in order: its streams are end to end."""
    return np.append(part.data.flatten().numpy(), part.targets[-1, -1]).astype(np.int64)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the baseline and return the exit code; 2: invalid arguments."""
    parser = argparse.ArgumentParser(
        prog="bench.text_baselines", description=__doc__, formatter_class=RAW
    )
    parser.add_argument(
        "--data-dir",
        default="data",
        metavar="FOLDER",
        help="where text/anna.txt is; default: data",
    )
    parser.add_argument("--text", default="auto", help=f"{RECIPE.datasets}; default: auto")
    given = parser.parse_args(arguments)
    params = RECIPE.defaults()
    try:
        source = Source(given.text, given.data_dir, 0)
        data = load_text(source, int(params["batch_size"]), int(params["length"]))
    except ModelsError as error:
        print(f"bench.text_baselines: {error}", file=sys.stderr)
        return 2
    trigram = character_trigram(data)
    table(
        f"Characters: {data.source}",
        ("validation", "nats", "perplexity", "seconds"),
        [
            (
                "3-gram, interpolated Kneser-Ney",
                f"{trigram.loss:.4f}",
                f"{trigram.perplexity:.3f}",
                f"{trigram.seconds:.1f}",
            )
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
