"""``blip2 caption``: generate a caption for each image."""

from __future__ import annotations

from typing import Any

import click

from blip2.cli.collect import COLLECTION, Collection
from blip2.cli.images import IMAGE_OPTIONS, Asked, find_images, of_reading
from blip2.cli.options import DECODING, DECODING_NAMES, MODEL, OUTPUT, given, load_pipeline, of_model, with_options
from blip2.cli.report import Report, row_of, see


@click.command("caption")
@click.argument("arguments", nargs=-1, metavar="IMAGES...")
@click.option("--prompt", default="", metavar="TEXT", help='Text that the caption continues, such as "a photo of".')
@click.option("-n", "--num-captions", "num_return", type=int, help="Captions per image.  [default: 1]")
@click.option("--pick", type=click.Choice(["best"]), help="Of -n captions, put the one first that a matching "
              "model scores best.")  # fmt: skip
@click.option("--matcher", metavar="NAME", help="With --pick: the matching model.  [default: the bundled "
              "miniature-itm]")
@with_options(OUTPUT, COLLECTION, IMAGE_OPTIONS, DECODING, MODEL)
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
    """Generate captions for images.

    IMAGES are files, folders, URLs, or - for standard input. An index made by blip2 index --for ask is accepted too:
    its images are not opened again. Folders are searched recursively. One image prints its caption; several print one
    line each: the image, a tab, the caption. An unreadable image does not stop the others; the exit code is then 1.

    The default is 5 beams and at most 30 tokens. The text of --prompt is not repeated in the caption.

    With -o, --sidecar, --xmp or --embed, IMAGES can be a whole collection: a folder, rows (JSONL, CSV, parquet, COCO
    JSON) or shards ("shards/{000..099}.tar"). The captions are written to files, and the same command resumes an
    interrupted run.

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

    # Check the options before the model is loaded.
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
        raise click.UsageError("--pick and --matcher need results in files; add -o FILE or --sidecar .txt")
    asked = Asked.of(arguments, others)
    merged(CAPTION, given(others))
    check_batch_size(batch_size)
    images = find_images(asked, takes_index=True)
    blip = load_pipeline(**images.model(model))
    options = merged(blip.speaker.defaults.caption, given(others))
    report = Report(blip.name, as_json=as_json, shows_image=images.are_several, is_null=asked.is_null)
    report.about(images)
    seen = images.seen_by(blip, batch_size)
    for batch in see(seen, images.sources, batch_size):
        found = caption(blip.speaker, batch.images, [prompt], options=options, batch_size=batch_size)
        report.results(batch, ([row_of(answer) for answer in answers] for answers in found))
    context.exit(report.exit_code)
