"""``blip2 curves``: plot the losses, scores and learning rates of training runs."""

from __future__ import annotations

from pathlib import Path

import click

from blip2.cli import Failure
from blip2.cli.options import with_options

SUFFIXES = (".svg", ".html")


@click.command("curves")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", "out", required=True, type=click.Path(dir_okay=False, path_type=Path),
              metavar="FILE", help="Output file, .svg or .html.")  # fmt: skip
@with_options()
def command(runs: tuple[Path, ...], out: Path) -> None:
    """Plot losses, scores and learning rates of training runs.

    RUNS are folders named as 'out' in recipes, finished or not, each with its log.jsonl. Several runs are drawn in the
    same panels for comparison. The name of the output is printed.

    \b
    blip2 curves runs/stage2 -o curves.svg
    blip2 curves runs/first runs/second -o curves.html
    """
    if out.suffix.lower() not in SUFFIXES:
        raise click.UsageError(f"{out}: curves are written as {' or '.join(SUFFIXES)}; change the file name")
    from blip2.collection.page import page
    from blip2.disk import write_text
    from blip2.train.curves import draw, read_run

    drawing = draw([read_run(path) for path in runs])
    if out.suffix.lower() == ".html":
        style = "body { padding: 1rem; } svg { max-width: 100%; height: auto; }"
        drawing = page("Training curves - blip2", style, f"<h1>Training curves</h1>\n{drawing}")
    try:
        write_text(out, drawing)
    except OSError as error:
        raise Failure(f"{out}: cannot be written ({error.strerror or error}); name another file") from None
    click.echo(out)
