"""A run that notes each batch before the model says a word about it; `test_kills` kills it.

    python killed_run.py NOTES SOURCE OUTPUT-OPTIONS-AS-JSON [BATCH-SIZE] [names|miniature]

``names``: the model is a function of names; ``miniature``: the bundled one. When it ends, NOTES.memory has lines of
images that were done by then and the peak of memory in KiB, where the system tells that.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from blip2.collection import run
from blip2.collection.feed import Feed
from blip2.collection.record import Record, Result
from blip2.collection.request import Request, planned
from blip2.collection.run import Outcome
from blip2.collection.summary import Summary

MEASURED_AT = 2_000


def note(notes: str, batch: Sequence[Record]) -> None:
    with open(notes, "a", encoding="utf-8") as file:
        file.write("".join(f"{record.key}\n" for record in batch))


def by_names(notes: str, source: str, options: dict[str, Any], batch_size: int, told: Callable) -> None:
    def work(records: Feed) -> Iterator[Outcome]:
        while batch := records.batch(batch_size):
            note(notes, batch)
            time.sleep(0.0025 * len(batch))
            for record in batch:  # what it says depends on its company, as a model's last digits do
                words = f"a {record.key.rpartition('/')[2]} of {len(batch)} from {batch[0].key.rpartition('/')[2]}"
                yield Outcome([words, "two"], [-0.5, -1.0], [4, 2])

    with planned(Request.of([source], options)).begun() as job:
        run(job, work, told)


def by_miniature(notes: str, source: str, options: dict[str, Any], batch_size: int, told: Callable) -> None:
    from blip2.api import work
    from blip2.api.collect import captioning

    in_batches = work.in_batches

    def noted(frontend: Any, task: Callable, *others: Any, **named: Any) -> Any:
        def noting(pictures: Sequence[Any], records: Sequence[Record]) -> Any:
            note(notes, records)
            return task(pictures, records)

        return in_batches(frontend, noting, *others, **named)

    work.in_batches = noted
    captioning(source, num_beams=1, max_new_tokens=12, batch_size=batch_size, **options).run(told)


class Memory:
    """The peak of this process, when so many images were done and at the end."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def description(self, summary: Summary, results: Sequence[Result]) -> None:
        if not self.lines and summary.settled >= MEASURED_AT:
            self.note(summary.settled)

    def note(self, number: int | str) -> None:
        with suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
            peak = next(line.split()[1] for line in file if line.startswith("VmHWM"))
            self.lines.append(f"{number} {peak}\n")


def main(notes: str, source: str, options: str, batch_size: str = "8", model: str = "names") -> None:
    memory = Memory()
    begin = by_miniature if model == "miniature" else by_names
    begin(notes, source, json.loads(options), int(batch_size), memory.description)
    memory.note("all")
    with open(f"{notes}.memory", "w", encoding="ascii") as file:
        file.writelines(memory.lines)


if __name__ == "__main__":
    main(*sys.argv[1:])
