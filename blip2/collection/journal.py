"""What a run has done so far, in a hidden folder beside its output: the same command goes on, another one is told so.

    run.json            what was asked for: model, options, source, output
    units/000012.jsonl  a unit that is done: its stamp, then a result a line, in the order of its records
    units/000012.part   a unit that is being done: the results so far; a torn last line is dropped
    lock                held by the run that is at work (lock-3-of-16 by one of several)

A line is on its way to the disk before the output of its picture is written, so that what is written can always be
written once more, the same to the last byte.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from blip2.collection.record import FAILED, Result, Unit
from blip2.disk import locked, write_text, written
from blip2.errors import CollectionError

VERSION = 1
NEEDED = ("key", "stamp", "status")
"""Of a result, also where they are empty: what is not there has no stamp."""


class Journal:
    """The folder of an output. `begin` before anything else; results are added by one thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._units = folder / "units"

    # ---- who is at work ----

    @contextmanager
    def held(self, shard: tuple[int, int] = (0, 1)) -> Iterator[None]:
        """Within, no other run works on this (part of the) output. Raises CollectionError."""
        number, total = shard
        name = "lock" if total == 1 else f"lock-{number}-of-{total}"
        try:
            with locked(self.folder / name):
                yield
        except BlockingIOError:
            raise CollectionError(f"{self.folder.parent}: another run is at work on it; wait for its end") from None
        except PermissionError as error:
            raise CollectionError(f"{error.filename}: cannot be written ({error.strerror}); check its rights") from None

    @contextmanager
    def assembling(self) -> Iterator[bool]:
        """Within, no other run writes the outputs of all units; False if one is at it, from the same results."""
        try:
            with locked(self.folder / "lock-whole"):
                yield True
        except BlockingIOError:
            yield False

    # ---- what was asked ----

    def begin(self, asked: Mapping[str, Any], *, restart: bool = False) -> None:
        """Go on with a run that was asked the same, or begin one. Raises CollectionError for another one."""
        path = self.folder / "run.json"
        wanted = json.loads(json.dumps({"version": VERSION, **asked}))
        if restart:
            shutil.rmtree(self._units, ignore_errors=True)
            path.unlink(missing_ok=True)
        self._units.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            try:
                before = json.loads(path.read_text("utf-8"))
            except ValueError:
                raise CollectionError(f"{path}: is damaged; add --restart to begin anew") from None
            if changed := [name for name in {**before, **wanted} if before.get(name) != wanted.get(name)]:
                differences = "; ".join(
                    f"{name} was {_short(before.get(name))} and is {_short(wanted.get(name))}" for name in changed
                )
                raise CollectionError(
                    f"{self.folder.parent}: was begun by another command ({differences}); give the same again, "
                    "another output, or --restart to do all anew"
                )
            return
        write_text(path, json.dumps(wanted, indent=1, ensure_ascii=False))

    # ---- units ----

    def stamp_of(self, unit: Unit) -> str | None:
        """That of a unit that is done, as it was then; None if it is not done."""
        with suppress(OSError, ValueError, KeyError, StopIteration):
            with open(self._done(unit), encoding="utf-8") as file:
                return str(json.loads(next(file))["stamp"])
        return None

    def results(self, unit: Unit) -> Iterator[Result]:
        """Of a unit that is done."""
        with open(self._done(unit), encoding="utf-8") as file:
            next(file)
            yield from map(_result, file)

    def earlier(self) -> Iterator[Result]:
        """All that is known, of whatever unit; a picture may come twice."""
        for path in sorted(self._units.iterdir()):
            with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
                for line in file:
                    with suppress(ValueError, TypeError):  # torn
                        if line.endswith("\n") and "key" in (found := json.loads(line)):
                            yield Result(**found)

    def part(self, unit: Unit) -> Part:
        return Part(self._units / f"{unit.name}.part")

    def finish(self, unit: Unit, stamp: str, results: Iterable[Result]) -> None:
        """The unit is done, and its outputs are written."""
        path = self._done(unit)
        with written(path, self._units / f"{unit.name}.writing") as unfinished:
            with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps({"stamp": stamp}) + "\n")
                file.writelines(_line(result) for result in results)
        with suppress(FileNotFoundError):
            (self._units / f"{unit.name}.part").unlink()

    def forget_beyond(self, number: int) -> None:
        """What is known of units that the source does not have any more."""
        for path in self._units.iterdir():
            if re.fullmatch(r"\d{6}", path.stem) and int(path.stem) >= number:
                path.unlink()

    def num_failed(self, unit: Unit) -> int:
        return sum(result.status == FAILED for result in self.results(unit))

    def _done(self, unit: Unit) -> Path:
        return self._units / f"{unit.name}.jsonl"


class Part:
    """The results of a unit that is being done."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def add(self, results: Iterable[Result]) -> None:
        """Raises OSError where there is no room."""
        if self._file is None:
            self._drop_torn()
            self._file = open(self._path, "a", encoding="utf-8", newline="\n")
        self._file.writelines(_line(result) for result in results)
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _drop_torn(self) -> None:
        with suppress(FileNotFoundError), open(self._path, "rb+") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)


def _line(result: Result) -> str:
    told = {
        name: value for name, value in asdict(result).items() if name in NEEDED or value not in ("", (), [], {}, 0)
    }
    return json.dumps(told) + "\n"


def _result(line: str) -> Result:
    return Result(**json.loads(line))


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False) if value is not None else "not given"
    return text if len(text) <= 60 else f"{text[:57]}..."


def beside(output: str | os.PathLike[str]) -> Path:
    """Where the journal of an output lies: hidden within a folder, or beside a file."""
    path = Path(output)
    return path / ".blip2" if is_folder(output) else path.with_name(f".{path.name}.blip2")


def is_folder(output: str | os.PathLike[str]) -> bool:
    """Whether an output is a folder, which may not be there yet: one without a suffix, or with a "/" at its end."""
    text = os.fspath(output)
    return Path(text).is_dir() or not Path(text).suffix or text.endswith(("/", os.sep))
