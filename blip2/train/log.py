"""The log of a training, ``log.jsonl`` in its folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TextIO

from blip2.disk import write_text
from blip2.train.trackers import Trackers


class Log:
    """One JSON object a line. What was written after the step that training goes on from is taken out."""

    def __init__(self, path: Path | None, keep_to: int, trackers: Trackers | None = None) -> None:
        """Without a path nothing is kept: another process keeps it. ``trackers`` are told all that is written."""
        self._file: TextIO | None = None
        self._trackers = trackers
        self.evaluated = 0
        """The step of the last evaluation in it."""
        if path is None:
            return
        lines = path.read_text("utf-8", "replace").splitlines(keepends=True) if path.exists() and keep_to else []
        kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= keep_to]
        self.evaluated = max((json.loads(line)["step"] for line in kept if '"evaluation"' in line), default=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        if self._trackers is not None:
            self._trackers.write(values)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._trackers is not None:
            self._trackers.close()


def _step_of(line: str) -> float:
    """Of a line of the log; a line that is damaged is none of them."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return math.inf
