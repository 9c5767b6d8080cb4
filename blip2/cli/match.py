"""``blip2 match``: pictures and texts in, how well they fit out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from blip2.cli.collect import UNWORDED, Collection
from blip2.cli.options import MODEL, OUTPUT, lines_in, load_matcher, of_model, with_options
from blip2.cli.pictures import PICTURES, Asked, find_pictures, of_reading
from blip2.cli.report import Report, see

CANDIDATES = 32
"""With --top: the texts that are looked at together with a picture."""


@click.command("match")
@click.argument("arguments", nargs=-1, metavar="IMAGE TEXT...")
@click.option("-t", "--text", "texts", multiple=True, help="A text; may be given several times. All arguments are "
              "pictures then.")  # fmt: skip
@click.option("--labels", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Texts from a file, one a line. All arguments are pictures then.")  # fmt: skip
@click.option("--template", default="{}", metavar="TEXT", help='Words around each text, such as "a photo of a {}".')
@click.option("--top", type=int, metavar="K", help="Only the K best texts, the best first.")
@with_options(OUTPUT, UNWORDED, PICTURES, MODEL)
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
    """Tell how well texts fit a picture.

    The picture comes first, then one or more TEXTs; or any number of pictures and folders, with the texts by -t or
    --labels. A folder gives the pictures in it and in the folders within. With -o, --sidecar, --xmp or --embed, they
    may be a whole collection, as for blip2 caption; the texts of each picture are written in order, with their
    probabilities where the format has scores.

    \b
    match    the probability that the two belong together, of each text by itself
    cosine   how near their vectors are
    share    the probability of the text among all that are given; by the learned temperature, which the
             published files lack

    The best text comes first. With --top, only the 32 nearest by cosine (or K) are looked at together with the
    picture, so that texts may be thousands. With several pictures, each line begins with the picture and a tab. A
    picture that cannot be read does not stop the others; the exit code is then 1.

    \b
    blip2 match street.jpg "a bus" "two buses" "a tram"
    blip2 match photos/*.jpg --labels animals.txt --template "a photo of a {}" --top 5
    blip2 match street.jpg "a bus" --json
    blip2 match photos/ --labels animals.txt --top 3 -o labels.jsonl
    """
    images, compared = _split(arguments, texts, labels, has_list=others["files_from"] is not None)
    collection = Collection(others, UNWORDED)
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
    pictures = find_pictures(asked)
    matcher = load_matcher(**model)
    found = matcher.each_classified(
        pictures.sources,
        compared,
        top=len(compared) if top is None else top,
        candidates=len(compared) if top is None else CANDIDATES,
        template=template,
        on_error="return",
        batch_size=batch_size,
    )
    report = Report(
        matcher.name, as_json=as_json, shows_image=pictures.are_several, plain=_line, is_null=asked.is_null
    )
    report.about(pictures)
    if not (as_json or pictures.are_several or asked.is_null):
        click.echo(f"{'match':>7}  {'cosine':>6}  {'share':>7}  text")
    for batch in see(found, pictures.sources, batch_size):
        report.results(batch, ([asdict(match) for match in matches] for matches in batch.images))
    context.exit(report.exit_code)


def _line(row: dict[str, Any]) -> str:
    """The numbers and the text: "98.7 %   0.412   99.1 %  two dogs"."""
    share = row["itc_probability"]
    shown = "-" if share is None else f"{share:.1%}"
    return f"{row['itm_probability']:>7.1%}  {row['itc_cosine']:>6.3f}  {shown:>7}  {row['text']}"


def _split(
    arguments: tuple[str, ...], texts: tuple[str, ...], labels: Path | None, has_list: bool
) -> tuple[tuple[str, ...], Sequence[str]]:
    """Pictures and texts: the first argument is the picture and the others are texts, unless options give these.

    ``has_list``: of pictures, so that all arguments are texts, unless options give these.
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
        raise click.UsageError("there is no text; give the picture first, then one text or more")
    if several := [argument for argument in others if os.path.exists(argument)]:
        raise click.UsageError(
            f"{click.format_filename(several[0])} is a file, and a text is wanted there; with more than one picture "
            "give the texts by -t or --labels"
        )
    return images, others
