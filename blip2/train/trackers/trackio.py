"""trackio: ``trackio show --project PROJECT`` shows the runs on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class _Tracker:
    def __init__(self, library: Any) -> None:
        self._library = library

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._library.log(dict(values), step=step)

    def close(self) -> None:
        self._library.finish()


def start(folder: Path, project: str, first: int) -> _Tracker:
    import trackio

    trackio.init(project=project, name=folder.name, resume="allow")
    return _Tracker(trackio)
