"""``blip2 rows``: convert the files of published data sets to training rows."""

from __future__ import annotations

from pathlib import Path

import click

from blip2.cli.options import with_options
from blip2.data.kinds import KINDS


@click.command("rows", epilog="\b\n" + "\n".join(f"{name:10}  {kind.help}" for name, kind in KINDS.items()))
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, metavar="FILE", type=click.Path(path_type=Path),
              help="JSON-lines file to write, for data.rows of a recipe.")  # fmt: skip
@click.option("--images", metavar="DIR", type=click.Path(path_type=Path), help="Folder of the images, found by path, "
              "then by name. Rows whose image is missing are left out.")  # fmt: skip
@click.option("--split", metavar="NAME", help="Split to convert, such as train; or several: train,val.")
@click.option("--by", type=click.Choice(["picture", "text"]), help="One row per image with all its texts, or one "
              "row per text.  [default: picture for captions, text for questions]")  # fmt: skip
@with_options()
def command(
    kind: str, files: tuple[Path, ...], output: Path, images: Path | None, split: str | None, by: str | None
) -> None:
    """Convert published data sets to training rows.

    FILES are the files as published; for VQAv2 and OK-VQA give both, questions and annotations. The number of rows and
    images, and what was left out and why, is printed on standard error; the name of the output on standard output. If
    several people answered a question, all answers are kept with their counts, and training samples them accordingly.

    \b
    blip2 rows karpathy dataset_coco.json --split train --images coco/ -o coco.jsonl
    blip2 rows vqav2 v2_OpenEnded_mscoco_train2014_questions.json \\
        v2_mscoco_train2014_annotations.json --images coco/ -o vqa.jsonl
    """
    import json

    from blip2 import disk
    from blip2.data.convert import Conversion
    from blip2.errors import RecipeError

    conversion = Conversion(
        KINDS[kind], files, images=images, base=output.absolute().parent, split=split, by=by
    )
    try:
        with disk.written(output) as unfinished, unfinished.open("w", encoding="utf-8") as file:
            for row in conversion.rows():
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise RecipeError(f"{output}: cannot be written ({error.strerror or error}); name another file") from None
    counts = conversion.counts
    texts = ", ".join(f"{count:,} {name}" for name, count in counts.texts.items() if count)
    click.echo(f"{counts.rows:,} rows about {counts.images:,} images: {texts}", err=True)
    for reason, (count, first) in counts.left_out.items():
        click.echo(f"left out: {count:,}, {reason}; the first: {first}", err=True)
    click.echo(output)
