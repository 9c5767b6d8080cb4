"""``blip2 match``: score how well texts match images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from blip2.cli.collect import COLLECTION_WITHOUT_WORDS, Collection
from blip2.cli.images import IMAGE_OPTIONS, Asked, find_images, of_reading
from blip2.cli.options import MODEL, OUTPUT, lines_in, load_matcher, of_model, with_options
from blip2.cli.report import Report, see

CANDIDATES = 32
"""With --top: the number of texts that ITM scores for each image."""


@click.command("match")
@click.argument("arguments", nargs=-1, metavar="IMAGE TEXT...")
@click.option("-t", "--text", "texts", multiple=True, help="A text. Repeatable; all arguments are images "
              "then.")  # fmt: skip
@click.option("--labels", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="File with one text per line; all arguments are images then.")  # fmt: skip
@click.option("--template", default="{}", metavar="TEXT", help='Pattern around each text, such as "a photo of a {}".')
@click.option("--top", type=int, metavar="K", help="Print only the K best texts.")
@with_options(OUTPUT, COLLECTION_WITHOUT_WORDS, IMAGE_OPTIONS, MODEL)
@click.pass_context
def command(
    context: click.Context,
    /,
    arguments: tuple[str, ...],
    texts: tuple[str, ...],
    labels: Path | None,
    template: str,
    top: int | None,
    batch_size: int,
    as_json: bool,
    **others: Any,
) -> None:
    """Score how well texts match an image.

    The first argument is the image, followed by one or more TEXTs. With -t or --labels, all arguments are images or
    folders. Folders are searched recursively. With -o, --sidecar, --xmp or --embed, they can be a whole collection, as
    for blip2 caption: the texts of each image are written from best to worst, with their probabilities if the format
    has scores.

    \b
    match    probability that image and text belong together (ITM), for each text on its own
    cosine   similarity of the image and text vectors (ITC)
    share    probability of the text among all given texts; needs the learned temperature,
             which the published files lack

    The best text comes first. With --top, only the 32 texts with the highest cosine (or K, if larger) are scored by
    ITM, so that thousands of labels are practical. With several images, each line begins with the image and a tab. An
    unreadable image does not stop the others; the exit code is then 1.

    \b
    blip2 match street.jpg "a bus" "two buses" "a tram"
    blip2 match photos/*.jpg --labels animals.txt --template "a photo of a {}" --top 5
    blip2 match street.jpg "a bus" --json
    blip2 match photos/ --labels animals.txt --top 3 -o labels.jsonl
    """
    images, compared = _split(arguments, texts, labels, has_list=others["files_from"] is not None)
    collection = Collection(others, COLLECTION_WITHOUT_WORDS)
    model = of_model(others) | of_reading(others)
    if collection.is_asked:
        from blip2.api.collect import matching

        context.exit(
            collection.run(
                matching, images, model, others, texts=compared, words=template, top=top, candidates=CANDIDATES,
                batch_size=batch_size, as_json=as_json,
            )
        )  # fmt: skip
    asked = Asked.of(images, others)
    images_found = find_images(asked)
    matcher = load_matcher(**model)
    found = matcher.each_classified(
        images_found.sources,
        compared,
        top=len(compared) if top is None else top,
        candidates=len(compared) if top is None else CANDIDATES,
        template=template,
        on_error="return",
        batch_size=batch_size,
    )
    report = Report(
        matcher.name, as_json=as_json, shows_image=images_found.are_several, plain=_line, is_null=asked.is_null
    )
    report.about(images_found)
    if not (as_json or images_found.are_several or asked.is_null):
        click.echo(f"{'match':>7}  {'cosine':>6}  {'share':>7}  text")
    for batch in see(found, images_found.sources, batch_size):
        report.results(batch, ([asdict(match) for match in matches] for matches in batch.images))
    context.exit(report.exit_code)


def _line(row: dict[str, Any]) -> str:
    """One line of the table: "98.7 %   0.412   99.1 %  two dogs"."""
    share = row["itc_probability"]
    shown = "-" if share is None else f"{share:.1%}"
    return f"{row['itm_probability']:>7.1%}  {row['itc_cosine']:>6.3f}  {shown:>7}  {row['text']}"


def _split(
    arguments: tuple[str, ...], texts: tuple[str, ...], labels: Path | None, has_list: bool
) -> tuple[tuple[str, ...], Sequence[str]]:
    """Images and texts: the first argument is the image and the others are texts, unless options give the texts.

    ``has_list``: --files-from gives images, so that all arguments are texts, unless options give the texts.
    """
    if labels is not None:
        return arguments, [*texts, *lines_in(labels, "label")]
    if texts:
        return arguments, texts
    if not (arguments or has_list):
        raise click.UsageError("Missing argument 'IMAGE TEXT...'.")
    images = () if has_list else arguments[:1]
    others = arguments[len(images) :]
    if not others:
        raise click.UsageError("there is no text; give the image first, then one text or more")
    if several := [argument for argument in others if os.path.exists(argument)]:
        raise click.UsageError(
            f"{click.format_filename(several[0])} is a file, but a text belongs there; for more than one image "
            "give the texts with -t or --labels"
        )
    return images, others
