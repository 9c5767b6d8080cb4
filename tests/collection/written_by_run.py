"""A run whose model is a function of names, for the tests of outputs."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from blip2.collection import Job, Journal, Record, run
from blip2.collection.record import Unit
from blip2.collection.run import Outcome
from blip2.collection.sinks import Outputs, View, open_beside, open_sinks
from blip2.collection.sources.files import Files
from blip2.collection.wording import Wording
from blip2.errors import ImageError


def drawn(folder: Path, *names: str, size: tuple[int, int] = (8, 6)) -> list[str]:
    """Pictures of these names, each of a colour of its own."""
    formats = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (40 * number % 256, 90, 200)).save(path, formats[path.suffix.lower()])
    return [str(folder / name) for name in names]


class Listed:
    """A source of records that are there already, in units of ``size``."""

    def __init__(self, records: Sequence[Record], size: int = 100) -> None:
        self._records = records
        self.units = [
            Unit(number, "", start, start + size) for number, start in enumerate(range(0, len(records), size))
        ]
        self.num_records = len(records)

    def stamp(self, unit: Unit) -> str:
        return "1"

    def records(self, unit: Unit) -> Iterator[Record]:
        yield from self._records[unit.start : unit.stop]

    def description(self) -> dict:
        return {}


def said(record: Record) -> Outcome | ImageError:
    if "bad" in record.key:
        return ImageError(f"{record.name}: damaged")
    return Outcome([f"a {Path(record.key).name}"], [-0.5], [4])


def said_twice(record: Record) -> Outcome:
    return Outcome([f"a {Path(record.key).name}", "two"], [-0.5, -1.0], [4, 2])


def captioned(
    source,
    outputs: Outputs,
    work: Callable[[Record], "Outcome | ImageError"] = said,
    journal: Path | None = None,
    **wording,
):
    """The sinks, when all is written. ``source``: one, or the paths of images."""
    beside = open_beside(outputs)
    if isinstance(source, list):
        source = Files(source, root=str(Path(source[0]).parent))
    source = View(source, beside)
    words = Wording(**wording)
    sinks = open_sinks(outputs, source, beside)
    kept = Journal(journal or Path(f"{outputs.output or source.root}.journal"))
    kept.begin({})
    run(Job(source, sinks, kept, words, {}, skips=words.if_exists == "skip"), lambda records: map(work, records))
    return sinks
