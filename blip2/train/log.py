"""The log of a training, ``log.jsonl`` in its folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TextIO

from blip2.disk import write_text
from blip2.train.trackers import Trackers


class Log:
    """One JSON object a line. Lines of steps after the one that training resumes from are removed."""

    def __init__(self, path: Path | None, keep_to: int, trackers: Trackers | None = None) -> None:
        """Without a path nothing is written, because another process writes the log. ``trackers`` receive every
        line."""
        self._file: TextIO | None = None
        self._trackers = trackers
        self.evaluated = 0
        """The step of the last evaluation in the log."""
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
    """The step of a log line; infinite for a damaged line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return math.inf
