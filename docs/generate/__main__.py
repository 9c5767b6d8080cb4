"""``python -m docs.generate FOLDER``: write the generated pages, to look at them without Sphinx."""

import sys
from pathlib import Path

from docs.generate import write

for written in write(Path(sys.argv[1])):
    print(written)
