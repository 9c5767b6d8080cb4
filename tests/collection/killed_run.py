"""A run whose model is a function of names and notes each batch that it begins; `test_kills` kills it.

    python killed_run.py NOTES SOURCE OUTPUT-OPTIONS-AS-JSON [BATCH-SIZE]
"""

import json
import sys
import time
from collections.abc import Iterator
from itertools import islice

from blip2.collection import Record, run
from blip2.collection.request import Request, planned
from blip2.collection.run import Outcome


def main(notes: str, source: str, options: str, batch_size: str = "8") -> None:
    def work(records: Iterator[Record]) -> Iterator[Outcome]:
        while batch := list(islice(records, int(batch_size))):
            with open(notes, "a", encoding="utf-8") as file:
                file.write("".join(f"{record.key}\n" for record in batch))
            time.sleep(0.0025 * len(batch))
            for record in batch:
                yield Outcome([f"a {record.key.rpartition('/')[2]}", "two"], [-0.5, -1.0], [4, 2])

    with planned(Request.of([source], json.loads(options))).begun() as job:
        run(job, work)


if __name__ == "__main__":
    main(*sys.argv[1:])
