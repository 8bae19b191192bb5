"""Search the tutorial's hyperparameters: `studies.search`, its study named `fashion-mnist`.

python -m studies.fashion_mnist --sampler grid --workers 2 --epochs 1 --dataset digits
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from studies import search


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, 2 for a mistake in the arguments."""
    return search.main(arguments, "studies.fashion_mnist", "fashion-mnist")


if __name__ == "__main__":
    sys.exit(main())
