"""``blip2 quantize``: a model of 8 or 4 bits, written once, that loads without the original."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from blip2.cli.options import REVISION, in_bytes, with_options
from blip2.disk import replace
from blip2.errors import CheckpointError

if TYPE_CHECKING:
    from blip2.checkpoint import Quantization

COMPANIONS = (
    "preprocessor_config.json", "processor_config.json", "generation_config.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
"""What stands beside the weights and the tokenizer, and is the same whatever the weights are kept in."""
UNFINISHED = "unfinished"


@click.command("quantize")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", "kind", type=click.Choice(["int8", "int4"]), required=True, help="8 bits lose next to nothing; "
              "4 bits are half as large.")  # fmt: skip
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), help="With int4: so many weights share a scale; "
              "fewer are more exact.  [default: 64]")  # fmt: skip
@click.option("--vision", is_flag=True, help="Quantise the image encoder, too.")
@with_options((REVISION,))
def command(model: str, out: Path, kind: str, group_size: str | None, vision: bool, revision: str | None) -> None:
    """Make a model of 8 or 4 bits from a model.

    MODEL is a folder or a name on the Hugging Face hub, OUT the folder that is made. OUT needs nothing of MODEL, and
    answers as MODEL does with --quantize, which does the same anew each time it is loaded. The linear layers of the
    language model are quantised; every other weight is kept bit by bit. Progress is shown on standard error; the name
    of OUT is printed when it is whole.

    \b
    blip2 quantize Salesforce/blip2-opt-2.7b opt-int8 --to int8
    blip2 caption photo.jpg --model opt-int8
    """
    if kind == "int8" and group_size is not None:
        raise click.UsageError("--group-size goes with --to int4; in 8 bits each output has one scale")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already; choose another name, or delete it")
    from blip2 import checkpoint
    from blip2.checkpoint.describe import stored

    folder = checkpoint.resolve(model, revision=revision)
    quantization = checkpoint.quantization(kind, vision=vision, group_size=int(group_size or 64))
    assert quantization is not None
    _check(folder, quantization)
    before = stored(folder).num_bytes
    _write(folder, out, quantization)
    after = stored(out).num_bytes
    click.echo(f"{in_bytes(before)} became {in_bytes(after)} ({after / before:.0%})", err=True)
    click.echo(out)


def _check(folder: Path, quantization: Quantization) -> None:
    """What is wrong with the model is told before the work begins."""
    from blip2.checkpoint import image_settings, read_config
    from blip2.checkpoint.describe import describe
    from blip2.checkpoint.quantize import quantization_in
    from blip2.text import Tokenizer

    config = read_config(folder)
    if (found := quantization_in(folder)) is not None:
        raise CheckpointError(f"{folder}: is quantised to {found.bits} bits already; quantise the original")
    if not describe(config, quantization=quantization).quantized:
        raise CheckpointError(f"{folder}: has no language model; --vision quantises its image encoder")
    Tokenizer.from_folder(folder)
    image_settings(folder, config)


def _write(folder: Path, out: Path, quantization: Quantization) -> None:
    """Into a folder within ``out``, and from there, config.json last: there is a whole model, or none."""
    from blip2 import checkpoint

    was_there = out.exists()
    unfinished = out / UNFINISHED
    try:
        with _bar() as (progress, writes):
            quantized = checkpoint.load(folder, quantize=quantization, as_stored=True, progress=progress)
            if (found := checkpoint.damage(quantized)) is not None:
                raise CheckpointError(f"{folder}: has weights that are NaN or infinite: {found}")
            writes()
            checkpoint.save(
                quantized, unfinished, tokenizer=folder / "tokenizer.json", quantization=quantization.as_json()
            )
        # Whoever looks for them finds the original's, or none: what `save` knows is a guess beside them.
        for name in COMPANIONS:
            (unfinished / name).unlink(missing_ok=True)
            if (folder / name).exists():
                shutil.copyfile(folder / name, unfinished / name)
        whole = sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json")
        replace([(path, out / path.name) for path in whole])
    except OSError as error:
        raise CheckpointError(
            f"{out}: cannot be written ({error.strerror}); make room there, or name another"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not was_there:
            with suppress(OSError):  # there is a model in it, or it never came to be
                out.rmdir()


@contextmanager
def _bar() -> Iterator[tuple[Callable[[int, int], None] | None, Callable[[], None]]]:
    """On a terminal a bar for bytes done and in all, on standard error; and what to call when they are written."""
    if not sys.stderr.isatty():
        yield None, lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TextColumn("left:"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as bar:
        task = bar.add_task("reading, quantising", total=None)
        yield (
            lambda done, total: bar.update(task, completed=done, total=total),
            lambda: bar.update(task, description="writing"),
        )
