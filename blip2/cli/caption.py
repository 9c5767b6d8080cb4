"""``blip2 caption``: pictures in, a description of each out."""

from __future__ import annotations

from typing import Any

import click

from blip2.cli.collect import COLLECTION, Collection
from blip2.cli.options import DECODING, DECODING_NAMES, MODEL, OUTPUT, given, load_pipeline, of_model, with_options
from blip2.cli.pictures import PICTURES, Asked, find_pictures, of_reading
from blip2.cli.report import Report, row_of, see


@click.command("caption")
@click.argument("arguments", nargs=-1, metavar="IMAGES...")
@click.option("--prompt", default="", metavar="TEXT", help='How the caption begins, such as "a photo of".')
@click.option("-n", "--num-captions", "num_return", type=int, help="Captions of each picture.  [default: 1]")
@click.option("--pick", type=click.Choice(["best"]), help="Of -n captions, the first is the one that fits best, by a "
              "matching model.")  # fmt: skip
@click.option("--matcher", metavar="NAME", help="With --pick: that model.  [default: the bundled miniature-itm]")
@with_options(OUTPUT, COLLECTION, PICTURES, DECODING, MODEL)
@click.pass_context
def command(
    context: click.Context,
    /,
    arguments: tuple[str, ...],
    prompt: str,
    pick: str | None,
    matcher: str | None,
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

    With -o, --sidecar, --xmp or --embed, IMAGES may be a whole collection: a folder, rows (JSONL, CSV, parquet, COCO
    JSON) or shards ("shards/{000..099}.tar"); the captions go into files, and a run that is stopped is gone on with by
    the same command.

    \b
    blip2 caption photo.jpg
    blip2 caption --prompt "a photo of" photos/*.jpg
    blip2 caption photos/ --json > captions.jsonl
    blip2 caption photos/ --sidecar .txt --prefix "sks dog, " --html review.html
    blip2 caption photos/ -o photos/metadata.jsonl
    blip2 caption "shards/{000..099}.tar" -o captioned/
    find photos/ -newer last -print0 | blip2 caption --files-from - -0
    blip2 caption -n 3 --sample --top-p 0.9 https://example.org/photo.jpg
    """
    from blip2.tasks.caption import caption
    from blip2.tasks.defaults import CAPTION, merged
    from blip2.tasks.speaker import check_batch_size

    # What is wrong with the options is told before the model is loaded.
    collection = Collection(others)
    model = of_model(others) | of_reading(others)
    if collection.is_asked:
        from blip2.api.collect import captioning

        decoding = given({name: others.pop(name) for name in (*DECODING_NAMES, "num_return")})
        context.exit(
            collection.run(
                captioning, arguments, model, others, prompt=prompt, pick=pick, matcher=matcher, batch_size=batch_size,
                as_json=as_json, **decoding,
            )
        )  # fmt: skip
    if pick or matcher:
        raise click.UsageError("--pick and --matcher are for results in files; add -o FILE or --sidecar .txt")
    asked = Asked.of(arguments, others)
    merged(CAPTION, given(others))
    check_batch_size(batch_size)
    pictures = find_pictures(asked, takes_index=True)
    blip = load_pipeline(**pictures.model(model))
    options = merged(blip.speaker.defaults.caption, given(others))
    report = Report(blip.name, as_json=as_json, shows_image=pictures.are_several, is_null=asked.is_null)
    report.about(pictures)
    seen = pictures.seen_by(blip, batch_size)
    for batch in see(seen, pictures.sources, batch_size):
        found = caption(blip.speaker, batch.images, [prompt], options=options, batch_size=batch_size)
        report.results(batch, ([row_of(answer) for answer in answers] for answers in found))
    context.exit(report.exit_code)
