"""Commands on whole collections: their options, and a run from its checks to its summary."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blip2.cli import Failure, of_image
from blip2.cli.images import echo, names_in, shown
from blip2.cli.options import given, lines_in, of_loading
from blip2.cli.progress import Progress

if TYPE_CHECKING:
    from blip2.api.collect import CollectionRun

OUTPUTS = (
    click.option("-o", "--output", metavar="FILE|FOLDER", help="Write results to this file (.jsonl .json .csv .tsv "
                 ".parquet), or to a folder with one file per shard. The same command resumes an interrupted run."),
    click.option("--format", metavar="NAME", help="Output format: imagefolder, jsonl, train, sd-scripts, musubi, "
                 "invoke, csv, open-clip, kohya, coco, coco-dataset, parquet, webdataset.  [default: from the name]"),
    click.option("--sidecar", "--caption-extension", metavar=".txt", help="Write a text file next to each image."),
    click.option("--sidecar-name", type=click.Choice(["stem", "full"]), help="Name of the text file: a.txt or "
                 "a.jpg.txt.  [default: stem]"),
    click.option("--xmp", is_flag=True, help="Write an XMP sidecar next to each image, for photo managers."),
    click.option("--xmp-name", type=click.Choice(["full", "stem"]), help="Name of the XMP file: a.jpg.xmp or a.xmp.  "
                 "[default: full]"),
    click.option("--xmp-shared", is_flag=True, help="One a.xmp for the raw file and the JPEG of the same photograph."),
    click.option("--embed", is_flag=True, help="Write into the metadata of the images themselves (needs exiftool)."),
    click.option("--with-images/--no-images", default=None, help="Whether to copy the images into parquet files and "
                 "shards.  [default: only into shards]"),
    click.option("--caption-field", metavar="NAME", help="Field of the caption in the shards written.  [default: txt]"),
    click.option("--shard-size", type=click.IntRange(1), metavar="N", help="Images per shard, if the source has no "
                 "shards.  [default: 10000]"),
    click.option("--csv-bom", is_flag=True, help="Start the CSV with a UTF-8 byte order mark, for Excel."),
    click.option("--html", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Also write a review "
                 "page with thumbnails, worst scores first."),
)  # fmt: skip
ROWS = (
    click.option("--image-column", metavar="NAME", help="Column of the image in rows.  [default: detected]"),
    click.option("--images", metavar="FOLDER", help="Base folder of relative paths in rows.  [default: the file's "
                 "folder]"),
    click.option("--split", metavar="NAME", help="Split of a Karpathy JSON file: train, val, test, restval."),
)  # fmt: skip
SOURCES = (
    *ROWS,
    click.option("--caption-column", metavar="NAME", help="Column of existing captions in rows.  [default: detected]"),
    click.option("--key-column", metavar="NAME", help="Column that identifies a row; 'row' uses row numbers."),
    click.option("--caption-suffix", metavar=".txt", help="Suffix of text files next to the images that hold existing "
                 "captions."),
)  # fmt: skip
WORDS = (
    click.option("--if-exists", type=click.Choice(["skip", "overwrite", "append", "prepend"]), help="What to do with "
                 "images that already have a caption.  [default: skip]"),
    click.option("--prefix", metavar="TEXT", help="Text before each caption, unchanged."),
    click.option("--suffix", metavar="TEXT", help="Text after each caption, unchanged."),
    click.option("--template", metavar="TEXT", help="Pattern of the caption: {caption} {name} {folder} {concept} "
                 "{old}."),
    click.option("--replace", multiple=True, metavar="OLD=NEW", help="Replace text in captions. Repeatable."),
    click.option("--remove", multiple=True, metavar="REGEX", help="Remove matches from captions. Repeatable."),
    click.option("--forbid-words", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Words never "
                 "to generate, one per line."),
    click.option("--dedupe-words", is_flag=True, help='Cut repetitions at the end: "a dog a dog a dog".'),
    click.option("--max-chars", type=int, metavar="N", help="Shorten captions to N characters, at a word boundary."),
)  # fmt: skip
RUN_OPTIONS = (
    click.option("--dry-run", is_flag=True, help="List what would be done; load no model, write nothing."),
    click.option("--limit", type=int, metavar="N", help="Stop after N images; the same command continues."),
    click.option("--shard", metavar="I/N", help="Process only part I of N, counted from 1.  [default: the task of a "
                 "SLURM array]"),
    click.option("--retry-failed", is_flag=True, help="Retry the images that failed in earlier runs."),
    click.option("--restart", is_flag=True, help="Ignore earlier runs and start again."),
    click.option("--dedupe", is_flag=True, help="Process identical files once (within 256 files or a shard) and copy "
                 "the result."),
    click.option("--log-json", is_flag=True, help="Write progress and summary as JSON lines to standard error."),
)  # fmt: skip
MACHINES = (
    click.option("--devices", metavar="0,1", help="Use several GPUs of this machine; cpu,cpu starts two CPU workers."),
    click.option("--engine", type=click.Choice(["ray"]), help="Use several machines or processes through Ray; all of "
                 "them must see the input and output folders."),
    click.option("--replicas", type=int, metavar="N", help="With --engine ray: number of workers.  [default: 1]"),
    click.option("--address", metavar="HOST:PORT", help="With --engine ray: address of a Ray cluster, or auto.  "
                 "[default: start Ray on this machine]"),
)  # fmt: skip
COLLECTION = (*OUTPUTS, *SOURCES, *WORDS, *RUN_OPTIONS, *MACHINES)
COLLECTION_WITHOUT_WORDS = (*OUTPUTS, *SOURCES, *RUN_OPTIONS, *MACHINES)


def names_of(options: Sequence[Any]) -> list[str]:
    """The parameter names of options."""

    @click.command()
    def command() -> None: ...

    for option in options:
        command = option(command)
    return [str(parameter.name) for parameter in command.params]


class Collection:
    """The options of `COLLECTION` that were given, taken out of all options of a subcommand."""

    def __init__(self, options: dict[str, Any], groups: Sequence[Any] = COLLECTION) -> None:
        found = {name: options.pop(name) for name in names_of(groups)}
        self.given = given(found)
        if found.get("with_images") is False:
            self.given["with_images"] = False

    @property
    def is_asked(self) -> bool:
        """Whether results go into files. UsageError for collection options without an output."""
        if any(name in self.given for name in ("output", "sidecar", "xmp", "embed")):
            return True
        if self.given:
            name = next(iter(self.given))
            flag = max(next(p.opts for p in click.get_current_context().command.params if p.name == name), key=len)
            raise click.UsageError(f"{flag} needs results in files; add -o FILE, --sidecar .txt, --xmp or --embed")
        return False

    def run(
        self, begin: Callable[..., CollectionRun], arguments: Sequence[str], model: Mapping[str, Any],
        others: dict[str, Any], **asked: Any,
    ) -> int:  # fmt: skip
        """Carry out the run and return the exit code. ``begin`` makes the run from the images, an output and options.
        ``others``: the options of `IMAGE_OPTIONS` are taken out, the rest goes to ``begin``."""
        if asked.pop("as_json", False):
            raise click.UsageError("--json is for standard output; name the output *.jsonl, or give --format")
        places, is_null = _places(arguments, others)
        options = {**self._options(), **of_loading(dict(model)), **others, **asked}
        run_options = {name: options.pop(name, None) for name in ("html", "dry_run", "log_json")}
        started = begin(places, output=options.pop("output", None), **options)
        progress = Progress(started, is_json=bool(run_options["log_json"]))
        if run_options["dry_run"]:
            return _list(started, progress, is_null)
        try:
            with progress:
                summary = started.run(progress.update, html=run_options["html"])
        except KeyboardInterrupt:
            same = "the same command without --restart" if "restart" in self.given else "the same command"
            raise Failure(f"stopped; finished results are kept, and {same} resumes", 130) from None
        return progress.end(summary, run_options["html"])

    def _options(self) -> dict[str, Any]:
        from blip2.collection.request import shard_of, shard_of_array

        found = dict(self.given)
        if "replace" in found:
            found["replace"] = [_pair(text) for text in found["replace"]]
        if "forbid_words" in found:
            found["forbid_words"] = lines_in(found["forbid_words"], "word")
        if "shard" in found:
            found["shard"] = shard_of(found["shard"])
        elif (shard := shard_of_array(os.environ)) is not None:
            found["shard"] = shard
            click.echo(f"blip2: part {shard[0]} of {shard[1]}, from the SLURM array; --shard 1/1 takes all", err=True)
        return found


def _places(arguments: Sequence[str], others: dict[str, Any]) -> tuple[list[str], bool]:
    files_from, is_null = others.pop("files_from"), others.pop("is_null")
    places = [*arguments, *(names_in(files_from, is_null) if files_from is not None else [])]
    if not places:
        raise click.UsageError("Missing argument 'IMAGES...'.")
    for place in places[:16]:  # an index cannot be a source; images and tables are recognised by their content
        if place.endswith(".index") and os.path.isfile(place):
            raise click.UsageError(f"{click.format_filename(place)} is an index of images; name the images")
    return places, is_null


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals:
        raise click.UsageError(f"--replace {text}: give OLD=NEW")
    return old, new


def _list(started: CollectionRun, progress: Progress, is_null: bool) -> int:
    """Print what would be done with each image, and the count of each kind."""
    counts: dict[str, int] = {}
    for record, what in started.plan.listed():
        counts[what] = counts.get(what, 0) + 1
        echo([what, shown(record.key, is_null)], is_null)
        if record.problem:
            progress.problem(of_image(record.problem))
    sys.stdout.flush()
    line = ", ".join(f"{number:,} {what}" for what, number in counts.items()) or "no images"
    progress.tell(f"{line}; nothing was written")
    return progress.exit_code
