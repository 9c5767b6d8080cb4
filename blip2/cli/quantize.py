"""``blip2 quantize``: write a model with 8-bit or 4-bit weights, which loads without the original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from blip2.cli.made import check_is_new, write_from
from blip2.cli.options import REVISION, in_bytes, with_options
from blip2.errors import CheckpointError

if TYPE_CHECKING:
    from blip2.checkpoint import Quantization


@click.command("quantize")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", "kind", type=click.Choice(["int8", "int4"]), required=True, help="int8 loses almost nothing; "
              "int4 is half the size.")  # fmt: skip
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), help="With int4: number of weights per scale; "
              "smaller is more accurate.  [default: 64]")  # fmt: skip
@click.option("--vision", is_flag=True, help="Quantise the image encoder as well.")
@with_options((REVISION,))
def command(model: str, out: Path, kind: str, group_size: str | None, vision: bool, revision: str | None) -> None:
    """Save a copy of a model with 8-bit or 4-bit weights.

    MODEL is a folder or a name on the Hugging Face hub, OUT the folder to create. OUT is complete without MODEL and
    gives the same answers as MODEL with --quantize, which quantises at each load. The linear layers of the language
    model are quantised; all other weights are copied unchanged. Progress is printed on standard error, the name of OUT
    on standard output when it is complete.

    \b
    blip2 quantize Salesforce/blip2-opt-2.7b opt-int8 --to int8
    blip2 caption photo.jpg --model opt-int8
    """
    if kind == "int8" and group_size is not None:
        raise click.UsageError("--group-size needs --to int4; in 8 bits each output has one scale")
    check_is_new(out)
    from blip2 import checkpoint
    from blip2.checkpoint.describe import stored

    folder = checkpoint.resolve(model, revision=revision)
    quantization = checkpoint.quantization(kind, vision=vision, group_size=int(group_size or 64))
    assert quantization is not None
    _check(folder, quantization)
    before = stored(folder).num_bytes
    write_from(
        folder,
        out,
        lambda progress: checkpoint.load(folder, quantize=quantization, as_stored=True, progress=progress),
        doing="reading, quantising",
        quantization=quantization.as_json(),
    )
    after = stored(out).num_bytes
    click.echo(f"{in_bytes(before)} reduced to {in_bytes(after)} ({after / before:.0%})", err=True)
    click.echo(out)


def _check(folder: Path, quantization: Quantization) -> None:
    """Check the model before the work begins."""
    from blip2.checkpoint import image_settings, read_config
    from blip2.checkpoint.describe import describe
    from blip2.checkpoint.quantize import quantization_in
    from blip2.text import Tokenizer

    config = read_config(folder)
    if (found := quantization_in(folder)) is not None:
        raise CheckpointError(f"{folder}: is already quantised to {found.bits} bits; quantise the original")
    if not describe(config, quantization=quantization).quantized:
        raise CheckpointError(f"{folder}: has no language model; add --vision to quantise its image encoder")
    Tokenizer.from_folder(folder)
    image_settings(folder, config)
