"""How results reach the terminal: plain text or JSON on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from blip2.cli import of_picture
from blip2.cli.pictures import Pictures, echo, shown
from blip2.errors import ImageError

if TYPE_CHECKING:
    from blip2.tasks.speaker import Answer

MANY = 16
"""More images than this get a progress bar."""


def row_of(answer: Answer) -> dict[str, Any]:
    """What is told about an answer."""
    return {"text": answer.text, "score": answer.score, "tokens": len(answer.tokens)}


class Batch(NamedTuple):
    """Images that are answered together: what each is called, and what was seen of it (or went wrong)."""

    names: list[str]
    seen: list[Any]
    started: float

    @property
    def images(self) -> list[Any]:
        """Those that could be read, in order."""
        return [image for image in self.seen if not isinstance(image, ImageError)]


class Report:
    """Prints results as they come, and remembers whether anything failed.

    ``shows_image``, ``shows_question``: whether a line of plain text begins with them. ``plain``: a row in one line.
    ``is_null``: lines end with a NUL byte, and names are raw.
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
        """For each image that could be read its results, each with a "text"; in the order of all images.

        What the batch took is divided among them: ``seconds`` an image.
        """
        seconds = (time.perf_counter() - batch.started) / len(batch.seen)
        remaining = iter(rows)
        for name, image in zip(batch.names, batch.seen, strict=True):
            if isinstance(image, ImageError):
                self._failure(name, image)
                continue
            for row in next(remaining):
                self._result(name, {**row, "seconds": round(seconds, 4)})

    def about(self, pictures: Pictures) -> None:
        """What is wrong with folders, and what was passed over in them."""
        for problem in pictures.problems:
            self.problem(problem)
        for note in pictures.notes:
            tell(note)

    def problem(self, message: str) -> None:
        """Something that went wrong while the rest goes on."""
        tell(message)
        self.exit_code = 1

    def _result(self, image: str, row: dict[str, Any]) -> None:
        if self._as_json:
            click.echo(json.dumps({"image": image, **row, "model": self._model}))
            return
        # Whatever a model writes or a person asks: one line, and no tab in it.
        columns = [self._plain({**row, "text": " ".join(row["text"].split())})]
        if self._shows_question:
            columns.insert(0, " ".join(row["question"].split()))
        if self._shows_image:
            columns.insert(0, shown(image, self._is_null))
        echo(columns, self._is_null)

    def _failure(self, image: str, error: ImageError) -> None:
        message = of_picture(str(error))
        self.problem(message)
        if self._as_json:  # so that whoever counts the lines finds one for each image
            click.echo(json.dumps({"image": image, "error": message, "model": self._model}))


def tell(message: str) -> None:
    """A line on standard error."""
    print(f"blip2: {message}", file=sys.stderr)  # which the progress bar redirects, so that it stays whole


def see(seen: Iterator[Any], names: Sequence[str], batch_size: int) -> Iterator[Batch]:
    """What a model sees of images, batch by batch, with a progress bar if they are many."""
    from blip2.tasks.speaker import chunks  # imports torch

    with bar(len(names)) as advance:
        for some in chunks(names, batch_size):
            started = time.perf_counter()
            yield Batch(list(some), list(islice(seen, len(some))), started)
            advance(len(some))


@contextmanager
def bar(total: int) -> Iterator[Any]:
    """A progress bar on standard error, unless the results themselves run over the terminal."""
    if total <= MANY or not sys.stderr.isatty() or sys.stdout.isatty():
        yield lambda number: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images, left:"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as progress:
        task = progress.add_task("", total=total)
        yield lambda number: progress.advance(task, number)
