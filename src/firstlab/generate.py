"""Stream text from a trained run and show which layers decode ran: `python -m firstlab.generate run=DIR "text"`."""

from __future__ import annotations

import sys

from firstlab.run.stream import main

if __name__ == "__main__":
    main(sys.argv[1:])
