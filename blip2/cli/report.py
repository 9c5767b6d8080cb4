"""Output of results: plain text or JSON on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from blip2.cli import of_image
from blip2.cli.images import FoundImages, echo, shown
from blip2.errors import ImageError

if TYPE_CHECKING:
    from blip2.tasks.speaker import Answer

MANY = 16
"""More images than this get a progress bar."""


def row_of(answer: Answer) -> dict[str, Any]:
    """An answer as a row of the JSON output."""
    return {"text": answer.text, "score": answer.score, "tokens": len(answer.tokens)}


class Batch(NamedTuple):
    """Images that are answered together: their names, and their features or errors."""

    names: list[str]
    seen: list[Any]
    started: float

    @property
    def images(self) -> list[Any]:
        """Those that could be read, in order."""
        return [image for image in self.seen if not isinstance(image, ImageError)]


class Report:
    """Prints results as they arrive, and records whether anything failed.

    ``shows_image``, ``shows_question``: whether a plain line begins with them. ``plain``: formats a row as one line.
    ``is_null``: lines end with a NUL byte, and names are not escaped.
    """

    def __init__(
        self,
        model: str,
        *,
        as_json: bool,
        shows_image: bool,
        shows_question: bool = False,
        plain: Callable[[dict[str, Any]], str] = lambda row: row["text"],
        is_null: bool = False,
    ) -> None:
        self._model = model
        self._as_json = as_json
        self._shows_image = shows_image
        self._shows_question = shows_question
        self._plain = plain
        self._is_null = is_null
        self.exit_code = 0

    def results(self, batch: Batch, rows: Iterable[list[dict[str, Any]]]) -> None:
        """Print the results of each image, in the order of the images; each row has a "text".

        The time of the batch is divided among them: ``seconds`` per image.
        """
        seconds = (time.perf_counter() - batch.started) / len(batch.seen)
        remaining = iter(rows)
        for name, image in zip(batch.names, batch.seen, strict=True):
            if isinstance(image, ImageError):
                self._failure(name, image)
                continue
            for row in next(remaining):
                self._result(name, {**row, "seconds": round(seconds, 4)})

    def about(self, images: FoundImages) -> None:
        """Report problems with folders, and what was skipped in them."""
        for problem in images.problems:
            self.problem(problem)
        for note in images.notes:
            tell(note)

    def problem(self, message: str) -> None:
        """Report something that went wrong; the run continues."""
        tell(message)
        self.exit_code = 1

    def _result(self, image: str, row: dict[str, Any]) -> None:
        if self._as_json:
            click.echo(json.dumps({"image": image, **row, "model": self._model}))
            return
        # Generated texts and questions may contain anything: print one line without tabs.
        columns = [self._plain({**row, "text": " ".join(row["text"].split())})]
        if self._shows_question:
            columns.insert(0, " ".join(row["question"].split()))
        if self._shows_image:
            columns.insert(0, shown(image, self._is_null))
        echo(columns, self._is_null)

    def _failure(self, image: str, error: ImageError) -> None:
        message = of_image(str(error))
        self.problem(message)
        if self._as_json:  # one line for each image, so that lines can be counted
            click.echo(json.dumps({"image": image, "error": message, "model": self._model}))


def tell(message: str) -> None:
    """Print a line on standard error."""
    print(f"blip2: {message}", file=sys.stderr)  # the progress bar redirects this, so that it is not broken


def see(seen: Iterator[Any], names: Sequence[str], batch_size: int) -> Iterator[Batch]:
    """The features of images, batch by batch, with a progress bar if there are many."""
    from blip2.tasks.speaker import chunks  # imports torch

    with bar(len(names)) as advance:
        for some in chunks(names, batch_size):
            started = time.perf_counter()
            yield Batch(list(some), list(islice(seen, len(some))), started)
            advance(len(some))


@contextmanager
def bar(total: int) -> Iterator[Any]:
    """A progress bar on standard error, unless the results are printed on the terminal."""
    if total <= MANY or not sys.stderr.isatty() or sys.stdout.isatty():
        yield lambda number: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images, left:"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as progress:
        task = progress.add_task("", total=total)
        yield lambda number: progress.advance(task, number)
