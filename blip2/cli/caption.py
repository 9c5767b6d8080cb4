"""``blip2 caption``: pictures in, a description of each out."""

from __future__ import annotations

from typing import Any

import click

from blip2.cli.options import DECODING, MODEL, OUTPUT, given, load_pipeline, of_model, with_options
from blip2.cli.pictures import PICTURES, Asked, find_pictures, of_reading
from blip2.cli.report import Report, row_of, see


@click.command("caption")
@click.argument("images", nargs=-1, metavar="IMAGES...")
@click.option("--prompt", default="", metavar="TEXT", help='How the caption begins, such as "a photo of".')
@click.option("-n", "--num-captions", "num_return", type=int, help="Captions of each picture.  [default: 1]")
@with_options(OUTPUT, PICTURES, DECODING, MODEL)
@click.pass_context
def command(
    context: click.Context,
    /,
    images: tuple[str, ...],
    prompt: str,
    batch_size: int,
    as_json: bool,
    **others: Any,
) -> None:
    """Describe pictures in words.

    IMAGES are files, folders, web addresses, or - for standard input; or an index of pictures (blip2 index --for
    ask), of which none is opened; or a list of such names (--files-from). A folder gives the pictures in it and in the
    folders within. One picture gives its caption alone; several give a line each: the picture, a tab,
    the caption. A picture that cannot be read does not stop the others; the exit code is then 1.

    By default 5 beams and at most 30 tokens. What --prompt says is not repeated in the caption.

    \b
    blip2 caption photo.jpg
    blip2 caption --prompt "a photo of" photos/*.jpg
    blip2 caption photos/ --json > captions.jsonl
    find photos/ -newer last -print0 | blip2 caption --files-from - -0
    blip2 caption -n 3 --sample --top-p 0.9 https://example.org/photo.jpg
    """
    from blip2.tasks.caption import caption
    from blip2.tasks.defaults import CAPTION, merged
    from blip2.tasks.speaker import check_batch_size

    # What is wrong with the options is told before the model is loaded.
    model = of_model(others) | of_reading(others)
    asked = Asked.of(images, others)
    options = merged(CAPTION, given(others))
    check_batch_size(batch_size)
    pictures = find_pictures(asked, takes_index=True)
    blip = load_pipeline(**pictures.model(model))
    report = Report(blip.name, as_json=as_json, shows_image=pictures.are_several, is_null=asked.is_null)
    report.about(pictures)
    seen = pictures.seen_by(blip, batch_size)
    for batch in see(seen, pictures.sources, batch_size):
        found = caption(blip.speaker, batch.images, [prompt], options=options, batch_size=batch_size)
        report.results(batch, ([row_of(answer) for answer in answers] for answers in found))
    context.exit(report.exit_code)
