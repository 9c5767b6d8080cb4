"""``blip2 search``: find the images of an index that are nearest to a text or an image."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blip2.cli import Failure, of_image
from blip2.cli.images import NULL, READING, changes, echo, of_reading, shown
from blip2.cli.options import INDEX_MODEL, load_matcher, of_model, with_options
from blip2.cli.page import Shown, page
from blip2.disk import write_text

if TYPE_CHECKING:
    from blip2.api import Matcher
    from blip2.index import Index


@click.command("search")
@click.argument("index")
@click.argument("text", required=False)
@click.option("-k", type=int, help="Number of results.  [default: 10]")
@click.option("--rerank", type=int, default=0, metavar="N", help="Rerank the N best results with ITM, which opens the "
              "images: slower, more accurate. The paper uses 128.")  # fmt: skip
@click.option("--image", metavar="IMAGE", help="Find images similar to this one, instead of TEXT.")
@click.option("--duplicates", "threshold", type=float, is_flag=False, flag_value=0.95, metavar="[SIMILARITY]",
              help="List near-duplicates in the index, from this similarity (0.95) upwards.")  # fmt: skip
@click.option("--html", "html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page with thumbnails, "
              "as a single file.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
@with_options(NULL, READING, INDEX_MODEL)
@click.pass_context
def command(
    context: click.Context,
    /,
    index: str,
    text: str | None,
    k: int | None,
    rerank: int,
    image: str | None,
    threshold: float | None,
    html: Path | None,
    as_json: bool,
    is_null: bool,
    **others: Any,
) -> None:
    """Search an index of images by text or by image.

    INDEX is a file made by blip2 index. Prints one line per result, best first: the score, a tab, the image. The score
    is the cosine similarity (-1 to 1) of text and image; with --rerank it is the cosine plus the ITM logit, and images
    that can no longer be opened come last, with exit code 1. With --image it is the similarity of two images, 1 for
    identical ones. The search is exact. --duplicates prints groups of near-duplicates: similarity, group number, image.

    \b
    blip2 search photos.index "two cats on a sofa" -k 20
    blip2 search photos.index "two cats on a sofa" --rerank 128 --html cats.html
    blip2 search photos.index --image query.jpg
    blip2 search photos.index --duplicates 0.98 --json
    """
    if (text is not None) + (image is not None) + (threshold is not None) != 1:
        raise click.UsageError("give a TEXT, or --image, or --duplicates")
    if rerank and text is None:
        raise click.UsageError("--rerank compares images with a text; give a TEXT")
    if k is not None and threshold is not None:
        raise click.UsageError("--duplicates finds all duplicates; leave out -k")
    problems: list[str] = []

    def tell(message: str) -> None:
        if message not in problems:  # one image may fail twice: for its score and for the page
            problems.append(message)
            click.echo(f"blip2: {of_image(message)}", err=True)

    model = of_model(others) | of_reading(others)
    groups: list[list[Shown]]
    if threshold is not None:
        title, groups = "near-duplicates", _duplicates(index, threshold, tell)
    elif text is not None:
        title, groups = text, [_by_text(index, model, text, 10 if k is None else k, rerank, tell)]
    else:
        title, groups = f"similar to {image}", [_by_image(index, model, str(image), 10 if k is None else k, tell)]
    if html is not None:
        _write(html, page(title, groups, tell))
    for each in (each for group in groups for each in group):
        if as_json:
            click.echo(json.dumps({"path": each.path, **each.values}))
        else:
            echo([*each.columns, shown(each.path, is_null)], is_null)
    context.exit(1 if problems else 0)


def _by_text(
    path: str, model: dict[str, Any], text: str, k: int, rerank: int, tell: Callable[[str], None]
) -> list[Shown]:
    from blip2.index import Index
    from blip2.index.index import check_search, check_text

    # Check the options before a model is loaded.
    check_search(k, rerank)
    check_text(text)
    index = Index.open(path)
    hits = index.search(_matcher(index, model), text, k, rerank=rerank, on_problem=tell)
    for line in changes(index, [hit.row for hit in hits]):
        tell(line)
    return [
        Shown(hit.path, {"score": hit.score} | ({"cosine": hit.cosine, "reranked": hit.is_reranked} if rerank else {}))
        for hit in hits
    ]


def _by_image(path: str, model: dict[str, Any], image: str, k: int, tell: Callable[[str], None]) -> list[Shown]:
    from blip2.index import Index
    from blip2.index.index import check_search

    check_search(k, 0)
    index = Index.open(path)
    hits = index.search_picture(_matcher(index, model), image, k)
    for line in changes(index, [hit.row for hit in hits]):
        tell(line)
    return [Shown(hit.path, {"score": hit.score}) for hit in hits]


def _duplicates(path: str, threshold: float, tell: Callable[[str], None]) -> list[list[Shown]]:
    from blip2.index import Index

    index = Index.open(path)
    groups = index.near_duplicates(threshold)
    found = {path for group in groups for path in group.paths}
    for line in changes(index, [row for row, path in enumerate(index.paths) if path in found]):
        tell(line)
    return [
        [Shown(path, {"score": group.similarity, "group": number}) for path in group.paths]
        for number, group in enumerate(groups, start=1)
    ]


def _matcher(index: Index, model: dict[str, Any]) -> Matcher:
    """The model that made the index, unless another one is named."""
    index.check_kind("search")
    return load_matcher(**(model | {"model": model["model"] or index.model_name}))


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise Failure(f"{path}: cannot be written ({error.strerror}); check the folder and the disk space") from None
