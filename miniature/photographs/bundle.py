"""Put what the two stages made where `blip2.load("photographs")` finds it.

    python -m miniature.photographs.bundle WORK

Not into the package: the cut-outs that it learnt from are GPL-2, and whether what is learnt from them may be passed on
under another licence is for a person to decide.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from blip2.checkpoint.names import made_folder
from miniature.bundle import bundle

if __name__ == "__main__":
    out = made_folder()
    if out.exists():  # of an earlier making
        shutil.rmtree(out)
    bundle(Path(sys.argv[1]), out)
