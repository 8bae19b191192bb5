"""Let a char-lstm that was trained by `studies.train` write text.

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
from studies.arguments import RAW, add_logged_model, natural, positive_int, seed
from studies.training import SPEC
from tracker import TrackerError, load_trained
from tracker.arguments import OneSentenceParser, positive_float


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what is None is as the run has it."""
    parser = OneSentenceParser(prog="studies.sample", description=__doc__, formatter_class=RAW)
    add_logged_model(parser)
    parser.add_argument("--prime", help="the text to go on from; by default the run's")
    parser.add_argument(
        "--length", type=positive_int, default=400, help="characters, by default 400"
    )
    parser.add_argument("--temperature", type=positive_float, help="by default the run's")
    parser.add_argument("--top-k", type=natural, help="0: all; by default the run's")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--tracking-uri", help="by default the one that MLflow itself would use")
    return parser.parse_args(arguments)


def write(given: argparse.Namespace) -> str:
    """The prime, and the text that goes on from it.

    Raises StoreError for a run that is not there or has no model, and ModelsError for one that
    trained something else, or for a prime with characters that the network does not know.
    """
    network, spec = load(given.model, given.tracking_uri)
    asked = {name: getattr(given, name) for name in ("prime", "temperature", "top_k")}
    chosen = {
        name: spec["params"][name] if value is None else value for name, value in asked.items()
    }
    drawn = sample(
        network,
        Vocabulary(spec["facts"]["characters"]),
        length=given.length,
        generator=torch.Generator().manual_seed(given.seed),
        **chosen,
    )
    return str(chosen["prime"]) + drawn


def load(model: str, tracking_uri: str | None = None) -> tuple[CharLSTM, dict[str, Any]]:
    """The network of a run's or a registered model, on the CPU, and what describes it.

    Raises StoreError or ModelsError, as `write` does.
    """
    trained = load_trained(model, tracking_uri)
    if SPEC not in trained.files:
        raise ModelsError(
            f"model={model!r} was not logged by studies.train; allowed: one of {RECIPE.name}."
        )
    spec = parse_spec(trained.files[SPEC], {RECIPE.name}, f"model={model!r}")
    network = rebuild(spec)
    assert isinstance(network, CharLSTM)
    network.load_state_dict(trained.program.state_dict)
    return network, spec


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, 2 for a mistake in the arguments."""
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
