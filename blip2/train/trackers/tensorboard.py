"""TensorBoard: ``tensorboard --logdir OUT`` shows the files in ``OUT/tensorboard``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class _Tracker:
    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(folder / "tensorboard", purge_step=first + 1)  # drops later points

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def start(folder: Path, project: str, first: int) -> _Tracker:
    return _Tracker(folder, first)
