"""What a command asks of a collection, checked and opened before any model is loaded."""

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
class Going:
    """How a run goes on. ``limit``: it ends after so many images that the model has seen. ``shard``: which of how
    many parts, from 1; None if it does all. ``retry_failed``, ``restart``: what failed, or all, is done anew.

    ``dedupe``: of files of equal content the first is seen, and the others are given its captions, each worded for its
    place. That holds within a unit, which is a shard, or a run of 256 files or rows: what is written depends on no
    order in which units are done, and memory on no number of images. Images that only look alike are all seen."""

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
GOING, OUTPUTS, WORDING = (tuple(each.name for each in fields(kind) if each.init) for kind in (Going, Outputs, Wording))


@dataclass(frozen=True, kw_only=True)
class Request:
    """``places``: what `open_source` is given, with ``reading`` as its keywords. ``told``: what else distinguishes this
    command from another, by the names of options. ``view``: another way to see the source, such as each image with
    each of several questions. ``takes_text``: see `View`."""

    places: Sequence[str]
    reading: Mapping[str, Any] = field(default_factory=dict)
    outputs: Outputs
    wording: Wording = field(default_factory=Wording)
    going: Going = field(default_factory=Going)
    told: Mapping[str, Any] = field(default_factory=dict)
    view: Callable[[View], View] = lambda view: view
    takes_text: bool = True

    def __post_init__(self) -> None:
        outputs = self.outputs
        if not (outputs.output or outputs.sidecar or outputs.xmp or outputs.embed):
            raise OptionError(
                f"nothing says where results go; give {option('output')}, {option('sidecar')}, {option('xmp')} or "
                f"{option('embed')}"
            )

    @classmethod
    def of(cls, places: Sequence[str], options: dict[str, Any], **others: Any) -> Request:
        """Take the options of all its parts out of all those of a command."""
        taken = {
            names: {name: options.pop(name) for name in names if name in options}
            for names in (READING, OUTPUTS, WORDING, GOING)
        }
        wording = Wording(**taken[WORDING])
        outputs = Outputs(**{"replaces": wording.if_exists == "overwrite", **taken[OUTPUTS]})
        going = Going(**taken[GOING])
        return cls(places=places, reading=taken[READING], outputs=outputs, wording=wording, going=going, **others)


@dataclass(frozen=True)
class Plan:
    """A request whose source is open, and whose outputs can be written. ``problems``: what is wrong with folders;
    ``passed_over``: what in them is no image. ``is_made``: the output is there, as an earlier run wrote it."""

    request: Request
    source: View
    sinks: Sequence[Sink]
    journal: Journal
    is_made: bool = False

    @property
    def problems(self) -> Sequence[str]:
        return getattr(self.source, "problems", ())

    @property
    def passed_over(self) -> str:
        outputs = self.request.outputs
        own = {f".{outputs.sidecar.lstrip('.').lower()}", *((".xmp", ".xmp_original") if outputs.xmp else ())}
        return self.source.passed_over(own) if hasattr(self.source, "passed_over") else ""

    @property
    def asked(self) -> dict[str, Any]:
        """For `Journal.begin`: all that changes results or outputs, and nothing else."""
        outputs = asdict(self.request.outputs)
        for name in ("output", "replaces", "constants", "image_column", "caption_column"):
            outputs.pop(name)  # an output may be moved, with its journal
        wording = asdict(self.request.wording)
        wording.pop("pieces")
        seen = {"dedupe": True} if self.request.going.dedupe else {}
        return {**self.request.told, **wording, **self.source.told(), **outputs, **seen}

    @contextmanager
    def begun(self) -> Iterator[Job]:
        """A job whose lock is held. Raises CollectionError."""
        going = self.request.going
        number, total = going.shard or (1, 1)
        if going.restart and total > 1:
            raise OptionError(
                f"{option('restart')} by one of several parts would undo what the others do; remove "
                f"{self.journal.folder} before the first of them begins"
            )
        shard = (number - 1, total)
        with self.journal.held(shard):
            self.journal.begin(self.asked, restart=going.restart, is_made=self.is_made)
            yield Job(
                self.source, self.sinks, self.journal, self.request.wording, self.asked,
                skips=self.request.wording.if_exists == "skip", retries=going.retry_failed, shard=shard,
                limit=going.limit, output=self.request.outputs.output,
                dedupes=going.dedupe,
            )  # fmt: skip

    def listed(self) -> Iterator[tuple[Record, str]]:
        """Each image of this part with what a run would do with it. Nothing is written."""
        going = self.request.going
        if not going.restart:
            self.journal.compare(self.asked)
        number, total = going.shard or (1, 1)
        skips = self.request.wording.if_exists == "skip"
        for unit in self.source.units:
            if (unit.number + 1 - number) % total:
                continue
            known = {} if going.restart else {
                (result.key, result.stamp): result.status for result in self.journal.so_far(unit)
            }  # fmt: skip
            for record in self.source.records(unit):
                if (status := known.get((record.key, record.stamp))) is not None:
                    was = FAILED_BEFORE if status == "failed" else DONE
                    yield record, TO_DO if was == FAILED_BEFORE and going.retry_failed else was
                elif record.problem:
                    yield record, PROBLEM
                else:
                    yield record, SKIPPED if skips and record.is_described else TO_DO


def planned(request: Request) -> Plan:
    """Raises OptionError and CollectionError for all that can be known to be wrong before a model is there."""
    by_picture = open_beside(request.outputs)
    made = _made(request.outputs.output, is_kept=request.going.restart)
    opened = open_source(request.places, **request.reading, without=made)
    view = View(opened, by_picture, takes_text=request.takes_text, is_beside_alone=not request.outputs.output)
    source = request.view(view)
    _check_apart(request.outputs.output, source)
    folder = _journal_of(request.outputs, source)
    outputs = request.outputs
    if request.going.restart and Journal(folder).written:
        outputs = replace(outputs, replaces=True)
    return Plan(request, source, open_sinks(outputs, source, by_picture), Journal(folder), bool(made))


def _made(output: str, *, is_kept: bool) -> list[str]:
    """The output itself, if it is a file as an earlier run wrote it. Raises CollectionError if it was changed since,
    unless what it says is kept."""
    if not output or not os.path.isfile(output) or not (before := Journal(beside(output)).written):
        return []
    if before in (UNFINISHED, digest_of(output)):
        return [output]
    if is_kept:
        return []
    raise CollectionError(
        f"{output}: was changed since it was written; keep it under another name, or {setting('restart', True)} to "
        "replace it (of a metadata.jsonl in the folder of the images, what it says is kept then)"
    )


def _check_apart(output: str, source: View) -> None:
    """That a source of rows or shards is not written over while it is read. Raises CollectionError."""
    if os.path.isfile(output) and source.told().get("source") in ("rows", "shards"):
        for place in dict.fromkeys(unit.place for unit in source.units):
            if os.path.samefile(place, output):
                raise CollectionError(f"{output}: is the source itself; give another output")


def _journal_of(outputs: Outputs, source: View) -> Path:
    """Beside the output; that of files beside images is hidden in the folder of all images."""
    if outputs.output:
        return beside(outputs.output)
    kinds = [outputs.sidecar.lstrip("."), "xmp" if outputs.xmp else "", "embed" if outputs.embed else ""]
    name = f".{'-'.join(filter(None, kinds))}.blip2"
    root = getattr(source, "root", "")
    if not root:
        folders = {os.path.dirname(os.path.abspath(path)) for path in source.pictures or ()}
        try:
            root = os.path.commonpath(folders)
        except ValueError:
            root = ""
        if not root or not os.access(root, os.W_OK):
            raise CollectionError(
                f"{root or 'these pictures'}: there is no place for the journal of this run; name the images' common "
                f"folder, or give {option('output')}, beside which it lies then"
            )
    return Path(root) / name


def shard_of(text: str) -> tuple[int, int]:
    """ "3/16" -> (3, 16). Raises OptionError."""
    if (found := re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())) is None:
        raise OptionError(f"{option('shard')} is {text!r}; give a number and how many there are, such as 3/16")
    return int(found[1]), int(found[2])


def shard_of_array(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """By the variables that SLURM sets for a task of an array; None if there are none."""
    try:
        task, first, count = (int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "COUNT"))
        last, step = int(environment.get("SLURM_ARRAY_TASK_MAX", first + count - 1)), 0
    except (KeyError, ValueError):
        return None
    step = (last - first) // (count - 1) if count > 1 else 1
    number, rest = divmod(task - first, max(step, 1))
    if rest or not 0 <= number < count:
        raise OptionError(
            f"the array's tasks {first} to {last} are {count}, and not at equal steps; give {option('shard')}"
        )
    return (number + 1, count) if count > 1 else None


def check_names(options: Iterable[str], known: Sequence[str], elsewhere: Sequence[str] = ()) -> None:
    """Raises OptionError for a name that is no option, with the nearest that is one, here or ``elsewhere``."""
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *elsewhere], n=1)
            raise OptionError(f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else " here"))
