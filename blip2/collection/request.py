"""The request of a command on a collection, checked and opened before any model is loaded."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

from blip2.collection.journal import UNFINISHED, Journal, beside
from blip2.collection.record import SKIPPED, Record
from blip2.collection.run import Job, Sink
from blip2.collection.sinks import Outputs, View, open_beside, open_sinks
from blip2.collection.sources import open_source
from blip2.collection.wording import Wording
from blip2.disk import digest_of
from blip2.errors import CollectionError, OptionError, option, setting

DONE, FAILED_BEFORE, TO_DO, PROBLEM = "done", "failed before", "to do", "cannot be read"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run continues. ``limit``: number of images processed by the model to end after. ``shard``: (I, N) for part
    I of N, from 1; None for everything. ``retry_failed``, ``restart``: process failed images, or all images, again.

    ``dedupe``: the model only processes the first of several files with equal content; the others get its captions,
    each worded for its own path. This works within a unit (a shard, or 256 files or rows), so outputs do not depend on
    the order of units, nor memory on the number of images. Images that only look alike are all processed."""

    limit: int | None = None
    shard: tuple[int, int] | None = None
    retry_failed: bool = False
    restart: bool = False
    dedupe: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise OptionError(f"{option('limit')} is {self.limit}; give 1 or more, or leave it out")
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            number, total = self.shard
            raise OptionError(f"{option('shard')} is {number}/{total}; the first part is 1/{max(total, 1)}")


READING = tuple(signature(open_source).parameters)[1:]
"""The keywords of `open_source`."""
RUN_OPTIONS, OUTPUTS, WORDING = (
    tuple(each.name for each in fields(kind) if each.init) for kind in (RunOptions, Outputs, Wording)
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """``places``: the arguments of `open_source`, with ``reading`` as its keywords. ``identity``: other options that
    distinguish this command, by name. ``view``: a view of the source, such as each image with each of several
    questions. ``takes_text``: see `View`."""

    places: Sequence[str]
    reading: Mapping[str, Any] = field(default_factory=dict)
    outputs: Outputs
    wording: Wording = field(default_factory=Wording)
    run_options: RunOptions = field(default_factory=RunOptions)
    identity: Mapping[str, Any] = field(default_factory=dict)
    view: Callable[[View], View] = lambda view: view
    takes_text: bool = True

    def __post_init__(self) -> None:
        outputs = self.outputs
        if not (outputs.output or outputs.sidecar or outputs.xmp or outputs.embed):
            raise OptionError(
                f"there is no output; give {option('output')}, {option('sidecar')}, {option('xmp')} or "
                f"{option('embed')}"
            )

    @classmethod
    def of(cls, places: Sequence[str], options: dict[str, Any], **others: Any) -> Request:
        """Take the options of all parts out of the options of a command."""
        taken = {
            names: {name: options.pop(name) for name in names if name in options}
            for names in (READING, OUTPUTS, WORDING, RUN_OPTIONS)
        }
        wording = Wording(**taken[WORDING])
        outputs = Outputs(**{"replaces": wording.if_exists == "overwrite", **taken[OUTPUTS]})
        run = RunOptions(**taken[RUN_OPTIONS])
        return cls(places=places, reading=taken[READING], outputs=outputs, wording=wording, run_options=run, **others)


@dataclass(frozen=True)
class Plan:
    """A request with an open source and checked outputs. ``problems``: of folders. ``skipped_files``: files in them
    that are not images. ``is_made``: the output exists, as an earlier run wrote it."""

    request: Request
    source: View
    sinks: Sequence[Sink]
    journal: Journal
    is_made: bool = False

    @property
    def problems(self) -> Sequence[str]:
        return getattr(self.source, "problems", ())

    @property
    def skipped_files(self) -> str:
        outputs = self.request.outputs
        own = {f".{outputs.sidecar.lstrip('.').lower()}", *((".xmp", ".xmp_original") if outputs.xmp else ())}
        return self.source.skipped_files(own) if hasattr(self.source, "skipped_files") else ""

    @property
    def asked(self) -> dict[str, Any]:
        """Everything that changes results or outputs, for `Journal.begin`."""
        outputs = asdict(self.request.outputs)
        for name in ("output", "replaces", "constants", "image_column", "caption_column"):
            outputs.pop(name)  # an output may be moved, with its journal
        wording = asdict(self.request.wording)
        wording.pop("pieces")
        seen = {"dedupe": True} if self.request.run_options.dedupe else {}
        return {**self.request.identity, **wording, **self.source.description(), **outputs, **seen}

    @contextmanager
    def begun(self) -> Iterator[Job]:
        """A job whose lock is held. Raises CollectionError."""
        run_options = self.request.run_options
        number, total = run_options.shard or (1, 1)
        if run_options.restart and total > 1:
            raise OptionError(
                f"{option('restart')} in one of several parts would delete the results of the others; remove "
                f"{self.journal.folder} before the first part starts"
            )
        shard = (number - 1, total)
        with self.journal.held(shard):
            self.journal.begin(self.asked, restart=run_options.restart, is_made=self.is_made)
            yield Job(
                self.source, self.sinks, self.journal, self.request.wording, self.asked,
                skips=self.request.wording.if_exists == "skip", retries=run_options.retry_failed, shard=shard,
                limit=run_options.limit, output=self.request.outputs.output,
                dedupes=run_options.dedupe,
            )  # fmt: skip

    def listed(self) -> Iterator[tuple[Record, str]]:
        """Each image of this part with what a run would do. Writes nothing."""
        run_options = self.request.run_options
        if not run_options.restart:
            self.journal.compare(self.asked)
        number, total = run_options.shard or (1, 1)
        skips = self.request.wording.if_exists == "skip"
        for unit in self.source.units:
            if (unit.number + 1 - number) % total:
                continue
            known = {} if run_options.restart else {
                (result.key, result.stamp): result.status for result in self.journal.so_far(unit)
            }  # fmt: skip
            for record in self.source.records(unit):
                if (status := known.get((record.key, record.stamp))) is not None:
                    was = FAILED_BEFORE if status == "failed" else DONE
                    yield record, TO_DO if was == FAILED_BEFORE and run_options.retry_failed else was
                elif record.problem:
                    yield record, PROBLEM
                else:
                    yield record, SKIPPED if skips and record.is_described else TO_DO


def planned(request: Request) -> Plan:
    """Raises OptionError and CollectionError for everything that can be checked without a model."""
    by_image = open_beside(request.outputs)
    made = _made(request.outputs.output, is_kept=request.run_options.restart)
    opened = open_source(request.places, **request.reading, without=made)
    view = View(opened, by_image, takes_text=request.takes_text, only_per_image=not request.outputs.output)
    source = request.view(view)
    _check_apart(request.outputs.output, source)
    folder = _journal_of(request.outputs, source)
    outputs = request.outputs
    if request.run_options.restart and Journal(folder).written:
        outputs = replace(outputs, replaces=True)
    return Plan(request, source, open_sinks(outputs, source, by_image), Journal(folder), bool(made))


def _made(output: str, *, is_kept: bool) -> list[str]:
    """The output itself, if it is an unchanged file of an earlier run. Raises CollectionError if it has changed, unless
    its content is kept."""
    if not output or not os.path.isfile(output) or not (before := Journal(beside(output)).written):
        return []
    if before in (UNFINISHED, digest_of(output)):
        return [output]
    if is_kept:
        return []
    raise CollectionError(
        f"{output}: has changed since it was written; rename it to keep it, or {setting('restart', True)} to "
        "replace it (the texts of a metadata.jsonl in the folder of the images are kept)"
    )


def _check_apart(output: str, source: View) -> None:
    """Check that a source of rows or shards is not overwritten while it is read. Raises CollectionError."""
    if os.path.isfile(output) and source.description().get("source") in ("rows", "shards"):
        for place in dict.fromkeys(unit.place for unit in source.units):
            if os.path.samefile(place, output):
                raise CollectionError(f"{output}: is the source itself; give another output")


def _journal_of(outputs: Outputs, source: View) -> Path:
    """The journal beside the output. For files beside images, it is hidden in the common folder of all images."""
    if outputs.output:
        return beside(outputs.output)
    kinds = [outputs.sidecar.lstrip("."), "xmp" if outputs.xmp else "", "embed" if outputs.embed else ""]
    name = f".{'-'.join(filter(None, kinds))}.blip2"
    root = getattr(source, "root", "")
    if not root:
        folders = {os.path.dirname(os.path.abspath(path)) for path in source.images or ()}
        try:
            root = os.path.commonpath(folders)
        except ValueError:
            root = ""
        if not root or not os.access(root, os.W_OK):
            raise CollectionError(
                f"{root or 'these images'}: there is no place for the journal of this run; name the images' common "
                f"folder, or give {option('output')} to put it beside"
            )
    return Path(root) / name


def shard_of(text: str) -> tuple[int, int]:
    """ "3/16" -> (3, 16). Raises OptionError."""
    if (found := re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())) is None:
        raise OptionError(f"{option('shard')} is {text!r}; give I/N, such as 3/16")
    return int(found[1]), int(found[2])


def shard_of_array(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """The shard from SLURM's variables for a task of an array; None without them."""
    try:
        task, first, count = (int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "COUNT"))
        last, step = int(environment.get("SLURM_ARRAY_TASK_MAX", first + count - 1)), 0
    except (KeyError, ValueError):
        return None
    step = (last - first) // (count - 1) if count > 1 else 1
    number, rest = divmod(task - first, max(step, 1))
    if rest or not 0 <= number < count:
        raise OptionError(
            f"the array has {count} tasks from {first} to {last}, without an equal step; give {option('shard')}"
        )
    return (number + 1, count) if count > 1 else None


def check_names(options: Iterable[str], known: Sequence[str], elsewhere: Sequence[str] = ()) -> None:
    """Raises OptionError for an unknown option name, with the nearest known name, here or ``elsewhere``."""
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *elsewhere], n=1)
            raise OptionError(f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else " here"))
