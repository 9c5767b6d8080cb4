"""How results reach the terminal: plain text or JSON on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from blip2.errors import ImageError

if TYPE_CHECKING:
    from blip2.api import Pipeline
    from blip2.model import EncodedImage

MANY = 16
"""More pictures than this get a progress bar."""


class Report:
    """Prints results as they come, and remembers whether any picture failed.

    ``shows_image``, ``shows_question``: whether a line of plain text begins with them.
    """

    def __init__(self, model: str, *, as_json: bool, shows_image: bool, shows_question: bool = False) -> None:
        self._model = model
        self._as_json = as_json
        self._shows_image = shows_image
        self._shows_question = shows_question
        self.exit_code = 0

    def result(self, image: str, text: str, *, seconds: float, question: str | None = None, **details: Any) -> None:
        """One text about one picture. ``seconds``: what its batch took, divided by the pictures in it."""
        if self._as_json:
            asked = {} if question is None else {"question": question}
            row = {"image": image, **asked, "text": text, **details, "seconds": round(seconds, 4)}
            click.echo(json.dumps({**row, "model": self._model}))
            return
        columns = [text]
        if self._shows_question and question is not None:
            columns.insert(0, " ".join(question.split()))
        if self._shows_image:
            columns.insert(0, click.format_filename(image))
        click.echo("\t".join(columns))

    def failure(self, image: str, error: ImageError) -> None:
        """A picture that cannot be read: one line on standard error; with JSON a line beside the others as well."""
        self.problem(str(error))
        if self._as_json:
            click.echo(json.dumps({"image": image, "error": str(error), "model": self._model}))

    def problem(self, message: str) -> None:
        """Something that went wrong while the rest goes on."""
        click.echo(f"blip2: {message}", err=True)
        self.exit_code = 1


class Batch:
    """Pictures that are answered together, encoded; ``seconds`` since their reading began, for each of them."""

    def __init__(self, sound: list[tuple[str, EncodedImage]], started: float) -> None:
        self.names = [name for name, _ in sound]
        self.images = [image for _, image in sound]
        self._started = started

    @property
    def seconds(self) -> float:
        return (time.perf_counter() - self._started) / len(self.images)


def see(blip: Pipeline, sources: Sequence[str], batch_size: int, report: Report) -> Iterator[Batch]:
    """Encode pictures batch by batch, with a progress bar if they are many. What cannot be read is reported."""
    seen = blip.each_encoded(list(sources), on_error="return", batch_size=batch_size)
    names = iter(sources)
    started = time.perf_counter()
    with _bar(len(sources)) as advance:
        while some := list(islice(zip(names, seen, strict=False), batch_size)):
            sound = []
            for name, image in some:
                if isinstance(image, ImageError):
                    report.failure(name, image)
                else:
                    sound.append((name, image))
            if sound:
                yield Batch(sound, started)
            advance(len(some))
            started = time.perf_counter()


@contextmanager
def _bar(total: int) -> Iterator[Any]:
    """A progress bar on standard error, unless the results themselves run over the terminal."""
    if total <= MANY or not sys.stderr.isatty() or sys.stdout.isatty():
        yield lambda number: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("pictures, left:"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda number: progress.advance(task, number)
