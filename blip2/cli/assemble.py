"""``blip2 assemble``: combine pretrained parts into the models that training starts from."""

from __future__ import annotations

from pathlib import Path

import click

from blip2.cli.options import in_bytes, with_options


@click.command("assemble")
@click.option("--vision", required=True, metavar="NAME", help="Image encoder: EVA-CLIP (in a BLIP-2), CLIP, SigLIP, "
              "DINOv2 or v3, ViT. A folder, a name on the hub, or a .pth of EfficientNet-Lite.")  # fmt: skip
@click.option("--language", metavar="NAME", help="Language model, for stage 2. A folder or a name on the hub.")
@click.option("--qformer", default="bert-base-uncased", show_default=True, metavar="NAME",
              help="Initial weights of the Q-Former: a BERT of any size, another BLIP-2, or \"scratch\".")  # fmt: skip
@click.option("--tokenizer", metavar="NAME", help="With --qformer scratch: the BERT whose size and "
              "tokenizer are used.")  # fmt: skip
@click.option("--queries", type=int, help="Number of query tokens.  [default: 32]")
@click.option("--layer", type=click.Choice(["second-last", "last"]), default="second-last", show_default=True,
              help="Layer of the image encoder that the Q-Former reads.")  # fmt: skip
@click.option("--no-class-token", is_flag=True, help="Leave the class token out of what the Q-Former reads.")
@click.option("--image-size", type=int, help="Image size in pixels per side.  [default: the image encoder's]")
@click.option("--whole-picture", is_flag=True, help="Resize the whole image to a square, even if the image "
              "encoder was trained on a square cut out of its middle.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the new weights.")
@click.option("--link", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="FOLDER",
              help="Share the frozen parts with this earlier result, or a model trained from it, by hard links that "
              "take no disk space.")  # fmt: skip
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="Folder to create.")
@with_options()
def command(
    vision: str,
    language: str | None,
    qformer: str,
    tokenizer: str | None,
    queries: int | None,
    layer: str,
    no_class_token: bool,
    image_size: int | None,
    whole_picture: bool,
    seed: int,
    link: Path | None,
    out: Path,
) -> None:
    """Combine pretrained parts into a model to train.

    Writes OUT/matching for stage 1 and, with --language, OUT/generative for stage 2, and prints their names. The image
    encoder and the language model are copied unchanged; cross-attention, query tokens, heads and projection are new.
    Each frozen part has its own files. Models trained from OUT, and another OUT made with --link, share these files by
    hard links. Every folder is complete without the others.

    \b
    blip2 assemble --vision google/siglip-base-patch16-224 --language facebook/opt-125m -o start/
    blip2 assemble --vision facebook/dinov2-base --language facebook/opt-125m -o other/ --link start/
    blip2 train stage1.toml     # start = "start/matching"
    blip2 train stage2.toml     # start = "start/generative", qformer = the result of stage 1
    """
    from blip2.checkpoint import open_encoder, resolve
    from blip2.checkpoint.assemble import assemble, qformer_start
    from blip2.checkpoint.describe import stored

    place = Path(vision).expanduser()
    encoder = open_encoder(
        place if place.is_file() or place.suffix == ".pth" else resolve(vision),
        layer=layer,  # type: ignore[arg-type]
        class_token=not no_class_token,
        image_size=image_size,
        whole_picture=whole_picture,
    )
    start = qformer_start(qformer, tokenizer)
    folders = assemble(
        out, vision=encoder, qformer=start, language=language, num_queries=queries, seed=seed, link=link
    )
    for folder in folders:
        if link is not None:
            click.echo(f"{in_bytes(stored(folder).num_shared_bytes)} of {folder} are shared", err=True)
        click.echo(folder)
