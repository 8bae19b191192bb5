"""Generate text with a char-lstm that studies.train has trained.

python -m studies.sample RUN_ID --prime "Anna" --length 400 --temperature 0.8 --top-k 5
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import Any

import torch

from models import ModelsError, parse_spec, rebuild
from models.char_lstm import RECIPE, CharLSTM, sample
from models.text import Vocabulary
from studies.arguments import (
    RAW,
    add_logged_model,
    add_seed,
    add_tracking_uri,
    natural,
    positive_int,
)
from studies.training import SPEC
from tracker import TrackerError, load_trained
from tracker.arguments import OneSentenceParser, positive_float


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; None means that the value comes from the run."""
    parser = OneSentenceParser(prog="studies.sample", description=__doc__, formatter_class=RAW)
    add_logged_model(parser)
    parser.add_argument("--prime", metavar="TEXT", help="text to continue; default: the run's")
    parser.add_argument(
        "--length",
        type=positive_int,
        default=400,
        metavar="N",
        help="characters to generate; default: 400",
    )
    parser.add_argument(
        "--temperature",
        type=positive_float,
        metavar="T",
        help="below 1: more predictable; default: the run's",
    )
    parser.add_argument(
        "--top-k",
        type=natural,
        metavar="K",
        help="draw from the K most likely characters; 0: from all; default: the run's",
    )
    add_seed(parser, "seed of the draws")
    add_tracking_uri(parser)
    return parser.parse_args(arguments)


def write(given: argparse.Namespace) -> str:
    """Return the prime followed by the generated text.

    Args:
        given: The parsed command line.

    Raises:
        StoreError: The run does not exist or has no model.
        ModelsError: The model is not a char-lstm, or does not know a character of the prime.
    """
    network, spec = load(given.model, given.tracking_uri)
    options = {name: getattr(given, name) for name in ("prime", "temperature", "top_k")}
    chosen = {
        name: spec["params"][name] if value is None else value for name, value in options.items()
    }
    text = sample(
        network,
        Vocabulary(spec["facts"]["characters"]),
        length=given.length,
        generator=torch.Generator().manual_seed(given.seed),
        **chosen,
    )
    return str(chosen["prime"]) + text


def load(model: str, tracking_uri: str | None = None) -> tuple[CharLSTM, dict[str, Any]]:
    """Load a logged char-lstm.

    Args:
        model: A model URI.
        tracking_uri: Where the model is stored; by default MLflow's own.

    Returns:
        The network, on the CPU in evaluation mode, and its spec.

    Raises:
        StoreError: The model does not exist.
        ModelsError: The model is not a char-lstm.
    """
    trained = load_trained(model, tracking_uri)
    if SPEC not in trained.files:
        raise ModelsError(
            f"model={model!r} was not logged by studies.train; allowed: a {RECIPE.name}."
        )
    spec = parse_spec(trained.files[SPEC], {RECIPE.name}, f"model={model!r}")
    network = rebuild(spec)
    assert isinstance(network, CharLSTM)
    network.load_state_dict(trained.program.state_dict)
    return network.eval(), spec


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; 2: invalid arguments."""
    given = parse(arguments)
    try:
        print(write(given))
    except (TrackerError, ModelsError) as error:
        print(f"studies.sample: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
