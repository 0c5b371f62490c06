"""Save a W&B workspace of the runs: `python -m firstlab.dashboard [entity=NAME] [dry_run=FILE]`."""

from __future__ import annotations

import sys

from firstlab.run.dashboard import main

if __name__ == "__main__":
    main(sys.argv[1:])
