"""A process that evaluates, and kills itself on the way: ``python -m tests.evaluate.killed NAME DATA OUT WHEN``.

WHEN: "N results", when so many new ones are in the journal, or "N pictures" of the first pass of a retrieval.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from blip2.collection.part import Part
from blip2.evaluate import begun, matching

OPTIONS = {"batch_size": 2, "first": 18}


def main(name: str, data: str, folder: str, when: str) -> None:
    number, _, what = when.partition(" ")
    add, num_added = Part.add, 0

    def counted(part: Part, result: Any, *, is_new: bool) -> None:
        nonlocal num_added
        add(part, result, is_new=is_new)
        num_added += is_new
        kill_at(num_added, "results")

    def kill_at(done: int, of: str) -> None:
        if of == what and done >= int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    Part.add = counted  # type: ignore[method-assign]
    matching.CHUNK = 4
    evaluation = begun(name, Path(data), Path(folder), OPTIONS)
    evaluation.see(lambda done, total: kill_at(done, "pictures"))
    evaluation.run.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
