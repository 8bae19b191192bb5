"""`python -m studies mirror` and `reap`: the same as `tracker mirror` and `tracker reap`."""

import sys

from tracker.cli import main

if __name__ == "__main__":
    sys.exit(main())
