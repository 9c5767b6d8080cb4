"""``blip2 convert``: convert between the authors' .pth files and model folders."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from blip2.cli.options import with_options


@click.command("convert")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--like", metavar="NAME", help="Model to take the configuration, the tokenizer and missing frozen parts "
              "from.  [default: the published model of the same size]")  # fmt: skip
@click.option("--vision", metavar="PATH", help="Image encoder: eva_vit_g.pth, clip_vit_L.pth, or a model.")
@click.option("--language", metavar="PATH", help="Language model: the original, such as google/flan-t5-xl, or a "
              "BLIP-2 model.")  # fmt: skip
@click.option("--all", "has_frozen", is_flag=True, help="From a folder: also write the frozen parts.")
@with_options()
def command(
    source: Path, out: Path, like: str | None, vision: str | None, language: str | None, has_frozen: bool
) -> None:
    """Convert checkpoints from and to LAVIS .pth files.

    From LAVIS (the library of the authors): SOURCE is a .pth file, OUT the folder to create. To LAVIS: SOURCE is a
    model folder, OUT the .pth file. LAVIS files lack the frozen parts; --vision, --language or --like supply them. OUT
    must not exist yet; its name is printed when it is complete.

    \b
    blip2 convert blip2_pretrained_flant5xl.pth my-model --vision eva_vit_g.pth --language google/flan-t5-xl
    blip2 convert runs/stage1/model stage1.pth
    """
    is_folder = source.is_dir()
    for flag, value, needs_folder in (
        ("--like", like, False), ("--vision", vision, False), ("--language", language, False),
        ("--all", has_frozen, True),
    ):  # fmt: skip
        if value and is_folder != needs_folder:
            wanted = "a folder" if needs_folder else "a .pth file"
            raise click.UsageError(f"{flag} needs {wanted} as SOURCE, and {source} is not one")
    from blip2.checkpoint.lavis import convert_from_lavis, convert_to_lavis

    with _bar() as progress:
        if is_folder:
            convert_to_lavis(source, out, trainable_only=not has_frozen, progress=progress)
        else:
            convert_from_lavis(source, out, like=like, vision=vision, language=language, progress=progress)
    click.echo(out)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("weights"))
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
