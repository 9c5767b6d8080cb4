"""``blip2 index``: encode images into a file that can be searched or asked about."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blip2.cli import Failure, of_image
from blip2.cli.collect import ROWS, names_of
from blip2.cli.images import IMAGE_OPTIONS, Asked, of_reading
from blip2.cli.options import INDEX_MODEL, given, load_matcher, load_pipeline, of_model, with_options
from blip2.cli.report import tell

if TYPE_CHECKING:
    from blip2.api import Matcher, Pipeline


@click.command("index")
@click.argument("photos", nargs=-1, metavar="PHOTOS...")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Index file; "
              "updated if it exists.")  # fmt: skip
@click.option("--for", "kind", type=click.Choice(["search", "ask"]), help="Purpose: search (a matching model) or "
              "ask (a generative model).  [default: that of the existing index, or search]")  # fmt: skip
@click.option("--batch-size", type=int, default=16, show_default=True, help="Images per batch.")
@with_options(ROWS, IMAGE_OPTIONS, INDEX_MODEL)
@click.pass_context
def command(
    context: click.Context,
    /,
    photos: tuple[str, ...],
    output: Path,
    kind: str | None,
    batch_size: int,
    **others: Any,
) -> None:
    """Encode images once, to search them or ask about them later.

    PHOTOS are folders (searched recursively) or image files, a list of them (--files-from), or rows (JSON lines, CSV,
    parquet, COCO JSON). A second run encodes only images that are new or changed, by size and modification time, and
    removes those deleted from the folders given. Unreadable images and folders are reported and skipped; the exit code
    is then 1. An interrupted run loses at most half a minute of work: the same command resumes it.

    The index is a safetensors file. It records its model, so later runs, blip2 search and blip2 ask need no --model.

    \b
    blip2 index photos/ -o photos.index
    blip2 index captions.jsonl --image-column file_name -o photos.index
    blip2 search photos.index "two cats on a sofa"
    blip2 index photos/ -o seen.index --for ask
    blip2 ask seen.index "is there a dog?"
    """
    from blip2.image import Reading
    from blip2.index import update

    model, reading = of_model(others), of_reading(others)
    rows = given({name: others.pop(name) for name in names_of(ROWS)})
    asked = Asked.of(photos, others, "PHOTOS...")
    name = model.pop("model")
    problems = 0

    def load(name: str, kind: str) -> Matcher | Pipeline:
        chosen = model | reading | {"model": name}
        return load_pipeline(**chosen) if kind == "ask" else load_matcher(**chosen)

    def problem(message: str) -> None:
        nonlocal problems
        problems += 1
        tell(of_image(message))

    try:
        with _bar() as on_progress:
            changes = update(
                output, asked.arguments, load, kind=kind, model=name, batch_size=batch_size,
                recursive=asked.recursive, exclude=asked.exclude, rows=rows, reading=Reading(**reading),
                on_progress=on_progress, on_problem=problem, on_note=tell,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise Failure(f"stopped; finished work is kept beside {output}, and the same command resumes", 130) from None
    images = "image" if changes.total == 1 else "images"
    click.echo(f"{changes}; {changes.total:,} {images} in {click.format_filename(output)}", err=True)
    context.exit(1 if problems else 0)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error if that is a terminal: images done, total, rate."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(TextColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.3g} images/s")

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images,"), Rate(""), TextColumn("left:"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
