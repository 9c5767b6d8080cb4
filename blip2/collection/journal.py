"""The journal: results so far, in a hidden folder beside the output, so that the same command resumes.

    run.json            the request: model, options, source, output
    units/000012.jsonl  a finished unit: its stamp, then one result per line, in the order of its records
    units/000012.part   a unit in progress: the results so far; a torn last line is dropped
    lock                held by the running command (lock-3-of-16 by one of several; lock.0 by its first worker)
    errors.jsonl        failed images and reasons, written when a run ends

A line is synced before the output of its image is written. So all output can be written again, byte for byte.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from blip2.collection.part import Part, line_of, result_of, sound
from blip2.collection.record import FAILED, SUCCESS, Result, Unit
from blip2.disk import digest_of, locked, write_text, written
from blip2.errors import CollectionError, option, setting

VERSION = 1
WHOLE = "lock-whole"
HANDOVER_S = 10.0
"""Wait for a worker that is ending, before another one takes its place."""
FOUND = "found"
"""The key of the request that holds what `Journal.agree` compares."""
OUTPUT, UNFINISHED = "output", "unfinished"
PER_IMAGE = "sidecar", "xmp", "embed"
"""Output options whose files are also read as existing texts."""


class Journal:
    """The folder of an output. Call `begin` first. Results are added by one thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._units = folder / "units"
        self._path = folder / "run.json"
        self._own = ""
        """The lock held by this process."""

    # ---- locks ----

    @contextmanager
    def held(self, shard: tuple[int, int] = (0, 1)) -> Iterator[None]:
        """While this is held, no other run works on this (part of the) output. Raises CollectionError."""
        name, total = _lock(shard), shard[1]
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.folder / name))
                self._own = name
                # Runs that divide the units differently, and workers that outlived their run.
                for other in self.folder.glob("lock*"):
                    part = other.name.partition(".")[0]
                    is_apart = total > 1 and part != name and part.endswith(f"-of-{total}")
                    if other.name not in (name, WHOLE) and not is_apart:
                        with _patiently(other) if "." in other.name else locked(other):
                            pass
            except BlockingIOError:
                raise CollectionError(f"{self.folder.parent}: another run is writing it; wait until it ends") from None
            except OSError as error:
                reason = error.strerror or error
                raise CollectionError(f"{self.folder}: cannot be written ({reason}); check its permissions") from None
            yield

    @contextmanager
    def helped(self, shard: tuple[int, int], number: int) -> Iterator[None]:
        """While this is held, a worker works for a run that holds this part; no other run begins before it ends. Raises
        CollectionError, OSError."""
        with ExitStack() as stack:
            try:
                stack.enter_context(_patiently(self.folder / f"{_lock(shard)}.{number}"))
            except BlockingIOError:
                reason = "an abandoned worker is still running; end it"
                raise CollectionError(f"{self.folder.parent}: {reason}") from None
            yield

    @contextmanager
    def assembling(self) -> Iterator[bool]:
        """While this is held, no other run writes the outputs of all units. False if one does, from the same
        results."""
        try:
            with locked(self.folder / WHOLE):
                yield True
        except BlockingIOError:
            yield False

    # ---- the request ----

    def begin(self, asked: Mapping[str, Any], *, restart: bool = False, is_made: bool = False) -> None:
        """Resume the run of the same request, or begin one. Raises CollectionError if another request is recorded,
        unless it has no results.

        ``is_made``: the output is that of an earlier run; this is remembered after a ``restart``, too.
        """
        before = self.written
        is_new = restart or self._has_no_results()
        if restart or (is_new and self._changed(asked)):
            shutil.rmtree(self._units, ignore_errors=True)
        if is_new:  # also drops what `agree` recorded
            self._path.unlink(missing_ok=True)
        self.compare(asked)
        self._units.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            found = {FOUND: {OUTPUT: before}} if before and is_made else {}
            self._write({"version": VERSION, **asked, **found})

    def compare(self, asked: Mapping[str, Any]) -> None:
        """Raises CollectionError if the recorded request is another one. Changes nothing.

        ``asked``: names of options, or other keys, with JSON values.
        """
        if (changed := self._changed(asked)) and not self._has_no_results():
            self._refuse(changed, keeps_texts=asked.get("if_exists") == "skip" and any(map(asked.get, PER_IMAGE)))

    def _changed(self, asked: Mapping[str, Any]) -> list[str]:
        """The differences to the recorded request, one text each."""
        if not (before := self._asked()):
            return []
        wanted = json.loads(json.dumps({"version": VERSION, **asked}))
        return [
            _difference(name, before.get(name), wanted.get(name))
            for name in {**before, **wanted}
            if name != FOUND and before.get(name) != wanted.get(name)
        ]

    def _has_no_results(self) -> bool:
        """Whether the recorded run has no results, for example because its model could not be loaded, and is not
        running."""
        done, parts = self._units.glob("*.jsonl"), self._units.glob("*.part")
        if any(_head(path).get("statuses", {}).get(SUCCESS) for path in done):
            return False
        if any(result.status == SUCCESS for path in parts for result in sound(path)):
            return False
        try:
            for other in self.folder.glob("lock*"):
                if other.name != self._own:
                    with locked(other):
                        pass
        except OSError:  # held by another process, or no permission
            return False
        return True

    def agree(self, name: str, value: str) -> None:
        """As `compare`, for a value known only once a model is loaded. Recorded if there is none yet."""
        found = self._asked().get(FOUND, {})
        if found.get(name, value) != value:
            self._refuse([_difference(name, found[name], value)])
        if name not in found:
            self._find(name, value)

    @property
    def written(self) -> str:
        """The digest of the output file when it was written; "" if it was not, `UNFINISHED` while it is being
        written."""
        with suppress(CollectionError):
            return str(self._asked().get(FOUND, {}).get(OUTPUT, ""))
        return ""

    @contextmanager
    def writing(self, output: str) -> Iterator[None]:
        """Marks the output of all units as being written."""
        self._find(OUTPUT, UNFINISHED)
        yield
        if digest := digest_of(output):
            self._find(OUTPUT, digest)

    def _find(self, name: str, value: str) -> None:
        asked = self._asked()
        self._write({**asked, FOUND: {**asked.get(FOUND, {}), name: value}})

    def _asked(self) -> dict[str, Any]:
        """The recorded request; empty if there is none."""
        with suppress(FileNotFoundError, NotADirectoryError):
            with suppress(ValueError):
                if isinstance(found := json.loads(self._path.read_text("utf-8")), dict):
                    return found
            raise CollectionError(f"{self._path}: is damaged; {setting('restart', True)} to start again")
        return {}

    def _write(self, asked: Mapping[str, Any]) -> None:
        write_text(self._path, json.dumps(asked, indent=1, ensure_ascii=False))

    def _refuse(self, differences: Iterable[str], *, keeps_texts: bool = False) -> NoReturn:
        """``keeps_texts``: a restart would keep texts that the earlier command wrote beside the images."""
        overwriting = f" and {setting('if_exists', 'overwrite')}" if keeps_texts else ""
        raise CollectionError(
            f"{self.folder.parent}: was started by another command ({'; '.join(differences)}); give the same options, "
            f"another output, or {setting('restart', True)}{overwriting} to start again"
        )

    # ---- units ----

    def stamp_of(self, unit: Unit) -> str | None:
        """The stamp of a finished unit; None if it is not finished."""
        return _head(self._done(unit)).get("stamp")

    def statuses(self, unit: Unit) -> Counter[str]:
        """The number of images per status; empty if the unit is not finished."""
        return Counter(_head(self._done(unit)).get("statuses"))

    def results(self, unit: Unit) -> Iterator[Result]:
        """The results of a finished unit."""
        with open(self._done(unit), encoding="utf-8") as file:
            next(file)
            yield from map(result_of, file)

    def earlier(self, without: Container[str] = ()) -> Iterator[Result]:
        """All known results, of any unit except the named ones. An image may occur twice."""
        for path in sorted(self._units.glob("*")):
            if path.stem not in without:
                yield from sound(path)

    def so_far(self, unit: Unit) -> Iterator[Result]:
        """The results of a unit that may be unfinished, the newest of each image."""
        if not (part := {result.key: result for result in sound(self._part(unit))}):
            return sound(self._done(unit))
        older = {result.key: result for result in sound(self._done(unit))}
        return iter({**part, **older, **part}.values())

    def begun(self, unit: Unit) -> set[tuple[str, str]]:
        """Keys and stamps of the results of an unfinished unit."""
        return {(result.key, result.stamp) for result in sound(self._part(unit))}

    def part(self, unit: Unit) -> Part:
        return Part(self._part(unit))

    def finish(self, unit: Unit, stamp: str, results: Sequence[Result]) -> None:
        """Record that the unit is finished and its outputs are written."""
        statuses = Counter(result.status for result in results)
        with (
            written(self._done(unit), self._units / f"{unit.name}.writing") as unfinished,
            open(unfinished, "w", encoding="utf-8", newline="\n") as file,
        ):
            file.write(json.dumps({"stamp": stamp, "statuses": statuses}) + "\n")
            file.writelines(line_of(result) for result in results)
        with suppress(FileNotFoundError):
            self._part(unit).unlink()

    def forget_beyond(self, number: int) -> None:
        """Delete results of units that the source no longer has."""
        for path in self._units.iterdir():
            if re.fullmatch(r"\d{6}", path.stem) and int(path.stem) >= number:
                path.unlink()

    def write_errors(self, units: Iterable[Unit]) -> None:
        """Write the failures of these units into `errors`; delete the file if there are none."""
        some = [unit for unit in units if not (statuses := self.statuses(unit)) or statuses[FAILED]]
        failed = [result for unit in some for result in self.so_far(unit) if result.status == FAILED]
        lines = (
            json.dumps({"key": result.key, "name": result.name, "error_message": result.error_message}) + "\n"
            for result in failed
        )
        if failed:
            write_text(self.errors, "".join(lines))
        else:
            self.errors.unlink(missing_ok=True)

    @property
    def errors(self) -> Path:
        return self.folder / "errors.jsonl"

    def _done(self, unit: Unit) -> Path:
        return self._units / f"{unit.name}.jsonl"

    def _part(self, unit: Unit) -> Path:
        return self._units / f"{unit.name}.part"


@contextmanager
def _patiently(path: Path) -> Iterator[None]:
    """As `locked`, but waits for a holder that is about to release the lock."""
    end_s = time.monotonic() + HANDOVER_S
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(path))
                break
            except BlockingIOError:
                if time.monotonic() > end_s:
                    raise
                time.sleep(0.1)
        yield


def _head(path: Path) -> dict[str, Any]:
    """The first line of a finished unit; empty if it is not finished."""
    with suppress(OSError, ValueError, StopIteration), open(path, encoding="utf-8") as file:
        return dict(json.loads(next(file)))
    return {}


def _lock(shard: tuple[int, int]) -> str:
    number, total = shard
    return "lock" if total == 1 else f"lock-{number + 1}-of-{total}"


def _difference(name: str, before: object, now: object) -> str:
    return f"{option(name)} was {_short(before)} and is {_short(now)}"


def _short(value: object) -> str:
    text = "not given" if value in (None, "", [], False) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def beside(output: str | os.PathLike[str]) -> Path:
    """The journal's path for an output: hidden within a folder, or beside a file."""
    path = Path(output)
    return path / ".blip2" if is_folder(output) else path.with_name(f".{path.name}.blip2")


def is_folder(output: str | os.PathLike[str]) -> bool:
    """Whether an output is a folder (it may not exist): it has no suffix, or ends with "/"."""
    text = os.fspath(output)
    return Path(text).is_dir() or not Path(text).suffix or text.endswith(("/", os.sep))
