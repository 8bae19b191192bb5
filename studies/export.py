"""Export a logged model to a single file for other programs.

python -m studies.export RUN_ID --to torchscript
python -m studies.export models:/fashion@champion --to onnx --output fashion.onnx
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from studies.arguments import RAW, add_logged_model, add_tracking_uri
from tracker import TrackerError, load_trained
from tracker.arguments import OneSentenceParser
from tracker.deploy import CHECKED_SIZES, FORMATS, deploy


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `model` is a model URI, and `output` is set."""
    formats = "\n".join(f"  {name:12} {each.summary}" for name, each in FORMATS.items())
    parser = OneSentenceParser(
        prog="studies.export",
        description=f"{__doc__}\nThe file needs none of this project's Python classes and takes "
        "any batch size. It is\ncompared with the logged model before it is written. Formats:\n\n"
        + formats,
        formatter_class=RAW,
    )
    add_logged_model(parser)
    parser.add_argument("--to", choices=list(FORMATS), required=True, help="format of the file")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="the file to write, replaced if it exists; default: RUN_ID with the format's suffix",
    )
    add_tracking_uri(parser)
    given = parser.parse_args(arguments)
    if given.output is None:
        name = re.sub(r"\W+", "-", given.model.removesuffix("/model").partition(":/")[2]).strip("-")
        given.output = Path((name or "model") + FORMATS[given.to].suffix)
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; 2: nothing was exported."""
    given = parse(arguments)
    try:
        program = load_trained(given.model, given.tracking_uri).program
        difference = deploy(program, given.output, given.to)
    except TrackerError as error:
        print(f"studies.export: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    sizes = ", ".join(str(size) for size in CHECKED_SIZES)
    print(f"file        {given.output}")
    print(f"size        {given.output.stat().st_size:,} bytes")
    print(f"difference  at most {difference:.2g} from the logged model, on batches of {sizes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
