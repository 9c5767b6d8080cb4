"""``blip2 merge``: write a model with adapters merged into its weights, so that it loads without them."""

from __future__ import annotations

from pathlib import Path

import click

from blip2.cli.made import check_is_new, write_from
from blip2.cli.options import REVISION, adapters_in, with_options


@click.command("merge")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--adapter", "names", multiple=True, required=True, metavar="NAME", help="LoRA or DoRA adapter: a folder "
              "or a name on the hub. Repeatable; NAME=0.5 sets a weight.")  # fmt: skip
@with_options((REVISION,))
def command(model: str, out: Path, names: tuple[str, ...], revision: str | None) -> None:
    """Merge LoRA adapters into a model.

    MODEL is a folder or a name on the Hugging Face hub, OUT the folder to create. OUT is complete without MODEL and the
    adapters, has the precision of MODEL, and gives the same answers as MODEL with --adapter. Progress is printed on
    standard error, the name of OUT on standard output when it is complete.

    \b
    blip2 merge Salesforce/blip2-opt-2.7b merged --adapter my-lora
    blip2 caption photo.jpg --model merged
    """
    check_is_new(out)
    from blip2 import checkpoint
    from blip2.checkpoint.adapters import Adapters

    folder, adapters = checkpoint.resolve(model, revision=revision), Adapters.of(adapters_in(names))
    write_from(
        folder,
        out,
        lambda progress: checkpoint.load(folder, adapters=adapters, as_stored=True, progress=progress),
        doing="reading, merging",
    )
    click.echo(out)
