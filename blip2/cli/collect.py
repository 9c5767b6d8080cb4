"""What the verbs do with whole collections: their options, and a run from its checks to its summary."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blip2.cli import Failure, of_picture
from blip2.cli.options import given, lines_in, of_loading
from blip2.cli.pictures import echo, names_in, shown
from blip2.cli.progress import Progress

if TYPE_CHECKING:
    from blip2.api.collect import CollectionRun

OUTPUTS = (
    click.option("-o", "--output", metavar="FILE|FOLDER", help="Write results here, and go on where an earlier run was "
                 "stopped: *.jsonl *.json *.csv *.tsv *.parquet, or a folder for a file a shard."),
    click.option("--format", metavar="NAME", help="Of the output: imagefolder, jsonl, train, sd-scripts, musubi, "
                 "invoke, csv, open-clip, kohya, coco, coco-dataset, parquet, webdataset.  [default: by its name]"),
    click.option("--sidecar", "--caption-extension", metavar=".txt", help="Write a text file beside each picture."),
    click.option("--sidecar-name", type=click.Choice(["stem", "full"]), help="a.txt or a.jpg.txt.  [default: stem]"),
    click.option("--xmp", is_flag=True, help="Write an XMP sidecar beside each picture, for photo managers."),
    click.option("--xmp-name", type=click.Choice(["full", "stem"]), help="a.jpg.xmp or a.xmp.  [default: full]"),
    click.option("--xmp-shared", is_flag=True, help="Raw and JPEG of one photograph share a.xmp."),
    click.option("--embed", is_flag=True, help="Write into the pictures' own metadata, by exiftool."),
    click.option("--with-images/--no-images", default=None, help="Whether parquet and shards hold the pictures, too.  "
                 "[default: shards do]"),
    click.option("--caption-field", metavar="NAME", help="Of samples in shards that are written.  [default: txt]"),
    click.option("--shard-size", type=click.IntRange(1), metavar="N", help="Pictures in a shard, where the source has "
                 "none.  [default: 10000]"),
    click.option("--csv-bom", is_flag=True, help="Mark a CSV as UTF-8, for Excel."),
    click.option("--html", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write a page to look "
                 "results over, too, the worst scores first."),
)  # fmt: skip
ROWS = (
    click.option("--image-column", metavar="NAME", help="Of rows: where the picture is.  [default: by looking]"),
    click.option("--images", metavar="FOLDER", help="Where paths in rows begin.  [default: the file's folder]"),
    click.option("--split", metavar="NAME", help="Of Karpathy's JSON: train, val, test, restval."),
)
SOURCES = (
    *ROWS,
    click.option("--caption-column", metavar="NAME", help="Of rows: what was said before.  [default: by looking]"),
    click.option("--key-column", metavar="NAME", help="Of rows: what they are known by; row numbers them."),
    click.option("--caption-suffix", metavar=".txt", help="Files beside pictures that hold what was said before."),
)  # fmt: skip
WORDS = (
    click.option("--if-exists", type=click.Choice(["skip", "overwrite", "append", "prepend"]), help="What becomes of "
                 "pictures that have a text.  [default: skip]"),
    click.option("--prefix", metavar="TEXT", help="Before each caption, as it is."),
    click.option("--suffix", metavar="TEXT", help="After each caption, as it is."),
    click.option("--template", metavar="TEXT", help="Around each caption: {caption} {name} {folder} {concept} {old}."),
    click.option("--replace", multiple=True, metavar="OLD=NEW", help="Replace in captions; several times."),
    click.option("--remove", multiple=True, metavar="REGEX", help="Remove from captions; several times."),
    click.option("--forbid-words", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Words that "
                 "no caption has, one a line."),
    click.option("--dedupe-words", is_flag=True, help='Cut repeats at the end: "a dog a dog a dog".'),
    click.option("--max-chars", type=int, metavar="N", help="Cut captions at a word."),
)  # fmt: skip
GOING = (
    click.option("--dry-run", is_flag=True, help="List what would be done; load no model, write nothing."),
    click.option("--limit", type=int, metavar="N", help="Stop after N pictures; the same command goes on."),
    click.option("--shard", metavar="I/N", help="Do the I-th of N parts, from 1.  [default: the task of a SLURM "
                 "array]"),
    click.option("--retry-failed", is_flag=True, help="Do once more what failed before."),
    click.option("--restart", is_flag=True, help="Forget earlier runs."),
    click.option("--dedupe", is_flag=True, help="Of equal files see the first alone, in a run of 256 files or a shard; "
                 "the others are given its result."),
    click.option("--log-json", is_flag=True, help="Progress and summary as JSON lines on standard error."),
)  # fmt: skip
MACHINES = (
    click.option("--devices", metavar="0,1", help="Work on these GPUs of this machine at once; cpu,cpu is two workers "
                 "without any."),
    click.option("--engine", type=click.Choice(["ray"]), help="Work on several machines, or in several processes of "
                 "this one, by Ray; pictures and outputs lie where all see them."),
    click.option("--replicas", type=int, metavar="N", help="With --engine ray: how many.  [default: 1]"),
    click.option("--address", metavar="HOST:PORT", help="With --engine ray: of a Ray cluster that this machine belongs "
                 "to, or auto.  [default: one is started on this machine]"),
)  # fmt: skip
COLLECTION = (*OUTPUTS, *SOURCES, *WORDS, *GOING, *MACHINES)
UNWORDED = (*OUTPUTS, *SOURCES, *GOING, *MACHINES)


def names_of(options: Sequence[Any]) -> list[str]:
    """The parameters that options make."""

    @click.command()
    def command() -> None: ...

    for option in options:
        command = option(command)
    return [str(parameter.name) for parameter in command.params]


class Collection:
    """The options of `COLLECTION`, taken out of all those of a verb: only those that were given."""

    def __init__(self, options: dict[str, Any], groups: Sequence[Any] = COLLECTION) -> None:
        found = {name: options.pop(name) for name in names_of(groups)}
        self.given = given(found)
        if found.get("with_images") is False:
            self.given["with_images"] = False

    @property
    def is_asked(self) -> bool:
        """Whether results go into files. UsageError for other options without them."""
        if any(name in self.given for name in ("output", "sidecar", "xmp", "embed")):
            return True
        if self.given:
            name = next(iter(self.given))
            flag = max(next(p.opts for p in click.get_current_context().command.params if p.name == name), key=len)
            raise click.UsageError(f"{flag} is for results in files; add -o FILE, --sidecar .txt, --xmp or --embed")
        return False

    def run(
        self, begin: Callable[..., CollectionRun], arguments: Sequence[str], model: Mapping[str, Any],
        others: dict[str, Any], **asked: Any,
    ) -> int:  # fmt: skip
        """The whole of it; the exit code. ``begin``: makes the run of the pictures, an output and options. ``others``:
        those of `PICTURES`, which are taken out, and all else for ``begin``."""
        if asked.pop("as_json", False):
            raise click.UsageError("--json is for standard output; name the output *.jsonl, or give --format")
        places, is_null = _places(arguments, others)
        options = {**self._options(), **of_loading(dict(model)), **others, **asked}
        going = {name: options.pop(name, None) for name in ("html", "dry_run", "log_json")}
        started = begin(places, output=options.pop("output", None), **options)
        progress = Progress(started, is_json=bool(going["log_json"]))
        if going["dry_run"]:
            return _list(started, progress, is_null)
        try:
            with progress:
                summary = started.run(progress.update, html=going["html"])
        except KeyboardInterrupt:
            same = "the same command without --restart" if "restart" in self.given else "the same command"
            raise Failure(f"stopped; what was done is kept, and {same} goes on", 130) from None
        return progress.end(summary, going["html"])

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
            click.echo(f"blip2: part {shard[0]} of {shard[1]}, by SLURM's array; --shard 1/1 does all", err=True)
        return found


def _places(arguments: Sequence[str], others: dict[str, Any]) -> tuple[list[str], bool]:
    files_from, is_null = others.pop("files_from"), others.pop("is_null")
    places = [*arguments, *(names_in(files_from, is_null) if files_from is not None else [])]
    if not places:
        raise click.UsageError("Missing argument 'IMAGES...'.")
    for place in places[:16]:  # an index has no files; pictures and tables are told by their heads
        if place.endswith(".index") and os.path.isfile(place):
            raise click.UsageError(f"{click.format_filename(place)} is an index of pictures; name the pictures")
    return places, is_null


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals:
        raise click.UsageError(f"--replace {text}: give OLD=NEW")
    return old, new


def _list(started: CollectionRun, progress: Progress, is_null: bool) -> int:
    """Each picture with what would become of it, and how many there are of each kind."""
    counts: dict[str, int] = {}
    for record, what in started.plan.listed():
        counts[what] = counts.get(what, 0) + 1
        echo([what, shown(record.key, is_null)], is_null)
        if record.problem:
            progress.problem(of_picture(record.problem))
    sys.stdout.flush()
    told = ", ".join(f"{number:,} {what}" for what, number in counts.items()) or "no pictures"
    progress.tell(f"{told}; nothing was written")
    return progress.exit_code
