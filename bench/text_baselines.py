"""What the recipes for text are compared with: `python -m bench.text_baselines --data-dir …`."""

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

Tokens = npt.NDArray[np.int64]


class Baseline(NamedTuple):
    """What a baseline came to."""

    loss: float
    """Nats per character."""
    seconds: float

    @property
    def perplexity(self) -> float:
        """e to the power of the loss."""
        return math.exp(self.loss)


def character_trigram(data: TextData) -> Baseline:
    """A character 3-gram model with interpolated Kneser-Ney smoothing, on the validation part.

    Counted on the training part alone, and asked for the characters that the recipe char-lstm is:
    the targets of `data.validation`, but for the first, which has no two characters before it.

    Source: Chen & Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling",
    1999, section 2.7; one discount an order, n1 / (n1 + 2 n2), as in Ney, Essen & Kneser, 1994.
    """
    started = time.perf_counter()
    symbols = len(data.facts["characters"]) + 1  # the last is every unknown character
    train = _flat(data.train)
    counts = np.zeros((symbols,) * 3)
    np.add.at(counts, (train[:-2], train[1:-1], train[2:]), 1)
    # Lower orders count in how many contexts a character occurs, not how often.
    pairs = (counts > 0).sum(axis=0).astype(float)
    singles = (pairs > 0).sum(axis=0).astype(float)
    uniform = np.full(symbols, 1 / symbols)
    probabilities = _interpolated(counts, _interpolated(pairs, _interpolated(singles, uniform)))

    asked = _flat(data.validation)
    found = probabilities[asked[:-2], asked[1:-1], asked[2:]]
    return Baseline(float(-np.log(found).mean()), time.perf_counter() - started)


def _interpolated(
    counts: npt.NDArray[np.float64], lower: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Probabilities (…, symbols) by discounted `counts`, what is discounted spread as in `lower`.

    A context without counts has the probabilities of `lower`, those of one character less.
    """
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    # A text so small, or so large, that the estimate is undefined has the usual one.
    discount = once / (once + 2 * twice) if once and twice else 0.75
    total = counts.sum(axis=-1, keepdims=True)
    kept = np.maximum(counts - discount, 0)
    spread = np.where(total > 0, total - kept.sum(axis=-1, keepdims=True), 1)
    mixed: npt.NDArray[np.float64] = (kept + spread * lower) / np.maximum(total, 1)
    return mixed


def _flat(part: Windows) -> Tokens:
    """The characters of a part in their order: its streams are end to end."""
    return np.append(part.data.flatten().numpy(), part.targets[-1, -1]).astype(np.int64)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the baselines; returns the exit code, 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(prog="bench.text_baselines", description=__doc__)
    parser.add_argument("--data-dir", default="data", help="has text/anna.txt")
    parser.add_argument("--text", default="auto", help=RECIPE.datasets)
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
